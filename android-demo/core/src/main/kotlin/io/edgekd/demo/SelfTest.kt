package io.edgekd.demo

/** What the self-test found; `failure` is a sentence, and `answers` 0 says that nothing was recorded. */
data class SelfTestResult(val answers: Int, val tokens: Int, val failure: String?)

/** Run the manifest's golden answers again: the ids of texts, and greedy tokens of ids, which end before the first near tie. */
fun selfTest(decoder: Decoder, golden: List<GoldenAnswer>): SelfTestResult {
    var tokens = 0
    for ((number, answer) in golden.withIndex()) {
        misread(decoder, answer)?.let { return SelfTestResult(golden.size, tokens, "Golden answer ${number + 1}: $it") }
        val given = decoder.generate(answer.promptIds, answer.tokens.size).toList()
        val at = answer.tokens.indices.firstOrNull { answer.tokens[it] != given.getOrNull(it) }
        if (at != null) {
            val found = given.getOrNull(at)?.toString() ?: "missing"
            val words = "Golden answer ${number + 1}: token ${at + 1} is $found, not ${answer.tokens[at]}."
            return SelfTestResult(golden.size, tokens + at, words)
        }
        tokens += answer.tokens.size
    }
    return SelfTestResult(golden.size, tokens, null)
}

/** What is wrong with the ids of an answer's text, in a sentence. */
private fun misread(decoder: Decoder, answer: GoldenAnswer): String? {
    val text = answer.text ?: return null
    val contract = decoder.contract
    val rendered = answer.messages?.let { renderChat(contract.chatTemplate.orEmpty(), contract.specialTokens, it) }
    if (rendered != null && rendered != text) return "its chat is rendered as another text."
    val ids = if (rendered == null) textIds(decoder.engine, contract, text) else chatIds(decoder.engine, contract, text)
    return if (ids == answer.promptIds) null else "its text is read as $ids, not ${answer.promptIds}."
}
