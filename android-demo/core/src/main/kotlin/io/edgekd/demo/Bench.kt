package io.edgekd.demo

import java.text.SimpleDateFormat
import java.util.Date
import java.util.Locale
import java.util.TimeZone

private const val WARM_UP_TOKENS = 8
private const val CLOCK = "measured:System.nanoTime"

data class BenchSettings(val promptTokens: List<Int> = listOf(32, 256), val decodeTokens: Int = 64, val runs: Int = 3) {
    /** Prompt lengths and tokens that fit the context. */
    fun fitted(contextLength: Int): BenchSettings {
        val decode = minOf(decodeTokens, contextLength / 2)
        val lengths = promptTokens.filter { it + decode <= contextLength }.sorted()
        return BenchSettings(lengths.ifEmpty { listOf(contextLength - decode) }, decode, runs)
    }
}

/** What the app's system tells while a run is measured; null where it does not. */
interface Device {
    /** Of `edgekd.proof.Host`: device, cpu, cores, ram_bytes, os, architecture … */
    fun host(): Map<String, Any?>

    fun rssBytes(): Long?

    fun peakRssBytes(): Long?

    /** What the battery gives, in microampere, negative while it empties. */
    fun currentMicroampere(): Long?

    fun temperatureC(): Double?
}

private class Repetition(
    val loadS: Double, val first: Request, val warm: Map<Int, Request>, val decode: Request,
    val rssBeforeLoad: Long?, val peakRss: Long?, val currents: List<Long>, val temperatures: List<Double>, val threads: Int,
)

/** Time an artifact as edgekd's harness does; `edgekd.proof.BenchRecord` as JSON values. */
class Bench(private val artifact: Artifact, private val device: Device, private val open: () -> Decoder) {
    private val manifest = artifact.manifest

    fun record(settings: BenchSettings = BenchSettings(), onRun: (Int, Int) -> Unit = { _, _ -> }): Map<String, Any?> {
        val fit = settings.fitted(manifest.contract.contextLength)
        val runs = (1..fit.runs).map { run -> repetition(fit).also { onRun(run, fit.runs) } }
        return mapOf(
            "schema_version" to 1, "created" to utcNow(), "artifact" to artifact.folder.name, "name" to manifest.name,
            "target" to manifest.target, "recipe" to manifest.recipe, "runtime" to manifest.runtime,
            "files_digest" to manifest.filesDigest, "size_bytes" to artifact.sizeBytes,
            "benchmark" to benchmark(runs, fit),
        )
    }

    /** One repetition on a freshly opened engine. */
    private fun repetition(settings: BenchSettings): Repetition {
        val before = device.rssBytes()
        val currents = ArrayList<Long>()
        val temperatures = listOfNotNull(device.temperatureC())
        val start = System.nanoTime()
        val decoder = open()
        val load = (System.nanoTime() - start) / 1e9
        try {
            val texts = settings.promptTokens.map { realText(decoder.engine, it) }
            val first = firstText(decoder, texts[0], settings.promptTokens[0])
            serve(decoder, texts.last(), minOf(WARM_UP_TOKENS, settings.decodeTokens))
            val warm = settings.promptTokens.zip(texts).associate { (length, text) -> length to firstText(decoder, text, length) }
            device.currentMicroampere()?.let { currents += it }
            val decode = serve(decoder, texts.last(), settings.decodeTokens)
            device.currentMicroampere()?.let { currents += it }
            val warmest = temperatures + listOfNotNull(device.temperatureC())
            return Repetition(load, first, warm, decode, before, device.peakRssBytes(), currents, warmest, decoder.engine.threads)
        } finally {
            decoder.engine.close()
        }
    }

