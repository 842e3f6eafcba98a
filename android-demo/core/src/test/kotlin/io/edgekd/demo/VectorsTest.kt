package io.edgekd.demo

import java.io.File
import java.nio.file.Files
import java.text.SimpleDateFormat
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Assert.assertTrue
import org.junit.Test

private val FOLDER = File(System.getProperty("edgekd.vectors") ?: "../../tests/vectors")

private fun read(name: String) = Json.parse(File(FOLDER, "$name.json").readText()) as Map<*, *>

private fun cases(name: String) = (read(name)["cases"] as List<*>).map { it as Map<*, *> }

private fun bytes(hex: Any?) = (hex as String).chunked(2).map { it.toInt(16).toByte() }.toByteArray()

private fun int(value: Any?) = (value as Long).toInt()

@Suppress("UNCHECKED_CAST")
private fun <T> typed(value: Any?) = value as T

/** The code of what is refused, or "none". */
private fun refused(onRefusal: (Refusal) -> Unit = {}, work: () -> Unit): String = try {
    work()
    "none"
} catch (error: Refusal) {
    onRefusal(error)
    error.code
}

/** The golden vectors, which edgekd, the page and the iOS demo are held to as well. */
class VectorsTest {
    @Test
    fun hashes() = cases("hashes").forEach { case ->
        val file = File.createTempFile("edgekd", null)
        file.outputStream().buffered().use { stream -> repeat(int(case["times"])) { stream.write(bytes(case["hex"])) } }
        assertEquals("${case["name"]}", case["expect"], sha256(file))
        file.delete()
    }

    @Test
    fun manifests() = cases("manifests").forEach { case ->
        val folder = Files.createTempDirectory("edgekd").toFile()
        typed<Map<String, String>>(case["files"]).forEach { (name, text) ->
            File(folder, name).apply { parentFile.mkdirs() }.writeText(text)
        }
        case["manifest"]?.let { File(folder, "manifest.json").writeText(it as String) }
        val targets = setOf(case["target"] as String)
        val expect = case["expect"] as Map<*, *>
        val code = refused { Artifact.read(folder, targets).checkFiles() }
        assertEquals("${case["name"]}", expect["refused"] ?: "none", code)
        if (code == "none") {
            val artifact = Artifact.read(folder, targets)
            val manifest = artifact.manifest
            val contract = manifest.contract
            val found = mapOf(
                "name" to manifest.name, "target" to manifest.target, "main_file" to manifest.mainFile,
                "context_length" to contract.contextLength.toLong(), "vocab_size" to contract.vocabSize.toLong(),
                "bos_id" to contract.bosId?.toLong(), "eos_ids" to contract.eosIds.map { it.toLong() },
                "add_bos" to contract.addBos, "size_bytes" to artifact.sizeBytes, "cache_bytes" to manifest.cacheBytes,
            )
            assertEquals("${case["name"]}", expect["ok"], found)
        }
        folder.deleteRecursively()
    }

    @Test
    fun bundles() = cases("bundles").forEach { case ->
        val folder = Files.createTempDirectory("edgekd").toFile()
        val files = typed<Map<String, String>>(case["files"]) + mapOf(SUMS to case["bundle"], SIGNATURE to case["signature"])
        files.forEach { (name, text) -> (text as String?)?.let { File(folder, name).apply { parentFile.mkdirs() }.writeText(it) } }
        val expect = case["expect"] as Map<*, *>
        val code = refused { Artifact.read(folder, setOf("gguf")).checkFiles(case["public_key"] as String) }
        assertEquals("${case["name"]}", expect["refused"] ?: "none", code)
        folder.deleteRecursively()
    }

