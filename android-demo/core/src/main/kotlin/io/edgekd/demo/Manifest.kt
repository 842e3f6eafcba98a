package io.edgekd.demo

import java.io.File
import java.security.MessageDigest

const val NEWEST_SCHEMA = 1L
private const val MAX_TOKENS = 1L shl 24
private const val AGAIN = "Export the artifact again."

/** What a program that runs the artifact must know; see `edgekd.manifest.Contract`. */
class Contract(
    val contextLength: Int,
    val vocabSize: Int,
    val bosId: Int?,
    val eosIds: List<Int>,
    val addBos: Boolean,
    val chatTemplate: String?,
    val normalizer: String? = null,
    val specialTokens: Map<String, String> = emptyMap(),
    val specialIds: Map<String, Int>? = null,
    val specialStrips: Map<String, String> = emptyMap(),
    val spacePrefix: String? = null,
)

/**
 * Greedy tokens that the artifact's own runtime gave where it was verified or bundled. `text` is what the ids are of, where they are
 * of one, and `messages` the chat that the template renders so.
 */
class GoldenAnswer(val promptIds: List<Int>, val tokens: List<Int>, val text: String? = null, val messages: List<Message>? = null)

class Manifest(
    val name: String,
    val target: String,
    val recipe: String,
    val runtime: String,
    val mainFile: String,
    val files: Map<String, String>,
    val contract: Contract,
    val weightBytes: Long?,
    val kvBytesPerPosition: Long?,
    val golden: List<GoldenAnswer>,
) {
    /** Bytes of the cache of a whole context; null: the manifest does not tell. */
    val cacheBytes: Long? get() = kvBytesPerPosition?.times(contract.contextLength)

    /** As edgekd writes it: of the JSON of `files` with sorted keys, in ASCII. */
    val filesDigest: String
        get() {
            val sorted = files.toSortedMap().entries.joinToString(",", "{", "}") { (name, sum) ->
                Json.write(name, ascii = true) + ":" + Json.write(sum, ascii = true)
            }
            return hex(MessageDigest.getInstance("SHA-256").digest(sorted.toByteArray()))
        }

    companion object {
        /** The manifest of a text, checked as far as the app relies on it; `targets` are those that it runs. */
        fun parse(text: String?, targets: Set<String>): Manifest {
            if (text == null) throw Refusal("no_manifest", "The folder has no manifest.json.", "Choose an artifact of edgekd.")
            val value = try {
                Json.parse(text)
            } catch (error: NotJson) {
                throw Refusal("not_json", "manifest.json is not JSON: ${error.message}.", AGAIN)
            }
            if (value !is Map<*, *>) throw Refusal("not_json", "manifest.json holds no object.", AGAIN)
            return Fields(value, "").manifest(targets)
        }
    }
}

/** The keys of an object of the manifest, each read as what it must be. */
private class Fields(private val values: Map<*, *>, private val at: String) {
    fun bad(key: String, what: String, code: String = "bad_value"): Nothing =
        throw Refusal(code, "manifest.json: key '$at$key' is not $what.", AGAIN)

    fun text(key: String): String = (values[key] as? String)?.takeIf { it.isNotEmpty() } ?: bad(key, "text")

    fun optionalText(key: String): String? = values[key]?.let { it as? String ?: bad(key, "text") }

    fun count(key: String): Int =
        (values[key] as? Long)?.takeIf { it in 1..MAX_TOKENS }?.toInt() ?: bad(key, "a number of tokens")

    fun flag(key: String): Boolean = values[key] as? Boolean ?: bad(key, "true or false")

    fun bytes(key: String): Long? = values[key] as? Long

    fun list(key: String): List<*> = values[key] as? List<*> ?: bad(key, "a list")

    fun optional(key: String): Map<*, *>? = values[key]?.let { it as? Map<*, *> ?: bad(key, "an object") }

    fun fields(key: String): Fields = Fields(optional(key) ?: bad(key, "an object"), "$at$key.")

    fun ids(key: String, size: Int): List<Int> = list(key).map { id(it, key, size) }

    fun id(value: Any?, key: String, size: Int): Int =
        (value as? Long)?.takeIf { it in 0 until size }?.toInt() ?: bad(key, "of ids of the vocabulary")

    fun messages(key: String): List<Message>? = if (values[key] == null) null else list(key).map {
        (it as? Map<*, *> ?: bad(key, "a list of messages")).entries.associate { (name, value) -> name as String to value }
    }

    fun texts(key: String): Map<String, String> = optional(key).orEmpty().entries.associate { (name, value) ->
        name as String to (value as? String ?: bad("$key.$name", "text"))
    }

