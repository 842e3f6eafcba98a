package io.edgekd.demo

import java.text.SimpleDateFormat
import java.util.Date
import java.util.Locale

/** A template raises, is in error, or has what this app does not know: it never renders another text than jinja2. */
class TemplateError(words: String) : Exception(words)

private const val MOST_STEPS = 2_000_000
private const val MOST_CHARACTERS = 1 shl 24

/** What stands for a name that has no value: empty where it is written, an error where it is used. */
private class Undefined(val words: String)

private class Namespace(val values: MutableMap<String, Any?>)

private class Function(val call: (List<Any?>, Map<String, Any?>) -> Any?)

private object Break : Throwable() {
    private fun readResolve(): Any = Break
}

private object Continue : Throwable() {
    private fun readResolve(): Any = Continue
}

private fun refuse(words: String): Nothing = throw TemplateError(words)

/** `strftime_now` by the clock: the few fields that chat templates use. */
fun timeNow(form: String, date: Date = Date()): String = buildString {
    var at = 0
    while (at < form.length) {
        if (form[at] != '%' || at + 1 == form.length) {
            append(form[at++])
            continue
        }
        val fields = mapOf('d' to "dd", 'm' to "MM", 'b' to "MMM", 'B' to "MMMM", 'Y' to "yyyy", 'y' to "yy", 'H' to "HH", 'M' to "mm", 'S' to "ss", 'A' to "EEEE", 'a' to "EEE")
        val field = fields[form[at + 1]] ?: refuse("strftime_now: %${form[at + 1]} is not known here")
        append(SimpleDateFormat(field, Locale.ENGLISH).format(date))
        at += 2
    }
}

fun timeNow(form: String): String = timeNow(form, Date())

// --- source to pieces ------------------------------------------------------------------------------------------------

private enum class Kind { TEXT, OUTPUT, TAG }

private class Piece(val kind: Kind, val text: String)

/** A template's text, outputs and tags, with the white space that trim_blocks, lstrip_blocks and `-` take away. */
private fun pieces(source: String): List<Piece> {
    val whole = source.replace("\r\n", "\n").replace('\r', '\n').removeSuffix("\n")
    val found = ArrayList<Piece>()
    var at = 0
    var strip = false // the tag before takes all white space along
    var trimLine = false // … or one line break
    while (true) {
        val start = Regex("\\{[{%#]").find(whole, at)
        var text = whole.substring(at, start?.range?.first ?: whole.length)
        if (strip) text = text.trimStart(*BLANKS) else if (trimLine && text.startsWith("\n")) text = text.substring(1)
        if (start == null) {
            if (text.isNotEmpty()) found += Piece(Kind.TEXT, text)
            return found
        }
        val open = start.value
        var inside = start.range.last + 1
        val sign = whole.getOrNull(inside)
        if (sign == '-' || sign == '+') inside++
        if (sign == '-') {
            text = text.trimEnd(*BLANKS)
        } else if (open != "{{" && sign != '+') {
            val line = text.takeLastWhile { it == ' ' || it == '\t' }
            val before = text.dropLast(line.length)
            val atLineStart = if (before.isEmpty()) start.range.first - line.length == 0 || whole[start.range.first - line.length - 1] == '\n' else before.endsWith("\n")
            if (atLineStart) text = before
        }
        if (text.isNotEmpty()) found += Piece(Kind.TEXT, text)
        val close = mapOf("{{" to "}}", "{%" to "%}", "{#" to "#}").getValue(open)
        val end = endOf(whole, inside, close, open != "{#")
        var body = whole.substring(inside, end)
        strip = body.endsWith("-")
        val keeps = body.endsWith("+") && open != "{{"
        if (strip || keeps) body = body.dropLast(1)
        trimLine = open != "{{" && !keeps
        at = end + 2
        if (open != "{#") found += Piece(if (open == "{{") Kind.OUTPUT else Kind.TAG, body)
    }
}

private val BLANKS = charArrayOf(' ', '\t', '\n', '\r', '\u000b', '\u000c')

