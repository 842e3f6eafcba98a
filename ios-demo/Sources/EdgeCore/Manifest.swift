import Foundation

public let newestSchema = 1
private let maxTokens = 1 << 24
private let again = "Export the artifact again."

/// What a program that runs the artifact must know; see `edgekd.manifest.Contract`.
public struct Contract {
    public var contextLength: Int
    public var vocabSize: Int
    public var bosId: Int?
    public var eosIds: [Int]
    public var addBos: Bool
    public var chatTemplate: String?
    public var normalizer: String?
    public var specialTokens: [String: String] = [:]
    public var specialIds: [String: Int]?
    public var specialStrips: [String: String] = [:]
    public var spacePrefix: String?

    public init(contextLength: Int, vocabSize: Int, eosIds: [Int], addBos: Bool = false) {
        (self.contextLength, self.vocabSize, self.eosIds, self.addBos) = (contextLength, vocabSize, eosIds, addBos)
    }
}

/// Greedy tokens that the artifact's own runtime gave where it was verified or bundled.
public struct GoldenAnswer {
    public let promptIds: [Int]
    public let tokens: [Int]
    /// What the ids are of, where they are of a text.
    public let text: String?
    /// The chat that the template renders as that text.
    public let messages: [Message]?

    public init(promptIds: [Int], tokens: [Int], text: String? = nil, messages: [Message]? = nil) {
        (self.promptIds, self.tokens, self.text, self.messages) = (promptIds, tokens, text, messages)
    }
}

public struct Manifest {
    public let name: String
    public let target: String
    public let recipe: String
    public let runtime: String
    public let mainFile: String
    /// Names and their sha256.
    public let files: [(name: String, sum: String)]
    public let contract: Contract
    public let weightBytes: Int?
    public let kvBytesPerPosition: Int?
    public let golden: [GoldenAnswer]

    /// Bytes of the cache of a whole context; nil: the manifest does not tell.
    public var cacheBytes: Int? { kvBytesPerPosition.map { $0 * contract.contextLength } }

    /// As edgekd writes it: of the JSON of `files` with sorted keys, in ASCII.
    public func filesDigest() throws -> String {
        let sorted = try files.sorted { isBefore($0.name, $1.name) }.map { name, sum in
            try Json.string(name).write(ascii: true) + ":" + Json.string(sum).write(ascii: true)
        }
        return sha256(Data(("{" + sorted.joined(separator: ",") + "}").utf8))
    }

    /// The manifest of a text, checked as far as the app relies on it; `targets` are those that it runs.
    public static func parse(_ text: String?, targets: [String]) throws -> Manifest {
        guard let text else {
            throw Refusal("no_manifest", "The folder has no manifest.json.", "Choose an artifact of edgekd.")
        }
        let value: Json
        do {
            value = try Json.parse(text)
        } catch let fault as NotJson {
            throw Refusal("not_json", "manifest.json is not JSON: \(fault.words).", again)
        }
        guard case .object(let members) = value else {
            throw Refusal("not_json", "manifest.json holds no object.", again)
        }
        return try Fields(values: members, at: "").manifest(targets)
    }
}

/// The keys of an object of the manifest, each read as what it must be.
private struct Fields {
    let values: Json.Members
    let at: String

    func bad(_ key: String, _ what: String, code: String = "bad_value") -> Refusal {
        Refusal(code, "manifest.json: key '\(at)\(key)' is not \(what).", again)
    }

    func text(_ key: String) throws -> String {
        guard let text = values[key].string, !text.isEmpty else { throw bad(key, "text") }
        return text
    }

    func optionalText(_ key: String) throws -> String? {
        if values[key].isNull { return nil }
        guard let text = values[key].string else { throw bad(key, "text") }
        return text
    }

    func count(_ key: String) throws -> Int {
        guard let count = values[key].int, (1...maxTokens).contains(count) else { throw bad(key, "a number of tokens") }
        return count
    }

    func flag(_ key: String) throws -> Bool {
        guard let flag = values[key].bool else { throw bad(key, "true or false") }
        return flag
    }

    func optional(_ key: String) throws -> Json.Members? {
        if values[key].isNull { return nil }
        guard let members = values[key].object else { throw bad(key, "an object") }
        return members
    }

    func fields(_ key: String) throws -> Fields {
        guard let members = try optional(key) else { throw bad(key, "an object") }
        return Fields(values: members, at: "\(at)\(key).")
    }

    func messages(_ key: String) throws -> [Message]? {
        if values[key].isNull { return nil }
        guard let list = values[key].list, list.allSatisfy({ $0.object != nil }) else {
            throw bad(key, "a list of messages")
        }
        return list
    }

    func ids(_ key: String, _ size: Int) throws -> [Int] {
        guard let list = values[key].list else { throw bad(key, "a list") }
        return try list.map { try id($0, key, size) }
    }

    func id(_ value: Json, _ key: String, _ size: Int) throws -> Int {
        guard let id = value.int, (0..<size).contains(id) else { throw bad(key, "of ids of the vocabulary") }
        return id
    }

    func texts(_ key: String) throws -> [(String, String)] {
        try (optional(key)?.pairs ?? []).map { name, value in
            guard let text = value.string else { throw bad("\(key).\(name)", "text") }
            return (name, text)
        }
    }

