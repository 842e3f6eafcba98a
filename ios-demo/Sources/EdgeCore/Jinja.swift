import Foundation

/// A template raises, is in error, or has what this app does not know: it never renders another text than jinja2.
public struct TemplateError: Error {
    public let words: String
}

/// The part of Jinja that chat templates are written in.
struct Jinja {
    private let body: Statement
    private let now: () -> Date

    init(_ source: String, now: @escaping () -> Date = Date.init) throws {
        body = try TemplateParser(source).whole()
        self.now = now
    }

    func render(_ variables: [String: Json]) throws -> String {
        let run = Run()
        let globals: [String: Value] = [
            "raise_exception": .function { given, _ in throw refusal(try written(given.first ?? .none)) },
            "strftime_now": .function { given, _ in
                guard case .text(let form)? = given.first else { throw refusal("strftime_now of no text") }
                return .text(try timeNow(form, now()))
            },
            "namespace": .function { _, named in .space(Namespace(named)) },
            "dict": .function { _, named in .map(named) },
            "range": .function { given, _ in try range(given) },
        ]
        let scope = Scope(run, Scope(run, nil, globals), variables.mapValues(Value.init))
        switch try body(scope) {
        case .normal: return run.out
        case .breaks: throw refusal("{% break %} outside a loop")
        case .continues: throw refusal("{% continue %} outside a loop")
        }
    }
}

/// `strftime_now` by the clock: the few fields that chat templates use.
func timeNow(_ form: String, _ date: Date) throws -> String {
    let fields: [Character: String] = [
        "d": "dd", "m": "MM", "b": "MMM", "B": "MMMM", "Y": "yyyy", "y": "yy", "H": "HH", "M": "mm", "S": "ss",
        "A": "EEEE", "a": "EEE",
    ]
    let formatter = DateFormatter()
    formatter.locale = Locale(identifier: "en_US_POSIX")
    var told = ""
    var rest = form[...]
    while let char = rest.popFirst() {
        guard char == "%", let letter = rest.popFirst() else {
            told.append(char)
            continue
        }
        guard let field = fields[letter] else { throw refusal("strftime_now: %\(letter) is not known here") }
        formatter.dateFormat = field
        told += formatter.string(from: date)
    }
    return told
}

private let mostSteps = 500_000
private let mostBytes = 1 << 24
/// Of brackets, blocks and calls inside each other: a thread that is not the main one has a stack of 512 KB.
private let deepest = 64

private func refusal(_ words: String) -> TemplateError { TemplateError(words: words) }

// --- source to pieces ------------------------------------------------------------------------------------------------

private typealias Scalars = [Unicode.Scalar]

private struct Piece {
    enum Kind { case text, output, tag }

    let kind: Kind
    let content: Scalars

    /// The first word of a tag.
    var word: String { text(trimmed.prefix { isNameScalar($0) }) }
    var trimmed: Scalars { strip(content, isBlank, left: true, right: true) }
}

private func isNameScalar(_ scalar: Unicode.Scalar) -> Bool {
    ("a"..."z").contains(scalar) || ("A"..."Z").contains(scalar) || scalar == "_" || isDigit(scalar)
}

private func isDigit(_ scalar: Unicode.Scalar) -> Bool { ("0"..."9").contains(scalar) }

/// White space as Python has it.
private func isBlank(_ scalar: Unicode.Scalar) -> Bool {
    scalar.properties.isWhitespace || ("\u{1c}"..."\u{1f}").contains(scalar)
}

private func strip(
    _ scalars: Scalars, _ taken: (Unicode.Scalar) -> Bool, left: Bool, right: Bool
) -> Scalars {
    var rest = scalars[...]
    if left { rest = rest.drop(while: taken) }
    if right { while let last = rest.last, taken(last) { rest.removeLast() } }
    return Array(rest)
}

/// Cuts a template into text, outputs and tags, less the white space that trim_blocks, lstrip_blocks and `-` take away.
private struct Cutter {
    private let all: Scalars
    private var at = 0
    /// The tag before takes all white space along.
    private var takesAll = false
    /// The tag before takes one line break along.
    private var takesLine = false

    init(_ source: String) {
        var lines = EdgeCore.split(source, by: "\r\n").joined(separator: "\n")
        lines = EdgeCore.split(lines, by: "\r").joined(separator: "\n")
        var all = Array(lines.unicodeScalars)
        if all.last == "\n" { all.removeLast() }
        self.all = all
    }

    mutating func pieces() throws -> [Piece] {
        var found: [Piece] = []
        while true {
            let start = nextTag()
            var text = Array(all[at..<(start ?? all.count)])
            if takesAll {
                text = strip(text, isBlank, left: true, right: false)
            } else if takesLine, text.first == "\n" {
                text.removeFirst()
            }
            guard let start else {
                if !text.isEmpty { found.append(Piece(kind: .text, content: text)) }
                return found
            }
            let opens = all[start + 1]
            var inside = start + 2
            let sign: Unicode.Scalar? =
                inside < all.count && (all[inside] == "-" || all[inside] == "+") ? all[inside] : nil
            if sign != nil { inside += 1 }
            if sign == "-" {
                text = strip(text, isBlank, left: false, right: true)
            } else if opens != "{", sign != "+" {
                text = withoutIndent(text, before: start)
            }
            if !text.isEmpty { found.append(Piece(kind: .text, content: text)) }
            let content = try content(from: inside, opens)
            if opens != "#" { found.append(Piece(kind: opens == "{" ? .output : .tag, content: content)) }
        }
    }

    private func nextTag() -> Int? {
        (at..<max(at, all.count - 1)).first { all[$0] == "{" && ["{", "%", "#"].contains(all[$0 + 1]) }
    }

