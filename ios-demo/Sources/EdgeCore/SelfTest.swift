/// What the self-test found; `failure` is a sentence, and `answers` 0 says that nothing was recorded.
public struct SelfTestResult: Equatable {
    public let answers: Int
    public let tokens: Int
    public let failure: String?

    public init(answers: Int, tokens: Int, failure: String?) {
        (self.answers, self.tokens, self.failure) = (answers, tokens, failure)
    }
}

/// Run the manifest's golden answers again: greedy tokens of ids, which end before the first near tie.
public func selfTest(_ decoder: Decoder, _ golden: [GoldenAnswer]) throws -> SelfTestResult {
    var tokens = 0
    for (number, answer) in golden.enumerated() {
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

/// The least lead of a logit that holds on every processor.
private let surely = 0.5

/// Do what a bundle's `golden.json` did: the ids of texts and of a chat are equal, and greedy tokens as long as their
/// leads are larger than what processors round differently. A sentence where that is not so, else nil.
public func goldenFailure(_ decoder: Decoder, _ golden: Json) throws -> String? {
    let (engine, contract) = (decoder.engine, decoder.contract)
    for text in golden["texts"].list ?? [] {
        let ids = try idsBefore(contract) + engine.tokenize(text["text"].string ?? "", start: true)
        if ids != integers(text["ids"]) { return "The golden text \(try text["text"].write()) has other tokens." }
    }
    if let messages = golden["chat"]["messages"].list {
        let rendered = try renderChat(contract.chatTemplate ?? "", contract.specialTokens, messages)
        if .string(rendered) != golden["chat"]["text"] { return "The golden chat is rendered as another text." }
        if try chatIds(engine, contract, rendered) != integers(golden["chat"]["ids"]) {
            return "The golden chat has other tokens."
        }
    }
    let (tokens, leads) = (integers(golden["greedy"]["tokens"]), golden["greedy"]["margins"].list ?? [])
    let given = try decoder.greedy(integers(golden["greedy"]["prompt_ids"]), tokens.count)
    guard let at = tokens.indices.first(where: { $0 >= given.count || given[$0] != tokens[$0] }),
        at >= leads.count || (leads[at].double ?? .infinity) > surely
    else { return nil }
    return "Golden token \(at + 1) is \(at < given.count ? String(given[at]) : "missing"), not \(tokens[at])."
}

private func integers(_ list: Json) -> [Int] { (list.list ?? []).compactMap(\.int) }
