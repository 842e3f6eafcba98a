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
        let key = try Curve25519.Signing.PublicKey(rawRepresentation: key)
        return key.isValidSignature(signature, for: data)
    #else
        throw Refusal(
            "bad_signature", "The bundle's signature cannot be verified on this system.", "Use another device.")
    #endif
}

/// The key by which an app knows the bundles of its makers: raw, base64, as `edgekd bundle --key` prints it.
public struct BundleKey {
    private let key: Data
    private let verify: Verify

    public init?(_ base64: String, verify: @escaping Verify = isSigned) {
        guard let key = Data(base64Encoded: base64), key.count == 32 else { return nil }
        (self.key, self.verify) = (key, verify)
    }

    func check(_ sums: Data, _ signature: Data) throws {
        let text = String(decoding: signature, as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines)
        guard let bytes = Data(base64Encoded: text), try verify(key, bytes, sums) else {
            throw Refusal("bad_signature", "bundle.sig is no signature of this app's key.", "Do not use the bundle.")
        }
    }
}

/// What `bundle.json` says: docs/bundles.md is the format.
struct BundleSums {
    let files: [(name: String, sum: String, bytes: Int)]

    /// Read it; the signature is verified over its bytes before anything in it is looked at.
    static func read(_ sums: Data, signature: Data?, key: BundleKey?) throws -> BundleSums {
        if let key {
            guard let signature else {
                throw Refusal("bad_signature", "The bundle is not signed.", "Sign it with --key.")
            }
            try key.check(sums, signature)
        }
        guard let text = String(data: sums, encoding: .utf8), let json = try? Json.parse(text),
            let files = json["files"].object
        else { throw Refusal("not_json", "bundle.json is not readable.", again) }
        if let schema = json["schema_version"].int, schema > newestSchema {
            let words = "bundle.json has schema \(schema); this app reads up to \(newestSchema)."
            throw Refusal("newer_schema", words, "Update the app.")
        }
        return BundleSums(
            files: try files.pairs.map { name, told in
                guard isInside(name) else {
                    throw Refusal("leaves_folder", "bundle.json: '\(name)' is not inside the folder.", again)
                }
                guard let sum = told["sha256"].string, let bytes = told["bytes"].int else {
                    throw Refusal("not_json", "bundle.json does not tell of \(name).", again)
                }
                return (name, sum, bytes)
            })
    }

    /// The bundle of a folder, if it is one; with a key it must be.
    static func read(_ folder: URL, key: BundleKey?) throws -> BundleSums? {
        guard let sums = try? Data(contentsOf: folder.appendingPathComponent(sumsName)) else {
            if key == nil { return nil }
            throw Refusal("bad_signature", "The folder is no signed bundle, which this app asks for.", again)
        }
        return try read(sums, signature: try? Data(contentsOf: folder.appendingPathComponent(signatureName)), key: key)
    }

    /// Compare a folder with it: the listed files and no other, each of its size and sha256.
    func check(_ folder: URL, onShare: (Double) -> Void = { _ in }) throws {
        let there = try filesBelow(folder)
        if let other = there.keys.sorted().first(where: { name in
            name != sumsName && name != signatureName && !files.contains { isSame($0.name, name) }
        }) {
            throw Refusal("not_listed", "bundle.json does not list \(other).", again)
        }
        for (name, _, bytes) in files where there[name].map({ $0 != bytes }) ?? false {
            throw Refusal("file_changed", "\(name) is not the file that the bundle lists.", "Copy the artifact again.")
        }
        try checkSums(folder, files.map { (name: $0.name, sum: $0.sum) }, by: "that the bundle lists", onShare: onShare)
    }
}

/// Compare a folder with what lists its files: its bundle's sums, which a key asks for, else its manifest.
func checkFiles(_ artifact: Artifact, key: BundleKey?, onShare: (Double) -> Void = { _ in }) throws {
    guard let bundle = try BundleSums.read(artifact.folder, key: key) else {
        return try artifact.checkFiles(onShare: onShare)
    }
    try bundle.check(artifact.folder, onShare: onShare)
    let listed = Dictionary(bundle.files.map { ($0.name, $0.sum) }) { first, _ in first }
    for (name, sum) in artifact.manifest.files where listed[name] != sum {
        throw Refusal("file_changed", "The bundle's \(name) is not the file its manifest names.", again)
    }
}
