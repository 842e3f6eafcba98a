import Foundation

private let warmUpTokens = 8
private let clockName = "measured:ContinuousClock"

public struct BenchSettings: Equatable {
    public var promptTokens: [Int]
    public var decodeTokens: Int
    public var runs: Int

    public init(promptTokens: [Int] = [32, 256], decodeTokens: Int = 64, runs: Int = 3) {
        (self.promptTokens, self.decodeTokens, self.runs) = (promptTokens, decodeTokens, runs)
    }

    /// Prompt lengths and tokens that fit the context.
    public func fitted(_ contextLength: Int) -> BenchSettings {
        let decode = min(decodeTokens, contextLength / 2)
        let lengths = promptTokens.filter { $0 + decode <= contextLength }.sorted()
        return BenchSettings(
            promptTokens: lengths.isEmpty ? [contextLength - decode] : lengths, decodeTokens: decode, runs: runs)
    }
}

/// What the system tells of the device and this process; nil where it does not.
public protocol Device {
    /// Of `edgekd.proof.Host`: device, cpu, cores, ram_bytes, os, architecture …
    var host: [(String, Json)] { get }

    /// What the memory's figures are called.
    var memorySource: String { get }
    var usedBytes: Int? { get }
    var peakBytes: Int? { get }

    /// What this process may still take before the system ends it.
    var availableBytes: Int? { get }

    /// Bytes of the storage that are free.
    var freeBytes: Int? { get }

    /// Why figures of now are disturbed, a sentence each.
    var disturbances: [String] { get }
}

private struct Repetition {
    let loadS: Double
    let first: Request
    let warm: [Int: Request]
    let decode: Request
    let usedBeforeLoad: Int?
    let peak: Int?
    let threads: Int
}

/// Time an artifact as edgekd's harness does; `edgekd.proof.BenchRecord` as JSON.
public struct Bench {
    private let artifact: Artifact
    private let device: any Device
    private let open: () throws -> Decoder

    public init(_ artifact: Artifact, _ device: any Device, _ open: @escaping () throws -> Decoder) {
        (self.artifact, self.device, self.open) = (artifact, device, open)
    }

    private var manifest: Manifest { artifact.manifest }

    public func record(
        _ settings: BenchSettings = BenchSettings(), onRun: (Int, Int) -> Void = { _, _ in }
    ) throws -> Json {
        let fit = settings.fitted(manifest.contract.contextLength)
        var dirty = device.disturbances
        var runs: [Repetition] = []
        for run in 1...fit.runs {
            runs.append(try repetition(fit))
            dirty += device.disturbances.filter { !dirty.contains($0) }
            onRun(run, fit.runs)
        }
        return [
            "schema_version": 1, "created": .string(utcNow()), "artifact": .string(artifact.folder.lastPathComponent),
            "name": .string(manifest.name), "target": .string(manifest.target), "recipe": .string(manifest.recipe),
            "runtime": .string(manifest.runtime), "files_digest": .string(try manifest.filesDigest()),
            "size_bytes": .int(artifact.sizeBytes), "benchmark": try benchmark(runs, fit, dirty),
        ]
    }

    /// One repetition on a freshly opened engine.
    private func repetition(_ settings: BenchSettings) throws -> Repetition {
        let before = device.usedBytes
        let start = secondsNow()
        let decoder = try open()
        let load = secondsNow() - start
        defer { decoder.engine.close() }
        let texts = try settings.promptTokens.map { try realText(decoder.engine, tokens: $0) }
        let longest = texts[texts.count - 1]
        let first = try firstText(decoder, texts[0], promptTokens: settings.promptTokens[0])
        _ = try serve(decoder, longest, decodeTokens: min(warmUpTokens, settings.decodeTokens))
        let warm = try zip(settings.promptTokens, texts).map { length, text in
            (length, try firstText(decoder, text, promptTokens: length))
        }
        let decode = try serve(decoder, longest, decodeTokens: settings.decodeTokens)
        return Repetition(
            loadS: load, first: first, warm: Dictionary(uniqueKeysWithValues: warm), decode: decode,
            usedBeforeLoad: before, peak: device.peakBytes, threads: decoder.engine.threads)
    }

