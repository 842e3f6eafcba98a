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

final class LibraryTests: XCTestCase {
    private var root = try! Folder()
    private var whole: [String: String] = [:]
    private let key = BundleKey(Data(repeating: 7, count: 32).base64EncodedString()) { key, signature, sums in
        // What stands for Ed25519 here: the key's first byte before the data's sum.
        signature == Data([key[0]]) + Data(sha256(sums).utf8)
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

    private func bundle(_ sign: UInt8? = nil, _ changes: [String: String] = [:]) throws -> [String: String] {
        var files = whole.filter { $0.key != "not listed" }
        files["LICENSE"] = "do what you like"
        let listed = files.merging(changes) { $1 }.sorted { $0.key < $1.key }.map { name, text in
            (name, ["sha256": .string(sha256(Data(text.utf8))), "bytes": .int(text.utf8.count)] as Json)
        }
        let sums = try (["schema_version": 1, "files": .object(Json.Members(listed))] as Json).write()
        files["bundle.json"] = sums
        if let sign {
            files["bundle.sig"] = (Data([sign]) + Data(sha256(Data(sums.utf8)).utf8)).base64EncodedString() + "\n"
        }
        return files
    }

    private func take(_ files: [String: String], _ key: BundleKey? = nil) throws {
        let library = library(key)
        let artifact = try library.take(Given(contents: files), freeBytes: nil)
        try library.check(artifact)
    }

    func testABundleComesWithAllItsFiles() throws {
        try take(bundle())
        XCTAssertEqual(kept("model"), ["LICENSE", "a", "bundle.json", "manifest.json"])
        XCTAssertEqual(refused { try take(bundle(nil, ["LICENSE": "other words...."])) }, "file_changed")
        XCTAssertEqual(refused { try take(bundle(nil, ["LICENSE": "longer than it was"])) }, "file_changed")
        XCTAssertEqual(refused { try take(bundle(nil, ["more": "x"])) }, "file_missing")
        XCTAssertEqual(refused { try take(bundle(nil, ["../out": "x"])) }, "leaves_folder")
        XCTAssertEqual(refused { try take(bundle().merging(["bundle.json": "{"]) { $1 }) }, "not_json")
        let newer = "{\"schema_version\": 2, \"files\": {}}"
        XCTAssertEqual(refused { try take(bundle().merging(["bundle.json": newer]) { $1 }) }, "newer_schema")
    }

    func testAFileThatTheBundleDoesNotListIsRefused() throws {
        try take(bundle())
        try root.write("model/more", Data())
        let artifact = try XCTUnwrap(library().kept())
        XCTAssertEqual(refused { try library().check(artifact) }, "not_listed")
    }

    func testABundleMustListWhatItsManifestDoes() throws {
        whole["manifest.json"] = try manifestText(["a/m": "Weights"])
        XCTAssertEqual(refused { try take(bundle()) }, "file_changed")
    }

    func testAnAppWithAKeyTakesBundlesOfThatKeyAlone() throws {
        try take(bundle(7), key)
        XCTAssertEqual(kept("model").contains("bundle.sig"), true)
        XCTAssertEqual(refused { try take(bundle(8), key) }, "bad_signature")
        XCTAssertEqual(refused { try take(bundle(), key) }, "bad_signature")
        XCTAssertEqual(refused { try take(whole, key) }, "bad_signature")
        let later = try bundle(7).merging(["bundle.json": bundle(nil, ["a/m": "Weights"])["bundle.json"]!]) { $1 }
        XCTAssertEqual(refused { try take(later, key) }, "bad_signature", "the sums were changed after the signature")
        let junk = try bundle(7).merging(["bundle.json": "{"]) { $1 }
        XCTAssertEqual(refused { try take(junk, key) }, "bad_signature", "nothing is read before it is verified")
        XCTAssertNil(BundleKey("c2hvcnQ="), "a key has 32 bytes")
    }
}
