/** The GGUF file in llama.cpp, compiled to WebAssembly: wllama 2, since version 3 takes text and not ids. */

import { Wllama } from "@wllama/wllama";
import { BATCH_TOKENS } from "../core/decoder.js";
import { Refusal } from "../core/refusal.js";

const QUIET = { debug() {}, log() {}, warn() {}, error() {} };

export async function open(manifest, files, threads) {
  const at = (name) => new URL(`../vendor/${name}`, import.meta.url).href;
  const paths = { "single-thread/wllama.wasm": at("wllama-single.wasm"), "multi-thread/wllama.wasm": at("wllama-multi.wasm") };
  const wllama = new Wllama(paths, { suppressNativeLog: true, logger: QUIET });
  try {
    const settings = { n_ctx: manifest.contract.context_length, n_batch: BATCH_TOKENS, n_threads: threads };
    await wllama.loadModel([files.get(manifest.main_file)], settings);
    await wllama.samplingInit({ temp: 0 });
  } catch (error) {
    throw new Refusal("not_loaded", `llama.cpp does not load ${manifest.main_file}: ${error.message}.`, "Export the artifact again.");
  }
  return new GgufEngine(wllama);
}

class GgufEngine {
  #wllama;

  constructor(wllama) {
    this.#wllama = wllama;
    this.threads = wllama.isMultithread() ? wllama.getNumThreads() : 1;
  }

  reset() {
    return this.#wllama.kvClear();
  }

  async feed(ids) {
    await this.#wllama.decode(ids, {});
  }

  async best() {
    return (await this.#wllama.samplingSample()).token;
  }

  close() {
    return this.#wllama.exit();
  }
}
