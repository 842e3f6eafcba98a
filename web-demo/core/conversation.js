/** A chat as the model reads it: the contract's template, special tokens by their ids, and text as text. */

import { Template } from "@huggingface/jinja";
import { Refusal } from "./refusal.js";

/** White space as Unicode has it. */
const WHITE = "[\\t\\n\\x0b\\f\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]*";

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

/** A message less its empty keys, its reasoning under both names that templates read it by. */
function asTemplateReads(message) {
  const plain = Object.fromEntries(Object.entries(message).filter(([, value]) => value !== null));
  const reasoning = plain.reasoning_content ?? plain.thinking ?? plain.reasoning;
  return reasoning === undefined ? plain : { thinking: reasoning, ...plain, reasoning_content: reasoning };
}

/** The text of a chat; by default up to where the assistant speaks. */
export function renderChat(contract, messages, more = {}) {
  const variables = {
    ...contract.special_tokens,
    messages: messages.map(asTemplateReads),
    tools: null,
    documents: null,
    add_generation_prompt: true,
    ...more,
  };
  try {
    return new Template(contract.chat_template).render(variables);
  } catch (error) {
    const words = `The chat template refuses the chat: ${error.message}.`;
    throw new Refusal("template_refused", words, "Change the chat, or the template.");
  }
}

/** A rendered chat in its parts: `{id}` of a special token, the longest where several begin, or `{text, start}`. */
export function promptParts(text, ids, strips = {}) {
  const special = Object.keys(ids).sort((a, b) => b.length - a.length || (a < b ? 1 : -1));
  if (!special.length) return text ? [{ text, start: true }] : [];
  const takes = (token, side) => ([side, "both"].includes(strips[token]) ? WHITE : "");
  const choices = special.map((token) => `${takes(token, "left")}(${escaped(token)})${takes(token, "right")}`);
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(new RegExp(choices.join("|"), "gu"))) {
    if (found.index > end) parts.push({ text: text.slice(end, found.index), start: end === 0 });
    parts.push({ id: ids[found.slice(1).find((token) => token !== undefined)] });
    end = found.index + found[0].length;
  }
  if (end < text.length) parts.push({ text: text.slice(end), start: end === 0 });
  return parts;
}

/** Ids of a rendered chat. Nothing is added: the template writes its own BOS, and an EOS would end it. */
export function chatIds(tokenizer, contract, text) {
  if (contract.special_ids == null) {
    throw new Refusal("bad_value", "The manifest does not name the special tokens.", "Export the artifact again.");
  }
  return promptParts(text, contract.special_ids, contract.special_strips).flatMap((part) =>
    part.id === undefined ? tokenizer.encode(part.text, { start: part.start }) : [part.id],
  );
}

/** A chat less what stands between its system messages and its second question; null where there is none. */
export function withoutOldest(messages) {
  const roles = messages.map((message) => message.role);
  const first = roles.findIndex((role) => !["system", "developer"].includes(role));
  const second = roles.findIndex((role, at) => at > first && role === "user");
  return first < 0 || second < 0 ? null : [...messages.slice(0, first), ...messages.slice(second)];
}

/** Ids of a chat, less its oldest exchanges where they leave no room for `most` tokens, or half the context. */
export function fittedChat(tokenizer, contract, messages, most) {
  for (let kept = messages; ; ) {
    const ids = chatIds(tokenizer, contract, renderChat(contract, kept));
    const room = contract.context_length - ids.length;
    const shorter = withoutOldest(kept);
    if (!shorter || room >= Math.min(most, Math.floor(contract.context_length / 2))) return { ids: checkRoom(ids, contract), kept };
    kept = shorter;
  }
}

/** The ids of a prompt, where the context holds them and an answer. */
function checkRoom(ids, contract) {
  if (!ids.length) throw new Refusal("empty", "The prompt has no tokens.", "Write something.");
  if (ids.length < contract.context_length) return ids;
  const words = `The prompt has ${ids.length} tokens, the context holds ${contract.context_length} with an answer.`;
  throw new Refusal("too_long", words, "Ask in fewer words.");
}

/** Ids of a text to be gone on with, in which nothing is a special token: BOS as the contract says, and no EOS. */
export function textIds(tokenizer, contract, text) {
  const before = contract.add_bos && contract.bos_id != null ? [contract.bos_id] : [];
  return checkRoom([...before, ...tokenizer.encode(text, { start: true })], contract);
}
