import Foundation
import XCTest

@testable import EdgeCore

final class CoreTests: XCTestCase {
    private let contract = Contract(contextLength: 40, vocabSize: 300, eosIds: [9])
    private let answers = [1: 2, 2: 3, 3: 4, 4: 9, 5: 5]

    func testGenerationEndsAtTheEndOfTheTextAtItsCountAndAtTheContext() throws {
        let decoder = Decoder(Scripted(answers), contract)
        XCTAssertEqual(try decoder.greedy([1], 10), [2, 3, 4])
        XCTAssertEqual(try decoder.greedy([1], 2), [2, 3])
        XCTAssertEqual(try decoder.greedy([5, 5, 5, 5, 5], 100).count, 36)
        XCTAssertEqual(refused { try decoder.feed(Array(repeating: 5, count: 41)) }, "too_long")
    }

    func testALongPromptIsFedInPieces() throws {
        let engine = Scripted(answers)
        let long = Contract(contextLength: 2000, vocabSize: 300, eosIds: [9])
        _ = try Decoder(engine, long).greedy(Array(repeating: 5, count: 1100), 2)
        XCTAssertEqual(engine.fed.map(\.ids.count), [512, 512, 76, 1])
        XCTAssertEqual(engine.fed.map(\.used), [0, 512, 1024, 1100])
    }

    func testAStreamShowsWholeCharactersAndStops() throws {
        let decoder = Decoder(Scripted(answers), contract)
        var shown: [String] = []
        XCTAssertEqual(try decoder.stream([1], 10, stopped: { false }) { shown.append($0) }, 3)
        XCTAssertEqual(shown, ["", "é", "", "\u{fffd}"])
        XCTAssertEqual(try decoder.stream([1], 10, stopped: { true }) { _ in }, 1)
    }

    func testTheSelfTestNamesTheFirstTokenThatDiffers() throws {
        let decoder = Decoder(Scripted(answers), contract)
        func run(_ tokens: [Int], after id: Int = 1) throws -> SelfTestResult {
            try selfTest(
                decoder,
                [
                    GoldenAnswer(promptIds: [1], tokens: [2, 3]), GoldenAnswer(promptIds: [id], tokens: tokens),
                ])
        }
        XCTAssertEqual(try run([2, 3, 4]), SelfTestResult(answers: 2, tokens: 5, failure: nil))
        let wrong = "Golden answer 2: token 2 is 3, not 4."
        XCTAssertEqual(try run([2, 4]), SelfTestResult(answers: 2, tokens: 3, failure: wrong))
        XCTAssertEqual(try run([9], after: 4).failure, "Golden answer 2: token 1 is missing, not 9.")
    }

    func testMemoryIsRefusedWithTheNumbers() throws {
        let more: [(String, Json)] = [("traffic", ["kv_bytes_per_position": .int(1 << 20)])]
        let manifest = try Manifest.parse(manifestText(["a/m": "w"], more), targets: ["gguf"])
        func told(_ available: Int?) -> String? {
            memoryShortage(manifest, modelBytes: 500 << 20, availableBytes: available)
        }
        XCTAssertEqual(
            told(600 << 20),
            "The model needs 636 MiB of memory (500 MiB of weights, the cache of 40 tokens and the runtime); "
                + "there are 600 MiB.")
        XCTAssertNil(told(636 << 20))
        XCTAssertNil(told(nil), "a system that does not tell refuses nothing")
        let storage = storageShortage(bytes: 2 << 20, freeBytes: 1 << 20)
        XCTAssertEqual(storage, "The artifact has 2 MiB; the storage has 1 MiB left.")
    }

    func testTheSelfTestReadsTextsAndChats() throws {
        var chats = contract
        chats.chatTemplate = "{{ messages[0].content }}!"
        chats.specialIds = ["!": 1]
        let decoder = Decoder(Scripted(answers), chats)
        func failure(_ ids: [Int], _ tokens: [Int], _ text: String, _ messages: [Message]? = nil) throws -> String? {
            let answer = GoldenAnswer(promptIds: ids, tokens: tokens, text: text, messages: messages)
            return try selfTest(decoder, [answer]).failure
        }
        let chat = [message("user", "four")]
        XCTAssertNil(try failure([4], [], "four"))
        XCTAssertEqual(try failure([5], [], "four"), "Golden answer 1: its text is read as [4], not [5].")
        XCTAssertNil(try failure([4, 1], [2, 3], "four!", chat))
        XCTAssertEqual(try failure([4, 1], [3], "four!", chat), "Golden answer 1: token 1 is 2, not 3.")
        let other = "Golden answer 1: its chat is rendered as another text."
        XCTAssertEqual(try failure([4, 1], [2], "four?", chat), other)
    }