    /// The white space of a line before a block goes too, where nothing else is before it.
    private func withoutIndent(_ text: Scalars, before start: Int) -> Scalars {
        let before = strip(text, { $0 == " " || $0 == "\t" }, left: false, right: true)
        let place = start - (text.count - before.count)
        let isAtLineStart = before.isEmpty ? place == 0 || all[place - 1] == "\n" : before.last == "\n"
        return isAtLineStart ? before : text
    }

    /// What stands inside a tag, whose end is then passed.
    private mutating func content(from inside: Int, _ opens: Unicode.Scalar) throws -> Scalars {
        let end = try end(from: inside, opens)
        var content = Array(all[inside..<end])
        takesAll = content.last == "-"
        let keeps = content.last == "+" && opens != "{"
        if takesAll || keeps { content.removeLast() }
        takesLine = opens != "{" && !keeps
        at = end + 2
        return content
    }

    /// Where a tag closes, which is not inside a string.
    private func end(from start: Int, _ opens: Unicode.Scalar) throws -> Int {
        let closes: Unicode.Scalar = opens == "{" ? "}" : opens
        var at = start
        var quote: Unicode.Scalar?
        while at + 1 < all.count {
            let scalar = all[at]
            if let open = quote {
                if scalar == "\\" { at += 1 } else if scalar == open { quote = nil }
            } else if opens != "#", scalar == "\"" || scalar == "'" {
                quote = scalar
            } else if scalar == closes, all[at + 1] == "}" {
                return at
            }
            at += 1
        }
        throw refusal("a tag that does not close")
    }
}

// --- values ----------------------------------------------------------------------------------------------------------

private final class Namespace {
    var pairs: [(String, Value)]

    init(_ pairs: [(String, Value)]) { self.pairs = pairs }
}

private indirect enum Value {
    /// Stands for a name that has no value: empty where it is written, an error where it is used.
    case undefined(String)
    case none
    case bool(Bool)
    case int(Int)
    case double(Double)
    case text(String)
    case list([Value])
    case map([(String, Value)])
    case space(Namespace)
    case function(([Value], [(String, Value)]) throws -> Value)

    init(_ json: Json) {
        switch json {
        case .null: self = .none
        case .bool(let value): self = .bool(value)
        case .int(let value): self = .int(value)
        case .double(let value): self = .double(value)
        case .string(let value): self = .text(value)
        case .list(let all): self = .list(all.map(Value.init))
        case .object(let members): self = .map(members.pairs.map { ($0.key, Value($0.value)) })
        }
    }

    var number: Double? {
        switch self {
        case .int(let value): Double(value)
        case .double(let value): value
        default: nil
        }
    }

    var isTrue: Bool {
        switch self {
        case .undefined, .none: false
        case .bool(let value): value
        case .int(let value): value != 0
        case .double(let value): value != 0
        case .text(let value): !value.isEmpty
        case .list(let all): !all.isEmpty
        case .map(let pairs): !pairs.isEmpty
        case .space, .function: true
        }
    }
}

private func valueOf(_ pairs: [(String, Value)], _ key: String) -> Value? { pairs.last { isSame($0.0, key) }?.1 }

/// A value as it is written; what Python alone knows how to write is refused.
private func written(_ value: Value) throws -> String {
    switch value {
    case .undefined: return ""
    case .none: return "None"
    case .bool(let value): return value ? "True" : "False"
    case .int(let value): return String(value)
    case .double(let value):
        let told = String(value)
        if told.contains("e") { throw refusal("a number that is written in powers of ten") }
        return told
    case .text(let value): return value
    case .list, .map, .space, .function: throw refusal("a list or an object is written as text")
    }
}

private func areSame(_ a: Value, _ b: Value) -> Bool {
    if let a = a.number, let b = b.number { return a == b }
    switch (a, b) {
    case (.undefined, .undefined), (.none, .none): return true
    case let (.bool(a), .bool(b)): return a == b
    case let (.text(a), .text(b)): return isSame(a, b)
    case let (.list(a), .list(b)): return a.count == b.count && zip(a, b).allSatisfy(areSame)
    case let (.map(a), .map(b)):
        return a.count == b.count && a.allSatisfy { key, value in valueOf(b, key).map { areSame(value, $0) } ?? false }
    case let (.space(a), .space(b)): return a === b
    default: return false
    }
}

private func isIn(_ a: Value, _ b: Value) throws -> Bool {
    switch b {
    case .text(let whole):
        guard case .text(let part) = a else { throw refusal("what is looked for in a text is none") }
        return part.isEmpty || EdgeCore.split(whole, by: part, most: 1).count > 1
    case .list(let all): return all.contains { areSame($0, a) }
    case .map(let pairs):
        guard case .text(let key) = a else { return false }
        return valueOf(pairs, key) != nil
    case .undefined: return false
    default: throw refusal("nothing is in such a value")
    }
}

private func compare(_ sign: String, _ a: Value, _ b: Value) throws -> Bool {
    switch sign {
    case "==": return areSame(a, b)
    case "!=": return !areSame(a, b)
    case "in": return try isIn(a, b)
    default: break
    }
    let isLess: Bool
    let isMore: Bool
    if let a = a.number, let b = b.number {
        (isLess, isMore) = (a < b, a > b)
    } else if case (.text(let a), .text(let b)) = (a, b) {
        (isLess, isMore) = (isBefore(a, b), isBefore(b, a))
    } else {
        throw refusal("values that have no order")
    }
    switch sign {
    case "<": return isLess
    case ">": return isMore
    case "<=": return !isMore
    default: return !isLess
    }
}

