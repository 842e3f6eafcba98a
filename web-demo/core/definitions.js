/** The terms of a benchmark, as edgekd's benchmarks/definitions.py has them: expressions over one request's readings. */

import { Refusal } from "./refusal.js";
import { Utf8Stream } from "./utf8.js";

/** Tokens that are waited for when a first character is looked for: more have no text at all. */
const MOST_SILENT_TOKENS = 16;

const ENGLISH = `A small model that runs on the device in your hand answers without a network, and what you ask it stays
with you. It reads the words of a question piece by piece, keeps what it has read in a cache, and then writes one piece
after another, each chosen from thousands by its likelihood. How soon the first one comes depends on the length of the
question; how fast the others follow depends on how quickly the weights can be read from memory, since every one of them
is read for every piece. A phone that grows warm slows down, so a short measurement is kinder than a long one. What is
told here was measured on this device, with the very file that was verified elsewhere, and nothing of it was guessed. `;

/** What the clock said while one request was served, in seconds. */
export class Request {
  constructor(readings) {
    Object.assign(this, readings);
  }

  get tokenize_s() { return this.ids_ready - this.text_in; }
  get prefill_s() { return this.prefilled - this.ids_ready; }
  /** From the ids to the first token chosen. */
  get first_token_s() { return this.chosen[0] - this.ids_ready; }
  /** From the text to the first whole character; null where no token had text. */
  get ttft_s() { return this.chunks.length ? this.chunks[0] - this.text_in : null; }
  /** (latency − TTFT) ÷ (tokens − 1). */
  get itl_s() {
    if (this.ttft_s === null || this.chosen.length < 2) return null;
    return (this.chosen.at(-1) - this.text_in - this.ttft_s) / (this.chosen.length - 1);
  }
  /** Gaps between pieces of text. */
  get icl_s() { return this.chunks.slice(1).map((time, i) => time - this.chunks[i]); }
  /** From the first token chosen to the last. */
  get decode_s() { return this.chosen.at(-1) - this.chosen[0]; }
  get decode_tokens() { return this.chosen.length - 1; }
  get sampling_s() { return this.decoded.map((time, i) => this.chosen[i + 1] - time); }
}

/** Serve one greedy request with a stopwatch; the end of a text does not end it. */
export async function serve(decoder, tokenizer, text, decodeTokens, { untilText = false, clock = () => performance.now() / 1000 } = {}) {
  const stream = new Utf8Stream();
  const decoded = [], chosen = [], chunks = [];
  const choose = async () => {
    const token = await decoder.best();
    chosen.push(clock());
    if (stream.push(tokenizer.bytes(token))) chunks.push(clock());
    return token;
  };
  await decoder.reset();
  const text_in = clock();
  const ids = tokenizer.encode(text);
  const ids_ready = clock();
  await decoder.feed(ids);
  const prefilled = clock();
  let token = await choose();
  while (chosen.length <= decodeTokens && !(untilText && chunks.length)) {
    await decoder.feed([token]);
    decoded.push(clock());
    token = await choose();
  }
  return new Request({ text_in, ids_ready, prefilled, decoded, chosen, chunks });
}

/** Serve a request up to its first whole character; `room` is what the context has left behind the prompt. */
export const firstText = (decoder, tokenizer, text, room) =>
  serve(decoder, tokenizer, text, Math.min(MOST_SILENT_TOKENS, room), { untilText: true });

/** English text that the tokenizer reads as exactly so many tokens. */
export function realText(tokenizer, tokens) {
  const count = (text) => tokenizer.encode(text).length;
  for (let start = 0; start < ENGLISH.length; start += 64) {
    const text = ENGLISH.slice(start) + ENGLISH.repeat(1 + Math.ceil((20 * tokens) / ENGLISH.length));
    let low = 0, high = text.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (count(text.slice(0, middle)) < tokens) low = middle + 1;
      else high = middle;
    }
    for (let end = Math.max(1, low - 4); end <= low + 8; end++) if (count(text.slice(0, end)) === tokens) return text.slice(0, end);
  }
  throw new Refusal("bad_value", `The tokenizer makes ${tokens} tokens of no text.`, "Export the artifact again.");
}
