package io.edgekd.demo

import java.text.Normalizer

/** White space as Unicode has it. */
private const val WHITE =
    "[\\t\\n\\u000b\\u000c\\r \\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]*"
private val REASONING = listOf("reasoning_content", "thinking", "reasoning")

/** A part of a rendered chat: a special token, or text, in which nothing is one. */
sealed class Part {
    data class Special(val id: Int) : Part()
    data class Text(val text: String, val start: Boolean) : Part()
}

typealias Message = Map<String, Any?>

/** A message less its empty keys, its reasoning under both names that templates read it by. */
private fun asTemplateReads(message: Message): Message {
    val plain = message.filterValues { it != null }
    val key = REASONING.firstOrNull { it in plain } ?: return plain
    return mapOf("thinking" to plain[key]) + plain + mapOf("reasoning_content" to plain[key])
}

/** The text of a chat; by default up to where the assistant speaks. */
fun renderChat(
    template: String,
    specialTokens: Map<String, String>,
    messages: List<Message>,
    tools: List<Any?>? = null,
    addGenerationPrompt: Boolean = true,
    now: (String) -> String = ::timeNow,
): String {
    val variables = specialTokens + mapOf(
        "messages" to messages.map(::asTemplateReads),
        "tools" to tools,
        "documents" to null,
        "add_generation_prompt" to addGenerationPrompt,
    )
    try {
        return Jinja(template, now).render(variables)
    } catch (error: TemplateError) {
        val words = "The chat template refuses the chat: ${error.message}."
        throw Refusal("template_refused", words, "Change the chat, or the template.")
    }
}

/** A rendered chat in its parts: special tokens, the longest where several begin, and the text between them. */
fun promptParts(text: String, ids: Map<String, Int>, strips: Map<String, String>): List<Part> {
    if (ids.isEmpty()) return if (text.isEmpty()) emptyList() else listOf(Part.Text(text, true))
    val special = ids.keys.sortedByDescending { it.length }
    val pattern = special.joinToString("|") {
        val side = strips[it]
        val before = if (side == "left" || side == "both") WHITE else ""
        val behind = if (side == "right" || side == "both") WHITE else ""
        "$before(${Regex.escape(it)})$behind"
    }
    val parts = ArrayList<Part>()
    var end = 0
    for (found in Regex(pattern).findAll(text)) {
        if (found.range.first > end) parts += Part.Text(text.substring(end, found.range.first), end == 0)
        parts += Part.Special(ids.getValue(found.groupValues.drop(1).first { it.isNotEmpty() }))
        end = found.range.last + 1
    }
    if (end < text.length) parts += Part.Text(text.substring(end), end == 0)
    return parts
}

/** A text with what the contract leaves to the caller of llama.cpp's tokenizer. */
fun asLlamaCppReads(text: String, contract: Contract, start: Boolean): String {
    val normal = if (contract.normalizer == "NFC") Normalizer.normalize(text, Normalizer.Form.NFC) else text
    val prefixed = contract.spacePrefix == "every" || (contract.spacePrefix == "first" && start)
    return if (prefixed && normal.isNotEmpty() && normal[0] !in " \u2581") " $normal" else normal
}

/** Text to ids, in which nothing is a special token and to which nothing is added. */
fun interface TextToIds {
    fun tokenize(text: String, start: Boolean): List<Int>
}

/** Ids of a rendered chat. Nothing is added: the template writes its own BOS, and an EOS would end it. */
fun chatIds(tokenizer: TextToIds, contract: Contract, text: String): List<Int> {
    val ids = contract.specialIds
        ?: throw Refusal("bad_value", "The manifest does not name the special tokens.", "Export the artifact again.")
    return promptParts(text, ids, contract.specialStrips).flatMap {
        when (it) {
            is Part.Special -> listOf(it.id)
            is Part.Text -> tokenizer.tokenize(it.text, it.start)
        }
    }
}

/** A chat less what stands between its system messages and its second question; null where there is none. */
fun withoutOldest(messages: List<Message>): List<Message>? {
    val roles = messages.map { it["role"] }
    val first = roles.indexOfFirst { it != "system" && it != "developer" }
    if (first < 0) return null
    val second = (first + 1 until roles.size).firstOrNull { roles[it] == "user" } ?: return null
    return messages.take(first) + messages.drop(second)
}

/** Ids of a chat, less its oldest exchanges where they leave no room for `most` tokens, or half the context. */
fun fittedChat(
    tokenizer: TextToIds, contract: Contract, messages: List<Message>, most: Int,
): Pair<List<Int>, List<Message>> {
    var kept = messages
    while (true) {
        val text = renderChat(contract.chatTemplate.orEmpty(), contract.specialTokens, kept)
        val ids = chatIds(tokenizer, contract, text)
        val shorter = withoutOldest(kept)
        val room = contract.contextLength - ids.size
        if (shorter == null || room >= minOf(most, contract.contextLength / 2)) return checkRoom(ids, contract) to kept
        kept = shorter
    }
}

/** The ids of a prompt, where the context holds them and an answer. */
private fun checkRoom(ids: List<Int>, contract: Contract): List<Int> {
    if (ids.isEmpty()) throw Refusal("empty", "The prompt has no tokens.", "Write something.")
    if (ids.size < contract.contextLength) return ids
    val words = "The prompt has ${ids.size} tokens, the context holds ${contract.contextLength} with an answer."
    throw Refusal("too_long", words, "Ask in fewer words.")
}

/** What stands before a text that is gone on with: BOS as the contract says. */
fun idsBefore(contract: Contract): List<Int> = listOfNotNull(contract.bosId.takeIf { contract.addBos })

/** Ids of a text to be gone on with, in which nothing is a special token. */
fun textIds(tokenizer: TextToIds, contract: Contract, text: String): List<Int> =
    checkRoom(idsBefore(contract) + tokenizer.tokenize(text, true), contract)
