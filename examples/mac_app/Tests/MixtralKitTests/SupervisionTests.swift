import XCTest

@testable import MixtralKit

final class SupervisionTests: XCTestCase {
    private func running() -> Supervision {
        var supervision = Supervision()
        XCTAssertEqual(supervision.handle(.start), [.launch])
        XCTAssertEqual(supervision.handle(.hello(protocolVersion: protocolVersion)), [])
        XCTAssertEqual(supervision.state, .running)
        return supervision
    }

    private func killed(_ livedFor: Double = 1) -> Supervision.Event {
        .ended(code: 9, bySignal: true, livedFor: livedFor)
    }

    private func waits(_ actions: [Supervision.Action]) -> [Double] {
        actions.compactMap { if case .wait(let seconds) = $0 { return seconds } else { return nil } }
    }

    func testADeadHelperIsStartedAgainWithItsModelAndItsRequestsFail() {
        var supervision = running()
        let actions = supervision.handle(killed())
        guard case .failRequests(let error)? = actions.first else { return XCTFail("requests go on") }
        XCTAssertEqual(error.code, "helper_gone")
        XCTAssertTrue(error.retryable)
        XCTAssertEqual(waits(actions), [0.5])
        XCTAssertEqual(supervision.handle(.waited), [.launch])
        XCTAssertEqual(supervision.handle(.hello(protocolVersion: protocolVersion)), [.restoreModel])
    }

    func testWaitsDoubleUpToHalfAMinuteAndStartAnewAfterASteadyMinute() {
        var supervision = running()
        var seen: [Double] = []
        for _ in 1...8 {
            seen += waits(supervision.handle(killed()))
            _ = supervision.handle(.waited)
            _ = supervision.handle(.hello(protocolVersion: protocolVersion))
        }
        XCTAssertEqual(seen, [0.5, 1, 2, 4, 8, 16, 30, 30])
        XCTAssertEqual(waits(supervision.handle(killed(61))), [0.5])
    }

    func testWhatCannotStartIsGivenUpAndMayBeTriedAgain() {
        var supervision = Supervision()
        _ = supervision.handle(.start)
        _ = supervision.handle(.ended(code: 1, bySignal: false, livedFor: 0.1))
        guard case .failed = supervision.state else { return XCTFail("\(supervision.state)") }
        XCTAssertEqual(supervision.handle(.start), [.launch])
    }

    func testWrongUsageIsNotTriedAgain() {
        var supervision = running()
        XCTAssertEqual(waits(supervision.handle(.ended(code: 2, bySignal: false, livedFor: 1))), [])
        guard case .failed = supervision.state else { return XCTFail("\(supervision.state)") }
    }

    func testAnotherProtocolIsRefused() {
        var supervision = Supervision()
        _ = supervision.handle(.start)
        XCTAssertEqual(supervision.handle(.hello(protocolVersion: protocolVersion + 1)), [.terminate])
        guard case .failed = supervision.state else { return XCTFail("\(supervision.state)") }
    }

    func testAStoppedHelperIsNotStartedAgain() {
        var supervision = running()
        XCTAssertEqual(supervision.handle(.stop), [.shutDown])
        XCTAssertEqual(waits(supervision.handle(.ended(code: 0, bySignal: false, livedFor: 5))), [])
        XCTAssertEqual(supervision.state, .stopped)
        XCTAssertEqual(supervision.handle(.waited), [])
    }

    func testStoppingWhileItWaitsStartsNothing() {
        var supervision = running()
        _ = supervision.handle(killed())
        XCTAssertEqual(supervision.handle(.stop), [])
        XCTAssertEqual(supervision.handle(.waited), [])
        XCTAssertEqual(supervision.state, .stopped)
    }
}
