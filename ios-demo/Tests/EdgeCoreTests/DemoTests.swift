import Foundation
import XCTest

@testable import EdgeCore

/// Engines that were opened.
private final class Opened: @unchecked Sendable {
    var engines: [Scripted] = []

    func open() -> Scripted {
        engines.append(Scripted([1: 2, 2: 3, 3: 4, 4: 9, 5: 9]))
        return engines[engines.count - 1]
    }
}

final class DemoTests: XCTestCase {
    private let root = try! Folder()
    private let source = try! Folder()
    private let opened = Opened()
    private var told: [String] = []

    private func demo(_ device: FixedDevice = FixedDevice()) -> Demo {
        Demo(root.url, device, [Runtime(target: "gguf") { [opened] _, _ in opened.open() }]) { self.told.append($0) }
    }

    private func artifact(_ golden: Json, template: Json = nil) throws -> FolderSource {
        let contract: Json = [
            "context_length": 40, "vocab_size": 300, "eos_ids": [9], "add_bos": false, "chat_template": template,
            "special_ids": [:],
        ]
        let more: [(String, Json)] = [("parity", ["golden": golden]), ("contract", contract)]
        try source.write("a/m", Data("weights".utf8))
        try source.write("manifest.json", Data(manifestText(["a/m": "weights"], more).utf8))
        return FolderSource(source.url)
    }

    private let right: Json = [["prompt_ids": [1], "tokens": [2, 3]]]

    func testAModelIsTakenCheckedLoadedProvedAndAnswers() throws {
        let template: Json = "{% for m in messages %}{{ m.role[:1] }} {{ m.content }} {% endfor %}"
        let demo = demo()
        try demo.take(artifact(right, template: template))
        XCTAssertEqual(told.last, "n, gguf r: files checked, 2 golden tokens the same.")
        XCTAssertTrue(demo.isLoaded)
        var shown = ""
        try demo.answer("a", stopped: { false }) { shown += $0 }
        XCTAssertEqual(opened.engines[0].fed[0].ids, [1, 1])
        XCTAssertEqual(told.last?.hasPrefix("2 tokens read, 3 written in "), true, told.last ?? "")
        try demo.answer("four", stopped: { false }) { _ in }
        XCTAssertEqual(opened.engines[0].fed[0].ids.count, 6, "the chat goes on")
        try demo.bench(
            BenchSettings(promptTokens: [2], decodeTokens: 2, runs: 1), to: root.url.appendingPathComponent("b"))
        XCTAssertEqual(opened.engines.map(\.isClosed), [true, true, false])
    }

    func testAModelWithoutATemplateGoesOnWithTheText() throws {
        let demo = demo()
        try demo.take(artifact(right))
        var shown = ""
        try demo.answer("vier viere", stopped: { false }) { shown += $0 }
        XCTAssertEqual(shown, "(the model ended its answer at once)")
    }

    func testMemoryIsRefusedBeforeLoading() throws {
        var device = FixedDevice()
        device.availableBytes = 1 << 20
        let told = words { try demo(device).take(artifact(right)) }
        XCTAssertTrue(told.contains("there are 1 MiB. Close other apps"), told)
        XCTAssertEqual(opened.engines.count, 0)
    }

    func testADeviceThatComputesOtherTokensIsRefused() throws {
        let demo = demo()
        let told = words { try demo.take(artifact([["prompt_ids": [1], "tokens": [2, 4]]])) }
        let cause = "This device does not compute what the artifact should: Golden answer 1: token 2 is 3, not 4."
        XCTAssertEqual(told, "\(cause) Report the device.")
        XCTAssertEqual(opened.engines.map(\.isClosed), [true])
        XCTAssertFalse(demo.isLoaded)
    }

    func testWhatIsKeptIsLoadedAtTheNextStart() throws {
        try demo().take(artifact(right))
        let second = demo()
        try second.start()
        XCTAssertTrue(second.isLoaded)
        try root.write("model/a/m", Data("Weights".utf8))
        XCTAssertEqual(refused { try demo().start() }, "file_changed")
        try root.write("loading", Data())
        XCTAssertEqual(refused { try demo().start() }, "ended")
    }
}