/** Where a tag closes, which is not inside a string. */
private fun endOf(source: String, from: Int, close: String, strings: Boolean): Int {
    var at = from
    var quote: Char? = null
    while (at < source.length) {
        val char = source[at]
        when {
            quote != null && char == '\\' -> at++
            quote != null -> if (char == quote) quote = null
            strings && (char == '"' || char == '\'') -> quote = char
            source.startsWith(close, at) -> return at
        }
        at++
    }
    refuse("a tag without $close")
}

// --- expressions -----------------------------------------------------------------------------------------------------

private class Token(val kind: Char, val text: String) // 'n'ame, 's'tring, 'd'igits, 'o'perator

private val TOKEN = Regex(
    "\\s*(?:([A-Za-z_][A-Za-z0-9_]*)|('(?:[^'\\\\]|\\\\.)*'|\"(?:[^\"\\\\]|\\\\.)*\")|([0-9]+(?:\\.[0-9]+)?)|(//|\\*\\*|==|!=|<=|>=|[-+*/%~<>=|.,:()\\[\\]{}]))",
    RegexOption.DOT_MATCHES_ALL,
)

private fun tokens(source: String): List<Token> {
    val found = ArrayList<Token>()
    var at = 0
    while (source.substring(at).isNotBlank()) {
        val match = TOKEN.find(source, at)?.takeIf { it.range.first == at } ?: refuse("'${source.substring(at).trim().take(20)}' is no expression")
        val (name, string, digits, operator) = match.destructured
        found += when {
            name.isNotEmpty() -> Token('n', name)
            string.isNotEmpty() -> Token('s', unescaped(string.substring(1, string.length - 1)))
            digits.isNotEmpty() -> Token('d', digits)
            else -> Token('o', operator)
        }
        at = match.range.last + 1
    }
    return found
}

private fun unescaped(text: String): String = Regex("\\\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", RegexOption.DOT_MATCHES_ALL).replace(text) {
    val escape = it.groupValues[1]
    when (escape[0]) {
        'n' -> "\n"
        't' -> "\t"
        'r' -> "\r"
        'u', 'x' -> if (escape.length > 1) escape.substring(1).toInt(16).toChar().toString() else refuse("an escape without digits")
        '\\', '\'', '"' -> escape
        else -> "\\" + escape
    }
}

private typealias Expression = (Scope) -> Any?

/** Names and their values; a loop and a macro have one of their own. */
private class Scope(val run: Run, val parent: Scope?, val values: MutableMap<String, Any?> = HashMap()) {
    fun get(name: String): Any? {
        var scope: Scope? = this
        while (scope != null) {
            if (name in scope.values) return scope.values[name]
            scope = scope.parent
        }
        return Undefined("'$name' is undefined")
    }
}

/** One rendering: how much it has done, and what it wrote. */
private class Run {
    var steps = 0
    var out = StringBuilder()

    fun step() {
        if (++steps > MOST_STEPS) refuse("the template does not end")
    }

    fun write(text: String) {
        if (out.length + text.length > MOST_CHARACTERS) refuse("more than $MOST_CHARACTERS characters")
        out.append(text)
    }
}

private class ExpressionParser(private val tokens: List<Token>) {
    private var at = 0

    fun whole(): Expression = tuple().also { if (at < tokens.size) refuse("'${tokens[at].text}' is not expected") }

    val isDone get() = at >= tokens.size

    fun peek(text: String, ahead: Int = 0): Boolean = tokens.getOrNull(at + ahead)?.let { it.kind != 's' && it.text == text } ?: false

    fun accept(text: String): Boolean = peek(text).also { if (it) at++ }

    fun expect(text: String) {
        if (!accept(text)) refuse("'$text' is expected")
    }

    fun name(): String = tokens.getOrNull(at)?.takeIf { it.kind == 'n' }?.text?.also { at++ } ?: refuse("a name is expected")

    private fun tuple(): Expression {
        val first = ternary()
        if (!peek(",")) return first
        val all = arrayListOf(first)
        while (accept(",")) if (!isDone) all += ternary()
        return { scope -> all.map { it(scope) } }
    }

    fun ternary(): Expression {
        val value = or()
        if (!accept("if")) return value
        val test = or()
        val other = if (accept("else")) ternary() else { _ -> Undefined("the condition has no else") }
        return { if (truth(test(it))) value(it) else other(it) }
    }

