package io.edgekd.demo

import java.io.ByteArrayInputStream
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.nio.file.Files
import java.security.KeyPairGenerator
import java.security.MessageDigest
import java.security.Signature
import kotlin.io.encoding.Base64
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

private fun sumOf(text: String) = MessageDigest.getInstance("SHA-256").digest(text.toByteArray()).joinToString("") { "%02x".format(it) }

class LibraryTest {
    private val root = Files.createTempDirectory("edgekd").toFile()
    private val library = Library(root, setOf("gguf"))
    private val sum = sumOf("weights")
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
    fun withAKeyOnlyItsBundlesCome() {
        val pair = KeyPairGenerator.getInstance("Ed25519").generateKeyPair()
        val key = Base64.encode(pair.public.encoded.takeLast(32).toByteArray())
        val signed = Library(root, setOf("gguf"), key)
        fun bundle(files: Map<String, String>): Map<String, String> {
            val listed = files.mapValues { (_, text) -> mapOf("sha256" to sumOf(text), "bytes" to text.length) }
            val sums = Json.write(mapOf("schema_version" to 1, "files" to listed))
            val signer = Signature.getInstance("Ed25519").apply { initSign(pair.private) }.apply { update(sums.toByteArray()) }
            return files + mapOf(SUMS to sums, SIGNATURE to Base64.encode(signer.sign()))
        }
        fun code(files: Map<String, String>) = assertThrows(Refusal::class.java) { signed.take(Given(files), 1L shl 20) }.code
        val good = bundle(whole - "not listed" + ("LICENSE" to "free"))
        assertEquals("not_signed", code(whole))
        assertEquals("bad_signature", code(good + (SUMS to good.getValue(SUMS).replace("LICENSE", "LICENCE"))))
        assertEquals("file_changed", code(good + ("LICENSE" to "Free")))
        assertEquals("file_missing", code(good - "LICENSE"))
        assertNull(signed.kept())
        signed.take(Given(good + ("more" to "x")), 1L shl 20)
        signed.kept()!!.checkFiles(key)
        assertEquals(good.keys - "a/m" + "a", File(root, "model").list()!!.toSet())
        File(root, "model/LICENSE").writeText("mine")
        assertEquals("file_changed", assertThrows(Refusal::class.java) { signed.kept()!!.checkFiles(key) }.code)
    }

    @Test
    fun whatAKilledImportLeftIsRemoved() {
        File(root, "incoming/half").apply { parentFile!!.mkdirs() }.writeText("half")
        assertNull(library.kept())
        assertFalse(File(root, "incoming").exists())
    }
}
