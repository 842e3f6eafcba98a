import Foundation
import XCTest

@testable import EdgeCore

/// Files of a folder that is somewhere else; `broken` cannot be read to its end.
private struct Given: Source {
    var contents: [String: String]
    var broken: String?

    func files() -> [String: Int] { contents.mapValues(\.utf8.count) }

    func copy(_ name: String, to place: URL) throws {
        if name == broken {
            try Data(contents[name]!.utf8.prefix(3)).write(to: place)
            errno = ENOSPC
            throw FileFault()
        }
        try Data(contents[name]!.utf8).write(to: place)
    }
}

/// What stands for a signature here, where there is no CryptoKit: the vectors' own are verified in tests/test_ios.py.
private func standIn(_ key: UInt8, _ sums: Data) -> Data { Data([key]) + Data(sha256(sums).utf8.prefix(63)) }

final class LibraryTests: XCTestCase {
    private var root = try! Folder()
    private var whole: [String: String] = [:]
    private let key = BundleKey(Data(repeating: 7, count: 32).base64EncodedString()) { key, signature, sums in
        signature == standIn(key[0], sums)
    }

    override func setUpWithError() throws {
        root = try Folder()
        whole = ["manifest.json": try manifestText(["a/m": "weights"]), "a/m": "weights", "not listed": "x"]
    }

    private func library(_ key: BundleKey? = nil) -> Library { Library(root.url, targets: ["gguf"], key: key) }

    private func kept(_ name: String = "") -> [String] {
        let place = root.url.appendingPathComponent(name)
        return ((try? FileManager.default.contentsOfDirectory(atPath: place.path)) ?? []).sorted()
    }

    private func code(_ files: [String: String], broken: String? = nil, free: Int? = 1 << 30) -> String? {
        refused { _ = try library().take(Given(contents: files, broken: broken), freeBytes: free) }
    }

    func testAnArtifactComesWhole() throws {
        XCTAssertNil(try library().kept())
        XCTAssertEqual(try library().take(Given(contents: whole), freeBytes: nil).manifest.name, "n")
        XCTAssertEqual(try library().kept()?.manifest.name, "n")
        XCTAssertEqual(kept("model"), ["a", "manifest.json"])
    }

    func testWhatFailsLeavesWhatWasThere() throws {
        _ = try library().take(Given(contents: whole), freeBytes: nil)
        XCTAssertEqual(code(whole, broken: "a/m"), "storage", "the storage is full half-way")
        XCTAssertEqual(code(whole, free: 3), "storage")
        XCTAssertEqual(code(whole.filter { $0.key != "a/m" }), "file_missing")
        XCTAssertEqual(code(whole.merging(["a/m": "Weights"]) { $1 }), "file_changed")
        XCTAssertEqual(code(whole.merging(["a/m": "weigh"]) { $1 }), "file_changed", "it is truncated")
        XCTAssertEqual(code(whole.filter { $0.key != "manifest.json" }), "no_manifest")
        let newer = try manifestText(["a/m": "weights"], [("schema_version", 2)])
        XCTAssertEqual(code(whole.merging(["manifest.json": newer]) { $1 }), "newer_schema")
        let other = try manifestText(["a/m": "weights"], [("target", "onnx")])
        XCTAssertEqual(code(whole.merging(["manifest.json": other]) { $1 }), "other_target")
        let mainFile = try XCTUnwrap(library().kept()).mainFile
        XCTAssertEqual(try String(contentsOf: mainFile, encoding: .utf8), "weights")
        XCTAssertEqual(kept(), ["model"])
    }

    func testAFullStorageIsToldInASentence() {
        let told = words { _ = try library().take(Given(contents: whole, broken: "a/m"), freeBytes: nil) }
        XCTAssertTrue(told.hasPrefix("The artifact could not be copied: No space left on device."), told)
    }