    fun or(): Expression {
        var left = and()
        while (accept("or")) {
            val (a, b) = left to and()
            left = { scope -> a(scope).let { if (truth(it)) it else b(scope) } }
        }
        return left
    }

    private fun and(): Expression {
        var left = not()
        while (accept("and")) {
            val (a, b) = left to not()
            left = { scope -> a(scope).let { if (truth(it)) b(scope) else it } }
        }
        return left
    }

    private fun not(): Expression {
        if (!accept("not")) return comparison()
        val value = not()
        return { !truth(value(it)) }
    }

    private fun comparison(): Expression {
        var left = sum()
        while (true) {
            val negated = peek("not") && peek("in", 1)
            if (negated) at++
            val operator = listOf("==", "!=", "<=", ">=", "<", ">", "in").firstOrNull(::accept) ?: return left
            val (a, b) = left to sum()
            left = { scope -> compare(operator, a(scope), b(scope)) != negated }
        }
    }

    private fun binary(next: () -> Expression, vararg operators: String): Expression {
        var left = next()
        while (true) {
            val operator = operators.firstOrNull(::accept) ?: return left
            val (a, b) = left to next()
            left = { scope -> arithmetic(operator, a(scope), b(scope)) }
        }
    }

    private fun sum(): Expression = binary({ binary(::product, "~") }, "+", "-")

    private fun product(): Expression = binary(::unary, "*", "//", "/", "%")

    private fun unary(): Expression {
        if (accept("-")) return unary().let { value -> { arithmetic("-", 0L, value(it)) } }
        if (accept("+")) return unary()
        return filtered(postfixed(primary())).also { if (peek("**")) refuse("** is not known here") }
    }

    private fun primary(): Expression {
        val token = tokens.getOrNull(at++) ?: refuse("an expression is expected")
        return when {
            token.kind == 's' -> {
                var text = token.text
                while (tokens.getOrNull(at)?.kind == 's') text += tokens[at++].text
                val whole = text;
                { whole }
            }
            token.kind == 'd' -> (token.text.toLongOrNull() ?: token.text.toDouble()).let { number -> { number } }
            token.kind == 'n' -> named(token.text)
            token.text == "(" -> if (accept(")")) { _ -> emptyList<Any?>() } else tuple().also { expect(")") }
            token.text == "[" -> listOfExpressions("]").let { all -> { scope -> all.map { it(scope) } } }
            token.text == "{" -> dictionary()
            else -> refuse("'${token.text}' is not expected")
        }
    }

    private fun named(name: String): Expression = when (name) {
        "true", "True" -> { _ -> true }
        "false", "False" -> { _ -> false }
        "none", "None" -> { _ -> null }
        else -> { scope -> scope.get(name) }
    }

    private fun listOfExpressions(close: String): List<Expression> {
        val all = ArrayList<Expression>()
        while (!accept(close)) {
            all += ternary()
            if (!peek(close)) expect(",")
        }
        return all
    }

    private fun dictionary(): Expression {
        val all = ArrayList<Pair<Expression, Expression>>()
        while (!accept("}")) {
            val key = ternary()
            expect(":")
            all += key to ternary()
            if (!peek("}")) expect(",")
        }
        return { scope -> all.associateTo(LinkedHashMap()) { (key, value) -> (key(scope) as? String ?: refuse("a key that is no text")) to value(scope) } }
    }

    private fun postfixed(start: Expression): Expression {
        var value = start
        while (true) {
            val inner = value
            value = when {
                accept(".") -> name().let { key -> { attribute(inner(it), key) } }
                accept("[") -> subscript(inner)
                accept("(") -> call(inner)
                else -> return value
            }
        }
    }

    private fun subscript(inner: Expression): Expression {
        val bounds = arrayOfNulls<Expression>(3)
        var place = 0
        while (!accept("]")) {
            if (accept(":")) place++ else bounds[place.coerceAtMost(2)] = ternary()
            if (isDone) refuse("']' is expected")
        }
        if (place == 0) return bounds[0]?.let { key -> { item(inner(it), key(it)) } } ?: refuse("an index is expected")
        return { scope -> slice(inner(scope), bounds.map { it?.invoke(scope) }) }
    }

