/// JSON as RFC 8259 has it, and nothing more. Objects keep the order of their keys, which templates write out.
public indirect enum Json: Equatable {
    case null
    case bool(Bool)
    case int(Int)
    case double(Double)
    case string(String)
    case list([Json])
    case object(Members)

    /// The members of an object.
    public struct Members: Equatable {
        public private(set) var pairs: [(key: String, value: Json)]

        public init(_ pairs: [(String, Json)] = []) {
            self.pairs = pairs.map { (key: $0.0, value: $0.1) }
        }

        /// Of a key that stands there twice the last, as most readers have it; null is what is not there.
        public subscript(key: String) -> Json {
            pairs.last { isSame($0.key, key) }?.value ?? .null
        }

        public static func == (a: Members, b: Members) -> Bool {
            a.pairs.count == b.pairs.count && a.pairs.allSatisfy { pair in b.pairs.contains { $0 == pair } }
        }
    }

    public static func == (a: Json, b: Json) -> Bool {
        switch (a, b) {
        case (.null, .null): true
        case let (.bool(a), .bool(b)): a == b
        case let (.int(a), .int(b)): a == b
        case let (.double(a), .double(b)): a == b
        case let (.string(a), .string(b)): isSame(a, b)
        case let (.list(a), .list(b)): a == b
        case let (.object(a), .object(b)): a == b
        default: false
        }
    }
}

public struct NotJson: Error {
    public let words: String
}

// --- values ----------------------------------------------------------------------------------------------------------

extension Json: ExpressibleByStringLiteral, ExpressibleByIntegerLiteral, ExpressibleByBooleanLiteral,
    ExpressibleByNilLiteral, ExpressibleByDictionaryLiteral, ExpressibleByArrayLiteral
{
    public init(stringLiteral value: String) { self = .string(value) }
    public init(integerLiteral value: Int) { self = .int(value) }
    public init(booleanLiteral value: Bool) { self = .bool(value) }
    public init(nilLiteral: ()) { self = .null }
    public init(dictionaryLiteral pairs: (String, Json)...) { self = .object(Members(pairs)) }
    public init(arrayLiteral values: Json...) { self = .list(values) }

    public subscript(key: String) -> Json { object?[key] ?? .null }

    public var isNull: Bool { self == .null }
    public var bool: Bool? { if case .bool(let value) = self { value } else { nil } }
    public var int: Int? { if case .int(let value) = self { value } else { nil } }
    public var string: String? { if case .string(let value) = self { value } else { nil } }
    public var list: [Json]? { if case .list(let values) = self { values } else { nil } }
    public var object: Members? { if case .object(let members) = self { members } else { nil } }

    /// Of a whole number too.
    public var double: Double? {
        switch self {
        case .double(let value): value
        case .int(let value): Double(value)
        default: nil
        }
    }
}

// --- reading ---------------------------------------------------------------------------------------------------------

extension Json {
    /// Read a text.
    public static func parse(_ text: String) throws -> Json {
        var reader = Reader(bytes: Array(text.utf8))
        return try reader.whole()
    }

    private struct Reader {
        let bytes: [UInt8]
        var at = 0

        static let deepest = 200

        mutating func whole() throws -> Json {
            let value = try value(0)
            space()
            if at < bytes.count { throw fault("something behind the end") }
            return value
        }

        func fault(_ what: String) -> NotJson { NotJson(words: "\(what) at byte \(at)") }

        mutating func space() {
            while at < bytes.count, [0x20, 0x09, 0x0d, 0x0a].contains(bytes[at]) { at += 1 }
        }

        /// The next byte that is no space, which is left to be read.
        mutating func next() throws -> UInt8 {
            space()
            if at == bytes.count { throw fault("the end") }
            return bytes[at]
        }

        /// One byte, white space or not.
        mutating func byte() throws -> UInt8 {
            if at == bytes.count { throw fault("the end") }
            at += 1
            return bytes[at - 1]
        }

        mutating func take(_ wanted: Character) throws {
            if try next() != wanted.asciiValue { throw fault("no '\(wanted)'") }
            at += 1
        }

        mutating func value(_ depth: Int) throws -> Json {
            if depth > Self.deepest { throw fault("too deep") }
            switch Character(Unicode.Scalar(try next())) {
            case "{": return .object(try members(depth))
            case "[": return .list(try elements(depth))
            case "\"": return .string(try string())
            case "t": return try word("true", .bool(true))
            case "f": return try word("false", .bool(false))
            case "n": return try word("null", .null)
            default: return try number()
            }
        }

        mutating func word(_ word: String, _ value: Json) throws -> Json {
            if !bytes[at...].starts(with: word.utf8) { throw fault("no value") }
            at += word.utf8.count
            return value
        }

        mutating func members(_ depth: Int) throws -> Members {
            var found: [(String, Json)] = []
            try take("{")
            if try next() == UInt8(ascii: "}") {
                at += 1
                return Members()
            }
            while true {
                if try next() != UInt8(ascii: "\"") { throw fault("no key") }
                let key = try string()
                try take(":")
                found.append((key, try value(depth + 1)))
                if try next() == UInt8(ascii: "}") { break }
                try take(",")
            }
            at += 1
            return Members(found)
        }

        mutating func elements(_ depth: Int) throws -> [Json] {
            var found: [Json] = []
            try take("[")
            if try next() == UInt8(ascii: "]") {
                at += 1
                return []
            }
            while true {
                found.append(try value(depth + 1))
                if try next() == UInt8(ascii: "]") { break }
                try take(",")
            }
            at += 1
            return found
        }

