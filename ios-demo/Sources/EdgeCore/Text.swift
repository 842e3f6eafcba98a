// A Swift String compares by canonical equivalence and counts graphemes; models, templates and files know code points.
// So texts are compared, searched and cut here as UTF-8.

/// Whether two texts are the same code points.
func isSame(_ a: String, _ b: String) -> Bool { a.utf8.elementsEqual(b.utf8) }

func starts(_ text: String, with beginning: String) -> Bool { text.utf8.starts(with: beginning.utf8) }

func ends(_ text: String, with end: String) -> Bool { text.utf8.reversed().starts(with: end.utf8.reversed()) }

/// The order of code points, which is that of their UTF-8.
func isBefore(_ a: String, _ b: String) -> Bool { a.utf8.lexicographicallyPrecedes(b.utf8) }

/// What stands between the occurrences of a text that is not empty, of which at most `most` divide.
func split(_ text: String, by separator: String, most: Int = .max) -> [String] {
    let all = Array(text.utf8)
    let wanted = Array(separator.utf8)
    var found: [String] = []
    var start = 0
    var at = 0
    while at + wanted.count <= all.count, found.count < most {
        if all[at] == wanted[0], all[at..<at + wanted.count].elementsEqual(wanted) {
            found.append(String(decoding: all[start..<at], as: UTF8.self))
            at += wanted.count
            start = at
        } else {
            at += 1
        }
    }
    return found + [String(decoding: all[start...], as: UTF8.self)]
}

/// A text of some of its code points.
func text(_ scalars: some Sequence<Unicode.Scalar>) -> String {
    var view = String.UnicodeScalarView()
    view.append(contentsOf: scalars)
    return String(view)
}

func hex(_ bytes: some Sequence<UInt8>) -> String {
    let digits = Array("0123456789abcdef".utf8)
    return String(decoding: bytes.flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] }, as: UTF8.self)
}