    /** Arguments up to `)`: by place, and by name. */
    fun arguments(): (Scope) -> Pair<List<Any?>, Map<String, Any?>> {
        val placed = ArrayList<Expression>()
        val named = LinkedHashMap<String, Expression>()
        while (!accept(")")) {
            if (tokens.getOrNull(at)?.kind == 'n' && peek("=", 1)) {
                val key = name()
                at++
                named[key] = ternary()
            } else {
                placed += ternary()
            }
            if (!peek(")")) expect(",")
        }
        return { scope -> placed.map { it(scope) } to named.mapValues { it.value(scope) } }
    }

    private fun call(inner: Expression): Expression {
        val given = arguments()
        return { scope ->
            scope.run.step()
            val function = inner(scope)
            val (placed, named) = given(scope)
            when (function) {
                is Function -> function.call(placed, named)
                is Undefined -> refuse(function.words)
                else -> refuse("what is called is no function")
            }
        }
    }

    private fun filtered(start: Expression): Expression {
        var value = start
        while (true) {
            val inner = value
            value = if (accept("|")) {
                val name = name()
                val given = if (accept("(")) arguments() else { _ -> emptyList<Any?>() to emptyMap() }
                postfixed { scope -> given(scope).let { (placed, named) -> filter(name, inner(scope), placed, named) } }
            } else if (accept("is")) {
                val negated = accept("not")
                val name = name()
                val given = when {
                    accept("(") -> arguments()
                    tokens.getOrNull(at)?.kind in listOf('s', 'd') -> primary().let { one -> { scope: Scope -> listOf(one(scope)) to emptyMap<String, Any?>() } }
                    else -> { _ -> emptyList<Any?>() to emptyMap() }
                };
                { scope -> test(name, inner(scope), given(scope).first) != negated }
            } else {
                return value
            }
        }
    }
}

// --- values ----------------------------------------------------------------------------------------------------------

private fun truth(value: Any?): Boolean = when (value) {
    null, is Undefined -> false
    is Boolean -> value
    is Long -> value != 0L
    is Double -> value != 0.0
    is String -> value.isNotEmpty()
    is List<*> -> value.isNotEmpty()
    is Map<*, *> -> value.isNotEmpty()
    else -> true
}

/** A value as it is written; what Python alone knows how to write is refused. */
private fun text(value: Any?): String = when (value) {
    is Undefined -> ""
    is String -> value
    is Boolean -> if (value) "True" else "False"
    is Long -> value.toString()
    is Double -> value.toString().also { if ('E' in it) refuse("a number that is written in powers of ten") }
    null -> "None"
    else -> refuse("a list or an object is written as text")
}

private fun same(a: Any?, b: Any?): Boolean = when {
    a is Number && b is Number -> a.toDouble() == b.toDouble()
    a is Undefined || b is Undefined -> a is Undefined && b is Undefined
    else -> a == b
}

private fun compare(operator: String, a: Any?, b: Any?): Boolean = when (operator) {
    "==" -> same(a, b)
    "!=" -> !same(a, b)
    "in" -> when (b) {
        is String -> (a as? String ?: refuse("what is looked for in a text is none")) in b
        is List<*> -> b.any { same(it, a) }
        is Map<*, *> -> a in b
        is Undefined -> false
        else -> refuse("nothing is in such a value")
    }
    else -> {
        val order = when {
            a is Number && b is Number -> a.toDouble().compareTo(b.toDouble())
            a is String && b is String -> a.compareTo(b)
            else -> refuse("values that have no order")
        }
        when (operator) {
            "<" -> order < 0
            ">" -> order > 0
            "<=" -> order <= 0
            else -> order >= 0
        }
    }
}

private fun arithmetic(operator: String, a: Any?, b: Any?): Any? {
    if (operator == "~") return text(a) + text(b)
    listOf(a, b).forEach { if (it is Undefined) refuse(it.words) }
    return when {
        operator == "+" && a is String && b is String -> a + b
        operator == "+" && a is List<*> && b is List<*> -> a + b
        operator == "*" && a is String && b is Long -> a.repeat(b.coerceIn(0, 10_000).toInt())
        a is Long && b is Long -> whole(operator, a, b)
        a is Number && b is Number -> real(operator, a.toDouble(), b.toDouble())
        else -> refuse("'$operator' between values that have none")
    }
}

