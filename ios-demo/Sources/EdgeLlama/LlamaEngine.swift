import EdgeCore
import llama

/// A GGUF file in llama.cpp, through its C API.
public final class LlamaEngine: Engine {
    public let threads: Int
    private let contract: Contract
    private let special: Set<Int>
    private var model: OpaquePointer?
    private var context: OpaquePointer?
    private let vocabulary: OpaquePointer
    private var logits: UnsafeMutablePointer<Float>?

    public init(_ artifact: Artifact, threads: Int) throws {
        contract = artifact.manifest.contract
        special = Set((contract.specialIds ?? [:]).values)
        self.threads = threads
        llama_log_set({ _, _, _ in }, nil)
        llama_backend_init()
        var params = llama_model_default_params()
        params.n_gpu_layers = 0
        var settings = llama_context_default_params()
        settings.n_ctx = UInt32(contract.contextLength)
        (settings.n_batch, settings.n_ubatch) = (UInt32(batchTokens), UInt32(batchTokens))
        (settings.n_threads, settings.n_threads_batch) = (Int32(threads), Int32(threads))
        settings.no_perf = true
        guard let model = llama_model_load_from_file(artifact.mainFile.path, params) else {
            throw Self.notLoaded(artifact)
        }
        guard let context = llama_init_from_model(model, settings) else {
            llama_model_free(model)
            throw Self.notLoaded(artifact)
        }
        (self.model, self.context, vocabulary) = (model, context, llama_model_get_vocab(model))
        let size = Int(llama_vocab_n_tokens(vocabulary))
        if size != contract.vocabSize {
            close()
            let words = "The model has a vocabulary of \(size), the manifest one of \(contract.vocabSize)."
            throw Refusal("bad_value", words, "Export the artifact again.")
        }
    }

    deinit { close() }

    private static func notLoaded(_ artifact: Artifact) -> Refusal {
        let context = artifact.manifest.contract.contextLength
        let words = "llama.cpp does not load \(artifact.manifest.mainFile), or has no memory for \(context) tokens."
        return Refusal("not_loaded", words, "Close other apps, or export the artifact again.")
    }

    /// Nothing in the text is a special token, and nothing is added to it.
    public func tokenize(_ text: String, start: Bool) -> [Int] {
        let bytes = asLlamaCppReads(text, contract, start: start).utf8.map { CChar(bitPattern: $0) }
        var ids = [llama_token](repeating: 0, count: bytes.count + 8)
        let count = llama_tokenize(vocabulary, bytes, Int32(bytes.count), &ids, Int32(ids.count), false, false)
        return ids.prefix(Int(max(count, 0))).map(Int.init)
    }

    /// llama.cpp takes some tokens for special by their text; the contract knows which are.
    public func bytes(_ id: Int) -> [UInt8] {
        let isText = !special.contains(id)
        var piece = [CChar](repeating: 0, count: 256)
        var count = llama_token_to_piece(vocabulary, llama_token(id), &piece, Int32(piece.count), 0, isText)
        if count < 0 {
            piece = [CChar](repeating: 0, count: Int(-count))
            count = llama_token_to_piece(vocabulary, llama_token(id), &piece, Int32(piece.count), 0, isText)
        }
        return piece.prefix(Int(max(count, 0))).map { UInt8(bitPattern: $0) }
    }

    public func reset() { llama_memory_clear(llama_get_memory(context), false) }

    public func feed(_ ids: [Int], used: Int) throws {
        var tokens = ids.map { llama_token($0) }
        let status = tokens.withUnsafeMutableBufferPointer {
            llama_decode(context, llama_batch_get_one($0.baseAddress, Int32($0.count)))
        }
        if status != 0 {
            let words = "llama.cpp failed on \(ids.count) tokens (status \(status))."
            throw Refusal("not_loaded", words, "Load the model again.")
        }
        logits = llama_get_logits_ith(context, -1)
    }

    public func best() -> Int {
        argmax(UnsafeBufferPointer(start: logits, count: contract.vocabSize))
    }

    public func close() {
        if let context { llama_free(context) }
        if let model { llama_model_free(model) }
        (context, model) = (nil, nil)
    }
}

extension Runtime {
    public static let llama = Runtime(target: "gguf") { try LlamaEngine($0, threads: $1) }
}
