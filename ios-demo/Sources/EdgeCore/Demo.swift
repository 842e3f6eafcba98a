import Foundation

private let answerTokens = 512

/// What the app runs: a target of edgekd, and how its runtime opens an artifact.
public struct Runtime: Sendable {
    public let target: String
    public let open: @Sendable (_ artifact: Artifact, _ threads: Int) throws -> any Engine

    public init(target: String, open: @escaping @Sendable (_ artifact: Artifact, _ threads: Int) throws -> any Engine) {
        (self.target, self.open) = (target, open)
    }
}

/// All that the app does, on one thread: a model is taken, checked, loaded and proved; then it chats, or is timed.
public final class Demo {
    private let library: Library
    private let device: any Device
    private let runtimes: [Runtime]
    private let say: (String) -> Void
    private var loaded: (artifact: Artifact, decoder: Decoder)?
    private var messages: [Message] = []

    /// - Parameter say: shows a sentence of what is going on.
    public init(
        _ root: URL, _ device: any Device, _ runtimes: [Runtime], key: BundleKey? = nil,
        say: @escaping (String) -> Void
    ) {
        library = Library(root, targets: runtimes.map(\.target), key: key)
        (self.device, self.runtimes, self.say) = (device, runtimes, say)
    }

    public var isLoaded: Bool { loaded != nil }

    /// Load what is kept.
    public func start() throws {
        guard let artifact = try library.kept() else { return say("Choose the folder of an artifact.") }
        try load(artifact)
    }

    /// Copy a folder into the app, and load it.
    public func take(_ source: some Source) throws {
        say("Copying")
        let artifact = try library.take(source, freeBytes: device.freeBytes) { say("Copying: \(percent($0))") }
        try load(artifact)
    }

    public func close() {
        loaded?.decoder.engine.close()
        loaded = nil
    }

    private func load(_ artifact: Artifact) throws {
        close()
        let manifest = artifact.manifest
        if let words = memoryShortage(
            manifest, modelBytes: artifact.sizeBytes, availableBytes: device.availableBytes)
        {
            throw Refusal("memory", words, "Close other apps, or choose a smaller model.")
        }
        _ = try library.check { say("Checking the files: \(percent($0))") }
        say("Loading the model")
        let (decoder, test) = try library.load { try proved(artifact) }
        loaded = (artifact, decoder)
        messages = []
        say(told(manifest, test))
    }

    /// Open an artifact and run its golden answers again.
    private func proved(_ artifact: Artifact) throws -> (Decoder, SelfTestResult) {
        let decoder = try open(artifact)
        do {
            say("Comparing its golden answers")
            let test = try selfTest(decoder, artifact.manifest.golden)
            if let failure = test.failure {
                let words = "This device does not compute what the artifact should: \(failure)"
                throw Refusal("self_test", words, "Report the device.")
            }
            return (decoder, test)
        } catch {
            decoder.engine.close()
            throw error
        }
    }

    private func told(_ manifest: Manifest, _ test: SelfTestResult) -> String {
        let proof =
            test.answers > 0
            ? "\(test.tokens) golden tokens the same" : "no golden answers are recorded in its manifest"
        return "\(manifest.name), \(manifest.target) \(manifest.recipe): files checked, \(proof)."
    }

    private func open(_ artifact: Artifact) throws -> Decoder {
        let runtime = runtimes.first { $0.target == artifact.manifest.target }!
        return Decoder(try runtime.open(artifact, threads), artifact.manifest.contract)
    }

    /// Half of the cores: the others are slower ones on most phones, and every step waits for the slowest.
    private var threads: Int { min(max(ProcessInfo.processInfo.activeProcessorCount / 2, 1), 8) }

    /// Answer a message, piece by piece; a model without a chat template goes on with the text.
    public func answer(_ text: String, stopped: () -> Bool, onPiece: (String) -> Void) throws {
        guard let (artifact, decoder) = loaded else { return }
        let contract = artifact.manifest.contract
        let ids: [Int]
        if contract.chatTemplate == nil {
            ids = try textIds(decoder.engine, contract, text)
        } else {
            let asked = messages + [message("user", text)]
            (ids, messages) = try fittedChat(decoder.engine, contract, asked, answerTokens)
        }
        var answer = ""
        let start = secondsNow()
        let tokens = try decoder.stream(ids, answerTokens, stopped: stopped) { piece in
            answer += piece
            onPiece(piece)
        }
        messages.append(message("assistant", answer))
        if answer.isEmpty { onPiece("(the model ended its answer at once)") }
        let seconds = (secondsNow() - start).rounded(toPlaces: 1)
        say("\(ids.count) tokens read, \(tokens) written in \(seconds) s")
    }

    /// Time the loaded artifact on engines of its own, and write the harness's record.
    public func bench(_ settings: BenchSettings = BenchSettings(), to file: URL) throws {
        guard let artifact = loaded?.artifact else { return }
        close()
        let record = try Bench(artifact, device) { [self] in try open(artifact) }.record(settings) { run, runs in
            say("Run \(run) of \(runs)")
        }
        try Data(record.write(indent: 1).utf8).write(to: file)
        loaded = (artifact, try open(artifact))
        let decode = record["benchmark"]["decode_tokens_per_s"]["value"].double ?? 0
        say("Decode \(decode.rounded(toPlaces: 1)) tok/s; the record: \(file.lastPathComponent)")
    }
}

private func percent(_ share: Double) -> String { "\(Int(100 * share)) %" }

extension Double {
    fileprivate func rounded(toPlaces places: Int) -> Double {
        let scale = (0..<places).reduce(1.0) { scale, _ in scale * 10 }
        return (self * scale).rounded() / scale
    }
}