private fun whole(operator: String, a: Long, b: Long): Any = when (operator) {
    "+" -> a + b
    "-" -> a - b
    "*" -> a * b
    else -> {
        if (b == 0L) refuse("division by zero")
        when (operator) {
            "/" -> a.toDouble() / b
            "//" -> a.floorDiv(b)
            else -> a.mod(b)
        }
    }
}

private fun real(operator: String, a: Double, b: Double): Double = when (operator) {
    "+" -> a + b
    "-" -> a - b
    "*" -> a * b
    "/" -> if (b == 0.0) refuse("division by zero") else a / b
    else -> refuse("'$operator' of broken numbers is not known here")
}

private fun elements(value: Any?): List<Any?> = when (value) {
    is List<*> -> value
    is Map<*, *> -> value.keys.toList()
    is String -> characters(value)
    is Undefined -> emptyList()
    else -> refuse("what is gone through is no list")
}

private fun characters(text: String): List<String> {
    val found = ArrayList<String>()
    var at = 0
    while (at < text.length) Character.charCount(text.codePointAt(at)).let { found += text.substring(at, at + it); at += it }
    return found
}

private fun item(value: Any?, key: Any?): Any? = when {
    value is Undefined -> refuse(value.words)
    value is List<*> && key is Long -> place(key, value.size)?.let { value[it] } ?: Undefined("the list has no element $key")
    value is String && key is Long -> characters(value).let { all -> place(key, all.size)?.let { all[it] } } ?: Undefined("the text has no character $key")
    value is Map<*, *> && value.containsKey(key) -> value[key]
    key is String -> attribute(value, key)
    else -> Undefined("the value has no element $key")
}

private fun place(index: Long, size: Int): Int? = (if (index < 0) index + size else index).takeIf { it in 0 until size }?.toInt()

private fun slice(value: Any?, bounds: List<Any?>): Any? {
    val step = (bounds[2] ?: 1L) as? Long ?: refuse("a step that is no number")
    val all = elements(value)
    val size = all.size.toLong()
    fun bound(given: Any?, otherwise: Long, low: Long, high: Long): Long {
        val number = (given ?: return otherwise) as? Long ?: refuse("a bound that is no number")
        return (if (number < 0) number + size else number).coerceIn(low, high)
    }
    val found = if (step > 0) {
        (bound(bounds[0], 0, 0, size) until bound(bounds[1], size, 0, size) step step).map { all[it.toInt()] }
    } else if (step < 0) {
        (bound(bounds[0], size - 1, -1, size - 1) downTo bound(bounds[1], -1, -1, size - 1) + 1 step -step).map { all[it.toInt()] }
    } else {
        refuse("a step of zero")
    }
    return if (value is String) found.joinToString("") else found
}

private fun attribute(value: Any?, name: String): Any? = when (value) {
    is Undefined -> refuse(value.words)
    is Namespace -> if (name in value.values) value.values[name] else Undefined("the namespace has no '$name'")
    is String -> textMethod(value, name) ?: Undefined("a text has no '$name'")
    is Map<*, *> -> mapMethod(value, name) ?: if (value.containsKey(name)) value[name] else Undefined("'dict object' has no attribute '$name'")
    else -> Undefined("the value has no '$name'")
}

private fun mapMethod(map: Map<*, *>, name: String): Function? = when (name) {
    "items" -> Function { _, _ -> map.entries.map { listOf(it.key, it.value) } }
    "keys" -> Function { _, _ -> map.keys.toList() }
    "values" -> Function { _, _ -> map.values.toList() }
    "get" -> Function { given, _ -> if (map.containsKey(given.getOrNull(0))) map[given[0]] else given.getOrNull(1) }
    "pop", "update", "setdefault", "clear", "copy", "popitem", "fromkeys" -> refuse("'$name' of an object is not known here")
    else -> null
}

