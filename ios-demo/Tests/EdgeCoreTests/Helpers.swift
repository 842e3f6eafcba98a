import Foundation

@testable import EdgeCore

/// A folder of its own, removed when nobody holds it.
final class Folder {
    let url = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)

    init() throws { try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true) }

    deinit { try? FileManager.default.removeItem(at: url) }

    func write(_ name: String, _ data: Data) throws {
        let file = url.appendingPathComponent(name)
        let folder = file.deletingLastPathComponent()
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        try data.write(to: file)
    }
}

/// The code of what is refused; nil: nothing was.
func refused(_ work: () throws -> Void) -> String? { refusalOf(work)?.code }

/// The sentence of what is refused.
func words(_ work: () throws -> Void) -> String { refusalOf(work)?.words ?? "" }

private func refusalOf(_ work: () throws -> Void) -> Refusal? {
    do {
        try work()
        return nil
    } catch {
        return error as? Refusal ?? Refusal("other", "\(error)")
    }
}

/// A tokenizer whose tokens are code points.
struct Letters: TextToIds {
    func tokenize(_ text: String, start: Bool) -> [Int] { text.unicodeScalars.map { Int($0.value) } }
}

/// An engine whose answers are known.
final class Scripted: Engine {
    let threads = 1
    private let answers: [Int: Int]
    private let text: (Int) -> [UInt8]
    private(set) var fed: [(ids: [Int], used: Int)] = []
    private(set) var isClosed = false

    /// - Parameter text: by default an even token is the first byte of "é", an odd one its second.
    init(_ answers: [Int: Int], _ text: @escaping (Int) -> [UInt8] = { [Array("é".utf8)[$0 % 2]] }) {
        (self.answers, self.text) = (answers, text)
    }

    func tokenize(_ text: String, start: Bool) -> [Int] { text.split(separator: " ").map(\.count) }

    func bytes(_ id: Int) -> [UInt8] { text(id) }

    func reset() { fed = [] }

    func feed(_ ids: [Int], used: Int) { fed.append((ids, used)) }

    func best() -> Int { answers[fed.last!.ids.last!]! }

    func close() { isClosed = true }
}

/// A device that says what it is told to.
struct FixedDevice: Device {
    var host: [(String, Json)] = [("device", "test")]
    var memorySource = "measured:test"
    var usedBytes: Int? = 1
    var peakBytes: Int?
    var availableBytes: Int?
    var freeBytes: Int?
    var disturbances: [String] = []
}

/// The text of a manifest of `files` for GGUF, with other keys as given.
func manifestText(_ files: [String: String], _ more: [(String, Json)] = []) throws -> String {
    let sums = files.sorted { $0.key < $1.key }.map { ($0.key, Json.string(sha256(Data($0.value.utf8)))) }
    let plain: [(String, Json)] = [
        ("schema_version", 1), ("name", "n"), ("target", "gguf"), ("recipe", "r"), ("main_file", "a/m"),
        ("files", .object(Json.Members(sums))),
        ("contract", ["context_length": 40, "vocab_size": 300, "eos_ids": [9], "add_bos": false]),
    ]
    return try Json.object(Json.Members(plain.filter { key, _ in !more.contains { $0.0 == key } } + more)).write()
}
