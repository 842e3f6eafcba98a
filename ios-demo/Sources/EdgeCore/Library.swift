import Foundation

/// A folder that is somewhere else, such as behind the system's file picker.
public protocol Source {
    /// Sizes of its files by their relative names.
    func files() throws -> [String: Int]

    func copy(_ name: String, to place: URL) throws
}

/// A folder that the app may read.
public struct FolderSource: Source {
    private let folder: URL

    public init(_ folder: URL) { self.folder = folder }

    public func files() throws -> [String: Int] { try filesBelow(folder) }

    public func copy(_ name: String, to place: URL) throws {
        try copyPieces(folder.appendingPathComponent(name), to: place)
    }
}

/// The artifact that the app keeps: it comes whole, checked, or not at all.
public final class Library {
    private let root: URL
    private let targets: [String]
    private let key: BundleKey?
    private let manager = FileManager.default

    private var incoming: URL { root.appendingPathComponent("incoming") }
    private var place: URL { root.appendingPathComponent("model") }
    private var loading: URL { root.appendingPathComponent("loading") }

    /// - Parameter targets: those that the app runs.
    public init(_ root: URL, targets: [String], key: BundleKey? = nil) {
        (self.root, self.targets, self.key) = (root, targets, key)
    }

    /// The artifact that is kept, if there is one; what an import that was ended left behind is removed. Where the app
    /// was ended while it loaded, that is told, once, instead.
    public func kept() throws -> Artifact? {
        try? manager.removeItem(at: incoming)
        guard manager.fileExists(atPath: place.path) else { return nil }
        if manager.fileExists(atPath: loading.path) {
            try? manager.removeItem(at: loading)
            let words = "The app was ended while it loaded its model, perhaps for want of memory."
            throw Refusal("ended", words, "Close other apps and load it again, or choose a smaller one.")
        }
        return try Artifact.read(place, targets: targets)
    }

    /// Load a model, with a mark that stays behind where the app is ended meanwhile.
    public func load<T>(_ work: () throws -> T) throws -> T {
        try? manager.createDirectory(at: root, withIntermediateDirectories: true)
        try? Data().write(to: loading)
        defer { try? manager.removeItem(at: loading) }
        return try work()
    }

    /// Compare the files of what is kept with its bundle's list, or with its manifest.
    public func check(onShare: (Double) -> Void = { _ in }) throws -> Artifact {
        try checkedArtifact(place, targets: targets, key: key, onShare: onShare)
    }

    /// Copy a folder, compare its files, and only then put it in the place of what was kept.
    public func take(_ source: some Source, freeBytes: Int?, onShare: (Double) -> Void = { _ in }) throws -> Artifact {
        try? manager.removeItem(at: incoming)
        defer { try? manager.removeItem(at: incoming) }
        do {
            try manager.createDirectory(at: incoming, withIntermediateDirectories: true)
            let artifact = try copied(source, freeBytes, onShare)
            if manager.fileExists(atPath: place.path) { try manager.removeItem(at: place) }
            try manager.moveItem(at: incoming, to: place)
            return Artifact(folder: place, manifest: artifact.manifest)
        } catch let refusal as Refusal {
            throw refusal
        } catch {
            let words = (error as? FileFault)?.words ?? error.localizedDescription
            throw Refusal(
                "storage", "The artifact could not be copied: \(words).", "Free storage, and choose it again.")
        }
    }

    private func copied(_ source: some Source, _ freeBytes: Int?, _ onShare: (Double) -> Void) throws -> Artifact {
        let sizes = try source.files()
        var names: [String] = []
        if let key {
            for name in [sumsName, signatureName] where sizes[name] != nil { try copy(source, name) }
            names = try SignedBundle.read(incoming, key).files.map(\.name).filter { $0 != "manifest.json" }
        }
        if sizes["manifest.json"] != nil { try copy(source, "manifest.json") }
        let listed = try Artifact.read(incoming, targets: targets).manifest.files.map(\.name)
        names += listed.filter { name in !names.contains { isSame($0, name) } }
        if let missing = names.first(where: { sizes[$0] == nil }) {
            throw Refusal("file_missing", "\(missing) is missing.", "Choose the artifact's whole folder.")
        }
        let all = names.reduce(0) { $0 + sizes[$1]! }
        if let freeBytes, let words = storageShortage(bytes: all, freeBytes: freeBytes) {
            throw Refusal("storage", words, "Free some, or choose a smaller model.")
        }
        for (i, name) in names.enumerated() {
            try copy(source, name)
            onShare(Double(i + 1) / Double(names.count))
        }
        return try checkedArtifact(incoming, targets: targets, key: key)
    }

    private func copy(_ source: some Source, _ name: String) throws {
        let file = incoming.appendingPathComponent(name)
        try manager.createDirectory(at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
        try source.copy(name, to: file)
    }
}
