package io.edgekd.demo

/**
 * Text of a stream of tokens, which holds back bytes until their UTF-8 character is whole. What is no UTF-8 becomes
 * U+FFFD, once for each maximal part of a character: the decoder of the WHATWG's Encoding Standard.
 */
class Utf8Stream {
    private var character = 0
    private var missing = 0
    private var allowed = CONTINUATION

    fun push(bytes: ByteArray): String {
        val text = StringBuilder()
        for (byte in bytes) take(byte.toInt() and 0xff, text)
        return text.toString()
    }

    fun end(): String = if (missing == 0) "" else BROKEN.also { missing = 0 }

    private fun take(byte: Int, text: StringBuilder) {
        if (missing == 0) {
            begin(byte, text)
        } else if (byte in allowed) {
            allowed = CONTINUATION
            character = character shl 6 or (byte and 0x3f)
            if (--missing == 0) text.appendCodePoint(character)
        } else {
            missing = 0
            text.append(BROKEN)
            begin(byte, text)
        }
    }

    private fun begin(byte: Int, text: StringBuilder) {
        missing = when (byte) {
            in 0xc2..0xdf -> 1
            in 0xe0..0xef -> 2
            in 0xf0..0xf4 -> 3
            else -> 0
        }
        // Overlong forms, half characters of UTF-16 and what is beyond the last character end at the second byte.
        allowed = when (byte) {
            0xe0 -> 0xa0..0xbf
            0xed -> 0x80..0x9f
            0xf0 -> 0x90..0xbf
            0xf4 -> 0x80..0x8f
            else -> CONTINUATION
        }
        character = byte and (0x3f shr missing)
        if (missing == 0) if (byte < 0x80) text.append(byte.toChar()) else text.append(BROKEN)
    }

    private companion object {
        val CONTINUATION = 0x80..0xbf
        const val BROKEN = "\ufffd"
    }
}
