package io.edgekd.demo

import java.io.File
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** A program in ExecuTorch's runtime. Its cache is inside the program; its tokenizer is `tokenizer.json`. */
private class ExecutorchEngine(private val module: Module, private val tokenizer: TokenizerFile, override val threads: Int) : Engine {
    private var logits = FloatArray(0)

    override fun tokenize(text: String, start: Boolean): List<Int> = tokenizer.tokenize(text, start)

    override fun bytes(id: Int): ByteArray = tokenizer.bytes(id)

    /** What is cached is written over. */
    override fun reset() {}

    override fun feed(ids: IntArray, used: Int) {
        val tokens = Tensor.fromBlob(LongArray(ids.size) { ids[it].toLong() }, longArrayOf(1, ids.size.toLong()))
        val position = Tensor.fromBlob(longArrayOf(used.toLong()), longArrayOf(1))
        logits = module.forward(EValue.from(tokens), EValue.from(position))[0].toTensor().dataAsFloatArray
    }

    override fun best(): Int = logits.indices.maxByOrNull { logits[it] }!!

    override fun close() = module.destroy()
}

/** What this flavour of the app runs. */
object Engines {
    val targets = setOf("executorch")

    /** ExecuTorch's classes load their library themselves. */
    fun prepare() {}

    fun open(artifact: Artifact, threads: Int): Engine {
        val tokenizer = TokenizerFile(File(artifact.folder, "tokenizer.json"))
        val module = try {
            Module.load(artifact.mainFile.path, Module.LOAD_MODE_MMAP, threads)
        } catch (error: RuntimeException) {
            throw Refusal("not_loaded", "ExecuTorch does not load ${artifact.manifest.mainFile}: ${error.message}.", "Export the artifact again.")
        }
        return ExecutorchEngine(module, tokenizer, threads)
    }
}