    func byName(_ key: String) throws -> [String: String] {
        Dictionary(try texts(key)) { _, last in last }
    }

    func manifest(_ targets: [String]) throws -> Manifest {
        guard let schema = values["schema_version"].int, schema >= 1 else { throw bad("schema_version", "a version") }
        if schema > newestSchema {
            let words = "manifest.json has schema \(schema); this app reads up to \(newestSchema)."
            throw Refusal("newer_schema", words, "Update the app.")
        }
        let target = try text("target")
        if !targets.contains(target) {
            let words = "The artifact is for \(values["runtime"].string ?? target), which this app does not run."
            throw Refusal("other_target", words, "Export one for \(targets.joined(separator: " or ")).")
        }
        if try optional("files") == nil { throw bad("files", "an object") }
        let files = try texts("files")
        for (name, _) in files where !isInside(name) {
            throw bad("files.\(name)", "a name inside the folder", code: "leaves_folder")
        }
        let mainFile = try text("main_file")
        if !files.contains(where: { isSame($0.0, mainFile) }) { throw bad("main_file", "among files") }
        let traffic = try optional("traffic")
        let contract = try fields("contract").contract()
        return Manifest(
            name: try text("name"), target: target, recipe: try text("recipe"),
            runtime: try optionalText("runtime") ?? target, mainFile: mainFile,
            files: files.map { (name: $0.0, sum: $0.1) }, contract: contract,
            weightBytes: traffic?["weight_bytes"].int, kvBytesPerPosition: traffic?["kv_bytes_per_position"].int,
            golden: try golden(contract.vocabSize))
    }

    func golden(_ size: Int) throws -> [GoldenAnswer] {
        guard let parity = try optional("parity"), !parity["golden"].isNull else { return [] }
        guard let answers = parity["golden"].list else { throw bad("parity.golden", "a list") }
        return try answers.map { answer in
            guard let members = answer.object else { throw bad("parity.golden", "a list of objects") }
            let fields = Fields(values: members, at: "parity.golden.")
            return GoldenAnswer(
                promptIds: try fields.ids("prompt_ids", size), tokens: try fields.ids("tokens", size),
                text: try fields.optionalText("text"), messages: try fields.messages("messages"))
        }
    }

    func contract() throws -> Contract {
        let size = try count("vocab_size")
        var contract = Contract(
            contextLength: try count("context_length"), vocabSize: size, eosIds: try ids("eos_ids", size),
            addBos: try flag("add_bos"))
        contract.bosId = values["bos_id"].isNull ? nil : try id(values["bos_id"], "bos_id", size)
        contract.chatTemplate = try optionalText("chat_template")
        contract.normalizer = try optionalText("normalizer")
        contract.specialTokens = try byName("special_tokens")
        contract.specialIds = try optional("special_ids").map { members in
            let pairs = try members.pairs.map { ($0.key, try id($0.value, "special_ids.\($0.key)", size)) }
            return Dictionary(pairs) { _, last in last }
        }
        contract.specialStrips = try byName("special_strips")
        contract.spacePrefix = try optionalText("space_prefix")
        return contract
    }
}

/// An artifact's folder, whose files are those that its manifest names.
public struct Artifact {
    public let folder: URL
    public let manifest: Manifest

    public init(folder: URL, manifest: Manifest) {
        (self.folder, self.manifest) = (folder, manifest)
    }

    /// Read a folder's manifest; `targets` are those that the app runs.
    public static func read(_ folder: URL, targets: [String]) throws -> Artifact {
        let file = folder.appendingPathComponent("manifest.json")
        var text: String?
        if isFile(file) {
            text = (try? Data(contentsOf: file)).flatMap { String(data: $0, encoding: .utf8) }
            if text == nil { throw Refusal("not_json", "manifest.json is not JSON: no UTF-8.", again) }
        }
        return Artifact(folder: folder, manifest: try Manifest.parse(text, targets: targets))
    }

    public var sizeBytes: Int { manifest.files.reduce(0) { $0 + size(file($1.name)) } }
    public var mainFile: URL { file(manifest.mainFile) }

    public func file(_ name: String) -> URL { folder.appendingPathComponent(name) }

    /// Compare every listed file with its sha256.
    public func checkFiles(onShare: (Double) -> Void = { _ in }) throws {
        try checkSums(folder, manifest.files, by: "its manifest names", onShare: onShare)
    }
}

/// Compare files with their sha256.
func checkSums(
    _ folder: URL, _ files: [(name: String, sum: String)], by whom: String, onShare: (Double) -> Void
) throws {
    let all = Double(max(1, files.reduce(0) { $0 + size(folder.appendingPathComponent($1.name)) }))
    var done = 0
    for (name, expected) in files {
        let file = folder.appendingPathComponent(name)
        if !isFile(file) { throw Refusal("file_missing", "\(name) is missing.", "Copy the artifact's whole folder.") }
        let sum: String
        do {
            sum = try sha256(file: file) { onShare(Double(done + $0) / all) }
        } catch let fault as FileFault {
            throw Refusal("file_changed", "\(name) cannot be read: \(fault.words).", "Copy the artifact again.")
        }
        if sum != expected {
            throw Refusal("file_changed", "\(name) is not the file \(whom).", "Copy the artifact again.")
        }
        done += size(file)
    }
}