private func arithmetic(_ sign: String, _ a: Value, _ b: Value) throws -> Value {
    if sign == "~" { return .text(try written(a) + written(b)) }
    for case .undefined(let words) in [a, b] { throw refusal(words) }
    switch (sign, a, b) {
    case let ("+", .text(a), .text(b)): return .text(a + b)
    case let ("+", .list(a), .list(b)): return .list(a + b)
    case let ("*", .text(text), .int(times)): return .text(String(repeating: text, count: min(max(times, 0), 10_000)))
    case let (_, .int(a), .int(b)): return try whole(sign, a, b)
    default:
        guard let a = a.number, let b = b.number else { throw refusal("'\(sign)' between values that have none") }
        return .double(try broken(sign, a, b))
    }
}

private func whole(_ sign: String, _ a: Int, _ b: Int) throws -> Value {
    if ["/", "//", "%"].contains(sign), b == 0 { throw refusal("division by zero") }
    let (result, overflows): (Int, Bool)
    switch sign {
    case "+": (result, overflows) = a.addingReportingOverflow(b)
    case "-": (result, overflows) = a.subtractingReportingOverflow(b)
    case "*": (result, overflows) = a.multipliedReportingOverflow(by: b)
    case "/": return .double(Double(a) / Double(b))
    default:
        let (quotient, tooLarge) = a.dividedReportingOverflow(by: b)
        if tooLarge { throw refusal("a number that is too large") }
        // Python's division goes down, and its remainder has the divisor's sign.
        let rest = a - quotient * b
        let isDown = rest != 0 && (rest < 0) != (b < 0)
        (result, overflows) = (sign == "//" ? quotient - (isDown ? 1 : 0) : rest + (isDown ? b : 0), false)
    }
    if overflows { throw refusal("a number that is too large") }
    return .int(result)
}

private func broken(_ sign: String, _ a: Double, _ b: Double) throws -> Double {
    switch sign {
    case "+": return a + b
    case "-": return a - b
    case "*": return a * b
    case "/":
        if b == 0 { throw refusal("division by zero") }
        return a / b
    default: throw refusal("'\(sign)' of broken numbers is not known here")
    }
}

private func elements(_ value: Value) throws -> [Value] {
    switch value {
    case .list(let all): return all
    case .map(let pairs): return pairs.map { .text($0.0) }
    case .text(let value): return value.unicodeScalars.map { .text(String($0)) }
    case .undefined: return []
    default: throw refusal("what is gone through is no list")
    }
}

private func item(_ value: Value, _ key: Value) throws -> Value {
    switch (value, key) {
    case (.undefined(let words), _): throw refusal(words)
    case (.list, .int(let index)), (.text, .int(let index)):
        let all = try elements(value)
        let place = index < 0 ? index + all.count : index
        return all.indices.contains(place) ? all[place] : .undefined("there is no element \(index)")
    case (.map(let pairs), .text(let name)):
        if let found = valueOf(pairs, name) { return found }
        return try attribute(value, name)
    case (_, .text(let name)): return try attribute(value, name)
    default: return .undefined("the value has no such element")
    }
}

private func slice(_ value: Value, _ bounds: [Value?]) throws -> Value {
    let all = try elements(value)
    func number(_ given: Value?) throws -> Int? {
        switch given {
        case nil, .some(.none): return nil
        case .int(let number)?: return number
        default: throw refusal("a bound that is no number")
        }
    }
    func bound(_ given: Value?, _ otherwise: Int, _ low: Int, _ high: Int) throws -> Int {
        guard let number = try number(given) else { return otherwise }
        return min(max(number < 0 ? number + all.count : number, low), high)
    }
    let step = try number(bounds[2]) ?? 1
    if step == 0 || step == .min { throw refusal("a step of zero") }
    let (low, high) = step > 0 ? (0, all.count) : (-1, all.count - 1)
    let from = try bound(bounds[0], step > 0 ? low : high, low, high)
    let to = try bound(bounds[1], step > 0 ? high : low, low, high)
    let found = stride(from: from, to: to, by: step).map { all[$0] }
    guard case .text = value else { return .list(found) }
    return .text(try found.map(written).joined())
}

private func attribute(_ value: Value, _ name: String) throws -> Value {
    switch value {
    case .undefined(let words): throw refusal(words)
    case .space(let space): return valueOf(space.pairs, name) ?? .undefined("the namespace has no '\(name)'")
    case .text(let text): return try textMethod(text, name)
    case .map(let pairs):
        return try mapMethod(pairs, name) ?? valueOf(pairs, name)
            ?? .undefined("'dict object' has no attribute '\(name)'")
    default: return .undefined("the value has no '\(name)'")
    }
}

private func mapMethod(_ pairs: [(String, Value)], _ name: String) throws -> Value? {
    switch name {
    case "items": return .function { _, _ in listOf(pairs) }
    case "keys": return .function { _, _ in .list(pairs.map { .text($0.0) }) }
    case "values": return .function { _, _ in .list(pairs.map { $0.1 }) }
    case "get":
        return .function { given, _ in
            if case .text(let key)? = given.first, let found = valueOf(pairs, key) { return found }
            return given.count > 1 ? given[1] : .none
        }
    case "pop", "update", "setdefault", "clear", "copy", "popitem", "fromkeys":
        throw refusal("'\(name)' of an object is not known here")
    default: return nil
    }
}

private func listOf(_ pairs: [(String, Value)]) -> Value { .list(pairs.map { .list([.text($0.0), $0.1]) }) }

private func textOf(_ given: [Value], _ what: String) throws -> String {
    guard given.count == 1, case .text(let text) = given[0] else { throw refusal("\(what) of no text") }
    return text
}

