import Foundation

#if canImport(CryptoKit)
    import CryptoKit
#endif

/// SHA-256 (FIPS 180-4), a piece at a time.
public struct Sha256 {
    private var state: [UInt32] = [
        0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
    ]
    private var words = [UInt32](repeating: 0, count: 64)
    private var rest: [UInt8] = []
    private var count: UInt64 = 0

    public init() {}

    public mutating func update(_ bytes: UnsafeRawBufferPointer) {
        count += UInt64(bytes.count)
        var at = 0
        if !rest.isEmpty {
            at = min(64 - rest.count, bytes.count)
            rest += bytes[..<at]
            if rest.count < 64 { return }
            let block = rest
            block.withUnsafeBytes { self.block($0) }
            rest = []
        }
        while at + 64 <= bytes.count {
            block(UnsafeRawBufferPointer(rebasing: bytes[at..<at + 64]))
            at += 64
        }
        rest += bytes[at...]
    }

    public mutating func digest() -> [UInt8] {
        let bits = count * 8
        var padding: [UInt8] = [0x80] + [UInt8](repeating: 0, count: Int((119 - count % 64) % 64))
        padding += (0..<8).map { UInt8(truncatingIfNeeded: bits >> (56 - 8 * UInt64($0))) }
        padding.withUnsafeBytes { update($0) }
        return state.flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> (24 - 8 * UInt32($0))) } }
    }

    private mutating func block(_ bytes: UnsafeRawBufferPointer) {
        func rotated(_ x: UInt32, _ n: UInt32) -> UInt32 { x >> n | x << (32 - n) }
        state.withUnsafeMutableBufferPointer { state in
            words.withUnsafeMutableBufferPointer { w in
                for i in 0..<16 {
                    w[i] = UInt32(bigEndian: bytes.loadUnaligned(fromByteOffset: 4 * i, as: UInt32.self))
                }
                for i in 16..<64 {
                    let s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3
                    let s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10
                    w[i] = w[i - 16] &+ s0 &+ w[i - 7] &+ s1
                }
                var (a, b, c, d) = (state[0], state[1], state[2], state[3])
                var (e, f, g, h) = (state[4], state[5], state[6], state[7])
                for i in 0..<64 {
                    let s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)
                    let first = h &+ s1 &+ (e & f ^ ~e & g) &+ Self.k[i] &+ w[i]
                    let s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)
                    let second = s0 &+ (a & b ^ a & c ^ b & c)
                    (h, g, f, e) = (g, f, e, d &+ first)
                    (d, c, b, a) = (c, b, a, first &+ second)
                }
                for (i, x) in [a, b, c, d, e, f, g, h].enumerated() { state[i] &+= x }
            }
        }
    }

    private static let k: [UInt32] = {
        let primes = (2...311).filter { n in !(2..<n).contains { n % $0 == 0 } }
        return primes.map { prime in
            let root = cbrt(Double(prime))
            return UInt32((root - root.rounded(.down)) * 4_294_967_296)
        }
    }()
}

/// sha256 of bytes as hex.
public func sha256(_ data: Data) -> String {
    #if canImport(CryptoKit)
        return hex(CryptoKit.SHA256.hash(data: data))
    #else
        var hash = Sha256()
        data.withUnsafeBytes { hash.update($0) }
        return hex(hash.digest())
    #endif
}

/// sha256 of a file as hex, read in pieces; `onBytes` is told how many were read.
public func sha256(file: URL, onBytes: (Int) -> Void = { _ in }) throws -> String {
    var done = 0
    #if canImport(CryptoKit)
        var hash = CryptoKit.SHA256()
        try readPieces(file) {
            hash.update(bufferPointer: $0)
            done += $0.count
            onBytes(done)
        }
        return hex(hash.finalize())
    #else
        var hash = Sha256()
        try readPieces(file) {
            hash.update($0)
            done += $0.count
            onBytes(done)
        }
        return hex(hash.digest())
    #endif
}
