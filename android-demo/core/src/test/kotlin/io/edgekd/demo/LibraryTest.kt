package io.edgekd.demo

import java.io.ByteArrayInputStream
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.nio.file.Files
import java.security.MessageDigest
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertNull
import org.junit.Assert.assertThrows
import org.junit.Test

private class Given(private val contents: Map<String, String>, private val broken: String? = null) : Source {
    override fun files() = contents.mapValues { it.value.length.toLong() }

    override fun open(name: String): InputStream =
        if (name == broken) throw IOException("no space left on device") else ByteArrayInputStream(contents.getValue(name).toByteArray())
}

class LibraryTest {
    private val root = Files.createTempDirectory("edgekd").toFile()
    private val library = Library(root, setOf("gguf"))
    private val sum = MessageDigest.getInstance("SHA-256").digest("weights".toByteArray()).joinToString("") { "%02x".format(it) }
    private val contract = mapOf("context_length" to 8, "vocab_size" to 8, "eos_ids" to listOf(0), "add_bos" to false)
    private val manifest = Json.write(
        mapOf("schema_version" to 1, "name" to "n", "target" to "gguf", "recipe" to "r", "main_file" to "a/m", "files" to mapOf("a/m" to sum), "contract" to contract),
    )
    private val whole = mapOf("manifest.json" to manifest, "a/m" to "weights", "not listed" to "x")

    private fun code(source: Source, free: Long = 1L shl 30) = assertThrows(Refusal::class.java) { library.take(source, free) }.code

    @Test
    fun anArtifactComesWhole() {
        assertNull(library.kept())
        assertEquals("n", library.take(Given(whole), 1L shl 20).manifest.name)
        assertEquals("n", library.kept()!!.manifest.name)
        assertEquals(setOf("manifest.json", "a"), File(root, "model").list()!!.toSet())
    }

    @Test
    fun whatFailsLeavesWhatWasThere() {
        library.take(Given(whole), 1L shl 20)
        assertEquals("storage", code(Given(whole, broken = "a/m")))
        assertEquals("storage", code(Given(whole), free = 3))
        assertEquals("file_missing", code(Given(whole - "a/m")))
        assertEquals("file_changed", code(Given(whole + ("a/m" to "Weights"))))
        assertEquals("no_manifest", code(Given(whole - "manifest.json")))
        assertEquals("weights", library.kept()!!.mainFile.readText())
        assertFalse(File(root, "incoming").exists())
    }

    @Test
    fun whatAKilledImportLeftIsRemoved() {
        File(root, "incoming/half").apply { parentFile!!.mkdirs() }.writeText("half")
        assertNull(library.kept())
        assertFalse(File(root, "incoming").exists())
    }
}
