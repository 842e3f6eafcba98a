package io.edgekd.demo

import java.io.File

/** Drives the app's own engine on a desktop's JVM: Drive JNI_LIBRARY ARTIFACT JOB, where JOB is JSON; one line of it back. */
fun main(arguments: Array<String>) {
    val (library, folder, text) = arguments
    val job = Json.parse(text) as Map<*, *>
    System.load(library)
    val artifact = Artifact.read(File(folder), Engines.targets)
    val found = try {
        artifact.checkFiles(job["public_key"] as String?)
        drive(artifact, job)
    } catch (error: Refusal) {
        mapOf("refused" to error.code, "words" to error.message)
    }
    println(Json.write(found))
}

private fun drive(artifact: Artifact, job: Map<*, *>): Map<String, Any?> {
    val contract = artifact.manifest.contract
    val open = { Decoder(Engines.open(artifact, 1), contract) }
    val decoder = open()
    val test = selfTest(decoder, artifact.manifest.golden)
    val ids = (job["ids"] as List<*>).map { (it as Long).toInt() }
    val count = (job["count"] as Long).toInt()
    val (prompt, _) = fittedChat(decoder.engine, contract, listOf(mapOf("role" to "user", "content" to job["chat"])), 64)
    val answer = StringBuilder()
    decoder.stream(prompt, count, { false }) { answer.append(it) }
    val tokens = decoder.generate(ids, count).toList()
    val texts = (job["texts"] as List<*>).map { decoder.engine.tokenize(it as String, true) }
    val json = TokenizerFile(File(artifact.folder, "tokenizer.json"))
    val byFile = (job["texts"] as List<*>).map { json.tokenize(it as String, true) }
    decoder.engine.close()
    val record = Bench(artifact, ProcDevice(), open).record(BenchSettings(listOf(16, 64), 16, 2))
    return mapOf(
        "tokens" to tokens, "prompt" to prompt, "answer" to answer.toString(), "texts" to texts, "texts_by_file" to byFile,
        "bytes_by_file" to tokens.joinToString("") { id -> json.bytes(id).joinToString("") { "%02x".format(it) } },
        "answers" to test.answers, "golden" to test.tokens, "failure" to test.failure, "bench" to record,
    )
}
