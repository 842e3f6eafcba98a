package io.edgekd.demo

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.util.Log
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors

private const val ANSWER_TOKENS = 512
private const val PICK = 1

/** One screen: a model is chosen, checked, loaded and proved; then it chats, or is timed. All work is done in core. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private lateinit var status: TextView
    private lateinit var chat: TextView
    private lateinit var scroll: ScrollView
    private lateinit var message: EditText
    private lateinit var choose: Button
    private lateinit var send: Button
    private lateinit var stop: Button
    private lateinit var bench: Button
    private lateinit var library: Library
    private lateinit var device: AndroidDevice
    private var loaded: Loaded? = null
    private var messages: List<Message> = emptyList()

    @Volatile
    private var stopped = false

    private class Loaded(val artifact: Artifact, val decoder: Decoder)

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(screen())
        library = Library(filesDir, Engines.targets, publicKey())
        device = AndroidDevice(this)
        work {
            Engines.prepare()
            (pushed() ?: library.kept())?.let { load(it) }
            if (loaded != null && intent.getBooleanExtra("bench", false)) time()
        }
    }

    override fun onDestroy() {
        stopped = true
        worker.execute { loaded?.decoder?.engine?.close() }
        worker.shutdown()
        super.onDestroy()
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        val tree = data?.data
        if (request == PICK && result == RESULT_OK && tree != null) {
            work {
                val picked = PickedFolder(contentResolver, tree)
                say("Copying")
                load(library.take(picked, filesDir.usableSpace) { say("Copying: ${(100 * it).toInt()} %") })
            }
        }
    }

    /** An artifact that came by `adb push FOLDER /sdcard/Android/data/io.edgekd.demo/files/model`. */
    private fun pushed(): Artifact? =
        getExternalFilesDir(null)?.let { File(it, "model") }?.takeIf { File(it, "manifest.json").isFile }?.let { Artifact.read(it, Engines.targets) }

    /** Of the bundles that the app opens; null: it opens every artifact. */
    private fun publicKey() = getString(R.string.public_key).ifEmpty { null }

    private fun open(artifact: Artifact) = Decoder(Engines.open(artifact, threads()), artifact.manifest.contract)

    /** Half of the cores: the others are slower ones on most phones, and every step waits for the slowest. */
    private fun threads() = (Runtime.getRuntime().availableProcessors() / 2).coerceIn(1, 8)

    private fun load(artifact: Artifact) {
        loaded?.decoder?.engine?.close()
        loaded = null
        memoryShortage(artifact.manifest, artifact.sizeBytes, device.availableBytes())?.let {
            throw Refusal("memory", it, "Close other apps, or choose a smaller model.")
        }
        artifact.checkFiles(publicKey()) { say("Checking the files: ${(100 * it).toInt()} %") }
        say("Loading the model")
        val decoder = open(artifact)
        say("Comparing its golden answers")
        val test = selfTest(decoder, artifact.manifest.golden)
        if (test.failure != null) {
            decoder.engine.close()
            throw Refusal("self_test", "This device does not compute what the artifact should: ${test.failure}", "Report the device.")
        }
        loaded = Loaded(artifact, decoder)
        messages = emptyList()
        val proof = if (test.answers > 0) "${test.tokens} golden tokens the same" else "no golden answers are recorded in its manifest"
        show { chat.text = "" }
        say("${artifact.manifest.name}, ${artifact.manifest.target} ${artifact.manifest.recipe}: files checked, $proof.")
    }

    private fun answer(text: String) {
        val (artifact, decoder) = loaded?.let { it.artifact to it.decoder } ?: return
        val contract = artifact.manifest.contract
        messages = messages + listOf(mapOf("role" to "user", "content" to text))
        append("\n\n> $text\n\n")
        val ids = if (contract.chatTemplate == null) {
            textIds(decoder.engine, contract, text)
        } else {
            fittedChat(decoder.engine, contract, messages, ANSWER_TOKENS).let { (ids, kept) -> ids.also { messages = kept } }
        }
        val answer = StringBuilder()
        val start = System.nanoTime()
        val tokens = decoder.stream(ids, ANSWER_TOKENS, { stopped }) { piece ->
            answer.append(piece)
            append(piece)
        }
        messages = messages + listOf(mapOf("role" to "assistant", "content" to answer.toString()))
        if (answer.isEmpty()) append("(the model ended its answer at once)")
        say("${ids.size} tokens read, $tokens written in ${"%.1f".format((System.nanoTime() - start) / 1e9)} s")
    }

    /** Write the harness's record beside what adb pushes: `edgekd` reads it there. */
    private fun time() {
        val artifact = loaded?.artifact ?: return
        loaded?.decoder?.engine?.close()
        loaded = null
        val record = Bench(artifact, device) { open(artifact) }.record { run, runs -> say("Run $run of $runs") }
        val file = File(getExternalFilesDir(null) ?: filesDir, "benchmark.json")
        file.writeText(Json.write(record))
        Log.i("edgekd", "benchmark written to ${file.path}")
        loaded = Loaded(artifact, open(artifact))
        val decode = ((record["benchmark"] as Map<*, *>)["decode_tokens_per_s"] as Map<*, *>)["value"]
        say("Decode ${"%.1f".format(decode)} tok/s; the record: ${file.path}")
    }

    /** Work on the one thread that the model belongs to; the buttons rest meanwhile, and what is refused is shown. */
    private fun work(task: () -> Unit) {
        enable(false)
        stopped = false
        worker.execute {
            try {
                task()
            } catch (error: Refusal) {
                say(error.message.orEmpty())
            } catch (error: OutOfMemoryError) {
                say("The app has no memory left. Close other apps, or choose a smaller model.")
            }
            show { enable(true) }
        }
    }

    private fun show(change: () -> Unit) = runOnUiThread(change)

    private fun say(text: String) = show { status.text = text }

    private fun append(text: String) = show {
        chat.append(text)
        scroll.post { scroll.fullScroll(View.FOCUS_DOWN) }
    }

    private fun enable(idle: Boolean) {
        choose.isEnabled = idle
        send.isEnabled = idle && loaded != null
        bench.isEnabled = idle && loaded != null
        stop.isEnabled = !idle
    }

    private fun button(text: Int, action: () -> Unit) = Button(this).apply {
        setText(text)
        setOnClickListener { action() }
    }

    private fun screen(): View {
        status = TextView(this).apply { setText(R.string.begin) }
        chat = TextView(this).apply { setTextIsSelectable(true) }
        scroll = ScrollView(this).apply { addView(chat) }
        message = EditText(this).apply { setHint(R.string.message) }
        choose = button(R.string.choose) { startActivityForResult(Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), PICK) }
        send = button(R.string.send) {
            val text = message.text.toString()
            message.text.clear()
            if (text.isNotEmpty()) work { answer(text) }
        }
        stop = button(R.string.stop) { stopped = true }
        bench = button(R.string.bench) { work { time() } }
        val wide = LinearLayout.LayoutParams.MATCH_PARENT
        fun row(vararg views: View) = LinearLayout(this).apply { views.forEach { addView(it) } }
        return LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
            setPadding(24, 24, 24, 24)
            addView(row(choose, bench))
            addView(status)
            addView(scroll, LinearLayout.LayoutParams(wide, 0, 1f))
            addView(message, LinearLayout.LayoutParams(wide, LinearLayout.LayoutParams.WRAP_CONTENT))
            addView(row(send, stop))
        }
    }
}