private fun textMethod(text: String, name: String): Function? = when (name) {
    "strip" -> Function { given, _ -> strip(text, given.firstOrNull(), left = true, right = true) }
    "lstrip" -> Function { given, _ -> strip(text, given.firstOrNull(), left = true, right = false) }
    "rstrip" -> Function { given, _ -> strip(text, given.firstOrNull(), left = false, right = true) }
    "upper" -> Function { _, _ -> text.uppercase(Locale.ROOT) }
    "lower" -> Function { _, _ -> text.lowercase(Locale.ROOT) }
    "startswith" -> Function { given, _ -> text.startsWith(given.single() as? String ?: refuse("startswith of no text")) }
    "endswith" -> Function { given, _ -> text.endsWith(given.single() as? String ?: refuse("endswith of no text")) }
    "split" -> Function { given, _ -> split(text, given) }
    "replace" -> Function { given, _ ->
        if (given.size != 2) refuse("replace with a count is not known here")
        text.replace(text(given[0]).ifEmpty { refuse("replace of nothing") }, text(given[1]))
    }
    "join" -> Function { given, _ -> elements(given.single()).joinToString(text) { it as? String ?: refuse("join of no texts") } }
    else -> if (Regex("[a-z]+").matches(name)) refuse("'$name' of a text is not known here") else null
}

/** White space as Python has it. */
private fun isBlank(char: Char) = char.isWhitespace() || char in "\u0085\u001c\u001d\u001e\u001f"

private fun strip(text: String, chars: Any?, left: Boolean, right: Boolean): String {
    val taken: (Char) -> Boolean = if (chars is String) { char -> char in chars } else ::isBlank
    val start = if (left) text.dropWhile(taken) else text
    return if (right) start.dropLastWhile(taken) else start
}

private fun split(text: String, given: List<Any?>): List<String> {
    val separator = given.firstOrNull() ?: return text.split(Regex("\\s+")).filter { it.isNotEmpty() }
    if (separator !is String || separator.isEmpty()) refuse("split by no text")
    return if (given.size > 1) text.split(separator, limit = (given[1] as Long).toInt() + 1) else text.split(separator)
}

private fun json(value: Any?, named: Map<String, Any?>): String {
    fun plain(inner: Any?): Any? = when (inner) {
        is Map<*, *> -> (if (truth(named["sort_keys"])) inner.toSortedMap(compareBy { it as String }) else inner).entries.associateTo(LinkedHashMap()) { it.key to plain(it.value) }
        is List<*> -> inner.map(::plain)
        is Undefined, is Function, is Namespace -> refuse("Object of type Undefined is not JSON serializable")
        else -> inner
    }
    if ((named.keys - setOf("indent", "sort_keys", "ensure_ascii")).isNotEmpty()) refuse("tojson(${named.keys.first()}) is not known here")
    return Json.write(plain(value), ascii = truth(named["ensure_ascii"]), indent = (named["indent"] as? Long)?.toInt())
}

private fun filter(name: String, value: Any?, given: List<Any?>, named: Map<String, Any?>): Any? = when (name) {
    "trim" -> strip(text(value), given.firstOrNull(), left = true, right = true)
    "length", "count" -> (if (value is Map<*, *>) value.size else elements(value).size).toLong()
    "upper" -> text(value).uppercase(Locale.ROOT)
    "lower" -> text(value).lowercase(Locale.ROOT)
    "string" -> text(value)
    "list" -> elements(value)
    "first" -> elements(value).let { if (it.isEmpty()) Undefined("the list has no first") else it.first() }
    "last" -> elements(value).let { if (it.isEmpty()) Undefined("the list has no last") else it.last() }
    "join" -> elements(value).joinToString(given.firstOrNull()?.let(::text) ?: "", transform = ::text)
    "default", "d" -> if (value is Undefined || (truth(given.getOrNull(1) ?: named["boolean"]) && !truth(value))) given.getOrElse(0) { "" } else value
    "replace" -> text(value).replace(text(given[0]).ifEmpty { refuse("replace of nothing") }, text(given[1]))
    "items" -> (value as? Map<*, *> ?: refuse("items of no object")).entries.map { listOf(it.key, it.value) }
    "reverse" -> elements(value).reversed().let { if (value is String) it.joinToString("") else it }
    "tojson" -> json(value, if (given.isEmpty()) named else refuse("tojson with arguments by place"))
    "safe" -> text(value)
    else -> refuse("the filter '$name' is not known here")
}

