// Drives the app's own core and engines where there is no app: drive JOB, where JOB is JSON; one line of JSON back.

import EdgeCore
import EdgeLlama
import Foundation

/// What Linux tells of this process in /proc.
struct ProcDevice: Device {
    let availableBytes: Int?
    let freeBytes: Int? = nil
    let disturbances: [String] = []
    let memorySource = "measured:/proc/self/status"

    var host: [(String, Json)] {
        [("logical_cores", .int(ProcessInfo.processInfo.activeProcessorCount)), ("os", "Linux")]
    }

    var usedBytes: Int? { status("VmRSS") }
    var peakBytes: Int? { status("VmHWM") }

    private func status(_ key: String) -> Int? {
        let lines = try? String(contentsOfFile: "/proc/self/status", encoding: .utf8).split(separator: "\n")
        let digits = lines?.first { $0.hasPrefix("\(key):") }?.filter(\.isNumber)
        return digits.flatMap { Int($0) }.map { $0 * 1024 }
    }
}

/// One line, at once.
func tell(_ value: Json) throws { FileHandle.standardOutput.write(Data("\(try value.write())\n".utf8)) }

/// The answer of whoever drives: a line for a line.
func asked(_ question: Json) throws -> Json {
    try tell(question)
    guard let line = readLine() else { throw Refusal("not_loaded", "Nobody answers.") }
    return try Json.parse(line)
}

/// Verifies Ed25519 elsewhere, where it is there: else as the app does, which refuses where CryptoKit is not.
func key(_ job: Json) -> BundleKey? {
    guard let text = job["key"].string else { return nil }
    if job["verifies"].bool != true { return BundleKey(text) }
    return BundleKey(text) { key, signature, data in
        let bytes = [key, signature, data].map { Json.string($0.base64EncodedString()) }
        return try asked(["verify": .list(bytes)]).bool == true
    }
}

/// Runs the Core ML program elsewhere: its inputs go out as a line, its logits come as one.
struct ElsewhereRunner: ProgramRunner {
    func reset() throws { _ = try asked(["reset": true]) }

    func run(_ step: ProgramStep) throws -> [Float] {
        let rows = step.ids.indices.map { row in
            Json.list((0..<step.seen).map { .double(Double(step.mask(row: row, column: $0))) })
        }
        let answer = try asked([
            "inputIds": integers(step.ids), "positionIds": integers(step.positions), "causalMask": .list(rows),
            "outputIds": integers(step.outputs),
        ])
        return (answer.list ?? []).map { Float($0.double ?? .nan) }
    }

    func close() {}

    private func integers(_ values: [Int]) -> Json { .list(values.map { .int($0) }) }
}

let elsewhere = Runtime(target: "coreml") { artifact, _ in
    ProgramEngine(ElsewhereRunner(), try TokenizerFile(artifact.file("tokenizer.json")))
}

/// What the app shows of a job: `folder`, if there is one, is imported into `root`; what is there is loaded and proved;
/// then `chat` is answered.
func shown(_ job: Json, _ folder: URL?, _ root: URL) throws -> Json {
    var told: [String] = []
    let device = ProcDevice(availableBytes: job["available"].int)
    let demo = Demo(root, device, [.llama, elsewhere], key: key(job)) { told.append($0) }
    if let folder { try demo.take(FolderSource(folder)) } else { try demo.start() }
    var answer = ""
    if let chat = job["chat"].string { try demo.answer(chat, stopped: { false }) { answer += $0 } }
    if job["bench"].bool == true {
        let settings = BenchSettings(promptTokens: [16, 64], decodeTokens: 16, runs: 2)
        try demo.bench(settings, to: root.appendingPathComponent("benchmark.json"))
    }
    demo.close()
    return ["told": .list(told.map { .string($0) }), "answer": .string(answer)]
}

/// What the engine computes: the tokens behind `ids`, the prompt of `chat`, the ids of `texts` by both tokenizers.
func computed(_ job: Json, _ artifact: Artifact) throws -> Json {
    let contract = artifact.manifest.contract
    let runtime: Runtime = artifact.manifest.target == "gguf" ? .llama : elsewhere
    let decoder = Decoder(try runtime.open(artifact, 1), contract)
    defer { decoder.engine.close() }
    let file = try TokenizerFile(artifact.file("tokenizer.json"))
    let texts = (job["texts"].list ?? []).compactMap(\.string)
    func integers(_ values: [Int]) -> Json { .list(values.map { .int($0) }) }
    func byFile(_ ids: [Int]) -> Json { integers(ids.flatMap { file.bytes($0) }.map(Int.init)) }
    let ids = (job["ids"].list ?? []).compactMap(\.int)
    let tokens = try decoder.greedy(ids, job["count"].int ?? 0)
    let prompt = try fittedChat(decoder.engine, contract, [message("user", job["chat"].string ?? "")], 64).ids
    return [
        "tokens": integers(tokens), "prompt": integers(prompt), "bytes_by_file": byFile(tokens),
        "bytes": integers(tokens.flatMap { decoder.engine.bytes($0) }.map(Int.init)),
        "texts": .list(try texts.map { integers(try decoder.engine.tokenize($0, start: true)) }),
        "texts_by_file": .list(try texts.map { integers(try file.tokenize($0, start: true)) }),
    ]
}

func run() throws -> Json {
    let job = try Json.parse(CommandLine.arguments[1])
    let folder = job["folder"].string.map { URL(fileURLWithPath: $0) }
    do {
        if job["check"].bool == true {
            _ = try checkedArtifact(folder!, targets: ["gguf"], key: key(job))
            return ["ok": true]
        }
        if let root = job["root"].string { return try shown(job, folder, URL(fileURLWithPath: root)) }
        let artifact = try Artifact.read(folder!, targets: ["gguf", "coreml"])
        try artifact.checkFiles()
        return try computed(job, artifact)
    } catch let refusal as Refusal {
        return ["refused": .string(refusal.code), "words": .string(refusal.words)]
    }
}

try tell(run())
