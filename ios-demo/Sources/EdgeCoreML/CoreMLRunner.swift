#if canImport(CoreML)
    import CoreML
    import EdgeCore
    import Foundation

    /// edgekd's stateful package in Core ML: its inputs are `ProgramStep`'s, its caches are the state.
    final class CoreMLRunner: ProgramRunner {
        private var model: MLModel?
        private var state: MLState?
        private let vocabSize: Int

        /// - Parameter compiled: the package as Core ML compiles it on the device.
        init(_ compiled: URL, vocabSize: Int) throws {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = .all
            model = try MLModel(contentsOf: compiled, configuration: configuration)
            self.vocabSize = vocabSize
        }

        func reset() throws { state = model?.makeState() }

        /// What Core ML makes of a step is let go behind it, not behind the whole answer.
        func run(_ step: ProgramStep) throws -> [Float] { try autoreleasepool { try logits(step) } }

        private func logits(_ step: ProgramStep) throws -> [Float] {
            guard let model, let state else { throw broken("it was closed") }
            let inputs = try MLDictionaryFeatureProvider(dictionary: [
                "inputIds": MLFeatureValue(multiArray: integers(step.ids, shape: [1, step.ids.count])),
                "positionIds": MLFeatureValue(multiArray: integers(step.positions, shape: [1, step.ids.count])),
                "causalMask": MLFeatureValue(multiArray: mask(step)),
                "outputIds": MLFeatureValue(multiArray: integers(step.outputs, shape: [step.outputs.count])),
            ])
            let outputs = try model.prediction(from: inputs, using: state)
            guard let logits = outputs.featureValue(for: "logits")?.multiArrayValue, logits.count == vocabSize else {
                throw broken("it gives no logits of \(vocabSize) tokens")
            }
            return logits.withUnsafeBufferPointer(ofType: Float16.self) { $0.prefix(vocabSize).map(Float.init) }
        }

        func close() { (model, state) = (nil, nil) }

        private func broken(_ what: String) -> Refusal {
            Refusal("not_loaded", "Core ML does not run the program: \(what).", "Export the artifact again.")
        }

        private func integers(_ values: [Int], shape: [Int]) throws -> MLMultiArray {
            let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .int32)
            array.withUnsafeMutableBufferPointer(ofType: Int32.self) { buffer, _ in
                for (i, value) in values.enumerated() { buffer[i] = Int32(value) }
            }
            return array
        }

        private func mask(_ step: ProgramStep) throws -> MLMultiArray {
            let shape = [1, 1, step.ids.count, step.seen].map { NSNumber(value: $0) }
            let array = try MLMultiArray(shape: shape, dataType: .float16)
            array.withUnsafeMutableBufferPointer(ofType: Float16.self) { buffer, strides in
                for row in step.ids.indices {
                    for column in 0..<step.seen {
                        buffer[row * strides[2] + column * strides[3]] = Float16(step.mask(row: row, column: column))
                    }
                }
            }
            return array
        }
    }

    extension Runtime {
        /// Core ML compiles a package once; what it made is kept among the caches, under the digest of its files.
        public static let coreML: Runtime? = Runtime(target: "coreml") { artifact, _ in
            let tokenizer = try TokenizerFile(artifact.file("tokenizer.json"))
            do {
                let runner = try CoreMLRunner(compiled(artifact), vocabSize: artifact.manifest.contract.vocabSize)
                return ProgramEngine(runner, tokenizer)
            } catch {
                let words = "Core ML does not load \(artifact.manifest.mainFile): \(error.localizedDescription)."
                throw Refusal("not_loaded", words, "Close other apps, or export the artifact again.")
            }
        }

        private static func compiled(_ artifact: Artifact) throws -> URL {
            let manager = FileManager.default
            let caches = try manager.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
            let place = caches.appendingPathComponent("\(try artifact.manifest.filesDigest()).mlmodelc")
            if !manager.fileExists(atPath: place.path) {
                let made = try MLModel.compileModel(at: artifact.mainFile.deletingLastPathComponent())
                try manager.moveItem(at: made, to: place)
            }
            return place
        }
    }
#else
    import EdgeCore

    extension Runtime {
        /// Only Apple's systems have Core ML.
        public static let coreML: Runtime? = nil
    }
#endif