private func textMethod(_ text: String, _ name: String) throws -> Value {
    switch name {
    case "strip": return .function { given, _ in .text(stripped(text, given.first, left: true, right: true)) }
    case "lstrip": return .function { given, _ in .text(stripped(text, given.first, left: true, right: false)) }
    case "rstrip": return .function { given, _ in .text(stripped(text, given.first, left: false, right: true)) }
    case "upper": return .function { _, _ in .text(text.uppercased()) }
    case "lower": return .function { _, _ in .text(text.lowercased()) }
    case "startswith": return .function { given, _ in .bool(starts(text, with: try textOf(given, name))) }
    case "endswith": return .function { given, _ in .bool(ends(text, with: try textOf(given, name))) }
    case "split": return .function { given, _ in .list(try divided(text, given).map { .text($0) }) }
    case "replace": return .function { given, _ in .text(try replaced(text, given)) }
    case "join":
        return .function { given, _ in
            .text(try elements(given.first ?? .none).map { try textOf([$0], "join") }.joined(separator: text))
        }
    default:
        let isMethod = name.utf8.allSatisfy { ("a"..."z").contains(Unicode.Scalar($0)) }
        if isMethod { throw refusal("'\(name)' of a text is not known here") }
        return .undefined("a text has no '\(name)'")
    }
}

private func stripped(_ given: String, _ chars: Value?, left: Bool, right: Bool) -> String {
    let scalars = Array(given.unicodeScalars)
    guard case .text(let chars)? = chars else { return text(strip(scalars, isBlank, left: left, right: right)) }
    let taken = Set(chars.unicodeScalars)
    return text(strip(scalars, taken.contains, left: left, right: right))
}

private func divided(_ given: String, _ arguments: [Value]) throws -> [String] {
    guard let separator = arguments.first else {
        return given.unicodeScalars.split(whereSeparator: isBlank).map { text($0) }
    }
    guard case .text(let wanted) = separator, !wanted.isEmpty else { throw refusal("split by no text") }
    guard arguments.count > 1 else { return EdgeCore.split(given, by: wanted) }
    guard case .int(let most) = arguments[1], most >= 0 else { throw refusal("split with such a count") }
    return EdgeCore.split(given, by: wanted, most: most)
}

private func replaced(_ given: String, _ arguments: [Value]) throws -> String {
    if arguments.count != 2 { throw refusal("replace with a count is not known here") }
    let wanted = try written(arguments[0])
    if wanted.isEmpty { throw refusal("replace of nothing") }
    return EdgeCore.split(given, by: wanted).joined(separator: try written(arguments[1]))
}

private func json(_ value: Value, sorted: Bool) throws -> Json {
    switch value {
    case .none: return .null
    case .bool(let value): return .bool(value)
    case .int(let value): return .int(value)
    case .double(let value): return .double(value)
    case .text(let value): return .string(value)
    case .list(let all): return .list(try all.map { try json($0, sorted: sorted) })
    case .map(let pairs):
        let ordered = sorted ? pairs.sorted { isBefore($0.0, $1.0) } : pairs
        return .object(Json.Members(try ordered.map { ($0.0, try json($0.1, sorted: sorted)) }))
    case .undefined, .space, .function: throw refusal("Object of type Undefined is not JSON serializable")
    }
}

private func asJson(_ value: Value, _ given: [Value], _ named: [(String, Value)]) throws -> String {
    if !given.isEmpty { throw refusal("tojson with arguments by place") }
    if let strange = named.first(where: { !["indent", "sort_keys", "ensure_ascii"].contains($0.0) }) {
        throw refusal("tojson(\(strange.0)) is not known here")
    }
    let plain = try json(value, sorted: valueOf(named, "sort_keys")?.isTrue ?? false)
    var indent: Int?
    if case .int(let spaces)? = valueOf(named, "indent") { indent = spaces }
    do {
        return try plain.write(ascii: valueOf(named, "ensure_ascii")?.isTrue ?? false, indent: indent)
    } catch let fault as NotJson {
        throw refusal("\(fault.words) is not JSON")
    }
}

private func filter(_ name: String, _ value: Value, _ given: [Value], _ named: [(String, Value)]) throws -> Value {
    switch name {
    case "trim": return .text(stripped(try written(value), given.first, left: true, right: true))
    case "length", "count": return .int(try elements(value).count)
    case "upper": return .text(try written(value).uppercased())
    case "lower": return .text(try written(value).lowercased())
    case "string", "safe": return .text(try written(value))
    case "list": return .list(try elements(value))
    case "first": return try elements(value).first ?? .undefined("the list has no first")
    case "last": return try elements(value).last ?? .undefined("the list has no last")
    case "join": return .text(try elements(value).map(written).joined(separator: given.first.map(written) ?? ""))
    case "default", "d":
        if case .undefined = value { return given.first ?? .text("") }
        let alsoFalse = (given.count > 1 ? given[1] : valueOf(named, "boolean"))?.isTrue ?? false
        return alsoFalse && !value.isTrue ? given.first ?? .text("") : value
    case "replace": return .text(try replaced(written(value), given))
    case "items":
        guard case .map(let pairs) = value else { throw refusal("items of no object") }
        return listOf(pairs)
    case "reverse":
        let all = Array(try elements(value).reversed())
        guard case .text = value else { return .list(all) }
        return .text(try all.map(written).joined())
    case "tojson": return .text(try asJson(value, given, named))
    default: throw refusal("the filter '\(name)' is not known here")
    }
}

