import Foundation

public struct SHA256 {
    public struct Digest: Sequence {
        public func makeIterator() -> IndexingIterator<[UInt8]> { [].makeIterator() }
    }
    public init() {}
    public static func hash(data: some DataProtocol) -> Digest { Digest() }
    public mutating func update(bufferPointer: UnsafeRawBufferPointer) {}
    public func finalize() -> Digest { Digest() }
}
public enum Curve25519 {
    public enum Signing {
        public struct PublicKey {
            public init(rawRepresentation: some ContiguousBytes) throws {}
            public func isValidSignature(_ signature: some DataProtocol, for data: some DataProtocol) -> Bool { false }
        }
    }
}
