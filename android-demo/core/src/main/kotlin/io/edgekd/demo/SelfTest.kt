package io.edgekd.demo

/** What the self-test found; `failure` is a sentence, and `answers` 0 says that nothing was recorded. */
data class SelfTestResult(val answers: Int, val tokens: Int, val failure: String?)

/** Run the manifest's golden answers again: greedy tokens of ids, which end before the first near tie. */
fun selfTest(decoder: Decoder, golden: List<GoldenAnswer>): SelfTestResult {
    var tokens = 0
    for ((number, answer) in golden.withIndex()) {
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
