import Foundation

/// A `tokenizer.json` of byte-level BPE, for runtimes without a tokenizer of their own.
public final class TokenizerFile: TextToIds {
    private struct Pair: Hashable {
        let left: Int
        let right: Int
    }

    private struct Merge {
        let rank: Int
        let id: Int
    }

    private var ids: [[UInt8]: Int] = [:]
    private var pieces: [Int: [UInt8]] = [:]
    private var merges: [Pair: Merge] = [:]
    private var splits: [NSRegularExpression] = []
    private let isNFC: Bool
    private let ignoresMerges: Bool

    public init(_ file: URL) throws {
        guard let data = try? Data(contentsOf: file), let text = String(data: data, encoding: .utf8),
            let json = try? Json.parse(text)
        else { throw Self.bad("is not JSON") }
        let model = json["model"]
        let steps = Self.steps(json["pre_tokenizer"])
        let kinds = steps.map { $0["type"].string ?? "" }
        let strange = kinds.first { !["Split", "ByteLevel", "Digits"].contains($0) }
        if model["type"].string != "BPE" || strange != nil || !kinds.contains("ByteLevel") {
            throw Self.bad("is no byte-level BPE (\(strange ?? model["type"].string ?? "no type"))")
        }
        let normalizer = json["normalizer"]["type"].string
        if let normalizer, normalizer != "NFC" { throw Self.bad("has the normalizer \(normalizer), not known here") }
        isNFC = normalizer == "NFC"
        ignoresMerges = model["ignore_merges"].bool ?? false
        splits = try steps.flatMap(Self.expressions).map { try NSRegularExpression(pattern: $0) }
        try read(model)
        for token in json["added_tokens"].list ?? [] {
            guard let id = token["id"].int, let content = token["content"].string else { throw Self.bad("is damaged") }
            pieces[id] = token["special"].bool == true ? [] : Array(content.utf8)
        }
    }

    private func read(_ model: Json) throws {
        for (text, id) in model["vocab"].object?.pairs ?? [] {
            guard let id = id.int else { throw Self.bad("is damaged") }
            let bytes = Self.bytes(of: text)
            pieces[id] = bytes ?? Array(text.utf8)
            if let bytes { ids[bytes] = id }
        }
        for (rank, merge) in (model["merges"].list ?? []).enumerated() {
            let parts = merge.string.map { split($0, by: " ") } ?? (merge.list ?? []).compactMap(\.string)
            let bytes = parts.compactMap(Self.bytes)
            guard bytes.count == 2, let left = ids[bytes[0]], let right = ids[bytes[1]],
                let id = ids[bytes[0] + bytes[1]]
            else { throw Self.bad("is damaged") }
            merges[Pair(left: left, right: right)] = Merge(rank: rank, id: id)
        }
    }

    public func tokenize(_ text: String, start: Bool) throws -> [Int] {
        var words = [isNFC ? text.precomposedStringWithCanonicalMapping : text]
        for split in splits { words = words.flatMap { Self.isolated(split, $0) } }
        return try words.flatMap { try merged(Array($0.utf8)) }
    }

    /// The bytes a token stands for; none for a special one and for an id without a token.
    public func bytes(_ id: Int) -> [UInt8] { pieces[id] ?? [] }

    private static func isolated(_ split: NSRegularExpression, _ text: String) -> [String] {
        let units = text as NSString
        var found: [String] = []
        var end = 0
        for match in split.matches(in: text, range: NSRange(location: 0, length: units.length))
        where match.range.length > 0 {
            if match.range.location > end {
                found.append(units.substring(with: NSRange(location: end, length: match.range.location - end)))
            }
            found.append(units.substring(with: match.range))
            end = match.range.location + match.range.length
        }
        if end < units.length { found.append(units.substring(from: end)) }
        return found
    }

    /// A word's tokens: the pair of the lowest rank is joined, until there is none.
    private func merged(_ word: [UInt8]) throws -> [Int] {
        if ignoresMerges, let id = ids[word] { return [id] }
        var parts = try word.map { byte in
            guard let id = ids[[byte]] else { throw Self.bad("has no token for the byte \(byte)") }
            return id
        }
        while true {
            let ranked = parts.indices.dropLast().compactMap { at in
                merges[Pair(left: parts[at], right: parts[at + 1])].map { (at: at, merge: $0) }
            }
            guard let best = ranked.min(by: { $0.merge.rank < $1.merge.rank }) else { return parts }
            parts[best.at] = best.merge.id
            parts.remove(at: best.at + 1)
        }
    }

    private static func bad(_ what: String) -> Refusal {
        Refusal("bad_value", "tokenizer.json \(what).", "Use the GGUF artifact.")
    }

    private static func steps(_ value: Json) -> [Json] {
        if value.isNull { return [] }
        return value["type"].string == "Sequence" ? (value["pretokenizers"].list ?? []).flatMap(steps) : [value]
    }

    /// The expressions by which a step isolates words.
    private static func expressions(_ step: Json) throws -> [String] {
        switch step["type"].string {
        case "Split":
            guard let pattern = step["pattern"]["Regex"].string, step["behavior"].string == "Isolated" else {
                throw bad("divides words in a way not known here")
            }
            return [unicode(pattern)]
        case "Digits": return [step["individual_digits"].bool == true ? "\\p{N}" : "\\p{N}+"]
        default: return step["use_regex"].bool == false ? [] : [unicode(gpt2)]
        }
    }

    private static let gpt2 = #"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

    /// White space as Unicode has it: ICU's `\s` lacks two characters of it.
    private static func unicode(_ pattern: String) -> String {
        var found = ""
        var isEscaped = false
        for scalar in pattern.unicodeScalars {
            if isEscaped, scalar == "s" || scalar == "S" {
                found += scalar == "s" ? "p{White_Space}" : "P{White_Space}"
            } else {
                found.unicodeScalars.append(scalar)
            }
            isEscaped = scalar == "\\" && !isEscaped
        }
        return found
    }

    /// GPT-2's printable character of every byte.
    private static let byteOf: [Unicode.Scalar: UInt8] = {
        var other: UInt32 = 255
        let pairs = (UInt8.min...UInt8.max).map { byte -> (Unicode.Scalar, UInt8) in
            switch byte {
            case 0x21...0x7e, 0xa1...0xac, 0xae...0xff: return (Unicode.Scalar(byte), byte)
            default:
                other += 1
                return (Unicode.Scalar(other)!, byte)
            }
        }
        return Dictionary(uniqueKeysWithValues: pairs)
    }()

    /// The bytes that a token's text stands for; nil where it is none of bytes.
    private static func bytes(of text: String) -> [UInt8]? {
        let bytes = text.unicodeScalars.map { byteOf[$0] }
        return bytes.contains { $0 == nil } ? nil : bytes.compactMap { $0 }
    }
}