private fun test(name: String, value: Any?, given: List<Any?>): Boolean = when (name) {
    "defined" -> value !is Undefined
    "undefined" -> value is Undefined
    "none" -> value == null
    "string" -> value is String
    "mapping" -> value is Map<*, *>
    "sequence" -> value is List<*> || value is String || value is Map<*, *>
    "iterable" -> value is List<*> || value is String || value is Map<*, *> || value is Undefined
    "number" -> value is Long || value is Double || value is Boolean
    "integer" -> value is Long
    "boolean" -> value is Boolean
    "true" -> value == true
    "false" -> value == false
    "even" -> (value as? Long ?: refuse("even of no number")) % 2 == 0L
    "odd" -> (value as? Long ?: refuse("odd of no number")) % 2 != 0L
    "equalto", "eq" -> same(value, given.single())
    "in" -> compare("in", value, given.single())
    else -> refuse("the test '$name' is not known here")
}

// --- statements ------------------------------------------------------------------------------------------------------

private typealias Statement = (Scope) -> Unit

private class Parser(source: String) {
    private val pieces = pieces(source)
    private var at = 0

    fun whole(): Statement = block().also { if (at < pieces.size) refuse("a tag '${pieces[at].text.trim()}' without a beginning") }

    /** Everything up to a tag of one of `ends`, which is left to be read. */
    private fun block(vararg ends: String): Statement {
        val all = ArrayList<Statement>()
        while (at < pieces.size) {
            val piece = pieces[at]
            if (piece.kind == Kind.TAG && (word(piece) in ends || word(piece) in INNER)) break
            at++
            all += when (piece.kind) {
                Kind.TEXT -> { scope -> scope.run.write(piece.text) }
                Kind.OUTPUT -> ExpressionParser(tokens(piece.text)).whole().let { value -> { scope -> scope.run.write(text(value(scope))) } }
                Kind.TAG -> statement(piece)
            }
        }
        return { scope -> all.forEach { scope.run.step(); it(scope) } }
    }

    private fun word(piece: Piece) = piece.text.trim().takeWhile { it.isLetterOrDigit() || it == '_' }

    /** The tag that ended a block, and what stands behind its word. */
    private fun end(vararg words: String): Pair<String, ExpressionParser> {
        val piece = pieces.getOrNull(at++) ?: refuse("no {% ${words.last()} %}")
        val word = word(piece)
        if (word !in words) refuse("{% ${words.last()} %} is expected, not '$word'")
        return word to ExpressionParser(tokens(piece.text.trim().drop(word.length)))
    }

    private fun statement(piece: Piece): Statement {
        val rest = ExpressionParser(tokens(piece.text.trim().drop(word(piece).length)))
        return when (val word = word(piece)) {
            "if" -> condition(rest.whole())
            "for" -> loop(rest)
            "set" -> assignment(rest)
            "macro" -> macro(rest)
            "generation" -> block("endgeneration").also { end("endgeneration") }
            "break" -> { _ -> throw Break }
            "continue" -> { _ -> throw Continue }
            else -> refuse("{% $word %} is not known here")
        }
    }

    private fun condition(test: Expression): Statement {
        val body = block("elif", "else", "endif")
        val (word, rest) = end("elif", "else", "endif")
        val other: Statement = when (word) {
            "elif" -> condition(rest.whole())
            "else" -> block("endif").also { end("endif") }
            else -> { _ -> }
        }
        return { if (truth(test(it))) body(it) else other(it) }
    }

    private fun loop(head: ExpressionParser): Statement {
        val names = arrayListOf(head.name())
        while (head.accept(",")) names += head.name()
        head.expect("in")
        val source = head.or()
        val wanted = if (head.accept("if")) head.or() else null
        if (!head.isDone) refuse("{% for %} with more than this app knows")
        val body = block("else", "endfor")
        val empty = if (end("else", "endfor").first == "else") block("endfor").also { end("endfor") } else { _ -> }
        return { scope ->
            val bound = elements(source(scope)).map { bind(names, it) }
            val all = if (wanted == null) bound else bound.filter { truth(wanted(Scope(scope.run, scope, HashMap(it)))) }
            if (all.isEmpty()) empty(scope) else turns(scope, names, all, body)
        }
    }

    private fun bind(names: List<String>, value: Any?): Map<String, Any?> {
        if (names.size == 1) return mapOf(names[0] to value)
        val values = elements(value)
        if (values.size != names.size) refuse("${values.size} values for ${names.size} names")
        return names.zip(values).toMap()
    }

