// What the window shows: a conversation, and how the helper is.

import AppKit
import Dispatch
import MixtralKit
import Observation

struct Turn: Identifiable {
    let id = UUID()
    let role: String
    var content: String
}

@MainActor @Observable
final class ChatModel {
    private(set) var turns: [Turn] = []
    private(set) var status = "Starting"
    private(set) var isReady = false
    var draft = ""

    private var answer: Task<Void, Never>?
    private let helper = MixtralHelper(Bundled.launch)
    private var pressure: (any DispatchSourceMemoryPressure)?

    var isAnswering: Bool { answer != nil }
    var canSend: Bool { isReady && !isAnswering && !draft.trimmingCharacters(in: .whitespacesAndNewlines).isEmpty }

    /// Start the helper and load a model; follow what happens for as long as the window is there.
    func run() async {
        watchMemory()
        stopBeforeQuitting()
        let loading = Task { await self.startAndLoad() }
        for await notice in helper.notices {
            show(notice)
        }
        loading.cancel()
    }

    func send() {
        guard canSend else { return }
        turns.append(Turn(role: "user", content: draft))
        draft = ""
        let messages = turns.map { ChatMessage(role: $0.role, content: $0.content) }
        turns.append(Turn(role: "assistant", content: ""))
        answer = Task {
            await read(messages)
            answer = nil
        }
    }

    func stopAnswering() {
        answer?.cancel()
    }

    private func startAndLoad() async {
        do {
            try await helper.start()
            let ready = try await helper.load(
                model: Bundled.model,
                options: LoadOptions(idleUnloadSeconds: 600),
                onProgress: { progress in
                    let percent = 100 * progress.doneBytes / max(progress.totalBytes, 1)
                    let doing = progress.phase == "fetching" ? "Fetching" : "Loading"
                    Task { @MainActor in self.status = "\(doing) \(percent) %" }
                }
            )
            status = ready.model
            isReady = true
        } catch {
            status = error.localizedDescription
        }
    }

    private func read(_ messages: [ChatMessage]) async {
        do {
            for try await message in await helper.chat(ChatBody(messages: messages)) {
                if case .text(let delta) = message { turns[turns.count - 1].content += delta.text }
            }
        } catch {
            status = error.localizedDescription
        }
        if turns.last?.content.isEmpty == true {
            turns.removeLast(2)  // A question without an answer is not part of the conversation.
        }
    }

    private func show(_ notice: MixtralHelper.Notice) {
        switch notice {
        case .supervision(.waiting):
            isReady = false
            status = "The helper has died and is started again"
        case .supervision(.failed(let reason)):
            isReady = false
            status = reason
        case .message(.ready(let ready)):
            isReady = true
            status = ready.model
        case .message(.state(let state)):
            status = state.state
        case .log(let line):
            NSLog("helper: %@", line)
        default:
            break
        }
    }

    /// macOS tells an app how short memory is; the helper is told in turn.
    private func watchMemory() {
        let source = DispatchSource.makeMemoryPressureSource(eventMask: [.normal, .warning, .critical], queue: .main)
        source.setEventHandler { [helper] in
            let level: PressureLevel =
                source.data.contains(.critical) ? .critical : source.data.contains(.warning) ? .warning : .normal
            Task { try? await helper.memoryPressure(level) }
        }
        source.resume()
        pressure = source
    }

    private func stopBeforeQuitting() {
        NotificationCenter.default.addObserver(
            forName: NSApplication.willTerminateNotification, object: nil, queue: nil
        ) { [helper] _ in
            // Quitting closes the helper's stdin, which ends it too; this only lets it end its answers.
            let done = DispatchSemaphore(value: 0)
            Task.detached {
                await helper.stop()
                done.signal()
            }
            _ = done.wait(timeout: .now() + Supervision.stopWithin)
        }
    }
}

/// Where things lie: the interpreter in the bundle, or what the environment names while developing.
enum Bundled {
    static var launch: MixtralHelper.Launch {
        if let program = ProcessInfo.processInfo.environment["MIXTRAL_MLX"] {
            return MixtralHelper.Launch(executable: URL(fileURLWithPath: program), arguments: ["helper"])
        }
        let python = Bundle.main.resourceURL!.appendingPathComponent("python/bin/python3")
        // -I: nothing of the user's Python comes in. The bundle is signed, so nothing may be written into it.
        return MixtralHelper.Launch(
            executable: python,
            arguments: ["-I", "-B", "-m", "mixtral_mlx", "helper"],
            environment: ["PATH": "/usr/bin:/bin", "HOME": NSHomeDirectory(), "TMPDIR": NSTemporaryDirectory()]
        )
    }

    static var model: String {
        if let model = ProcessInfo.processInfo.environment["MODEL"] { return model }
        let support = FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask)[0]
        let folder = support.appendingPathComponent("MixtralApp/Models/mixtral-q4")
        return FileManager.default.fileExists(atPath: folder.path) ? folder.path : "demo"
    }
}
