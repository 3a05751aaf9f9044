// When the helper is started, started again, and given up: decisions only, no process and no clock.

import Foundation

/// Keeps a helper alive. It is told what happened and answers with what is to be done.
public struct Supervision: Equatable, Sendable {
    public enum State: Equatable, Sendable {
        case stopped
        case starting
        case running
        /// It has died and is started again after a while.
        case waiting
        /// It cannot run; to start it again would be no better.
        case failed(String)
        case stopping
    }

    public enum Event: Equatable, Sendable {
        case start
        case hello(protocolVersion: Int)
        case couldNotStart(String)
        /// `code` is the exit code, or the signal's number with `bySignal`.
        case ended(code: Int32, bySignal: Bool, livedFor: TimeInterval)
        case waited
        case stop
    }

    public enum Action: Equatable, Sendable {
        case launch
        /// Load the model that was there before.
        case restoreModel
        /// Requests that were under way have failed.
        case failRequests(HelperError)
        case wait(TimeInterval)
        /// Ask it to end; kill it when it has not after `stopWithin` seconds.
        case shutDown
        case terminate
    }

    /// The helper promises to be gone in three seconds.
    public static let stopWithin: TimeInterval = 4
    /// Who has lived so long starts anew with the shortest wait.
    public static let steadyAfter: TimeInterval = 60
    private static let wrongUsage: Int32 = 2

    public private(set) var state: State = .stopped
    private var failures = 0
    private var hasRun = false

    public init() {}

    /// Seconds before a restart: from half a second, doubling, to half a minute.
    public static func backoff(afterFailures failures: Int) -> TimeInterval {
        min(0.5 * pow(2, Double(max(failures, 1) - 1)), 30)
    }

    public mutating func handle(_ event: Event) -> [Action] {
        switch (state, event) {
        case (.stopped, .start), (.failed, .start):
            failures = 0
            hasRun = false
            state = .starting
            return [.launch]
        case (.starting, .hello(let version)):
            guard version == protocolVersion else {
                state = .failed("The helper speaks protocol \(version), not \(protocolVersion).")
                return [.terminate]
            }
            state = .running
            let isRestart = hasRun
            hasRun = true
            return isRestart ? [.restoreModel] : []
        case (.starting, .couldNotStart(let reason)):
            state = .failed(reason)
            return [.failRequests(Self.gone(reason))]
        case (.starting, .ended(let code, let bySignal, let livedFor)),
            (.running, .ended(let code, let bySignal, let livedFor)):
            return ended(code: code, bySignal: bySignal, livedFor: livedFor)
        case (.waiting, .waited):
            state = .starting
            return [.launch]
        case (.starting, .stop), (.running, .stop):
            state = .stopping
            return [.shutDown]
        case (.waiting, .stop), (.failed, .stop):
            state = .stopped
            return []
        case (.stopping, .ended):
            state = .stopped
            return [.failRequests(Self.gone("The helper was stopped."))]
        case (.failed, .ended):
            return [.failRequests(Self.gone("The helper was of another version."))]
        default:
            // What comes too late: a wait that ran out after a stop, a start of what runs.
            return []
        }
    }

    private mutating func ended(code: Int32, bySignal: Bool, livedFor: TimeInterval) -> [Action] {
        let how = bySignal ? "by signal \(code)" : "with exit code \(code)"
        let gone = Self.gone("The helper has ended \(how).")
        let cannotStart = state == .starting && !hasRun
        if cannotStart || (!bySignal && code == Self.wrongUsage) {
            state = .failed(gone.message)
            return [.failRequests(gone)]
        }
        failures = livedFor > Self.steadyAfter ? 1 : failures + 1
        state = .waiting
        return [.failRequests(gone), .wait(Self.backoff(afterFailures: failures))]
    }

    private static func gone(_ message: String) -> HelperError {
        HelperError(code: "helper_gone", message: message, retryable: true)
    }
}
