import Foundation
import XCTest

@testable import EdgeCore

/// The golden vectors, which edgekd and the other demos are held to as well.
final class VectorsTests: XCTestCase {
    private func read(_ name: String) throws -> Json {
        let here = URL(fileURLWithPath: #filePath)
        let root = (0..<4).reduce(here) { url, _ in url.deletingLastPathComponent() }
        let file = root.appendingPathComponent("tests/vectors/\(name).json")
        return try Json.parse(String(decoding: Data(contentsOf: file), as: UTF8.self))
    }

    private func cases(_ name: String) throws -> [Json] { try XCTUnwrap(read(name)["cases"].list) }

    func testHashes() throws {
        for test in try cases("hashes") {
            let folder = try Folder()
            let data = (0..<test["times"].int!).reduce(into: Data()) { data, _ in data += fromHex(test["hex"].string!) }
            try folder.write("file", data)
            XCTAssertEqual(
                try sha256(file: folder.url.appendingPathComponent("file")), test["expect"].string, name(test))
            XCTAssertEqual(sha256(data), test["expect"].string, name(test))
        }
    }

    func testManifests() throws {
        for test in try cases("manifests") {
            let folder = try Folder()
            for (file, text) in test["files"].object!.pairs { try folder.write(file, Data(text.string!.utf8)) }
            if let text = test["manifest"].string { try folder.write("manifest.json", Data(text.utf8)) }
            let targets = [test["target"].string!]
            let code = refused { try Artifact.read(folder.url, targets: targets).checkFiles() }
            XCTAssertEqual(code, test["expect"]["refused"].string, name(test))
            if code != nil { continue }
            let artifact = try Artifact.read(folder.url, targets: targets)
            let (manifest, contract) = (artifact.manifest, artifact.manifest.contract)
            let found: Json = [
                "name": .string(manifest.name), "target": .string(manifest.target),
                "main_file": .string(manifest.mainFile), "context_length": .int(contract.contextLength),
                "vocab_size": .int(contract.vocabSize), "bos_id": contract.bosId.map { .int($0) } ?? nil,
                "eos_ids": .list(contract.eosIds.map { .int($0) }), "add_bos": .bool(contract.addBos),
                "size_bytes": .int(artifact.sizeBytes), "cache_bytes": manifest.cacheBytes.map { .int($0) } ?? nil,
            ]
            XCTAssertEqual(found, test["expect"]["ok"], name(test))
        }
    }

    func testPrompts() throws {
        let all = try read("prompts")
        let form = DateFormatter()
        form.dateFormat = "yyyy-MM-dd'T'HH:mm:ss"
        let now = try XCTUnwrap(form.date(from: all["now"].string!))
        let ids = all["special_ids"].object!.pairs.map { ($0.key, $0.value.int!) }
        var renderedFull = 0
        for test in try XCTUnwrap(all["cases"].list) {
            let template = all["templates"][test["template"].string!]
            let isFull = template["level"].string == "full"
            let chat = try XCTUnwrap(all["chats"][test["chat"].string!].list)
            var rendered = ""
            let code = refused {
                rendered = try renderChat(
                    template["source"].string!, texts(all["special_tokens"]), chat,
                    tools: test["tools"].bool! ? all["tools"] : nil,
                    addGenerationPrompt: test["add_generation_prompt"].bool!, now: { now })
            }
            if test["expect"]["refused"].string != nil {
                XCTAssertEqual(code, "template_refused", name(test))
                continue
            }
            if isFull, code == "template_refused" { continue }
            renderedFull += isFull ? 1 : 0
            XCTAssertNil(code, name(test))
            // As JSON: Swift's == holds texts equal that differ in their normal form.
            XCTAssertEqual(.string(rendered), test["expect"]["text"], name(test))
            let parts = promptParts(
                rendered, Dictionary(uniqueKeysWithValues: ids), texts(all["special_strips"])
            ).map { part -> Json in
                switch part {
                case .special(let id): .int(id)
                case .text(let text, let start): ["text": .string(text), "start": .bool(start)]
                }
            }
            XCTAssertEqual(.list(parts), test["expect"]["parts"], name(test))
        }
        XCTAssertGreaterThan(renderedFull, 80, "templates of level full that are rendered")
    }

    func testTexts() throws {
        for test in try cases("texts") {
            let given = test["contract"]
            var contract = Contract(contextLength: 9, vocabSize: 300, eosIds: [1], addBos: given["add_bos"].bool!)
            contract.bosId = given["bos_id"].int
            contract.normalizer = given["normalizer"].string
            contract.spacePrefix = given["space_prefix"].string
            let read = asLlamaCppReads(test["text"].string!, contract, start: test["start"].bool!)
            XCTAssertEqual(.list(idsBefore(contract).map { .int($0) }), test["expect"]["before"], name(test))
            XCTAssertEqual(.string(read), test["expect"]["text"], name(test))
        }
    }

    func testHistory() throws {
        let template = try read("history")["template"].string
        for test in try cases("history") {
            let messages = try XCTUnwrap(test["messages"].list)
            var contract = Contract(contextLength: test["context_length"].int!, vocabSize: 1 << 20, eosIds: [0])
            contract.chatTemplate = template
            contract.specialIds = [:]
            var found: (ids: [Int], kept: [Message]) = ([], [])
            let code = refused { found = try fittedChat(Letters(), contract, messages, test["max_tokens"].int!) }
            XCTAssertEqual(code, test["expect"]["refused"].string, name(test))
            if code != nil { continue }
            let shown = text(found.ids.map { Unicode.Scalar(UInt32($0))! })
            XCTAssertEqual(.string(shown), test["expect"]["text"], name(test))
            let kept = try XCTUnwrap(test["expect"]["keep"].list).map { messages[$0.int!] }
            XCTAssertEqual(found.kept, kept, name(test))
        }
    }

    func testRoom() throws {
        for test in try cases("room") {
            let given = test["contract"]
            var contract = Contract(
                contextLength: given["context_length"].int!, vocabSize: 300, eosIds: [1], addBos: given["add_bos"].bool!
            )
            contract.bosId = given["bos_id"].int
            let text = String(repeating: "x", count: test["length"].int!)
            var tokens: Int?
            let told = words { tokens = try textIds(Letters(), contract, text).count }
            let code = refused { _ = try textIds(Letters(), contract, text) }
            XCTAssertEqual(code, test["expect"]["refused"].string, name(test))
            XCTAssertEqual(tokens, test["expect"]["tokens"].int, name(test))
            if code != "too_long" { continue }
            let numbers = told.split { !$0.isNumber }.map { Json.int(Int($0)!) }
            XCTAssertEqual(.list(numbers), test["expect"]["numbers"], name(test))
        }
    }

    func testStreams() throws {
        for test in try cases("streams") {
            var stream = Utf8Stream()
            let tokens = try XCTUnwrap(test["tokens"].list)
            let shown = tokens.map { Json.string(stream.push(Array(fromHex($0.string!)))) }
            XCTAssertEqual(.list(shown), test["expect"]["shown"], name(test))
            XCTAssertEqual(.string(stream.end()), test["expect"]["end"], name(test))
        }
    }

    func testStatistics() throws {
        for test in try cases("statistics") {
            let runs = try XCTUnwrap(test["runs"].list)
            let gaps = runs.map { $0["inter_token_s"].list!.map { $0.double! } }
            func near(_ found: Double, _ key: String) {
                let wanted = test["expect"][key].double!
                XCTAssertEqual(found, wanted, accuracy: 1e-9 * abs(wanted), "\(name(test)): \(key)")
            }
            near(median(runs.map { $0["load_s"].double! }), "load_s")
            near(percentile(gaps.flatMap { $0 }, 95), "inter_token_p95_s")
            let tokens = test["decode_tokens"].int!
            near(median(try gaps.map { try tokensPerSecond(tokens, $0.reduce(0, +)) }), "decode_tokens_per_s")
        }
    }

    private func name(_ test: Json) -> String { test["name"].string ?? "" }

    private func texts(_ value: Json) -> [String: String] {
        Dictionary(uniqueKeysWithValues: value.object!.pairs.map { ($0.key, $0.value.string!) })
    }

    private func fromHex(_ hex: String) -> Data {
        let digits = Array(hex)
        return Data(stride(from: 0, to: digits.count, by: 2).map { UInt8(String(digits[$0...$0 + 1]), radix: 16)! })
    }
}