    /// Medians over the runs, each with its samples.
    private func benchmark(_ runs: [Repetition], _ settings: BenchSettings, _ dirty: [String]) throws -> Json {
        let longest = settings.promptTokens[settings.promptTokens.count - 1]
        func byLength(_ unit: String, _ reading: (Request, Int) throws -> Double?) rethrows -> Json {
            let pairs = try settings.promptTokens.map { length in
                (String(length), ofRuns(unit, try runs.map { try reading($0.warm[length]!, length) }))
            }
            return .object(Json.Members(pairs))
        }
        let gaps = runs.flatMap { $0.decode.iclS }
        func icl(_ q: Double) -> Json {
            if gaps.isEmpty { return unknown("s", "no token had text") }
            let each = runs.map { $0.decode.iclS }.filter { !$0.isEmpty }.map { percentile($0, q) }
            return known("s", percentile(gaps, q), clockName, each)
        }
        func memory(_ values: [Int?]) -> Json {
            ofRuns("bytes", values.map { $0.map(Double.init) }, device.memorySource, "the system does not tell it")
        }
        func told(_ bytes: Double?) -> Json {
            bytes.map { known("bytes", $0, "computed:manifest") } ?? unknown("bytes", "the manifest does not tell")
        }
        let middle = Double(longest) + Double(settings.decodeTokens) / 2
        let read = manifest.weightBytes.map { Double($0) + Double(manifest.kvBytesPerPosition ?? 0) * middle }
        return [
            "settings": settingsOf(settings, runs[0].threads),
            "machine": .object(Json.Members(device.host)),
            "noise": ["dirty": .list(dirty.map { .string($0) })],
            "load_s": ofRuns("s", runs.map { $0.loadS }),
            "tokenize_s": byLength("s") { request, _ in request.tokenizeS },
            "ttft_s": byLength("s") { request, _ in request.ttftS },
            "first_token_s": byLength("s") { request, _ in request.firstTokenS },
            "prefill_tokens_per_s": try byLength("tok/s") { try tokensPerSecond($1, $0.prefillS) },
            "decode_tokens_per_s": ofRuns(
                "tok/s", try runs.map { try tokensPerSecond($0.decode.decodeTokens, $0.decode.decodeS) }),
            "itl_s": ofRuns("s", runs.map { $0.decode.itlS }),
            "icl_s": ofRuns("s", gaps),
            "icl_p50_s": icl(50), "icl_p95_s": icl(95), "icl_p99_s": icl(99),
            "sampling_s": ofRuns("s", runs.flatMap { $0.decode.samplingS }),
            "first_ttft_s": ofRuns("s", runs.map { $0.first.ttftS }),
            "peak_rss_bytes": memory(runs.map { $0.peak }),
            "rss_before_load_bytes": memory(runs.map { $0.usedBeforeLoad }),
            "kv_cache_bytes": told(manifest.cacheBytes.map(Double.init)),
            "bytes_per_token": told(read),
        ]
    }

    private func settingsOf(_ settings: BenchSettings, _ threads: Int) -> Json {
        let longest = settings.promptTokens[settings.promptTokens.count - 1]
        let warmUp =
            "a first request, then \(longest) tokens prefilled and \(warmUpTokens) decoded in every run, not counted"
        return [
            "ttft_from": "text", "threads": .int(threads),
            "prompt_tokens": .list(settings.promptTokens.map { .int($0) }),
            "decode_tokens": .int(settings.decodeTokens), "decode_after_tokens": .int(longest),
            "context_length": .int(manifest.contract.contextLength), "runs": .int(settings.runs),
            "warm_up": .string(warmUp), "torch_in_process": false,
        ]
    }
}

private func ofRuns(
    _ unit: String, _ values: [Double?], _ source: String = clockName, _ reason: String = "no token had text"
) -> Json {
    let samples = values.compactMap { $0 }
    return samples.isEmpty ? unknown(unit, reason) : known(unit, median(samples), source, samples)
}

private func known(_ unit: String, _ value: Double, _ source: String, _ samples: [Double] = []) -> Json {
    [
        "value": .double(value), "unit": .string(unit), "source": .string(source),
        "samples": .list(samples.map { .double($0) }),
    ]
}

private func unknown(_ unit: String, _ reason: String) -> Json {
    ["value": nil, "unit": .string(unit), "reason": .string(reason)]
}

private func utcNow() -> String {
    let formatter = ISO8601DateFormatter()
    formatter.timeZone = TimeZone(identifier: "UTC")
    return formatter.string(from: Date())
}