    func testWhatAnImportThatWasEndedLeftIsRemoved() throws {
        try root.write("incoming/half", Data("half".utf8))
        XCTAssertNil(try library().kept())
        XCTAssertEqual(kept(), [])
    }

    func testAnAppThatWasEndedWhileItLoadedSaysSoOnce() throws {
        _ = try library().take(Given(contents: whole), freeBytes: nil)
        XCTAssertEqual(try library().load { kept() }, ["loading", "model"], "the mark is there while it loads")
        XCTAssertEqual(kept(), ["model"], "and not behind")
        try root.write("loading", Data())
        let told = words { _ = try library().kept() }
        XCTAssertTrue(told.hasPrefix("The app was ended while it loaded its model"), told)
        XCTAssertNotNil(try library().kept())
    }

    // --- bundles ---------------------------------------------------------------------------------------------------

    private func bundle(_ sign: UInt8? = 7, _ changes: [String: String] = [:]) throws -> [String: String] {
        var files = whole.filter { $0.key != "not listed" }
        files["LICENSE"] = "do what you like"
        let listed = files.merging(changes) { $1 }.sorted { $0.key < $1.key }.map { name, text in
            (name, ["sha256": .string(sha256(Data(text.utf8))), "bytes": .int(text.utf8.count)] as Json)
        }
        let sums = try (["schema_version": 1, "files": .object(Json.Members(listed))] as Json).write()
        files["bundle.json"] = sums
        if let sign { files["bundle.sig"] = standIn(sign, Data(sums.utf8)).base64EncodedString() + "\n" }
        return files
    }

    private func take(_ files: [String: String], _ key: BundleKey?) throws {
        _ = try library(key).take(Given(contents: files), freeBytes: nil)
        _ = try library(key).check()
    }

    func testWithAKeyOnlyItsBundlesCome() throws {
        try take(bundle().merging(["more": "x"]) { $1 }, key)
        let names = ["LICENSE", "a", "bundle.json", "bundle.sig", "manifest.json"]
        XCTAssertEqual(kept("model"), names, "and what is not listed stays behind")
        XCTAssertEqual(refused { try take(whole, key) }, "not_signed")
        XCTAssertEqual(refused { try take(bundle(nil), key) }, "not_signed")
        XCTAssertEqual(refused { try take(bundle(8), key) }, "bad_signature")
        XCTAssertEqual(refused { try take(bundle(7, ["LICENSE": "other words...."]), key) }, "file_changed")
        XCTAssertEqual(refused { try take(bundle(7, ["LICENSE": "longer than it was"]), key) }, "file_changed")
        XCTAssertEqual(refused { try take(bundle(7, ["more": "x"]), key) }, "file_missing")
        let junk = try bundle().merging(["bundle.json": "{"]) { $1 }
        XCTAssertEqual(refused { try take(junk, key) }, "bad_signature", "nothing is read before it is verified")
        let unread = try bundle().merging(["manifest.json": "{", "bundle.sig": "none"]) { $1 }
        XCTAssertEqual(refused { try take(unread, key) }, "bad_signature", "the manifest neither")
        XCTAssertEqual(kept("model"), names)
    }

    func testWithAKeyWhatIsKeptIsVerifiedAtEachStart() throws {
        try take(bundle(), key)
        try root.write("model/more", Data())
        XCTAssertEqual(refused { _ = try library(key).check() }, "not_listed")
        try take(bundle(), key)
        try root.write("model/LICENSE", Data("do what I like !".utf8))
        XCTAssertEqual(refused { _ = try library(key).check() }, "file_changed")
    }

    func testABundleMustListWhatItsManifestDoes() throws {
        whole["manifest.json"] = try manifestText(["a/m": "Weights"])
        XCTAssertEqual(refused { try take(bundle(), key) }, "file_changed")
    }

    func testWithoutAKeyABundleIsAnArtifact() throws {
        try take(bundle(nil), nil)
        XCTAssertEqual(kept("model"), ["a", "manifest.json"])
    }
}
