public protocol ValueConvertible {}
public struct Value: ValueConvertible {}
public final class Tensor<T>: ValueConvertible {
    public init(_ scalars: [T], shape: [Int]) {}
    public init(_ values: [Value]) throws {}
    public func scalars() -> [T] { [] }
}
public final class Module {
    public init(filePath: String) {}
    public func load(_ method: String) throws {}
    public func forward(_ inputs: [any ValueConvertible]) throws -> [Value] { [] }
}

public func autoreleasepool<Result>(invoking body: () throws -> Result) rethrows -> Result { try body() }
