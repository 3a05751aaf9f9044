// The client: starts the helper, keeps it alive and streams from it.

import Foundation

/// A helper process and who watches it. Everything may be called from any task.
public actor MixtralHelper {
    /// What to start. In a bundled app the Python in its Resources, with `-I -B -m mixtral_mlx helper`.
    public struct Launch: Sendable {
        public var executable: URL
        public var arguments: [String]
        public var environment: [String: String]?

        public init(executable: URL, arguments: [String], environment: [String: String]? = nil) {
            self.executable = executable
            self.arguments = arguments
            self.environment = environment
        }
    }

    /// What nobody asked for: changes of state, a model's progress after a restart, lines of the helper's log.
    public enum Notice: Sendable {
        case supervision(Supervision.State)
        case message(Message)
        case log(String)
    }

    /// Everything nobody asked for, from the beginning; to be read by one task.
    public nonisolated let notices: AsyncStream<Notice>

    private let tell: AsyncStream<Notice>.Continuation
    private let launch: Launch
    private var supervision = Supervision()
    private var running: Running?
    private var requests: [String: AsyncThrowingStream<Message, Error>.Continuation] = [:]
    private var lastID = 0
    private var lastLoad: (model: String, options: LoadOptions)?
    private var startWaiters: [CheckedContinuation<Void, Error>] = []
    private var stopWaiters: [CheckedContinuation<Void, Never>] = []
    private var restart: Task<Void, Never>?

    public init(_ launch: Launch) {
        self.launch = launch
        (notices, tell) = AsyncStream.makeStream(of: Notice.self, bufferingPolicy: .bufferingNewest(1000))
    }

    // MARK: Life

    /// Start it; returns once it has said hello. Throws where it cannot start.
    public func start() async throws {
        if supervision.state == .running { return }
        try await withCheckedThrowingContinuation { continuation in
            startWaiters.append(continuation)
            handle(.start)
        }
    }

    /// End it; returns once the process is gone.
    public func stop() async {
        handle(.stop)
        restart?.cancel()
        if running == nil { return }
        await withCheckedContinuation { stopWaiters.append($0) }
    }

    // MARK: Asking

    /// Bring a model into memory; after a restart it comes back by itself.
    public func load(
        model: String, options: LoadOptions = LoadOptions(), onProgress: (@Sendable (Loading) -> Void)? = nil
    ) async throws -> Ready {
        lastLoad = (model, options)
        for try await message in ask({ .load(id: $0, model: model, options: options) }) {
            if case .loading(let progress) = message { onProgress?(progress) }
            if case .ready(let ready) = message { return ready }
        }
        throw CancellationError()
    }

    /// The messages of an answer, the last of them `done`. To stop reading cancels it.
    public func chat(_ body: ChatBody) -> AsyncThrowingStream<Message, Error> {
        ask { .chat(id: $0, body: body) }
    }

    public func stats() async throws -> Stats {
        for try await message in ask({ .stats(id: $0) }) {
            if case .stats(let stats) = message { return stats }
        }
        throw CancellationError()
    }

    public func unload() async throws {
        lastLoad = nil
        for try await _ in ask({ .unload(id: $0) }) {}
    }

    public func memoryPressure(_ level: PressureLevel) async throws {
        for try await _ in ask({ .memoryPressure(id: $0, level: level) }) {}
    }

    private func ask(_ command: (String) -> Command) -> AsyncThrowingStream<Message, Error> {
        lastID += 1
        let id = String(lastID)
        let (stream, continuation) = AsyncThrowingStream<Message, Error>.makeStream()
        guard let running, supervision.state == .running, let line = try? command(id).line() else {
            continuation.finish(
                throwing: HelperError(code: "helper_gone", message: "The helper is not running.", retryable: true))
            return stream
        }
        requests[id] = continuation
        continuation.onTermination = { [weak self] reason in
            guard case .cancelled = reason else { return }
            Task { [weak self] in await self?.cancel(id) }
        }
        running.write(line)
        return stream
    }

    private func cancel(_ id: String) {
        guard requests[id] != nil else { return }
        lastID += 1
        if let line = try? Command.cancel(id: String(lastID), request: id).line() {
            running?.write(line)
        }
    }

    // MARK: What happens

    private func handle(_ event: Supervision.Event) {
        let before = supervision.state
        for action in supervision.handle(event) {
            perform(action)
        }
        guard supervision.state != before else { return }
        tell.yield(.supervision(supervision.state))
        switch supervision.state {
        case .running:
            settleStart(.success(()))
        case .failed(let reason):
            settleStart(.failure(HelperError(code: "helper_gone", message: reason)))
        case .stopped, .waiting:
            settleStart(.failure(CancellationError()))
        case .starting, .stopping:
            break
        }
    }

    private func settleStart(_ result: Result<Void, Error>) {
        let waiters = startWaiters
        startWaiters = []
        waiters.forEach { $0.resume(with: result) }
    }

    private func perform(_ action: Supervision.Action) {
        switch action {
        case .launch:
            launchProcess()
        case .restoreModel:
            if let lastLoad { restore(lastLoad.model, lastLoad.options) }
        case .failRequests(let error):
            let failed = requests
            requests = [:]
            failed.values.forEach { $0.finish(throwing: error) }
        case .wait(let seconds):
            restart = Task { [weak self] in
                try? await Task.sleep(nanoseconds: UInt64(seconds * 1_000_000_000))
                if !Task.isCancelled { await self?.handle(.waited) }
            }
        case .shutDown:
            lastID += 1
            if let line = try? Command.shutdown(id: String(lastID)).line() { running?.write(line) }
            running?.end(killAfter: Supervision.stopWithin)
        case .terminate:
            running?.process.terminate()
        }
    }

    private func restore(_ model: String, _ options: LoadOptions) {
        let messages = ask { .load(id: $0, model: model, options: options) }
        Task { [tell] in
            do {
                for try await message in messages { tell.yield(.message(message)) }
            } catch let error as HelperError {
                tell.yield(.message(.error(error)))
            } catch {}
        }
    }

    private func launchProcess() {
        do {
            let running = try Running(launch)
            self.running = running
            Task { await self.read(running) }
            Task { [tell] in
                // Who does not read a child's stderr stops the child, sooner or later.
                for await line in running.log { tell.yield(.log(line)) }
            }
        } catch {
            let reason = "\(launch.executable.path) cannot be started: \(error.localizedDescription)"
            // Only once this event has been dealt with.
            Task { self.handle(.couldNotStart(reason)) }
        }
    }

    private func read(_ running: Running) async {
        let decoder = JSONDecoder()
        for await line in running.lines {
            do {
                take(try decoder.decode(Message.self, from: line))
            } catch {
                tell.yield(.log("A line was not understood: \(error)"))
            }
        }
        let end = await running.ended()
        self.running = nil
        handle(.ended(code: end.code, bySignal: end.bySignal, livedFor: end.livedFor))
        let waiters = stopWaiters
        stopWaiters = []
        waiters.forEach { $0.resume() }
    }

    private func take(_ message: Message) {
        if case .hello(let hello) = message {
            handle(.hello(protocolVersion: hello.protocol))
        }
        guard let id = message.id, let continuation = requests[id] else {
            if message.id == nil { tell.yield(.message(message)) }
            return
        }
        if case .error(let error) = message {
            requests[id] = nil
            continuation.finish(throwing: error)
            return
        }
        continuation.yield(message)
        if message.isEnd {
            requests[id] = nil
            continuation.finish()
        }
    }
}

