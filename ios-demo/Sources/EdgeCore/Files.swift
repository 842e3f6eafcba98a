import Foundation

private let pieceBytes = 1 << 20

/// What the system said when it did not read or write a file.
struct FileFault: Error {
    let words: String

    init() { words = String(cString: strerror(errno)) }
}

/// Read a file a piece at a time.
func readPieces(_ file: URL, _ each: (UnsafeRawBufferPointer) throws -> Void) throws {
    guard let source = fopen(file.path, "rb") else { throw FileFault() }
    defer { fclose(source) }
    var piece = [UInt8](repeating: 0, count: pieceBytes)
    while true {
        let count = fread(&piece, 1, pieceBytes, source)
        if count > 0 { try piece.withUnsafeBytes { try each(UnsafeRawBufferPointer(rebasing: $0[..<count])) } }
        if count < pieceBytes {
            if ferror(source) != 0 { throw FileFault() }
            return
        }
    }
}

/// Copy a file a piece at a time, and learn of a full disk.
func copyPieces(_ file: URL, to copy: URL) throws {
    guard let target = fopen(copy.path, "wb") else { throw FileFault() }
    var isOpen = true
    defer { if isOpen { fclose(target) } }
    try readPieces(file) { piece in
        if fwrite(piece.baseAddress, 1, piece.count, target) < piece.count { throw FileFault() }
    }
    isOpen = false
    if fclose(target) != 0 { throw FileFault() }
}

/// Sizes of the files below a folder by their relative names; a link is one of them, whatever it leads to.
func filesBelow(_ folder: URL, at place: String = "") throws -> [String: Int] {
    let manager = FileManager.default
    var found: [String: Int] = [:]
    for name in try manager.contentsOfDirectory(atPath: folder.appendingPathComponent(place).path) {
        let inner = place + name
        let attributes = try manager.attributesOfItem(atPath: folder.appendingPathComponent(inner).path)
        if attributes[.type] as? FileAttributeType == .typeDirectory {
            found.merge(try filesBelow(folder, at: inner + "/")) { first, _ in first }
        } else {
            found[inner] = (attributes[.size] as? NSNumber)?.intValue ?? 0
        }
    }
    return found
}

func isFile(_ url: URL) -> Bool {
    var isFolder: ObjCBool = false
    return FileManager.default.fileExists(atPath: url.path, isDirectory: &isFolder) && !isFolder.boolValue
}

func size(_ file: URL) -> Int {
    let attributes = try? FileManager.default.attributesOfItem(atPath: file.path)
    return (attributes?[.size] as? NSNumber)?.intValue ?? 0
}

/// Whether a relative name stays inside its folder.
func isInside(_ name: String) -> Bool {
    !name.isEmpty && !starts(name, with: "/") && !name.utf8.contains(UInt8(ascii: "\\"))
        && !split(name, by: "/").contains { isSame($0, "..") }
}
