import Foundation

/// What a user can mend: what is wrong in one sentence, what to do in another, and a code for programs.
public struct Refusal: LocalizedError, Equatable {
    public let code: String
    public let words: String

    public init(_ code: String, _ cause: String, _ remedy: String = "") {
        self.code = code
        words = remedy.isEmpty ? cause : "\(cause) \(remedy)"
    }

    public var errorDescription: String? { words }
}
