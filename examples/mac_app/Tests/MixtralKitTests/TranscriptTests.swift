// A conversation with the real helper, recorded; what this client makes of it.

import Foundation
import XCTest

@testable import MixtralKit

final class TranscriptTests: XCTestCase {
    /// Each line of the file is {"to": message} or {"from": message}.
    private struct Line: Decodable {
        var from: Message?
    }

    private func transcript() throws -> [Data] {
        let url = try XCTUnwrap(
            Bundle.module.url(forResource: "transcript", withExtension: "jsonl", subdirectory: "Fixtures"))
        return try Data(contentsOf: url).split(separator: 0x0A).map { Data($0) }
    }

    private func received() throws -> [Message] {
        try transcript().compactMap { try JSONDecoder().decode(Line.self, from: $0).from }
    }

    private func sent() throws -> [[String: Any]] {
        try transcript().compactMap {
            let line = try JSONSerialization.jsonObject(with: $0) as? [String: Any]
            return line?["to"] as? [String: Any]
        }
    }

    /// The same text for the same JSON.
    private func canonical(_ object: [String: Any]) throws -> String {
        let data = try JSONSerialization.data(withJSONObject: object, options: [.sortedKeys])
        return String(decoding: data, as: UTF8.self)
    }

    func testEveryMessageIsKnown() throws {
        let messages = try received()
        XCTAssertFalse(messages.isEmpty)
        for case .unknown(let type) in messages {
            XCTFail("\(type) is not known")
        }
    }

    func testEveryKindOfMessageIsInTheTranscript() throws {
        let kinds = try received().map { String(String(describing: $0).prefix { $0 != "(" }) }
        XCTAssertEqual(
            Set(kinds),
            ["hello", "loading", "ready", "state", "prompt", "text", "toolCall", "done", "ok", "stats", "error", "bye"])
    }

    func testEveryRequestEndsOnce() throws {
        var ended: [String: Int] = [:]
        for message in try received() where message.isEnd {
            if let id = message.id { ended[id, default: 0] += 1 }
        }
        XCTAssertTrue(ended.values.allSatisfy { $0 == 1 }, "\(ended)")
        let asked = try sent().compactMap { $0["id"] as? String }
        XCTAssertEqual(Set(asked), Set(ended.keys))
    }

    func testCommandsAreWrittenAsTheHelperTookThem() throws {
        let hello = [ChatMessage(role: "user", content: "Hello")]
        let written: [Command] = [
            .load(id: "load", model: "demo", options: LoadOptions(context: 512)),
            .chat(id: "chat", body: ChatBody(messages: hello, maxTokens: 6, temperature: 0)),
            .cancel(id: "cancel", request: "endless"),
            .stats(id: "stats"),
            .memoryPressure(id: "pressure", level: .critical),
            .unload(id: "unload"),
            .shutdown(id: "shutdown"),
        ]
        for command in written {
            let line = try command.line()
            XCTAssertEqual(line.last, 0x0A)
            let object = try XCTUnwrap(try JSONSerialization.jsonObject(with: line) as? [String: Any])
            let recorded = try XCTUnwrap(try sent().first { ($0["id"] as? String) == (object["id"] as? String) })
            XCTAssertEqual(try canonical(object), try canonical(recorded))
        }
    }
}
