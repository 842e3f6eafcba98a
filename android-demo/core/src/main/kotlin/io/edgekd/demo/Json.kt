package io.edgekd.demo

/** JSON as RFC 8259 has it, and nothing more: Android's own reader takes text that is none. Whole numbers are Long. */
object Json {
    fun parse(text: String): Any? = JsonReader(text).whole()

    /** One line, keys in their order; `ascii` writes what is not ASCII as Python's json does. */
    fun write(value: Any?, ascii: Boolean = false, indent: Int? = null): String =
        StringBuilder().also { JsonWriter(it, ascii, indent).value(value, 0) }.toString()
}

class NotJson(words: String) : Exception(words)

private class JsonReader(private val text: String) {
    private var at = 0

    fun whole(): Any? = value(0).also {
        space()
        if (at < text.length) fail("something behind the end")
    }

    private fun fail(what: String): Nothing = throw NotJson("$what at character $at")

    private fun space() {
        while (at < text.length && text[at] in " \t\r\n") at++
    }

    private fun take(char: Char) {
        space()
        if (at >= text.length || text[at] != char) fail("no '$char'")
        at++
    }

    private fun next(): Char {
        space()
        return if (at < text.length) text[at] else fail("the end")
    }

    private fun value(depth: Int): Any? {
        if (depth > 512) fail("too deep")
        return when (next()) {
            '{' -> members(depth)
            '[' -> elements(depth)
            '"' -> string()
            't' -> word("true", true)
            'f' -> word("false", false)
            'n' -> word("null", null)
            else -> number()
        }
    }

    private fun word(word: String, value: Any?): Any? {
        if (!text.startsWith(word, at)) fail("no value")
        at += word.length
        return value
    }

    private fun members(depth: Int): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        take('{')
        if (next() == '}') return found.also { at++ }
        while (true) {
            if (next() != '"') fail("no key")
            val key = string()
            take(':')
            found[key] = value(depth + 1)
            if (next() == '}') return found.also { at++ }
            take(',')
        }
    }

    private fun elements(depth: Int): List<Any?> {
        val found = ArrayList<Any?>()
        take('[')
        if (next() == ']') return found.also { at++ }
        while (true) {
            found += value(depth + 1)
            if (next() == ']') return found.also { at++ }
            take(',')
        }
    }

    private fun string(): String {
        val found = StringBuilder()
        at++
        while (true) {
            val char = if (at < text.length) text[at++] else fail("a string without an end")
            when {
                char == '"' -> return found.toString()
                char < ' ' -> fail("a control character")
                char != '\\' -> found.append(char)
                else -> found.append(escaped())
            }
        }
    }

    private fun escaped(): Char {
        val char = if (at < text.length) text[at++] else fail("a string without an end")
        if (char == 'u') {
            val hex = text.substring(at, minOf(at + 4, text.length))
            if (!Regex("[0-9a-fA-F]{4}").matches(hex)) fail("no character")
            at += 4
            return hex.toInt(16).toChar()
        }
        val place = "\"\\/bfnrt".indexOf(char)
        return if (place < 0) fail("an unknown escape") else "\"\\/\b\u000c\n\r\t"[place]
    }

    private fun number(): Any {
        val found = NUMBER.find(text.substring(at, minOf(at + 400, text.length)))?.value ?: fail("no value")
        at += found.length
        return found.toLongOrNull() ?: found.toDouble()
    }

    private companion object {
        val NUMBER = Regex("^-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")
    }
}

private class JsonWriter(private val out: StringBuilder, private val ascii: Boolean, private val indent: Int?) {
    fun value(value: Any?, depth: Int) {
        when (value) {
            is Map<*, *> -> items('{', '}', value.entries, depth) { (key, inner) ->
                string(key as String)
                out.append(": ")
                value(inner, depth + 1)
            }
            is List<*> -> items('[', ']', value, depth) { value(it, depth + 1) }
            is String -> string(value)
            null, is Boolean, is Int, is Long -> out.append(value)
            is Double -> out.append(if (value.isNaN() || value.isInfinite()) throw NotJson("$value") else value)
            else -> throw NotJson("a ${value::class.java.simpleName}")
        }
    }

    private fun <T> items(open: Char, close: Char, all: Collection<T>, depth: Int, each: (T) -> Unit) {
        out.append(open)
        all.forEachIndexed { i, item ->
            if (i > 0) out.append(if (indent == null) ", " else ",")
            line(depth + 1)
            each(item)
        }
        if (all.isNotEmpty()) line(depth)
        out.append(close)
    }

    private fun line(depth: Int) {
        if (indent != null) out.append('\n').append(" ".repeat(indent * depth))
    }

    private fun string(text: String) {
        out.append('"')
        for (char in text) {
            val place = "\"\\\b\u000c\n\r\t".indexOf(char)
            when {
                place >= 0 -> out.append('\\').append("\"\\bfnrt"[place])
                char < ' ' || (ascii && char > '~') -> out.append("\\u").append(char.code.toString(16).padStart(4, '0'))
                else -> out.append(char)
            }
        }
        out.append('"')
    }
}