    private fun turns(scope: Scope, names: List<String>, all: List<Map<String, Any?>>, body: Statement) {
        fun value(at: Int, what: String): Any? = all.getOrNull(at)?.getValue(names[0]) ?: Undefined("there is no $what item")
        try {
            all.forEachIndexed { i, values ->
                val loop = mapOf(
                    "index" to i + 1L, "index0" to i.toLong(), "first" to (i == 0), "last" to (i == all.size - 1),
                    "length" to all.size.toLong(), "revindex" to (all.size - i).toLong(), "revindex0" to (all.size - i - 1).toLong(),
                    "previtem" to value(i - 1, "previous"), "nextitem" to value(i + 1, "next"),
                )
                try {
                    body(Scope(scope.run, scope, HashMap(values + ("loop" to loop))))
                } catch (_: Continue) {
                }
            }
        } catch (_: Break) {
        }
    }

    private fun assignment(head: ExpressionParser): Statement {
        val name = head.name()
        val key = if (head.accept(".")) head.name() else null
        val value: Expression = if (head.accept("=")) {
            head.whole()
        } else {
            if (!head.isDone) refuse("{% set %} of several names is not known here")
            val body = block("endset").also { end("endset") };
            { scope -> captured(scope, body) }
        }
        return { scope ->
            if (key == null) {
                scope.values[name] = value(scope)
            } else {
                val space = scope.get(name) as? Namespace ?: refuse("'$name' is no namespace")
                space.values[key] = value(scope)
            }
        }
    }

    private fun captured(scope: Scope, body: Statement): String {
        val outside = scope.run.out
        scope.run.out = StringBuilder()
        try {
            body(scope)
            return scope.run.out.toString()
        } finally {
            scope.run.out = outside
        }
    }

    private fun macro(head: ExpressionParser): Statement {
        val name = head.name()
        val names = ArrayList<Pair<String, Expression?>>()
        head.expect("(")
        while (!head.accept(")")) {
            names += head.name() to if (head.accept("=")) head.ternary() else null
            if (!head.peek(")")) head.expect(",")
        }
        val body = block("endmacro").also { end("endmacro") }
        return { scope ->
            scope.values[name] = Function { placed, named ->
                if (placed.size > names.size) refuse("too many arguments for '$name'")
                val values = HashMap<String, Any?>()
                names.forEachIndexed { i, (key, otherwise) ->
                    values[key] = if (i < placed.size) placed[i] else if (key in named) named[key] else otherwise?.invoke(scope) ?: Undefined("'$key' was not given")
                }
                captured(Scope(scope.run, scope, values), body)
            }
        }
    }

    private companion object {
        val INNER = setOf("elif", "else", "endif", "endfor", "endset", "endmacro", "endgeneration")
    }
}

/** The part of Jinja that chat templates are written in. */
class Jinja(source: String, private val now: (String) -> String) {
    private val body = Parser(source).whole()

    fun render(variables: Map<String, Any?>): String {
        val run = Run()
        val globals = HashMap<String, Any?>(
            mapOf(
                "raise_exception" to Function { given, _ -> refuse(text(given.firstOrNull())) },
                "strftime_now" to Function { given, _ -> now(given.single() as? String ?: refuse("strftime_now of no text")) },
                "namespace" to Function { _, named -> Namespace(HashMap(named)) },
                "dict" to Function { _, named -> named },
                "range" to Function { given, _ -> range(given) },
            ),
        )
        try {
            body(Scope(run, Scope(run, null, globals), HashMap(variables)))
        } catch (error: StackOverflowError) {
            refuse("the template is too deep")
        } catch (error: Break) {
            refuse("{% break %} outside a loop")
        } catch (error: Continue) {
            refuse("{% continue %} outside a loop")
        }
        return run.out.toString()
    }

    private fun range(given: List<Any?>): List<Long> {
        val numbers = given.map { it as? Long ?: refuse("range of no number") }
        val (from, to) = if (numbers.size == 1) 0L to numbers[0] else numbers[0] to numbers.getOrElse(1) { refuse("range of nothing") }
        if (to - from > 100_000 || numbers.size > 2) refuse("range(${numbers.joinToString()}) is not known here")
        return (from until to).toList()
    }
}
