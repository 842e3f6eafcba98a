/// One call of edgekd's Core ML program: `targets/coreml/session.py` has the same inputs.
public struct ProgramStep {
    /// `inputIds (1, T)`.
    public let ids: [Int]
    /// Ids that are cached already.
    public let used: Int

    public init(ids: [Int], used: Int) {
        (self.ids, self.used) = (ids, used)
    }

    /// What is added to the scores of positions that must not be seen: the least number of float16.
    public static let masked: Float = -65504

    /// `positionIds (1, T)`.
    public var positions: [Int] { Array(used..<used + ids.count) }

    /// Cached positions and those of this step: the last axis of the mask.
    public var seen: Int { used + ids.count }

    /// `causalMask (1, 1, T, seen)`: a token sees itself and what is before it.
    public func mask(row: Int, column: Int) -> Float { column > used + row ? Self.masked : 0 }

    /// `outputIds (1)`: the last token alone wants logits.
    public var outputs: [Int] { [ids.count - 1] }
}

/// What runs the program, with the cache as its state.
public protocol ProgramRunner {
    /// A state of zeros.
    func reset() throws

    /// Logits of the one token that wants them.
    func run(_ step: ProgramStep) throws -> [Float]

    func close()
}

/// The Core ML program as an engine: its tokenizer is `tokenizer.json`.
public final class ProgramEngine: Engine {
    public let threads = 1
    private let runner: any ProgramRunner
    private let tokenizer: TokenizerFile
    private var logits: [Float] = []

    public init(_ runner: any ProgramRunner, _ tokenizer: TokenizerFile) {
        (self.runner, self.tokenizer) = (runner, tokenizer)
    }

    public func tokenize(_ text: String, start: Bool) throws -> [Int] { try tokenizer.tokenize(text, start: start) }

    public func bytes(_ id: Int) -> [UInt8] { tokenizer.bytes(id) }

    public func reset() throws { try runner.reset() }

    public func feed(_ ids: [Int], used: Int) throws { logits = try runner.run(ProgramStep(ids: ids, used: used)) }

    public func best() -> Int { argmax(logits) }

    public func close() { runner.close() }
}

/// The first of the largest.
public func argmax(_ logits: [Float]) -> Int { logits.withUnsafeBufferPointer(argmax) }

public func argmax(_ logits: UnsafeBufferPointer<Float>) -> Int {
    var best = 0
    for i in logits.indices where logits[i] > logits[best] { best = i }
    return best
}