private func test(_ name: String, _ value: Value, _ given: [Value]) throws -> Bool {
    switch (name, value) {
    case ("defined", .undefined): return false
    case ("defined", _): return true
    case ("undefined", .undefined), ("none", .none), ("string", .text), ("mapping", .map): return true
    case ("sequence", .list), ("sequence", .text), ("sequence", .map): return true
    case ("iterable", .list), ("iterable", .text), ("iterable", .map), ("iterable", .undefined): return true
    case ("number", .int), ("number", .double), ("number", .bool), ("integer", .int), ("boolean", .bool): return true
    case ("true", .bool(let flag)): return flag
    case ("false", .bool(let flag)): return !flag
    case ("even", .int(let number)): return number % 2 == 0
    case ("odd", .int(let number)): return number % 2 != 0
    case ("even", _), ("odd", _): throw refusal("\(name) of no number")
    case ("undefined", _), ("none", _), ("string", _), ("mapping", _), ("sequence", _), ("iterable", _),
        ("number", _), ("integer", _), ("boolean", _), ("true", _), ("false", _):
        return false
    case ("equalto", _), ("eq", _): return areSame(value, given.first ?? .none)
    case ("in", _): return try isIn(value, given.first ?? .none)
    default: throw refusal("the test '\(name)' is not known here")
    }
}

private func range(_ given: [Value]) throws -> Value {
    let numbers = try given.map { value in
        guard case .int(let number) = value else { throw refusal("range of no number") }
        return number
    }
    guard (1...2).contains(numbers.count) else { throw refusal("range of \(numbers.count) numbers is not known here") }
    let (from, to) = numbers.count == 1 ? (0, numbers[0]) : (numbers[0], numbers[1])
    let (count, overflows) = to.subtractingReportingOverflow(from)
    if overflows || count > 100_000 { throw refusal("a range that is too long") }
    return .list((0..<max(count, 0)).map { .int(from + $0) })
}

// --- scopes ----------------------------------------------------------------------------------------------------------

/// One rendering: how much it has done, and what it wrote.
private final class Run {
    var out = ""
    private var steps = 0
    private var depth = 0

    func step() throws {
        steps += 1
        if steps > mostSteps { throw refusal("the template does not end") }
    }

    func write(_ text: String) throws {
        if out.utf8.count + text.utf8.count > mostBytes { throw refusal("more than \(mostBytes) bytes") }
        out += text
    }

    /// What a block writes, which does not go out.
    func captured(_ body: () throws -> Void) throws -> String {
        let outside = out
        out = ""
        depth += 1
        defer {
            out = outside
            depth -= 1
        }
        if depth > deepest { throw refusal("the template is too deep") }
        try body()
        return out
    }
}

/// Names and their values; a loop and a macro have one of their own.
private final class Scope {
    let run: Run
    private let parent: Scope?
    private var values: [String: Value]

    init(_ run: Run, _ parent: Scope?, _ values: [String: Value] = [:]) {
        (self.run, self.parent, self.values) = (run, parent, values)
    }

    subscript(name: String) -> Value {
        get { values[name] ?? parent?[name] ?? .undefined("'\(name)' is undefined") }
        set { values[name] = newValue }
    }
}

private typealias Expression = (Scope) throws -> Value
/// What is done with a value.
private typealias Step = (Scope, Value) throws -> Value
private typealias Arguments = (Scope) throws -> ([Value], [(String, Value)])

private enum Flow { case normal, breaks, continues }

private typealias Statement = (Scope) throws -> Flow

// --- expressions -----------------------------------------------------------------------------------------------------

private struct Token {
    enum Kind { case name, string, digits, sign }

    let kind: Kind
    let text: String
}

private func tokens(_ source: Scalars) throws -> [Token] {
    let signs = ["//", "**", "==", "!=", "<=", ">="] + "-+*/%~<>=|.,:()[]{}".map(String.init)
    var found: [Token] = []
    var at = 0
    func run(from start: Int, _ goesOn: (Unicode.Scalar) -> Bool) -> Int {
        (start..<source.count).first { !goesOn(source[$0]) } ?? source.count
    }
    while true {
        at = run(from: at, isBlank)
        guard at < source.count else { return found }
        let first = source[at]
        if isDigit(first) {
            var end = run(from: at, isDigit)
            if end + 1 < source.count, source[end] == ".", isDigit(source[end + 1]) {
                end = run(from: end + 1, isDigit)
            }
            found.append(Token(kind: .digits, text: text(source[at..<end])))
            at = end
        } else if isNameScalar(first) {
            let end = run(from: at, isNameScalar)
            found.append(Token(kind: .name, text: text(source[at..<end])))
            at = end
        } else if first == "'" || first == "\"" {
            var end = at + 1
            while end < source.count, source[end] != first { end += source[end] == "\\" ? 2 : 1 }
            if end >= source.count { throw refusal("a string without an end") }
            found.append(Token(kind: .string, text: try unescaped(Array(source[at + 1..<end]))))
            at = end + 1
        } else if let sign = signs.first(where: { source[at...].starts(with: $0.unicodeScalars) }) {
            found.append(Token(kind: .sign, text: sign))
            at += sign.utf8.count
        } else {
            throw refusal("'\(text(source[at...].prefix(20)))' is no expression")
        }
    }
}

private func unescaped(_ source: Scalars) throws -> String {
    let plain: [Unicode.Scalar: Unicode.Scalar] = ["n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", "\"": "\""]
    var found: Scalars = []
    var at = 0
    while at < source.count {
        guard source[at] == "\\", at + 1 < source.count else {
            found.append(source[at])
            at += 1
            continue
        }
        let escape = source[at + 1]
        at += 2
        if let scalar = plain[escape] {
            found.append(scalar)
        } else if escape == "u" || escape == "x" {
            let digits = source[at..<min(at + (escape == "u" ? 4 : 2), source.count)]
            guard let code = UInt32(text(digits), radix: 16), let scalar = Unicode.Scalar(code) else {
                throw refusal("an escape that is no character")
            }
            found.append(scalar)
            at += digits.count
        } else {
            found += ["\\", escape]
        }
    }
    return text(found)
}