    @Test
    fun prompts() {
        val all = read("prompts")
        val now = SimpleDateFormat("yyyy-MM-dd'T'HH:mm:ss").parse(all["now"] as String)
        val ids = typed<Map<String, Long>>(all["special_ids"]).mapValues { it.value.toInt() }
        var renderedFull = 0
        for (case in cases("prompts")) {
            val template = (all["templates"] as Map<*, *>)[case["template"]] as Map<*, *>
            val chat = typed<List<Message>>((all["chats"] as Map<*, *>)[case["chat"]])
            val tools = if (case["tools"] == true) typed<List<Any?>>(all["tools"]) else null
            val expect = case["expect"] as Map<*, *>
            var text = ""
            val code = refused {
                text = renderChat(
                    template["source"] as String, typed(all["special_tokens"]), chat, tools, case["add_generation_prompt"] as Boolean,
                ) { timeNow(it, now) }
            }
            if ("refused" in expect) {
                assertEquals("${case["name"]}", "template_refused", code)
                continue
            }
            if (template["level"] == "full" && code == "template_refused") continue
            if (template["level"] == "full") renderedFull++
            assertEquals("${case["name"]}", "none", code)
            assertEquals("${case["name"]}", expect["text"], text)
            val parts = promptParts(text, ids, typed(all["special_strips"])).map {
                if (it is Part.Special) it.id.toLong() else (it as Part.Text).let { part -> mapOf("text" to part.text, "start" to part.start) }
            }
            assertEquals("${case["name"]}", expect["parts"], parts)
        }
        assertTrue("templates of level full that are rendered: $renderedFull", renderedFull > 80)
    }

    @Test
    fun texts() = cases("texts").forEach { case ->
        val given = case["contract"] as Map<*, *>
        val contract = Contract(
            9, 300, (given["bos_id"] as Long?)?.toInt(), listOf(1), given["add_bos"] as Boolean, null,
            normalizer = given["normalizer"] as String?, spacePrefix = given["space_prefix"] as String?,
        )
        val expect = case["expect"] as Map<*, *>
        assertEquals("${case["name"]}", expect["before"], idsBefore(contract).map { it.toLong() })
        assertEquals("${case["name"]}", expect["text"], asLlamaCppReads(case["text"] as String, contract, case["start"] as Boolean))
    }

    @Test
    fun history() = cases("history").forEach { case ->
        val messages = typed<List<Message>>(case["messages"])
        val contract = Contract(
            int(case["context_length"]), 1 shl 20, null, listOf(0), false, read("history")["template"] as String, specialIds = emptyMap(),
        )
        val tokenizer = TextToIds { text, _ -> text.map { it.code } }
        val expect = case["expect"] as Map<*, *>
        val code = refused { fittedChat(tokenizer, contract, messages, int(case["max_tokens"])) }
        assertEquals("${case["name"]}", expect["refused"] ?: "none", code)
        if (code == "none") {
            val (ids, kept) = fittedChat(tokenizer, contract, messages, int(case["max_tokens"]))
            assertEquals("${case["name"]}", expect["text"], String(CharArray(ids.size) { ids[it].toChar() }))
            assertEquals("${case["name"]}", expect["keep"], kept.map { one -> messages.indexOfFirst { it === one }.toLong() })
        }
    }

    @Test
    fun room() = cases("room").forEach { case ->
        val given = case["contract"] as Map<*, *>
        val contract = Contract(int(given["context_length"]), 300, (given["bos_id"] as Long?)?.toInt(), listOf(1), given["add_bos"] as Boolean, null)
        val expect = case["expect"] as Map<*, *>
        val text = "x".repeat(int(case["length"]))
        var words = ""
        var tokens: Long? = null
        val code = refused({ words = it.message!! }) { tokens = textIds({ given, _ -> given.map { 7 } }, contract, text).size.toLong() }
        assertEquals("${case["name"]}", expect["refused"] ?: "none", code)
        assertEquals("${case["name"]}", expect["tokens"], tokens)
        if (code == "too_long") assertEquals("${case["name"]}", expect["numbers"], Regex("\\d+").findAll(words).map { it.value.toLong() }.toList())
    }