        mutating func string() throws -> String {
            var found: [UInt8] = []
            at += 1
            while true {
                let byte = try byte()
                switch byte {
                case UInt8(ascii: "\""): return String(decoding: found, as: UTF8.self)
                case UInt8(ascii: "\\"): found += Array(text([try escaped()]).utf8)
                case ..<0x20: throw fault("a control character")
                default: found.append(byte)
                }
            }
        }

        mutating func escaped() throws -> Unicode.Scalar {
            switch Character(Unicode.Scalar(try byte())) {
            case "\"": return "\""
            case "\\": return "\\"
            case "/": return "/"
            case "b": return "\u{8}"
            case "f": return "\u{c}"
            case "n": return "\n"
            case "r": return "\r"
            case "t": return "\t"
            case "u": return try unicode()
            default: throw fault("an unknown escape")
            }
        }

        /// `\uXXXX`, or two that are one character; half of such a pair stands for no text.
        mutating func unicode() throws -> Unicode.Scalar {
            let first = try unit()
            if let scalar = Unicode.Scalar(first) { return scalar }
            let here = at
            if first < 0xdc00, bytes[at...].starts(with: "\\u".utf8) {
                at += 2
                let second = try unit()
                if (0xdc00...0xdfff).contains(second) {
                    return Unicode.Scalar(0x10000 + (first - 0xd800) << 10 + (second - 0xdc00))!
                }
                at = here
            }
            return "\u{fffd}"
        }

        mutating func unit() throws -> UInt32 {
            let digits = bytes[at..<min(at + 4, bytes.count)]
            let isHex = digits.allSatisfy { Character(Unicode.Scalar($0)).isHexDigit }
            guard digits.count == 4, isHex, let unit = UInt32(String(decoding: digits, as: UTF8.self), radix: 16) else {
                throw fault("no character")
            }
            at += 4
            return unit
        }

        mutating func digits() -> Int {
            let start = at
            while at < bytes.count, (0x30...0x39).contains(bytes[at]) { at += 1 }
            return at - start
        }

        mutating func has(_ one: String) -> Bool {
            guard at < bytes.count, one.utf8.contains(bytes[at]) else { return false }
            at += 1
            return true
        }

        mutating func number() throws -> Json {
            let start = at
            _ = has("-")
            let begins = at < bytes.count ? bytes[at] : 0
            let whole = digits()
            if whole == 0 || (whole > 1 && begins == 0x30) { throw fault("no value") }
            var broken = false
            if has(".") {
                broken = true
                if digits() == 0 { throw fault("no digit") }
            }
            if has("eE") {
                broken = true
                _ = has("+-")
                if digits() == 0 { throw fault("no digit") }
            }
            let text = String(decoding: bytes[start..<at], as: UTF8.self)
            if !broken, let int = Int(text) { return .int(int) }
            guard let double = Double(text) else { throw fault("no value") }
            return .double(double)
        }
    }
}

// --- writing ---------------------------------------------------------------------------------------------------------

extension Json {
    /// One line, or several with `indent`; `ascii` writes what is not ASCII as Python's json does.
    public func write(ascii: Bool = false, indent: Int? = nil) throws -> String {
        var writer = Writer(ascii: ascii, indent: indent)
        try writer.value(self, 0)
        return writer.out
    }

    private struct Writer {
        let ascii: Bool
        let indent: Int?
        var out = ""

        mutating func value(_ value: Json, _ depth: Int) throws {
            switch value {
            case .null: out += "null"
            case .bool(let flag): out += flag ? "true" : "false"
            case .int(let number): out += String(number)
            case .double(let number):
                if !number.isFinite { throw NotJson(words: "\(number)") }
                out += String(number)
            case .string(let text): string(text)
            case .list(let all):
                try items("[", "]", all, depth) { writer, one in try writer.value(one, depth + 1) }
            case .object(let members):
                try items("{", "}", members.pairs, depth) { writer, pair in
                    writer.string(pair.key)
                    writer.out += ": "
                    try writer.value(pair.value, depth + 1)
                }
            }
        }

        private mutating func items<T>(
            _ open: String, _ close: String, _ all: [T], _ depth: Int, _ each: (inout Writer, T) throws -> Void
        ) rethrows {
            out += open
            for (i, item) in all.enumerated() {
                if i > 0 { out += indent == nil ? ", " : "," }
                line(depth + 1)
                try each(&self, item)
            }
            if !all.isEmpty { line(depth) }
            out += close
        }

        private mutating func line(_ depth: Int) {
            if let indent { out += "\n" + String(repeating: " ", count: indent * depth) }
        }

        private mutating func string(_ text: String) {
            out += "\""
            for scalar in text.unicodeScalars {
                switch scalar {
                case "\"": out += "\\\""
                case "\\": out += "\\\\"
                case "\u{8}": out += "\\b"
                case "\u{c}": out += "\\f"
                case "\n": out += "\\n"
                case "\r": out += "\\r"
                case "\t": out += "\\t"
                case ..<" ": escape(scalar)
                case "\u{7f}"...: ascii ? escape(scalar) : out.unicodeScalars.append(scalar)
                default: out.unicodeScalars.append(scalar)
                }
            }
            out += "\""
        }

        private mutating func escape(_ scalar: Unicode.Scalar) {
            for unit in String(scalar).utf16 {
                let digits = String(unit, radix: 16)
                out += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            }
        }
    }
}