/// Reads an expression; what is at one level is kept as a list, so that a long one does not call deeply.
private final class ExpressionParser {
    private let tokens: [Token]
    private var at = 0
    private var depth = 0

    init(_ source: Scalars) throws { tokens = try EdgeCore.tokens(source) }

    var isDone: Bool { at >= tokens.count }

    func whole() throws -> Expression {
        let value = try tuple()
        if !isDone { throw refusal("'\(tokens[at].text)' is not expected") }
        return value
    }

    func peek(_ text: String, ahead: Int = 0) -> Bool {
        guard at + ahead < tokens.count else { return false }
        return tokens[at + ahead].kind != .string && tokens[at + ahead].text == text
    }

    func accept(_ text: String) -> Bool {
        if !peek(text) { return false }
        at += 1
        return true
    }

    func expect(_ text: String) throws {
        if !accept(text) { throw refusal("'\(text)' is expected") }
    }

    func name() throws -> String {
        guard !isDone, tokens[at].kind == .name else { throw refusal("a name is expected") }
        at += 1
        return tokens[at - 1].text
    }

    private func deeper<T>(_ work: () throws -> T) throws -> T {
        depth += 1
        defer { depth -= 1 }
        if depth > deepest { throw refusal("the template is too deep") }
        return try work()
    }

    private func tuple() throws -> Expression {
        let first = try ternary()
        if !peek(",") { return first }
        var all = [first]
        while accept(",") { if !isDone, !peek(")") { all.append(try ternary()) } }
        return { scope in .list(try all.map { try $0(scope) }) }
    }

    func ternary() throws -> Expression { try deeper(choice) }

    private func choice() throws -> Expression {
        let value = try or()
        if !accept("if") { return value }
        let test = try or()
        let other: Expression = accept("else") ? try ternary() : { _ in .undefined("the condition has no else") }
        return { scope in try test(scope).isTrue ? value(scope) : other(scope) }
    }

    func or() throws -> Expression {
        let all = try list(and, "or")
        if all.count == 1 { return all[0] }
        return { scope in
            var value = try all[0](scope)
            for next in all.dropFirst() where !value.isTrue { value = try next(scope) }
            return value
        }
    }

    private func and() throws -> Expression {
        let all = try list(not, "and")
        if all.count == 1 { return all[0] }
        return { scope in
            var value = try all[0](scope)
            for next in all.dropFirst() where value.isTrue { value = try next(scope) }
            return value
        }
    }

    private func list(_ next: () throws -> Expression, _ word: String) throws -> [Expression] {
        var all = [try next()]
        while accept(word) { all.append(try next()) }
        return all
    }

    private func not() throws -> Expression {
        var negated = false
        var isAny = false
        while accept("not") {
            negated.toggle()
            isAny = true
        }
        let value = try comparison()
        return isAny ? { scope in .bool(try value(scope).isTrue != negated) } : value
    }

    private func comparison() throws -> Expression {
        let first = try sum()
        var rest: [(sign: String, negated: Bool, value: Expression)] = []
        while true {
            let negated = peek("not") && peek("in", ahead: 1)
            if negated { at += 1 }
            guard let sign = ["==", "!=", "<=", ">=", "<", ">", "in"].first(where: accept) else { break }
            rest.append((sign, negated, try sum()))
        }
        if rest.isEmpty { return first }
        return { scope in
            var value = try first(scope)
            for next in rest { value = .bool(try compare(next.sign, value, next.value(scope)) != next.negated) }
            return value
        }
    }

    private func binary(_ next: () throws -> Expression, _ signs: [String]) throws -> Expression {
        let first = try next()
        var rest: [(sign: String, value: Expression)] = []
        while let sign = signs.first(where: accept) { rest.append((sign, try next())) }
        if rest.isEmpty { return first }
        return { scope in
            var value = try first(scope)
            for next in rest { value = try arithmetic(next.sign, value, next.value(scope)) }
            return value
        }
    }

    private func sum() throws -> Expression { try binary(joined, ["+", "-"]) }

    private func joined() throws -> Expression { try binary(product, ["~"]) }

    private func product() throws -> Expression { try binary(unary, ["*", "//", "/", "%"]) }

    private func unary() throws -> Expression {
        if accept("-") {
            let value = try deeper(unary)
            return { scope in try arithmetic("-", .int(0), value(scope)) }
        }
        if accept("+") { return try deeper(unary) }
        let first = try primary()
        let steps = try postfixed() + filtered()
        if peek("**") { throw refusal("** is not known here") }
        if steps.isEmpty { return first }
        return { scope in
            var value = try first(scope)
            for step in steps { value = try step(scope, value) }
            return value
        }
    }

    private func primary() throws -> Expression {
        if isDone { throw refusal("an expression is expected") }
        let token = tokens[at]
        at += 1
        switch token.kind {
        case .string:
            var text = token.text
            while !isDone, tokens[at].kind == .string {
                text += tokens[at].text
                at += 1
            }
            let whole = Value.text(text)
            return { _ in whole }
        case .digits:
            guard let number = Int(token.text).map(Value.int) ?? Double(token.text).map(Value.double) else {
                throw refusal("'\(token.text)' is no number")
            }
            return { _ in number }
        case .name: return named(token.text)
        case .sign: return try bracket(token.text)
        }
    }

