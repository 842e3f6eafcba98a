/// Room for the runtime itself, its work buffers and the app.
private let runtimeBytes = 96 << 20

/// Bytes that the artifact takes when it is loaded with a full cache.
public func requiredBytes(_ manifest: Manifest, modelBytes: Int) -> Int {
    modelBytes + (manifest.cacheBytes ?? 0) + runtimeBytes
}

/// A sentence with the numbers where memory is short, else nil.
///
/// - Parameter availableBytes: nil where the system does not tell.
public func memoryShortage(_ manifest: Manifest, modelBytes: Int, availableBytes: Int?) -> String? {
    let required = requiredBytes(manifest, modelBytes: modelBytes)
    guard let availableBytes, required > availableBytes else { return nil }
    return "The model needs \(mib(required)) of memory (\(mib(modelBytes)) of weights, the cache of "
        + "\(manifest.contract.contextLength) tokens and the runtime); there are \(mib(availableBytes))."
}

/// A sentence where a folder does not fit the storage, else nil.
public func storageShortage(bytes: Int, freeBytes: Int) -> String? {
    bytes <= freeBytes ? nil : "The artifact has \(mib(bytes)); the storage has \(mib(freeBytes)) left."
}

private func mib(_ bytes: Int) -> String { "\((bytes + (1 << 20) - 1) >> 20) MiB" }
