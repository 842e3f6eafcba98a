/// Most ids that an engine is fed at once.
public let batchTokens = 512

/// Text to ids, in which nothing is a special token and to which nothing is added.
public protocol TextToIds {
    /// - Parameter start: it begins a sequence, where some tokenizers put a space.
    func tokenize(_ text: String, start: Bool) throws -> [Int]
}

/// A runtime with a model, a tokenizer and a cache.
public protocol Engine: TextToIds {
    var threads: Int { get }

    /// The bytes a token stands for; none for a special one. They may end inside a UTF-8 character.
    func bytes(_ id: Int) -> [UInt8]

    /// Empty the cache.
    func reset() throws

    /// Write ids, at most `batchTokens`, behind `used` cached ones.
    func feed(_ ids: [Int], used: Int) throws

    /// The most likely next id.
    func best() -> Int

    func close()
}

/// What chat, self-test and benchmark do with an engine.
public final class Decoder {
    public let engine: any Engine
    public let contract: Contract
    private var used = 0

    public init(_ engine: any Engine, _ contract: Contract) {
        (self.engine, self.contract) = (engine, contract)
    }

    public func reset() throws {
        used = 0
        try engine.reset()
    }

    /// Write ids behind the cached ones.
    public func feed(_ ids: [Int]) throws {
        if used + ids.count > contract.contextLength {
            let words = "\(used) + \(ids.count) tokens exceed the context of \(contract.contextLength)."
            throw Refusal("too_long", words, "Begin a new chat.")
        }
        for start in stride(from: 0, to: ids.count, by: batchTokens) {
            let piece = Array(ids[start..<min(start + batchTokens, ids.count)])
            try engine.feed(piece, used: used)
            used += piece.count
        }
    }

    /// New greedy tokens, one at a time, until an end-of-sequence token, `count`, a full cache, or false from `goesOn`.
    public func generate(_ ids: [Int], _ count: Int, _ goesOn: (Int) throws -> Bool) throws {
        try reset()
        try feed(ids)
        for n in 0..<count {
            let token = engine.best()
            if contract.eosIds.contains(token) { return }
            if try !goesOn(token) || n == count - 1 || used == contract.contextLength { return }
            try feed([token])
        }
    }

    public func greedy(_ ids: [Int], _ count: Int) throws -> [Int] {
        var tokens: [Int] = []
        try generate(ids, count) { token in
            tokens.append(token)
            return true
        }
        return tokens
    }

    /// Text behind `ids`, piece by piece, until the model ends it or `stopped` says so; the number of tokens.
    public func stream(
        _ ids: [Int], _ count: Int, stopped: () -> Bool, onPiece: (String) -> Void
    ) throws -> Int {
        var text = Utf8Stream()
        var tokens = 0
        try generate(ids, count) { token in
            tokens += 1
            onPiece(text.push(engine.bytes(token)))
            return !stopped()
        }
        onPiece(text.end())
        return tokens
    }
}
