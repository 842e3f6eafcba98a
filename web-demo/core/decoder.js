/** What chat, self-test and benchmark do with a runtime: an engine resets, feeds ids, and tells the most likely next. */

import { Refusal } from "./refusal.js";
import { Utf8Stream } from "./utf8.js";

export const BATCH_TOKENS = 512;

export class Decoder {
  #engine;
  #contract;
  #tokenizer;
  #used = 0;

  /** `engine` has `reset()`, `feed(ids)` for at most BATCH_TOKENS, `best()`, `close()` and `threads`. */
  constructor(engine, contract, tokenizer) {
    this.#engine = engine;
    this.#contract = contract;
    this.#tokenizer = tokenizer;
    this.threads = engine.threads;
  }

  /** Write ids behind the cached ones. */
  async feed(ids) {
    const context = this.#contract.context_length;
    if (this.#used + ids.length > context) {
      throw new Refusal("too_long", `${this.#used} + ${ids.length} tokens exceed the context of ${context}.`, "Begin a new chat.");
    }
    for (let at = 0; at < ids.length; at += BATCH_TOKENS) await this.#engine.feed(ids.slice(at, at + BATCH_TOKENS), this.#used + at);
    this.#used += ids.length;
  }

  /** The most likely next id. */
  async best() {
    return this.#engine.best();
  }

  async reset() {
    this.#used = 0;
    await this.#engine.reset();
  }

  /** New greedy tokens, one at a time, until an end-of-sequence token, `count`, a full cache, or the signal. */
  async *generate(ids, count, signal) {
    await this.reset();
    await this.feed(ids);
    for (let n = 1; n <= count && !signal?.aborted; n++) {
      const token = await this.best();
      if (this.#contract.eos_ids.includes(token)) return;
      yield token;
      if (n === count || this.#used === this.#contract.context_length) return;
      await this.feed([token]);
    }
  }

  /** Up to `count` greedy tokens behind `ids`. */
  async greedy(ids, count) {
    const tokens = [];
    for await (const token of this.generate(ids, count)) tokens.push(token);
    return tokens;
  }

  /** Text behind `ids`, piece by piece; the number of tokens. */
  async stream(ids, count, onPiece, signal) {
    const text = new Utf8Stream();
    let tokens = 0;
    for await (const token of this.generate(ids, count, signal)) {
      tokens++;
      onPiece(text.push(this.#tokenizer.bytes(token)));
      await new Promise((resolve) => setTimeout(resolve)); // the page draws, and the stop button is heard
    }
    onPiece(text.end());
    return tokens;
  }

  close() {
    return this.#engine.close();
  }
}
