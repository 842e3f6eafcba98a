/// Text of a stream of tokens, which holds back bytes until their UTF-8 character is whole. What is no UTF-8 becomes
/// U+FFFD, once for each maximal part of a character: the decoder of the WHATWG's Encoding Standard.
public struct Utf8Stream {
    private static let continuation: ClosedRange<UInt8> = 0x80...0xbf
    private static let broken: Unicode.Scalar = "\u{fffd}"
    private var character: UInt32 = 0
    private var missing = 0
    private var allowed = continuation

    public init() {}

    public mutating func push(_ bytes: [UInt8]) -> String {
        var text = String.UnicodeScalarView()
        for byte in bytes { take(byte, &text) }
        return String(text)
    }

    public mutating func end() -> String {
        defer { missing = 0 }
        return missing == 0 ? "" : String(Self.broken)
    }

    private mutating func take(_ byte: UInt8, _ text: inout String.UnicodeScalarView) {
        if missing == 0 {
            begin(byte, &text)
        } else if allowed.contains(byte) {
            allowed = Self.continuation
            character = character << 6 | UInt32(byte & 0x3f)
            missing -= 1
            if missing == 0, let scalar = Unicode.Scalar(character) { text.append(scalar) }
        } else {
            missing = 0
            text.append(Self.broken)
            begin(byte, &text)
        }
    }

    private mutating func begin(_ byte: UInt8, _ text: inout String.UnicodeScalarView) {
        switch byte {
        case 0xc2...0xdf: missing = 1
        case 0xe0...0xef: missing = 2
        case 0xf0...0xf4: missing = 3
        default: text.append(byte < 0x80 ? Unicode.Scalar(byte) : Self.broken)
        }
        // Overlong forms, half characters of UTF-16 and what is beyond the last character end at the second byte.
        switch byte {
        case 0xe0: allowed = 0xa0...0xbf
        case 0xed: allowed = 0x80...0x9f
        case 0xf0: allowed = 0x90...0xbf
        case 0xf4: allowed = 0x80...0x8f
        default: allowed = Self.continuation
        }
        character = UInt32(byte & (0x3f >> UInt8(missing)))
    }
}
