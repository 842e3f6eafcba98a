package io.edgekd.demo

import java.io.File

/** A `tokenizer.json` of byte-level BPE, for runtimes without a tokenizer of their own. */
class TokenizerFile(file: File) : TextToIds {
    private val vocabulary: Map<String, Int>
    private val texts: Map<Int, String>
    private val added: Map<Int, String>
    private val ranks = HashMap<Pair<String, String>, Int>()
    private val splits: List<Regex>
    private val individualDigits: Boolean
    private val normalizer: String?
    private val ignoresMerges: Boolean

    init {
        val data = objectOf(Json.parse(file.readText()))
        val model = objectOf(data["model"])
        val steps = steps(data["pre_tokenizer"])
        val known = setOf("Split", "ByteLevel", "Digits")
        val strange = steps.map { it["type"] }.firstOrNull { it !in known }
        if (model["type"] != "BPE" || strange != null || steps.none { it["type"] == "ByteLevel" }) {
            throw Refusal("bad_value", "tokenizer.json is no byte-level BPE (${strange ?: model["type"]}).", "Use the GGUF flavour.")
        }
        normalizer = data["normalizer"]?.let { objectOf(it)["type"] as String }
        if (normalizer != null && normalizer != "NFC") {
            throw Refusal("bad_value", "tokenizer.json: the normalizer $normalizer is not known here.", "Use the GGUF flavour.")
        }
        vocabulary = objectOf(model["vocab"]).entries.associate { it.key as String to (it.value as Long).toInt() }
        texts = vocabulary.entries.associate { it.value to it.key }
        added = (data["added_tokens"] as? List<*>).orEmpty().map(::objectOf).associate {
            (it["id"] as Long).toInt() to if (it["special"] == true) "" else it["content"] as String
        }
        (model["merges"] as List<*>).forEachIndexed { rank, merge ->
            val (left, right) = if (merge is String) merge.split(" ") else (merge as List<*>).map { it as String }
            ranks[left to right] = rank
        }
        ignoresMerges = model["ignore_merges"] == true
        individualDigits = steps.any { it["type"] == "Digits" && it["individual_digits"] == true }
        val own = steps.filter { it["type"] == "ByteLevel" && it["use_regex"] != false }.map { GPT2 }
        splits = steps.filter { it["type"] == "Split" }.map { expression(objectOf(it["pattern"])["Regex"] as String) } + own.map(::expression)
    }

    override fun tokenize(text: String, start: Boolean): List<Int> {
        val normal = if (normalizer == "NFC") java.text.Normalizer.normalize(text, java.text.Normalizer.Form.NFC) else text
        var words = listOf(normal)
        if (individualDigits) words = words.flatMap { isolated(Regex("\\p{N}"), it) }
        for (split in splits) words = words.flatMap { isolated(split, it) }
        return words.flatMap(::merged)
    }

    /** The bytes a token stands for; none for a special one and for an id without a token. */
    fun bytes(id: Int): ByteArray {
        added[id]?.let { return it.toByteArray() }
        val text = texts[id] ?: return ByteArray(0)
        return if (text.all { it in BYTES }) ByteArray(text.length) { BYTES.getValue(text[it]).toByte() } else text.toByteArray()
    }

    private fun isolated(split: Regex, text: String): List<String> {
        val found = ArrayList<String>()
        var end = 0
        for (match in split.findAll(text)) {
            if (match.value.isEmpty()) continue
            if (match.range.first > end) found += text.substring(end, match.range.first)
            found += match.value
            end = match.range.last + 1
        }
        if (end < text.length) found += text.substring(end)
        return found
    }

    /** A word's tokens: the pair of the lowest rank is joined, until there is none. */
    private fun merged(word: String): List<Int> {
        val whole = word.toByteArray().map { CHARS[it.toInt() and 0xff].toString() }
        if (ignoresMerges) vocabulary[whole.joinToString("")]?.let { return listOf(it) }
        val parts = whole.toMutableList()
        while (parts.size > 1) {
            val at = (0 until parts.size - 1).minByOrNull { ranks[parts[it] to parts[it + 1]] ?: Int.MAX_VALUE }!!
            if (parts[at] to parts[at + 1] !in ranks) break
            parts[at] += parts.removeAt(at + 1)
        }
        return parts.map { vocabulary[it] ?: throw Refusal("bad_value", "The tokenizer has no token for '$it'.", "Use another tokenizer.") }
    }

    private companion object {
        const val GPT2 = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
        val CHARS = alphabet()
        val BYTES = CHARS.withIndex().associate { it.value to it.index }

        /** White space as Unicode has it: to a JVM, unlike to Android, `\s` is ASCII's. */
        fun expression(pattern: String) = Regex(if (System.getProperty("java.vm.name") == "Dalvik") pattern else "(?U)$pattern")

        fun objectOf(value: Any?): Map<*, *> = value as? Map<*, *> ?: throw Refusal("bad_value", "tokenizer.json is no tokenizer.", "Export the artifact again.")

        fun steps(value: Any?): List<Map<*, *>> {
            val step = objectOf(value ?: return emptyList())
            return if (step["type"] == "Sequence") (step["pretokenizers"] as List<*>).flatMap(::steps) else listOf(step)
        }

        /** GPT-2's printable character of every byte. */
        fun alphabet(): List<Char> {
            var other = 255
            return (0..255).map { if (it in 0x21..0x7e || it in 0xa1..0xac || it in 0xae..0xff) it.toChar() else (++other).toChar() }
        }
    }
}
