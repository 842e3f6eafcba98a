/// What the self-test found; `failure` is a sentence, and `answers` 0 says that nothing was recorded.
public struct SelfTestResult: Equatable {
    public let answers: Int
    public let tokens: Int
    public let failure: String?

    public init(answers: Int, tokens: Int, failure: String?) {
        (self.answers, self.tokens, self.failure) = (answers, tokens, failure)
    }
}

/// Run the manifest's golden answers again: the ids of texts, and greedy tokens of ids, which end before the first near
/// tie.
public func selfTest(_ decoder: Decoder, _ golden: [GoldenAnswer]) throws -> SelfTestResult {
    var tokens = 0
    for (number, answer) in golden.enumerated() {
        if let words = try misread(decoder, answer) {
            let failure = "Golden answer \(number + 1): \(words)"
            return SelfTestResult(answers: golden.count, tokens: tokens, failure: failure)
        }
        let given = try decoder.greedy(answer.promptIds, answer.tokens.count)
        if let at = answer.tokens.indices.first(where: { $0 >= given.count || given[$0] != answer.tokens[$0] }) {
            let found = at < given.count ? String(given[at]) : "missing"
            let words = "Golden answer \(number + 1): token \(at + 1) is \(found), not \(answer.tokens[at])."
            return SelfTestResult(answers: golden.count, tokens: tokens + at, failure: words)
        }
        tokens += answer.tokens.count
    }
    return SelfTestResult(answers: golden.count, tokens: tokens, failure: nil)
}

/// What is wrong with the ids of an answer's text, in a sentence.
private func misread(_ decoder: Decoder, _ answer: GoldenAnswer) throws -> String? {
    guard let text = answer.text else { return nil }
    let (engine, contract) = (decoder.engine, decoder.contract)
    let ids: [Int]
    if let messages = answer.messages {
        let rendered = try renderChat(contract.chatTemplate ?? "", contract.specialTokens, messages)
        if !isSame(rendered, text) { return "its chat is rendered as another text." }
        ids = try chatIds(engine, contract, text)
    } else {
        ids = try textIds(engine, contract, text)
    }
    return ids == answer.promptIds ? nil : "its text is read as \(ids), not \(answer.promptIds)."
}
