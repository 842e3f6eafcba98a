import EdgeCore
import EdgeCoreML
import EdgeExecuTorch
import EdgeLlama
import SwiftUI
import UIKit

/// What the screen shows. All work is done in EdgeCore, on the one thread that the model belongs to.
@MainActor
final class ChatModel: ObservableObject {
    @Published private(set) var status = ""
    @Published private(set) var chat = ""
    @Published private(set) var isBusy = false
    @Published private(set) var isLoaded = false
    private lazy var worker = Worker { [weak self] told in
        DispatchQueue.main.async { self?.status = told }
    }

    /// Load what was put into Documents/model by a computer, else what is kept.
    func start() {
        let isTimed = ProcessInfo.processInfo.arguments.contains("--bench")
        work { worker in
            try worker.start()
            if isTimed { try worker.measure() }
        }
    }

    func take(_ folder: URL) {
        chat = ""
        work { try $0.take(folder) }
    }

    func answer(_ message: String) {
        chat += "\n\n> \(message)\n\n"
        work { worker in
            try worker.answer(message) { piece in
                DispatchQueue.main.async { [weak self] in self?.chat += piece }
            }
        }
    }

    /// Write the harness's record to Documents/benchmark.json.
    func measure() { work { try $0.measure() } }

    func stop() { worker.stop() }

    /// The buttons rest meanwhile, the screen stays on, and what is refused is shown.
    private func work(_ task: @escaping (Worker) throws -> Void) {
        isBusy = true
        UIApplication.shared.isIdleTimerDisabled = true
        worker.run(task) { [weak self] failure, isLoaded in
            DispatchQueue.main.async {
                if let failure { self?.status = failure }
                self?.isLoaded = isLoaded
                self?.isBusy = false
                UIApplication.shared.isIdleTimerDisabled = false
            }
        }
    }
}

/// The thread that the model belongs to.
private final class Worker: @unchecked Sendable {
    private let queue = DispatchQueue(label: "io.edgekd.demo.worker")
    private let lock = NSLock()
    private var isStopped = false
    private let say: (String) -> Void
    private lazy var demo = Demo(
        URL.applicationSupportDirectory.appendingPathComponent("edgekd"), AppleDevice(),
        [Runtime.llama, .coreML, .executorch].compactMap { $0 }, key: bundleKey, say: say)

    init(say: @escaping (String) -> Void) { self.say = say }

    /// Of Info.plist's EdgekdBundleKey, where the app's makers put theirs: then it takes signed bundles alone.
    private var bundleKey: BundleKey? {
        let text = Bundle.main.object(forInfoDictionaryKey: "EdgekdBundleKey") as? String ?? ""
        return text.isEmpty ? nil : BundleKey(text)
    }

    func run(_ task: @escaping (Worker) throws -> Void, then: @escaping (String?, Bool) -> Void) {
        lock.withLock { isStopped = false }
        queue.async { [self] in
            var failure: String?
            do {
                try task(self)
            } catch {
                failure = error.localizedDescription
            }
            then(failure, demo.isLoaded)
        }
    }

    func stop() { lock.withLock { isStopped = true } }

    func start() throws {
        let pushed = URL.documentsDirectory.appendingPathComponent("model")
        guard FileManager.default.fileExists(atPath: pushed.path) else { return try demo.start() }
        try demo.take(FolderSource(pushed))
        try FileManager.default.removeItem(at: pushed)
    }

    func take(_ folder: URL) throws {
        let isScoped = folder.startAccessingSecurityScopedResource()
        defer { if isScoped { folder.stopAccessingSecurityScopedResource() } }
        try demo.take(FolderSource(folder))
    }

    func answer(_ message: String, onPiece: @escaping (String) -> Void) throws {
        try demo.answer(message, stopped: { [self] in lock.withLock { isStopped } }, onPiece: onPiece)
    }

    func measure() throws { try demo.bench(to: URL.documentsDirectory.appendingPathComponent("benchmark.json")) }
}
