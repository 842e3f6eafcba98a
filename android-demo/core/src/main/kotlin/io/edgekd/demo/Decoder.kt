package io.edgekd.demo

/** Most ids that an engine is fed at once. */
const val BATCH_TOKENS = 512

/** A runtime with a model, a tokenizer and a cache. */
interface Engine : TextToIds {
    val threads: Int

    /** The bytes a token stands for; none for a special one. They may end inside a UTF-8 character. */
    fun bytes(id: Int): ByteArray

    /** Empty the cache. */
    fun reset()

    /** Write ids, at most BATCH_TOKENS, behind `used` cached ones. */
    fun feed(ids: IntArray, used: Int)

    /** The most likely next id. */
    fun best(): Int

    fun close()
}

/** What chat, self-test and benchmark do with an engine. */
class Decoder(val engine: Engine, val contract: Contract) {
    private var used = 0

    fun reset() {
        used = 0
        engine.reset()
    }

    /** Write ids behind the cached ones. */
    fun feed(ids: List<Int>) {
        if (used + ids.size > contract.contextLength) {
            val words = "$used + ${ids.size} tokens exceed the context of ${contract.contextLength}."
            throw Refusal("too_long", words, "Begin a new chat.")
        }
        for (piece in ids.chunked(BATCH_TOKENS)) {
            engine.feed(piece.toIntArray(), used)
            used += piece.size
        }
    }

    /** New greedy tokens, one at a time, until an end-of-sequence token, `count`, or a full cache. */
    fun generate(ids: List<Int>, count: Int): Sequence<Int> = sequence {
        reset()
        feed(ids)
        for (n in 1..count) {
            val token = engine.best()
            if (token in contract.eosIds) return@sequence
            yield(token)
            if (n == count || used == contract.contextLength) return@sequence
            feed(listOf(token))
        }
    }

    /** Text behind `ids`, piece by piece, until the model ends it or `stopped` says so; the number of tokens. */
    fun stream(ids: List<Int>, count: Int, stopped: () -> Boolean, onPiece: (String) -> Unit): Int {
        val text = Utf8Stream()
        var tokens = 0
        for (token in generate(ids, count)) {
            tokens++
            onPiece(text.push(engine.bytes(token)))
            if (stopped()) break
        }
        onPiece(text.end())
        return tokens
    }
}
