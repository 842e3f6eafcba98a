package io.edgekd.demo

/** Tokens that are waited for when a first character is looked for: more have no text at all. */
private const val MOST_SILENT_TOKENS = 16

private const val ENGLISH =
    "A small model that runs on the device in your hand answers without a network, and what you ask it stays " +
        "with you. It reads the words of a question piece by piece, keeps what it has read in a cache, and then writes " +
        "one piece after another, each chosen from thousands by its likelihood. How soon the first one comes depends on " +
        "the length of the question; how fast the others follow depends on how quickly the weights can be read from " +
        "memory, since every one of them is read for every piece. A phone that grows warm slows down, so a short " +
        "measurement is kinder than a long one. What is told here was measured on this device, with the very file that " +
        "was verified elsewhere, and nothing of it was guessed. "

/** What the clock said while one request was served, in seconds: the terms of edgekd's benchmarks/definitions.py. */
class Request(
    private val textIn: Double,
    private val idsReady: Double,
    private val prefilled: Double,
    private val decoded: List<Double>,
    private val chosen: List<Double>,
    private val chunks: List<Double>,
) {
    val tokenizeS get() = idsReady - textIn
    val prefillS get() = prefilled - idsReady

    /** From the ids to the first token chosen. */
    val firstTokenS get() = chosen[0] - idsReady

    /** From the text to the first whole character; null where no token had text. */
    val ttftS get() = chunks.firstOrNull()?.minus(textIn)

    /** (latency − TTFT) ÷ (tokens − 1). */
    val itlS get() = ttftS?.takeIf { chosen.size > 1 }?.let { (chosen.last() - textIn - it) / (chosen.size - 1) }

    /** Gaps between pieces of text. */
    val iclS get() = chunks.zipWithNext { earlier, later -> later - earlier }

    /** From the first token chosen to the last. */
    val decodeS get() = chosen.last() - chosen.first()
    val decodeTokens get() = chosen.size - 1
    val samplingS get() = decoded.mapIndexed { i, time -> chosen[i + 1] - time }
}

/** Serve one greedy request with a stopwatch; the end of a text does not end it. */
fun serve(
    decoder: Decoder, text: String, decodeTokens: Int, untilText: Boolean = false, clock: () -> Double = { System.nanoTime() / 1e9 },
): Request {
    val stream = Utf8Stream()
    val decoded = ArrayList<Double>()
    val chosen = ArrayList<Double>()
    val chunks = ArrayList<Double>()
    fun choose(): Int {
        val token = decoder.engine.best()
        chosen += clock()
        if (stream.push(decoder.engine.bytes(token)).isNotEmpty()) chunks += clock()
        return token
    }
    decoder.reset()
    val textIn = clock()
    val ids = decoder.engine.tokenize(text, true)
    val idsReady = clock()
    decoder.feed(ids)
    val prefilled = clock()
    var token = choose()
    while (chosen.size <= decodeTokens && !(untilText && chunks.isNotEmpty())) {
        decoder.feed(listOf(token))
        decoded += clock()
        token = choose()
    }
    return Request(textIn, idsReady, prefilled, decoded, chosen, chunks)
}

/** Serve a request up to its first whole character. */
fun firstText(decoder: Decoder, text: String, promptTokens: Int): Request =
    serve(decoder, text, minOf(MOST_SILENT_TOKENS, decoder.contract.contextLength - promptTokens), untilText = true)

/** English text that the tokenizer reads as exactly so many tokens. */
fun realText(tokenizer: TextToIds, tokens: Int): String {
    fun count(text: String) = tokenizer.tokenize(text, true).size
    for (start in ENGLISH.indices step 64) {
        val text = ENGLISH.drop(start) + ENGLISH.repeat(1 + 20 * tokens / ENGLISH.length)
        var low = 0
        var high = text.length
        while (low < high) {
            val middle = (low + high) / 2
            if (count(text.take(middle)) < tokens) low = middle + 1 else high = middle
        }
        (maxOf(1, low - 4)..low + 8).firstOrNull { count(text.take(it)) == tokens }?.let { return text.take(it) }
    }
    throw Refusal("bad_value", "The tokenizer makes $tokens tokens of no text.", "Export the artifact again.")
}