    /** Medians over the runs, each with its samples. */
    private fun benchmark(runs: List<Repetition>, settings: BenchSettings): Map<String, Any?> {
        val longest = settings.promptTokens.last()
        fun byLength(unit: String, reading: (Request, Int) -> Double?) =
            settings.promptTokens.associate { n -> "$n" to ofRuns(unit, runs.map { reading(it.warm.getValue(n), n) }) }
        val gaps = runs.flatMap { it.decode.iclS }
        fun icl(q: Double) = if (gaps.isEmpty()) unknown("s", "no token had text") else {
            known("s", percentile(gaps, q), CLOCK, runs.map { it.decode.iclS }.filter { it.isNotEmpty() }.map { percentile(it, q) })
        }
        val temperatures = runs.flatMap { it.temperatures }
        val read = manifest.weightBytes?.plus((manifest.kvBytesPerPosition ?: 0) * (longest + settings.decodeTokens / 2.0))
        return mapOf(
            "settings" to mapOf(
                "ttft_from" to "text", "threads" to runs[0].threads, "prompt_tokens" to settings.promptTokens,
                "decode_tokens" to settings.decodeTokens, "decode_after_tokens" to longest,
                "context_length" to manifest.contract.contextLength, "runs" to settings.runs,
                "warm_up" to "a first request, then $longest tokens prefilled and $WARM_UP_TOKENS decoded in every run, not counted",
                "torch_in_process" to false,
            ),
            "machine" to device.host(),
            "noise" to mapOf("temperature_c" to if (temperatures.isEmpty()) null else listOf(temperatures.first(), temperatures.last())),
            "load_s" to ofRuns("s", runs.map { it.loadS }),
            "tokenize_s" to byLength("s") { request, _ -> request.tokenizeS },
            "ttft_s" to byLength("s") { request, _ -> request.ttftS },
            "first_token_s" to byLength("s") { request, _ -> request.firstTokenS },
            "prefill_tokens_per_s" to byLength("tok/s") { request, n -> tokensPerSecond(n, request.prefillS) },
            "decode_tokens_per_s" to ofRuns("tok/s", runs.map { tokensPerSecond(it.decode.decodeTokens, it.decode.decodeS) }),
            "itl_s" to ofRuns("s", runs.map { it.decode.itlS }),
            "icl_s" to ofRuns("s", gaps),
            "icl_p50_s" to icl(50.0), "icl_p95_s" to icl(95.0), "icl_p99_s" to icl(99.0),
            "sampling_s" to ofRuns("s", runs.flatMap { it.decode.samplingS }),
            "first_ttft_s" to ofRuns("s", runs.map { it.first.ttftS }),
            "peak_rss_bytes" to ofRuns("bytes", runs.map { it.peakRss?.toDouble() }, "measured:VmHWM", "the system does not tell it"),
            "rss_before_load_bytes" to ofRuns("bytes", runs.map { it.rssBeforeLoad?.toDouble() }, "measured:VmRSS", "the system does not tell it"),
            "kv_cache_bytes" to (manifest.cacheBytes?.let { known("bytes", it.toDouble(), "computed:manifest") } ?: unknown("bytes", "the manifest does not tell")),
            "bytes_per_token" to (read?.let { known("bytes", it, "computed:manifest") } ?: unknown("bytes", "the manifest does not tell")),
            "battery_current_ua" to ofRuns("uA", runs.flatMap { it.currents }.map { it.toDouble() }, "measured:BatteryManager", "the battery does not tell it"),
        )
    }

    private fun ofRuns(unit: String, values: List<Double?>, source: String = CLOCK, reason: String = "no token had text"): Map<String, Any?> {
        val samples = values.filterNotNull()
        return if (samples.isEmpty()) unknown(unit, reason) else known(unit, median(samples), source, samples)
    }
}

private fun known(unit: String, value: Double, source: String, samples: List<Double> = emptyList()): Map<String, Any?> =
    mapOf("value" to value, "unit" to unit, "source" to source, "samples" to samples)

private fun unknown(unit: String, reason: String): Map<String, Any?> = mapOf("value" to null, "unit" to unit, "reason" to reason)

private fun utcNow(): String = SimpleDateFormat("yyyy-MM-dd'T'HH:mm:ss'Z'", Locale.ROOT).apply { timeZone = TimeZone.getTimeZone("UTC") }.format(Date())