    fun manifest(targets: Set<String>): Manifest {
        val schema = (values["schema_version"] as? Long)?.takeIf { it >= 1 } ?: bad("schema_version", "a version")
        if (schema > NEWEST_SCHEMA) {
            val words = "manifest.json has schema $schema; this app reads up to $NEWEST_SCHEMA."
            throw Refusal("newer_schema", words, "Update the app.")
        }
        val target = text("target")
        if (target !in targets) {
            val words = "The artifact is for ${values["runtime"] ?: target}, which this app does not run."
            throw Refusal("other_target", words, "Export one for ${targets.joinToString(" or ")}.")
        }
        val files = optional("files")?.let { texts("files") } ?: bad("files", "an object")
        files.keys.forEach { if (!isInside(it)) bad("files.$it", "a name inside the folder", "leaves_folder") }
        val traffic = optional("traffic")?.let { Fields(it, "traffic.") }
        val mainFile = text("main_file").takeIf { it in files } ?: bad("main_file", "among files")
        val contract = fields("contract").contract()
        return Manifest(
            text("name"), target, text("recipe"), optionalText("runtime") ?: target, mainFile, files, contract,
            traffic?.bytes("weight_bytes"), traffic?.bytes("kv_bytes_per_position"), golden(contract.vocabSize),
        )
    }

    private fun golden(size: Int): List<GoldenAnswer> {
        val parity = optional("parity") ?: return emptyList()
        val answers = (parity["golden"] ?: return emptyList()) as? List<*> ?: bad("parity.golden", "a list")
        return answers.map {
            val fields = Fields(it as? Map<*, *> ?: bad("parity.golden", "a list of objects"), "parity.golden.")
            GoldenAnswer(fields.ids("prompt_ids", size), fields.ids("tokens", size), fields.optionalText("text"), fields.messages("messages"))
        }
    }

    private fun contract(): Contract {
        val size = count("vocab_size")
        return Contract(
            contextLength = count("context_length"),
            vocabSize = size,
            bosId = values["bos_id"]?.let { id(it, "bos_id", size) },
            eosIds = ids("eos_ids", size),
            addBos = flag("add_bos"),
            chatTemplate = optionalText("chat_template"),
            normalizer = optionalText("normalizer"),
            specialTokens = texts("special_tokens"),
            specialIds = optional("special_ids")?.entries?.associate { (text, value) ->
                text as String to id(value, "special_ids.$text", size)
            },
            specialStrips = texts("special_strips"),
            spacePrefix = optionalText("space_prefix"),
        )
    }
}

internal fun isInside(name: String): Boolean =
    name.isNotEmpty() && !name.startsWith("/") && '\\' !in name && ".." !in name.split("/")

private fun hex(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(it) }

/** sha256 of a file as hex, read in pieces; `onBytes` is told how many were read. */
fun sha256(file: File, onBytes: (Long) -> Unit = {}): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val piece = ByteArray(1 shl 20)
    var done = 0L
    file.inputStream().use { stream ->
        while (true) {
            val count = stream.read(piece)
            if (count < 0) return hex(digest.digest())
            digest.update(piece, 0, count)
            done += count
            onBytes(done)
        }
    }
}

/** An artifact's folder, whose files are those that its manifest names. */
class Artifact(val folder: File, val manifest: Manifest) {
    val sizeBytes: Long get() = manifest.files.keys.sumOf { File(folder, it).length() }
    val mainFile: File get() = File(folder, manifest.mainFile)

    /** Compare every listed file with its sha256; with a public key, only where a bundle lists them that it has signed. */
    fun checkFiles(publicKey: String? = null, onShare: (Double) -> Unit = {}) {
        val bundle = publicKey?.let { SignedBundle.read(folder, it) }
        val all = sizeBytes.coerceAtLeast(1).toDouble()
        var done = 0L
        for ((name, expected) in manifest.files) {
            val file = File(folder, name)
            if (!file.isFile) throw Refusal("file_missing", "$name is missing.", "Copy the artifact's whole folder.")
            if (sha256(file) { onShare((done + it) / all) } != expected) {
                throw Refusal("file_changed", "$name is not the file its manifest names.", "Copy the artifact again.")
            }
            done += file.length()
        }
        bundle?.check(this)
    }

    companion object {
        fun read(folder: File, targets: Set<String>): Artifact {
            val file = File(folder, "manifest.json")
            return Artifact(folder, Manifest.parse(if (file.isFile) file.readText() else null, targets))
        }
    }
}
