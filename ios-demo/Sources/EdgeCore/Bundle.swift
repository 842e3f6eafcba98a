import Foundation

#if canImport(CryptoKit)
    import CryptoKit
#endif

let sumsName = "bundle.json"
let signatureName = "bundle.sig"
private let again = "Make the bundle again."

/// Whether a signature of data is one of an Ed25519 key.
public typealias Verify = (_ key: Data, _ signature: Data, _ data: Data) throws -> Bool

/// By CryptoKit, which Apple's systems alone have.
public func isSigned(_ key: Data, _ signature: Data, _ data: Data) throws -> Bool {
    #if canImport(CryptoKit)
        guard let key = try? Curve25519.Signing.PublicKey(rawRepresentation: key) else { return false }
        return key.isValidSignature(signature, for: data)
    #else
        throw Refusal("no_ed25519", "This system cannot verify Ed25519 signatures.", "Use one of Apple's.")
    #endif
}

/// The key by which an app knows the bundles of its makers: raw, base64, as `edgekd bundle --key` prints it.
public struct BundleKey {
    private let base64: String
    private let verify: Verify

    public init(_ base64: String, verify: @escaping Verify = isSigned) {
        (self.base64, self.verify) = (base64, verify)
    }

    func check(_ sums: Data, _ signature: Data) throws {
        let text = String(decoding: signature, as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines)
        guard let key = Data(base64Encoded: base64), let bytes = Data(base64Encoded: text), key.count == 32,
            bytes.count == 64, try verify(key, bytes, sums)
        else {
            throw Refusal(
                "bad_signature", "\(signatureName) is no signature by the app's key.", "Do not use the bundle.")
        }
    }
}

/// The files that `edgekd bundle` lists, signed by whoever has the app's key: docs/bundles.md is the format.
struct SignedBundle {
    let files: [(name: String, sum: String, bytes: Int)]

    /// The list in a folder; its signature is verified over its bytes before anything in it is looked at.
    static func read(_ folder: URL, _ key: BundleKey) throws -> SignedBundle {
        func bytes(_ name: String) throws -> Data {
            guard let data = try? Data(contentsOf: folder.appendingPathComponent(name)) else {
                let words = "\(name) is missing: the app opens signed bundles alone."
                throw Refusal("not_signed", words, "Choose one.")
            }
            return data
        }
        let sums = try bytes(sumsName)
        try key.check(sums, bytes(signatureName))
        return try listed(sums)
    }

    private static func listed(_ sums: Data) throws -> SignedBundle {
        func bad(_ key: String) -> Refusal {
            Refusal("bad_value", "\(sumsName): key '\(key)' is not what a bundle has there.", again)
        }
        guard let text = String(data: sums, encoding: .utf8), let json = try? Json.parse(text) else {
            throw Refusal("not_json", "\(sumsName) is not JSON.", again)
        }
        guard let schema = json["schema_version"].int else { throw bad("schema_version") }
        if schema > newestSchema {
            let words = "\(sumsName) has schema \(schema); this app reads up to \(newestSchema)."
            throw Refusal("newer_schema", words, "Update the app.")
        }
        guard let files = json["files"].object else { throw bad("files") }
        for (name, _) in files.pairs where !isInside(name) {
            throw Refusal("leaves_folder", "\(sumsName) lists \(name).", again)
        }
        return SignedBundle(
            files: try files.pairs.map { name, told in
                guard let sum = told["sha256"].string, let bytes = told["bytes"].int else { throw bad("files.\(name)") }
                return (name, sum, bytes)
            })
    }

    /// Compare a folder with it: the listed files and no other, each of its size and sha256.
    func check(_ folder: URL, onShare: (Double) -> Void) throws {
        let there = try filesBelow(folder)
        for (name, _, bytes) in files where there[name].map({ $0 != bytes }) ?? false {
            throw Refusal("file_changed", "\(name) is not the file that the bundle lists.", "Copy the bundle again.")
        }
        try checkSums(folder, files.map { (name: $0.name, sum: $0.sum) }, by: "that the bundle lists", onShare: onShare)
        let listed = [sumsName, signatureName] + files.map(\.name)
        if let strange = there.keys.sorted().first(where: { name in !listed.contains { isSame($0, name) } }) {
            let remedy = "Remove it, or copy the bundle again."
            throw Refusal("not_listed", "\(strange) is not in the list of the bundle.", remedy)
        }
    }
}

/// An artifact whose files have been compared with its manifest; with a key, with the list of the bundle that it has
/// signed, before the manifest is read.
public func checkedArtifact(
    _ folder: URL, targets: [String], key: BundleKey?, onShare: (Double) -> Void = { _ in }
) throws -> Artifact {
    guard let key else {
        let artifact = try Artifact.read(folder, targets: targets)
        try artifact.checkFiles(onShare: onShare)
        return artifact
    }
    let bundle = try SignedBundle.read(folder, key)
    try bundle.check(folder, onShare: onShare)
    let artifact = try Artifact.read(folder, targets: targets)
    let listed = Dictionary(bundle.files.map { ($0.name, $0.sum) }) { first, _ in first }
    for (name, sum) in artifact.manifest.files where listed[name] != sum {
        throw Refusal("file_changed", "The bundle's \(name) is not the file its manifest names.", again)
    }
    return artifact
}
