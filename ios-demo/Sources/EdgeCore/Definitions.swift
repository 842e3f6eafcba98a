/// Tokens that are waited for when a first character is looked for: more have no text at all.
private let mostSilentTokens = 16

private let english =
    "A small model that runs on the device in your hand answers without a network, and what you ask it stays "
    + "with you. It reads the words of a question piece by piece, keeps what it has read in a cache, and then writes "
    + "one piece after another, each chosen from thousands by its likelihood. How soon the first one comes depends on "
    + "the length of the question; how fast the others follow depends on how quickly the weights can be read from "
    + "memory, since every one of them is read for every piece. A phone that grows warm slows down, so a short "
    + "measurement is kinder than a long one. What is told here was measured on this device, with the very file that "
    + "was verified elsewhere, and nothing of it was guessed. "

/// What the clock said while one request was served, in seconds: the terms of edgekd's benchmarks/definitions.py.
public struct Request {
    let textIn: Double
    let idsReady: Double
    let prefilled: Double
    let decoded: [Double]
    let chosen: [Double]
    let chunks: [Double]

    public var tokenizeS: Double { idsReady - textIn }
    public var prefillS: Double { prefilled - idsReady }

    /// From the ids to the first token chosen.
    public var firstTokenS: Double { chosen[0] - idsReady }

    /// From the text to the first whole character; nil where no token had text.
    public var ttftS: Double? { chunks.first.map { $0 - textIn } }

    /// (latency − TTFT) ÷ (tokens − 1).
    public var itlS: Double? {
        guard let ttftS, chosen.count > 1 else { return nil }
        return (chosen[chosen.count - 1] - textIn - ttftS) / Double(chosen.count - 1)
    }

    /// Gaps between pieces of text.
    public var iclS: [Double] { zip(chunks, chunks.dropFirst()).map { $1 - $0 } }

    /// From the first token chosen to the last.
    public var decodeS: Double { chosen[chosen.count - 1] - chosen[0] }
    public var decodeTokens: Int { chosen.count - 1 }
    public var samplingS: [Double] { zip(decoded, chosen.dropFirst()).map { $1 - $0 } }
}

private let origin = ContinuousClock.now

/// Seconds of a clock that does not rest while the device sleeps.
public func secondsNow() -> Double {
    let (seconds, attoseconds) = (ContinuousClock.now - origin).components
    return Double(seconds) + Double(attoseconds) * 1e-18
}

/// Serve one greedy request with a stopwatch; the end of a text does not end it.
public func serve(
    _ decoder: Decoder, _ text: String, decodeTokens: Int, untilText: Bool = false, clock: () -> Double = secondsNow
) throws -> Request {
    var stream = Utf8Stream()
    var decoded: [Double] = []
    var chosen: [Double] = []
    var chunks: [Double] = []
    func choose() -> Int {
        let token = decoder.engine.best()
        chosen.append(clock())
        if !stream.push(decoder.engine.bytes(token)).isEmpty { chunks.append(clock()) }
        return token
    }
    try decoder.reset()
    let textIn = clock()
    let ids = try decoder.engine.tokenize(text, start: true)
    let idsReady = clock()
    try decoder.feed(ids)
    let prefilled = clock()
    var token = choose()
    while chosen.count <= decodeTokens, !(untilText && !chunks.isEmpty) {
        try decoder.feed([token])
        decoded.append(clock())
        token = choose()
    }
    return Request(
        textIn: textIn, idsReady: idsReady, prefilled: prefilled, decoded: decoded, chosen: chosen, chunks: chunks)
}

/// Serve a request up to its first whole character.
func firstText(_ decoder: Decoder, _ text: String, promptTokens: Int) throws -> Request {
    let most = min(mostSilentTokens, decoder.contract.contextLength - promptTokens)
    return try serve(decoder, text, decodeTokens: most, untilText: true)
}

/// English text that the tokenizer reads as exactly so many tokens.
public func realText(_ tokenizer: any TextToIds, tokens: Int) throws -> String {
    for start in stride(from: 0, to: english.utf8.count, by: 64) {
        let long = String(repeating: english, count: 1 + 20 * tokens / english.utf8.count)
        let text = Array((english.dropFirst(start) + long).utf8)
        func beginning(_ count: Int) -> String { String(decoding: text.prefix(count), as: UTF8.self) }
        func count(_ characters: Int) throws -> Int {
            try tokenizer.tokenize(beginning(characters), start: true).count
        }
        var (low, high) = (0, text.count)
        while low < high {
            let middle = (low + high) / 2
            if try count(middle) < tokens { low = middle + 1 } else { high = middle }
        }
        for near in max(1, low - 4)...low + 8 where try count(near) == tokens { return beginning(near) }
    }
    throw Refusal("bad_value", "The tokenizer makes \(tokens) tokens of no text.", "Export the artifact again.")
}