    private func named(_ name: String) -> Expression {
        switch name {
        case "true", "True": return { _ in .bool(true) }
        case "false", "False": return { _ in .bool(false) }
        case "none", "None": return { _ in .none }
        default: return { scope in scope[name] }
        }
    }

    private func bracket(_ sign: String) throws -> Expression {
        switch sign {
        case "(":
            if accept(")") { return { _ in .list([]) } }
            let value = try tuple()
            try expect(")")
            return value
        case "[":
            var all: [Expression] = []
            while !accept("]") {
                all.append(try ternary())
                if !peek("]") { try expect(",") }
            }
            return { scope in .list(try all.map { try $0(scope) }) }
        case "{": return try dictionary()
        default: throw refusal("'\(sign)' is not expected")
        }
    }

    private func dictionary() throws -> Expression {
        var all: [(key: Expression, value: Expression)] = []
        while !accept("}") {
            let key = try ternary()
            try expect(":")
            all.append((key, try ternary()))
            if !peek("}") { try expect(",") }
        }
        return { scope in
            .map(
                try all.map { pair in
                    guard case .text(let key) = try pair.key(scope) else { throw refusal("a key that is no text") }
                    return (key, try pair.value(scope))
                })
        }
    }

    /// What follows a value: members, elements and calls.
    private func postfixed() throws -> [Step] {
        var steps: [Step] = []
        while true {
            if accept(".") {
                let key = try name()
                steps.append { _, value in try attribute(value, key) }
            } else if accept("[") {
                steps.append(try subscripted())
            } else if accept("(") {
                let given = try arguments()
                steps.append { scope, value in try called(scope, value, given) }
            } else {
                return steps
            }
        }
    }

    private func subscripted() throws -> Step {
        var bounds: [Expression?] = [nil, nil, nil]
        var place = 0
        while !accept("]") {
            if isDone { throw refusal("']' is expected") }
            if accept(":") { place += 1 } else { bounds[min(place, 2)] = try ternary() }
        }
        if place > 0 {
            let all = bounds
            return { scope, value in try slice(value, all.map { try $0?(scope) }) }
        }
        guard let key = bounds[0] else { throw refusal("an index is expected") }
        return { scope, value in try item(value, key(scope)) }
    }

    /// Arguments up to `)`: by place, and by name.
    private func arguments() throws -> Arguments {
        var placed: [Expression] = []
        var named: [(String, Expression)] = []
        while !accept(")") {
            if !isDone, tokens[at].kind == .name, peek("=", ahead: 1) {
                let key = try name()
                at += 1
                named.append((key, try ternary()))
            } else {
                placed.append(try ternary())
            }
            if !peek(")") { try expect(",") }
        }
        let (values, pairs) = (placed, named)
        return { scope in (try values.map { try $0(scope) }, try pairs.map { ($0.0, try $0.1(scope)) }) }
    }

    /// Filters and tests, and what follows their values.
    private func filtered() throws -> [Step] {
        var steps: [Step] = []
        while true {
            if accept("|") {
                let name = try name()
                let given: Arguments = accept("(") ? try arguments() : { _ in ([], []) }
                steps.append { scope, value in
                    let (placed, named) = try given(scope)
                    return try filter(name, value, placed, named)
                }
                steps += try postfixed()
            } else if accept("is") {
                let negated = accept("not")
                let name = try name()
                let given = try testArguments()
                steps.append { scope, value in .bool(try test(name, value, given(scope).0) != negated) }
            } else {
                return steps
            }
        }
    }

    private func testArguments() throws -> Arguments {
        if accept("(") { return try arguments() }
        guard !isDone, tokens[at].kind == .string || tokens[at].kind == .digits else { return { _ in ([], []) } }
        let one = try primary()
        return { scope in ([try one(scope)], []) }
    }
}

private func called(_ scope: Scope, _ value: Value, _ given: Arguments) throws -> Value {
    try scope.run.step()
    switch value {
    case .function(let call):
        let (placed, named) = try given(scope)
        return try call(placed, named)
    case .undefined(let words): throw refusal(words)
    default: throw refusal("what is called is no function")
    }
}

// --- statements ------------------------------------------------------------------------------------------------------

private final class TemplateParser {
    private static let inner = ["elif", "else", "endif", "endfor", "endset", "endmacro", "endgeneration"]
    private let pieces: [Piece]
    private var at = 0
    private var depth = 0

    init(_ source: String) throws {
        var cutter = Cutter(source)
        pieces = try cutter.pieces()
    }

    func whole() throws -> Statement {
        let body = try block()
        if at < pieces.count { throw refusal("a tag '\(text(pieces[at].trimmed))' without a beginning") }
        return body
    }

    /// Everything up to a tag that ends or divides a block, which is left to be read.
    private func block() throws -> Statement {
        depth += 1
        defer { depth -= 1 }
        if depth > deepest { throw refusal("the template is too deep") }
        var all: [Statement] = []
        while at < pieces.count {
            let piece = pieces[at]
            if piece.kind == .tag, Self.inner.contains(piece.word) { break }
            at += 1
            all.append(try statement(piece))
        }
        let statements = all
        return { scope in
            for statement in statements {
                try scope.run.step()
                let flow = try statement(scope)
                if flow != .normal { return flow }
            }
            return .normal
        }
    }

    private func statement(_ piece: Piece) throws -> Statement {
        switch piece.kind {
        case .text:
            let content = text(piece.content)
            return { scope in
                try scope.run.write(content)
                return .normal
            }
        case .output:
            let value = try ExpressionParser(piece.content).whole()
            return { scope in
                try scope.run.write(written(value(scope)))
                return .normal
            }
        case .tag: return try tag(piece.word, try rest(piece))
        }
    }