/// One process and its pipes.
private final class Running: @unchecked Sendable {
    struct End: Sendable {
        var code: Int32
        var bySignal: Bool
        var livedFor: TimeInterval
    }

    let process = Process()
    let lines: AsyncStream<Data>
    let log: AsyncStream<String>

    private let input = Pipe()
    private let began = Date()
    private let ends: AsyncStream<End>
    /// A pipe that is full makes its writer wait, which no task may.
    private let writing = DispatchQueue(label: "MixtralKit.writing")

    init(_ launch: MixtralHelper.Launch) throws {
        // A write to a child that has died must be an error, not the end of the app.
        signal(SIGPIPE, SIG_IGN)
        let output = Pipe()
        let errors = Pipe()
        process.executableURL = launch.executable
        process.arguments = launch.arguments + ["--parent-pid", String(ProcessInfo.processInfo.processIdentifier)]
        if let environment = launch.environment { process.environment = environment }
        process.standardInput = input
        process.standardOutput = output
        process.standardError = errors
        lines = Self.linesOf(output.fileHandleForReading)
        let logged = Self.linesOf(errors.fileHandleForReading)
        log = AsyncStream { continuation in
            let task = Task {
                for await line in logged { continuation.yield(String(decoding: line, as: UTF8.self)) }
                continuation.finish()
            }
            continuation.onTermination = { _ in task.cancel() }
        }
        let (ends, end) = AsyncStream<End>.makeStream()
        self.ends = ends
        let began = self.began
        process.terminationHandler = { process in
            end.yield(
                End(
                    code: process.terminationStatus,
                    bySignal: process.terminationReason == .uncaughtSignal,
                    livedFor: Date().timeIntervalSince(began)
                ))
            end.finish()
        }
        try process.run()
    }

    func write(_ line: Data) {
        let handle = input.fileHandleForWriting
        writing.async {
            // It has gone; its end is noticed elsewhere.
            try? handle.write(contentsOf: line)
        }
    }

    /// Close its stdin, which ends it too, and make sure that it goes.
    func end(killAfter seconds: TimeInterval) {
        let handle = input.fileHandleForWriting
        writing.async { try? handle.close() }
        let process = self.process
        DispatchQueue.global().asyncAfter(deadline: .now() + seconds) {
            if process.isRunning { kill(process.processIdentifier, SIGKILL) }
        }
    }

    func ended() async -> End {
        for await end in ends { return end }
        return End(code: -1, bySignal: false, livedFor: 0)
    }

    private static func linesOf(_ handle: FileHandle) -> AsyncStream<Data> {
        AsyncStream { continuation in
            let buffer = Buffer()
            handle.readabilityHandler = { handle in
                let data = handle.availableData
                if data.isEmpty {
                    handle.readabilityHandler = nil
                    continuation.finish()
                    return
                }
                buffer.add(data).forEach { continuation.yield($0) }
            }
        }
    }

    /// Handlers of one file handle are called one after another.
    private final class Buffer: @unchecked Sendable {
        private var lines = LineBuffer()

        func add(_ data: Data) -> [Data] {
            lines.add(data)
        }
    }
}
