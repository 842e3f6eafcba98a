#if canImport(ExecuTorch)
    import EdgeCore
    import ExecuTorch
    import Foundation

    /// A program in ExecuTorch's runtime. Its cache is inside the program; its tokenizer is `tokenizer.json`.
    final class ExecuTorchEngine: Engine {
        let threads: Int
        private let module: Module
        private let tokenizer: TokenizerFile
        private var logits: [Float] = []

        init(_ artifact: Artifact, threads: Int) throws {
            tokenizer = try TokenizerFile(artifact.file("tokenizer.json"))
            module = Module(filePath: artifact.mainFile.path)
            self.threads = threads
            do {
                try module.load("forward")
            } catch {
                let words = "ExecuTorch does not load \(artifact.manifest.mainFile): \(error.localizedDescription)."
                throw Refusal("not_loaded", words, "Close other apps, or export the artifact again.")
            }
        }

        func tokenize(_ text: String, start: Bool) throws -> [Int] { try tokenizer.tokenize(text, start: start) }

        func bytes(_ id: Int) -> [UInt8] { tokenizer.bytes(id) }

        /// What is cached is written over.
        func reset() {}

        func feed(_ ids: [Int], used: Int) throws {
            logits = try autoreleasepool {
                let tokens = Tensor<Int64>(ids.map { Int64($0) }, shape: [1, ids.count])
                let position = Tensor<Int64>([Int64(used)], shape: [1])
                return try Tensor<Float>(module.forward([tokens, position])).scalars()
            }
        }

        func best() -> Int { argmax(logits) }

        func close() {}
    }

    extension Runtime {
        public static let executorch: Runtime? = Runtime(target: "executorch") {
            try ExecuTorchEngine($0, threads: $1)
        }
    }
#else
    import EdgeCore

    extension Runtime {
        /// The package was resolved without EDGEKD_EXECUTORCH.
        public static let executorch: Runtime? = nil
    }
#endif