    @Test
    fun streams() = cases("streams").forEach { case ->
        val stream = Utf8Stream()
        val expect = case["expect"] as Map<*, *>
        assertEquals("${case["name"]}", expect["shown"], (case["tokens"] as List<*>).map { stream.push(bytes(it)) })
        assertEquals("${case["name"]}", expect["end"], stream.end())
    }

    @Test
    fun statistics() = cases("statistics").forEach { case ->
        val runs = (case["runs"] as List<*>).map { it as Map<*, *> }
        val expect = case["expect"] as Map<*, *>
        fun near(found: Double, wanted: Any?) = (wanted as Number).toDouble().let { assertEquals("${case["name"]}", it, found, 1e-9 * Math.abs(it)) }
        fun numbers(value: Any?) = (value as List<*>).map { (it as Number).toDouble() }
        val gaps = runs.flatMap { numbers(it["inter_token_s"] ?: it["icl_s"]) }
        near(median(runs.map { (it["load_s"] as Number).toDouble() }), expect["load_s"])
        near(percentile(gaps, 95.0), expect["inter_token_p95_s"] ?: expect["icl_p95_s"])
        val tokens = int(case["decode_tokens"])
        near(median(runs.map { tokensPerSecond(tokens, numbers(it["inter_token_s"] ?: it["icl_s"]).sum()) }), expect["decode_tokens_per_s"])
    }

    @Test
    fun json() {
        for (text in listOf("", "{", "[1,]", "{\"a\" 1}", "NaN", "01", "1 2", "\"\\x\"", "'a'", "[1}", "\"\u0001\"")) {
            assertTrue(text, runCatching { Json.parse(text) }.exceptionOrNull() is NotJson)
        }
        val value = mapOf("ä\"\\\n" to listOf(1L, -2.5, true, null, "\u20ac"), "empty" to emptyMap<String, Any?>())
        assertEquals(value, Json.parse(Json.write(value)))
        assertEquals("\"\\u20ac\"", Json.write("\u20ac", ascii = true))
        assertEquals("{\n    \"a\": [\n        1,\n        2\n    ]\n}", Json.write(mapOf("a" to listOf(1, 2)), indent = 4))
    }
}

/** An engine whose answers are known. */
private class Scripted(private val answers: Map<Int, Int>, private val text: (Int) -> ByteArray) : Engine {
    override val threads = 1
    var last = 0

    override fun tokenize(text: String, start: Boolean) = text.split(" ").map { it.length }

    override fun bytes(id: Int) = text(id)

    override fun reset() {
        last = 0
    }

    override fun feed(ids: IntArray, used: Int) {
        last = ids.last()
    }

    override fun best() = answers.getValue(last)

    override fun close() {}
}

class CoreTest {
    private val contract = Contract(40, 300, null, listOf(9), false, null)
    private val engine = Scripted(mapOf(1 to 2, 2 to 3, 3 to 4, 4 to 9, 5 to 5)) { "é".toByteArray().copyOfRange(it % 2, it % 2 + 1) }

    @Test
    fun generationEndsAtTheEndOfTheTextAtItsCountAndAtTheContext() {
        assertEquals(listOf(2, 3, 4), Decoder(engine, contract).generate(listOf(1), 10).toList())
        assertEquals(listOf(2, 3), Decoder(engine, contract).generate(listOf(1), 2).toList())
        assertEquals(36, Decoder(engine, contract).generate(List(5) { 5 }, 100).count())
        assertEquals("too_long", refused { Decoder(engine, contract).feed(List(41) { 5 }) })
    }

    @Test
    fun aStreamShowsWholeCharactersAndStops() {
        val shown = ArrayList<String>()
        assertEquals(3, Decoder(engine, contract).stream(listOf(1), 10, { false }) { shown += it })
        assertEquals(listOf("", "é", "", "\ufffd"), shown)
        assertEquals(1, Decoder(engine, contract).stream(listOf(1), 10, { true }) {})
    }

