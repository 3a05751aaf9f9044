import Foundation
import XCTest

@testable import MixtralKit

final class LineBufferTests: XCTestCase {
    func testLinesArePutTogetherWhereverThePartsEnd() {
        let whole = Data("{\"a\":1}\n{\"b\":2}\n\n{\"c\":3}\n{\"d\"".utf8)
        let expected = ["{\"a\":1}", "{\"b\":2}", "{\"c\":3}"].map { Data($0.utf8) }
        for cut in 0...whole.count {
            var buffer = LineBuffer()
            let lines = buffer.add(Data(whole.prefix(cut))) + buffer.add(Data(whole.dropFirst(cut)))
            XCTAssertEqual(lines, expected, "cut at \(cut)")
        }
    }

    func testBytesOneAtATime() {
        var buffer = LineBuffer()
        let lines = Data("one\ntwo\n".utf8).flatMap { buffer.add(Data([$0])) }
        XCTAssertEqual(lines, [Data("one".utf8), Data("two".utf8)])
    }
}
