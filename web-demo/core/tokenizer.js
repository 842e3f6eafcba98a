/** `tokenizer.json`: text to ids, in which nothing is a special token, and ids to bytes. */

import { Tokenizer } from "@huggingface/tokenizers";
import { Refusal } from "./refusal.js";

/** GPT-2's printable character by byte. */
function byteAlphabet() {
  const printable = (byte) => (byte >= 0x21 && byte < 0x7f) || (byte >= 0xa1 && byte < 0xad) || byte >= 0xae;
  const bytes = new Map();
  let others = 256;
  for (let byte = 0; byte < 256; byte++) bytes.set(String.fromCodePoint(printable(byte) ? byte : others++), byte);
  return bytes;
}

const BYTES = byteAlphabet();
const UTF8 = new TextEncoder();

export class TokenizerFile {
  #first;
  #later;
  #byteLevel;
  #texts = new Map();
  #added = new Map();

  constructor(text) {
    const data = JSON.parse(text);
    this.#byteLevel = JSON.stringify([data.decoder, data.pre_tokenizer]).includes('"ByteLevel"');
    for (const token of data.added_tokens ?? []) this.#added.set(token.id, token.special ? "" : token.content);
    // A special token in a text is text: the library would look for them.
    const plain = { ...data, added_tokens: (data.added_tokens ?? []).filter((token) => !token.special), post_processor: null };
    try {
      this.#first = new Tokenizer(plain, {});
      const step = data.pre_tokenizer;
      const prefixed = step?.type === "Metaspace" && step.prepend_scheme === "first";
      this.#later = prefixed
        ? new Tokenizer({ ...plain, pre_tokenizer: { ...step, prepend_scheme: "never" } }, {})
        : this.#first;
    } catch (error) {
      throw new Refusal("bad_value", `tokenizer.json is nothing that this page reads: ${error.message}.`, "Use another tokenizer.");
    }
    for (const [token, id] of this.#first.get_vocab()) this.#texts.set(id, token);
  }

  /** Ids of a text; `start`: it begins a sequence, where some tokenizers put a space. */
  encode(text, { start = true } = {}) {
    return text ? (start ? this.#first : this.#later).encode(text, { add_special_tokens: false }).ids : [];
  }

  /** The bytes a token stands for; none for a special one and for an id without a token. */
  bytes(id) {
    if (this.#added.has(id)) return UTF8.encode(this.#added.get(id));
    const text = this.#texts.get(id) ?? "";
    const chars = [...text];
    if (this.#byteLevel && chars.every((char) => BYTES.has(char))) return Uint8Array.from(chars, (c) => BYTES.get(c));
    const byte = !this.#byteLevel && /^<0x([0-9A-Fa-f]{2})>$/.exec(text);
    if (byte) return Uint8Array.of(parseInt(byte[1], 16));
    return UTF8.encode(this.#byteLevel ? text : text.replaceAll("▁", " "));
  }
}