    func testARequestIsTimedAsTheHarnessDoes() throws {
        var now = -1.0
        func clock() -> Double {
            now += 1
            return now
        }
        let engine = Scripted([4: 2, 2: 3, 3: 3])
        let request = try serve(Decoder(engine, contract), "four", decodeTokens: 3, clock: clock)
        XCTAssertEqual(request.tokenizeS, 1)
        XCTAssertEqual(request.prefillS, 1)
        XCTAssertEqual(request.firstTokenS, 2)
        XCTAssertEqual(request.ttftS, 6, "the first token is half a character")
        XCTAssertEqual(request.decodeTokens, 3)
        XCTAssertEqual(request.samplingS, [1, 1, 1])
    }

    func testTextOfExactlySoManyTokens() throws {
        let words = Scripted([:])
        for count in [1, 7, 300] {
            XCTAssertEqual(words.tokenize(try realText(words, tokens: count), start: true).count, count)
        }
        let settings = BenchSettings(promptTokens: [64, 3], decodeTokens: 4, runs: 1)
        XCTAssertEqual(settings.fitted(9).promptTokens, [3])
        XCTAssertEqual(settings.fitted(6), BenchSettings(promptTokens: [3], decodeTokens: 3, runs: 1))
    }

    func testWhatDisturbsABenchmarkIsTold() throws {
        let manifest = try Manifest.parse(manifestText(["a/m": "w"]), targets: ["gguf"])
        let folder = try Folder()
        let artifact = Artifact(folder: folder.url, manifest: manifest)
        let device = FixedDevice(disturbances: ["It is hot."])
        let all = Dictionary(uniqueKeysWithValues: (0..<300).map { ($0, 2) })
        let bench = Bench(artifact, device) { [contract] in Decoder(Scripted(all) { _ in [] }, contract) }
        let record = try bench.record(BenchSettings(promptTokens: [4], decodeTokens: 4, runs: 2))
        XCTAssertEqual(record["benchmark"]["noise"], ["dirty": ["It is hot."]])
        XCTAssertEqual(record["benchmark"]["icl_s"], ["value": nil, "unit": "s", "reason": "no token had text"])
        XCTAssertEqual(record["benchmark"]["load_s"]["samples"].list?.count, 2)
        XCTAssertEqual(record["benchmark"]["peak_rss_bytes"]["reason"], "the system does not tell it")
        XCTAssertEqual(record["benchmark"]["rss_before_load_bytes"]["value"].double, 1)
    }

    func testJsonIsReadAsTheStandardHasIt() throws {
        let bad = [
            "", "{", "[1,]", "{\"a\" 1}", "NaN", "01", "1 2", "\"\\x\"", "'a'", "[1}", "\"\u{1}\"", "1.", "-", "1e",
            "\"\\u12\"", String(repeating: "[", count: 9999),
        ]
        for text in bad { XCTAssertThrowsError(try Json.parse(text), text) { XCTAssert($0 is NotJson) } }
        let value: Json = ["ä\"\\\n": [1, .double(-2.5), true, nil, "\u{20ac}"], "empty": [:]]
        XCTAssertEqual(try Json.parse(value.write()), value)
        XCTAssertEqual(try Json.parse("\"\\ud83d\\ude00 \\ud83d!\""), "😀 \u{fffd}!")
        XCTAssertEqual(try Json.string("\u{20ac}😀\u{7f}").write(ascii: true), "\"\\u20ac\\ud83d\\ude00\\u007f\"")
        XCTAssertEqual(
            try Json.object(Json.Members([("a", [1, 2])])).write(indent: 4),
            "{\n    \"a\": [\n        1,\n        2\n    ]\n}")
        XCTAssertNotEqual(Json.string("\u{e9}"), "e\u{301}", "texts are code points")
    }

    func testATemplateThatDoesNotEndOrIsTooDeepIsRefused() throws {
        let deep = String(repeating: "(", count: 5000) + "1" + String(repeating: ")", count: 5000)
        let nested = String(repeating: "{% if true %}", count: 5000) + String(repeating: "{% endif %}", count: 5000)
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
        let itself = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"
        for template in ["{{ \(deep) }}", nested, endless, itself, "{% break %}", "{{ 9223372036854775807 + 1 }}"] {
            XCTAssertEqual(
                refused { _ = try renderChat(template, [:], []) }, "template_refused", template.prefix(40) + "")
        }
        let long = "{{ " + (0..<5000).map { _ in "'a'" }.joined(separator: " + ") + " }}"
        XCTAssertEqual(try renderChat(long, [:], []).count, 5000)
    }

    func testTheProgramsInputs() throws {
        let step = ProgramStep(ids: [7, 8, 9], used: 2)
        XCTAssertEqual(step.positions, [2, 3, 4])
        XCTAssertEqual(step.outputs, [2])
        let hidden = (0..<3).map { row in (0..<step.seen).map { step.mask(row: row, column: $0) < 0 } }
        XCTAssertEqual(
            hidden,
            [
                [false, false, false, true, true], [false, false, false, false, true],
                [false, false, false, false, false],
            ])
    }
}
