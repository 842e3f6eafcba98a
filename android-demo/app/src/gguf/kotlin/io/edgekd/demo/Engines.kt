package io.edgekd.demo

import java.io.File

/** llama.cpp through `native/edgekd_jni.c`. */
internal object Llama {
    external fun open(path: ByteArray, context: Int, batch: Int, threads: Int): Long

    external fun vocabSize(handle: Long): Int

    external fun tokenize(handle: Long, text: ByteArray): IntArray?

    external fun piece(handle: Long, token: Int, special: Boolean): ByteArray?

    external fun reset(handle: Long)

    external fun feed(handle: Long, ids: IntArray): Int

    external fun best(handle: Long): Int

    external fun close(handle: Long)
}

/** A GGUF file in llama.cpp. */
private class GgufEngine(private val handle: Long, private val contract: Contract, override val threads: Int) : Engine {
    private val special = contract.specialIds.orEmpty().values.toSet()

    override fun tokenize(text: String, start: Boolean): List<Int> =
        Llama.tokenize(handle, asLlamaCppReads(text, contract, start).toByteArray())?.toList() ?: throw OutOfMemoryError()

    /** llama.cpp takes some tokens for special by their text; the contract knows which are. */
    override fun bytes(id: Int): ByteArray = Llama.piece(handle, id, id !in special) ?: ByteArray(0)

    override fun reset() = Llama.reset(handle)

    override fun feed(ids: IntArray, used: Int) {
        val status = Llama.feed(handle, ids)
        if (status != 0) throw Refusal("not_loaded", "llama.cpp failed on ${ids.size} tokens (status $status).", "Load the model again.")
    }

    override fun best(): Int = Llama.best(handle)

    override fun close() = Llama.close(handle)
}

/** What this flavour of the app runs. */
object Engines {
    val targets = setOf("gguf")

    /** Load the native libraries, which an app finds by their names. */
    fun prepare() = System.loadLibrary("edgekd_jni")

    fun open(artifact: Artifact, threads: Int): Engine {
        val contract = artifact.manifest.contract
        val handle = Llama.open("${artifact.mainFile.path}\u0000".toByteArray(), contract.contextLength, BATCH_TOKENS, threads)
        if (handle == 0L) {
            val words = "llama.cpp does not load ${artifact.manifest.mainFile}, or has no memory for ${contract.contextLength} tokens."
            throw Refusal("not_loaded", words, "Close other apps, or export the artifact again.")
        }
        if (Llama.vocabSize(handle) != contract.vocabSize) {
            val size = Llama.vocabSize(handle)
            Llama.close(handle)
            throw Refusal("bad_value", "The model has a vocabulary of $size, the manifest one of ${contract.vocabSize}.", "Export the artifact again.")
        }
        return GgufEngine(handle, contract, threads)
    }
}
