import Foundation

public enum MLComputeUnits { case all, cpuOnly, cpuAndGPU, cpuAndNeuralEngine }
public final class MLModelConfiguration {
    public init() {}
    public var computeUnits = MLComputeUnits.all
}
public final class MLState {}
public enum MLMultiArrayDataType { case int32, float16, float32 }
public final class MLMultiArray {
    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {}
    public var count: Int { 0 }
    public func withUnsafeBufferPointer<S, R>(ofType: S.Type, _ body: (UnsafeBufferPointer<S>) throws -> R) rethrows
        -> R
    {
        fatalError()
    }
    public func withUnsafeMutableBufferPointer<S, R>(
        ofType: S.Type, _ body: (UnsafeMutableBufferPointer<S>, [Int]) throws -> R
    ) rethrows -> R { fatalError() }
}
public final class MLFeatureValue {
    public init(multiArray: MLMultiArray) {}
    public var multiArrayValue: MLMultiArray? { nil }
}
public protocol MLFeatureProvider { func featureValue(for name: String) -> MLFeatureValue? }
public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws {}
    public func featureValue(for name: String) -> MLFeatureValue? { nil }
}
public final class MLModel {
    public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {}
    public static func compileModel(at url: URL) throws -> URL { url }
    public func makeState() -> MLState { MLState() }
    public func prediction(from input: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
        input
    }
}

public func autoreleasepool<Result>(invoking body: () throws -> Result) rethrows -> Result { try body() }
