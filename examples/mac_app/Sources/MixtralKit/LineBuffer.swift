// Bytes in, lines out.

import Foundation

/// Cuts a stream of bytes into lines, wherever its parts end.
public struct LineBuffer: Sendable {
    private var begun = Data()

    public init() {}

    /// The lines that `data` completes, without their ends and without empty ones.
    public mutating func add(_ data: Data) -> [Data] {
        begun.append(data)
        var lines: [Data] = []
        while let end = begun.firstIndex(of: 0x0A) {
            let line = begun[begun.startIndex..<end]
            if !line.isEmpty {
                lines.append(Data(line))
            }
            // A fresh Data: slices keep the indices of what they were cut from.
            begun = Data(begun[begun.index(after: end)...])
        }
        return lines
    }
}
