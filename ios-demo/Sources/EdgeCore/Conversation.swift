import Foundation

/// White space as Unicode has it.
private let white: Set<Unicode.Scalar> = Set(
    "\t\n\u{b}\u{c}\r \u{85}\u{a0}\u{1680}\u{2000}\u{2001}\u{2002}\u{2003}\u{2004}\u{2005}\u{2006}\u{2007}\u{2008}\u{2009}\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}"
        .unicodeScalars)
private let reasoning = ["reasoning_content", "thinking", "reasoning"]

/// A part of a rendered chat: a special token, or text, in which nothing is one.
public enum Part {
    case special(Int)
    case text(String, start: Bool)
}

/// A message of a chat, as JSON: `role`, `content` and what else its template reads.
public typealias Message = Json

public func message(_ role: String, _ content: String) -> Message {
    ["role": .string(role), "content": .string(content)]
}

/// A message less its empty keys, its reasoning under both names that templates read it by.
private func asTemplateReads(_ message: Message) -> Json {
    let plain = (message.object?.pairs ?? []).filter { !$0.value.isNull }
    guard let key = reasoning.first(where: { key in plain.contains { isSame($0.key, key) } }) else {
        return .object(Json.Members(plain.map { ($0.key, $0.value) }))
    }
    let text = message[key]
    var pairs = plain.contains { $0.key == "thinking" } ? [] : [("thinking", text)]
    pairs += plain.filter { $0.key != "reasoning_content" }.map { ($0.key, $0.value) }
    return .object(Json.Members(pairs + [("reasoning_content", text)]))
}

/// The text of a chat; by default up to where the assistant speaks.
public func renderChat(
    _ template: String, _ specialTokens: [String: String], _ messages: [Message], tools: Json = .null,
    addGenerationPrompt: Bool = true, now: @escaping () -> Date = Date.init
) throws -> String {
    var variables = specialTokens.mapValues { Json.string($0) }
    variables["messages"] = .list(messages.map(asTemplateReads))
    variables["tools"] = tools
    variables["documents"] = .null
    variables["add_generation_prompt"] = .bool(addGenerationPrompt)
    do {
        return try Jinja(template, now: now).render(variables)
    } catch let error as TemplateError {
        let words = "The chat template refuses the chat: \(error.words)."
        throw Refusal("template_refused", words, "Change the chat, or the template.")
    }
}

/// A special token as it is looked for.
private struct Special {
    let scalars: [Unicode.Scalar]
    let id: Int
    let takesBefore: Bool
    let takesBehind: Bool

    /// Where it ends, with the white space that it takes along, if it begins at a place.
    func end(in text: [Unicode.Scalar], at start: Int) -> Int? {
        var at = start
        if takesBefore { while at < text.count, white.contains(text[at]) { at += 1 } }
        guard text[at...].starts(with: scalars) else { return nil }
        at += scalars.count
        if takesBehind { while at < text.count, white.contains(text[at]) { at += 1 } }
        return at
    }
}

/// A rendered chat in its parts: special tokens, the longest where several begin, and the text between them.
public func promptParts(_ whole: String, _ ids: [String: Int], _ strips: [String: String]) -> [Part] {
    let all = Array(whole.unicodeScalars)
    let special = ids.map { token, id in
        let side = strips[token]
        return Special(
            scalars: Array(token.unicodeScalars), id: id, takesBefore: side == "left" || side == "both",
            takesBehind: side == "right" || side == "both")
    }.sorted { $0.scalars.count > $1.scalars.count }
    let first = Set(special.compactMap { $0.scalars.first })
    let anyTakesBefore = special.contains { $0.takesBefore }
    var parts: [Part] = []
    var end = 0
    var at = 0
    while at < all.count {
        let mayBegin = first.contains(all[at]) || (anyTakesBefore && white.contains(all[at]))
        let found =
            mayBegin ? special.lazy.compactMap { one in one.end(in: all, at: at).map { (one.id, $0) } }.first : nil
        guard let (id, behind) = found else {
            at += 1
            continue
        }
        if at > end { parts.append(.text(text(all[end..<at]), start: end == 0)) }
        parts.append(.special(id))
        end = behind
        at = behind
    }
    if end < all.count { parts.append(.text(text(all[end...]), start: end == 0)) }
    return parts
}

/// A text with what the contract leaves to the caller of llama.cpp's tokenizer.
public func asLlamaCppReads(_ given: String, _ contract: Contract, start: Bool) -> String {
    let normal = contract.normalizer == "NFC" ? given.precomposedStringWithCanonicalMapping : given
    let prefixed = contract.spacePrefix == "every" || (contract.spacePrefix == "first" && start)
    guard prefixed, let first = normal.unicodeScalars.first, first != " ", first != "\u{2581}" else { return normal }
    return " " + normal
}

/// Ids of a rendered chat. Nothing is added: the template writes its own BOS, and an EOS would end it.
public func chatIds(_ tokenizer: any TextToIds, _ contract: Contract, _ rendered: String) throws -> [Int] {
    guard let ids = contract.specialIds else {
        throw Refusal("bad_value", "The manifest does not name the special tokens.", "Export the artifact again.")
    }
    return try promptParts(rendered, ids, contract.specialStrips).flatMap { part in
        switch part {
        case .special(let id): [id]
        case .text(let text, let start): try tokenizer.tokenize(text, start: start)
        }
    }
}

/// Where a chat's messages begin that can be left out, and where those end; nil where there are none.
public func oldest(_ messages: [Message]) -> Range<Int>? {
    let roles = messages.map { $0["role"].string ?? "" }
    guard let first = roles.firstIndex(where: { $0 != "system" && $0 != "developer" }),
        let second = roles[(first + 1)...].firstIndex(of: "user")
    else { return nil }
    return first..<second
}

/// Ids of a chat, less its oldest exchanges where they leave no room for `most` tokens, or half the context; and the
/// messages that are kept.
public func fittedChat(
    _ tokenizer: any TextToIds, _ contract: Contract, _ messages: [Message], _ most: Int
) throws -> (ids: [Int], kept: [Message]) {
    var kept = messages
    while true {
        let text = try renderChat(contract.chatTemplate ?? "", contract.specialTokens, kept)
        let ids = try chatIds(tokenizer, contract, text)
        let room = contract.contextLength - ids.count
        guard let left = oldest(kept), room < min(most, contract.contextLength / 2) else {
            return (try checkRoom(ids, contract), kept)
        }
        kept.removeSubrange(left)
    }
}

/// The ids of a prompt, where the context holds them and an answer.
private func checkRoom(_ ids: [Int], _ contract: Contract) throws -> [Int] {
    if ids.isEmpty { throw Refusal("empty", "The prompt has no tokens.", "Write something.") }
    if ids.count >= contract.contextLength {
        let words = "The prompt has \(ids.count) tokens, the context holds \(contract.contextLength) with an answer."
        throw Refusal("too_long", words, "Ask in fewer words.")
    }
    return ids
}

/// What stands before a text that is gone on with: BOS as the contract says.
public func idsBefore(_ contract: Contract) -> [Int] {
    contract.addBos ? [contract.bosId].compactMap { $0 } : []
}

/// Ids of a text to be gone on with, in which nothing is a special token.
public func textIds(_ tokenizer: any TextToIds, _ contract: Contract, _ text: String) throws -> [Int] {
    try checkRoom(idsBefore(contract) + tokenizer.tokenize(text, start: true), contract)
}