    /// What stands behind the word of a tag.
    private func rest(_ piece: Piece) throws -> ExpressionParser {
        try ExpressionParser(Array(piece.trimmed.dropFirst(piece.word.unicodeScalars.count)))
    }

    /// The tag that ended a block, and what stands behind its word.
    private func end(_ words: String...) throws -> (word: String, rest: ExpressionParser) {
        guard at < pieces.count else { throw refusal("no {% \(words.last!) %}") }
        let piece = pieces[at]
        at += 1
        if !words.contains(piece.word) { throw refusal("{% \(words.last!) %} is expected, not '\(piece.word)'") }
        return (piece.word, try rest(piece))
    }

    private func tag(_ word: String, _ rest: ExpressionParser) throws -> Statement {
        switch word {
        case "if": return try condition(rest.whole())
        case "for": return try loop(rest)
        case "set": return try assignment(rest)
        case "macro": return try macro(rest)
        case "generation":
            let body = try block()
            _ = try end("endgeneration")
            return body
        case "break": return { _ in .breaks }
        case "continue": return { _ in .continues }
        default: throw refusal("{% \(word) %} is not known here")
        }
    }

    private func condition(_ first: @escaping Expression) throws -> Statement {
        var branches = [(test: first, body: try block())]
        var other: Statement?
        while true {
            let (word, rest) = try end("elif", "else", "endif")
            if word == "endif" { break }
            if word == "else" {
                other = try block()
                _ = try end("endif")
                break
            }
            let test = try rest.whole()
            branches.append((test, try block()))
        }
        let (all, last) = (branches, other)
        return { scope in
            for branch in all where try branch.test(scope).isTrue { return try branch.body(scope) }
            return try last?(scope) ?? .normal
        }
    }

    private func loop(_ head: ExpressionParser) throws -> Statement {
        var names = [try head.name()]
        while head.accept(",") { names.append(try head.name()) }
        try head.expect("in")
        let source = try head.or()
        let wanted = head.accept("if") ? try head.or() : nil
        if !head.isDone { throw refusal("{% for %} with more than this app knows") }
        let body = try block()
        var other: Statement?
        if try end("else", "endfor").word == "else" {
            other = try block()
            _ = try end("endfor")
        }
        let (targets, empty) = (names, other)
        return { scope in
            var all = try elements(source(scope)).map { try bound(targets, $0) }
            if let wanted { all = try all.filter { try wanted(Scope(scope.run, scope, $0)).isTrue } }
            if all.isEmpty { return try empty?(scope) ?? .normal }
            return try turns(scope, targets[0], all, body)
        }
    }

    private func assignment(_ head: ExpressionParser) throws -> Statement {
        let name = try head.name()
        let key = head.accept(".") ? try head.name() : nil
        let value: Expression
        if head.accept("=") {
            value = try head.whole()
        } else {
            if !head.isDone { throw refusal("{% set %} of several names is not known here") }
            let body = try block()
            _ = try end("endset")
            value = { scope in .text(try scope.run.captured { _ = try body(scope) }) }
        }
        return { scope in
            let given = try value(scope)
            guard let key else {
                scope[name] = given
                return .normal
            }
            guard case .space(let space) = scope[name] else { throw refusal("'\(name)' is no namespace") }
            space.pairs.removeAll { isSame($0.0, key) }
            space.pairs.append((key, given))
            return .normal
        }
    }

    private func macro(_ head: ExpressionParser) throws -> Statement {
        let name = try head.name()
        var parameters: [(name: String, otherwise: Expression?)] = []
        try head.expect("(")
        while !head.accept(")") {
            parameters.append((try head.name(), head.accept("=") ? try head.ternary() : nil))
            if !head.peek(")") { try head.expect(",") }
        }
        let body = try block()
        _ = try end("endmacro")
        let all = parameters
        return { scope in
            scope[name] = .function { placed, named in
                if placed.count > all.count { throw refusal("too many arguments for '\(name)'") }
                var values: [String: Value] = [:]
                for (i, (key, otherwise)) in all.enumerated() {
                    let given = i < placed.count ? placed[i] : valueOf(named, key)
                    values[key] = try given ?? otherwise?(scope) ?? .undefined("'\(key)' was not given")
                }
                let inner = Scope(scope.run, scope, values)
                return .text(try scope.run.captured { _ = try body(inner) })
            }
            return .normal
        }
    }
}

/// The values of a loop's names.
private func bound(_ names: [String], _ value: Value) throws -> [String: Value] {
    if names.count == 1 { return [names[0]: value] }
    let values = try elements(value)
    if values.count != names.count { throw refusal("\(values.count) values for \(names.count) names") }
    return Dictionary(uniqueKeysWithValues: zip(names, values))
}

private func turns(_ scope: Scope, _ name: String, _ all: [[String: Value]], _ body: Statement) throws -> Flow {
    func neighbour(_ at: Int, _ what: String) -> Value {
        all.indices.contains(at) ? all[at][name]! : .undefined("there is no \(what) item")
    }
    for (i, values) in all.enumerated() {
        let loop: [(String, Value)] = [
            ("index", .int(i + 1)), ("index0", .int(i)), ("first", .bool(i == 0)), ("last", .bool(i == all.count - 1)),
            ("length", .int(all.count)), ("revindex", .int(all.count - i)), ("revindex0", .int(all.count - i - 1)),
            ("previtem", neighbour(i - 1, "previous")), ("nextitem", neighbour(i + 1, "next")),
        ]
        let inner = Scope(scope.run, scope, values.merging(["loop": .map(loop)]) { _, last in last })
        if try body(inner) == .breaks { break }
    }
    return .normal
}