    @Test
    fun theSelfTestNamesTheFirstTokenThatDiffers() {
        val decoder = Decoder(engine, contract)
        val right = GoldenAnswer(listOf(1), listOf(2, 3))
        assertEquals(SelfTestResult(2, 5, null), selfTest(decoder, listOf(right, GoldenAnswer(listOf(1), listOf(2, 3, 4)))))
        val wrong = GoldenAnswer(listOf(1), listOf(2, 4))
        assertEquals(SelfTestResult(2, 3, "Golden answer 2: token 2 is 3, not 4."), selfTest(decoder, listOf(right, wrong)))
        assertEquals("Golden answer 1: token 1 is missing, not 9.", selfTest(decoder, listOf(GoldenAnswer(listOf(4), listOf(9)))).failure)
    }

    @Test
    fun theSelfTestReadsTextsAndChats() {
        val chats = Contract(40, 300, null, listOf(9), false, "{{ messages[0].content }}!", specialIds = mapOf("!" to 1))
        val decoder = Decoder(engine, chats)
        val chat = listOf(mapOf("role" to "user", "content" to "four"))
        fun failure(answer: GoldenAnswer) = selfTest(decoder, listOf(answer)).failure
        assertNull(failure(GoldenAnswer(listOf(4), listOf(), "four")))
        assertEquals("Golden answer 1: its text is read as [4], not [5].", failure(GoldenAnswer(listOf(5), listOf(), "four")))
        assertNull(failure(GoldenAnswer(listOf(4, 1), listOf(2, 3), "four!", chat)))
        assertEquals("Golden answer 1: token 1 is 2, not 3.", failure(GoldenAnswer(listOf(4, 1), listOf(3), "four!", chat)))
        assertEquals("Golden answer 1: its chat is rendered as another text.", failure(GoldenAnswer(listOf(4, 1), listOf(2), "four?", chat)))
    }

    @Test
    fun memoryIsRefusedWithTheNumbers() {
        val manifest = Manifest("n", "gguf", "r", "r", "f", mapOf("f" to ""), Contract(1000, 9, null, listOf(), false, null), 1, 1L shl 20, emptyList())
        val words = memoryShortage(manifest, 500L shl 20, 1500L shl 20)
        assertTrue(words, "needs 1596 MiB of memory (500 MiB of weights" in words!! && "there are 1500 MiB" in words)
        assertNull(memoryShortage(manifest, 500L shl 20, 1596L shl 20))
        assertEquals("The artifact has 2 MiB; the storage has 1 MiB left.", storageShortage(2L shl 20, 1L shl 20))
    }

    @Test
    fun aRequestIsTimedAsTheHarnessDoes() {
        var now = 0.0
        val request = serve(Decoder(Scripted(mapOf(4 to 1, 1 to 2, 2 to 2)) { "é".toByteArray().copyOfRange(it % 2, 2 - it % 2) }, contract), "four", 3) { now++ }
        assertEquals(1.0, request.tokenizeS, 0.0)
        assertEquals(1.0, request.prefillS, 0.0)
        assertEquals(2.0, request.firstTokenS, 0.0)
        assertEquals(3, request.decodeTokens)
        assertEquals(listOf(1.0, 1.0, 1.0), request.samplingS)
    }

    @Test
    fun textOfExactlySoManyTokens() {
        val words = TextToIds { text, _ -> text.split(" ").filter { it.isNotEmpty() }.map { it.length } }
        for (count in listOf(1, 7, 300)) assertEquals(count, words.tokenize(realText(words, count), true).size)
        assertEquals("bad_value", refused { realText({ text, _ -> List(2 * text.length) { 1 } }, 7) })
        assertArrayEquals(intArrayOf(3), BenchSettings(listOf(64, 3), 4, 1).fitted(9).promptTokens.toIntArray())
    }
}
