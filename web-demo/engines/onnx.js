/** The ONNX decoder in onnxruntime-web. Its cache goes out and in again with every call. */

import * as ort from "onnxruntime-web";
import { Refusal } from "../core/refusal.js";

const PAST = "past_key_values.";

export async function open(manifest, files, threads) {
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = new URL("../vendor/", import.meta.url).href;
  const bytes = async (name) => new Uint8Array(await files.get(name).arrayBuffer());
  const data = Object.keys(manifest.files).filter((name) => name.startsWith(manifest.main_file) && name !== manifest.main_file);
  const externalData = await Promise.all(data.map(async (path) => ({ path, data: await bytes(path) })));
  try {
    const options = { executionProviders: ["wasm"], externalData, logSeverityLevel: 3 };
    return new OnnxEngine(await ort.InferenceSession.create(await bytes(manifest.main_file), options), threads);
  } catch (error) {
    throw new Refusal("not_loaded", `onnxruntime does not load ${manifest.main_file}: ${error.message}.`, "Export the artifact again.");
  }
}

class OnnxEngine {
  #session;
  #past;
  #cache;
  #logits;

  constructor(session, threads) {
    this.#session = session;
    this.#past = session.inputMetadata.filter((node) => node.name.startsWith(PAST));
    this.threads = threads;
  }

  reset() {
    this.#cache = this.#past.map(({ type, shape }) => new ort.Tensor(type, [], [1, shape[1], 0, shape[3]]));
  }

  /** Write ids behind `used` cached ones. */
  async feed(ids, used) {
    const total = used + ids.length;
    const present = this.#past.map(({ name }) => `present.${name.slice(PAST.length)}`);
    const outputs = await this.#session.run(
      {
        ...Object.fromEntries(this.#past.map(({ name }, i) => [name, this.#cache[i]])),
        input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
        attention_mask: new ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
      },
      ["logits", ...present],
    );
    this.#cache = present.map((name) => outputs[name]);
    this.#logits = outputs.logits.data;
  }

  best() {
    let best = 0;
    for (let i = 1; i < this.#logits.length; i++) if (this.#logits[i] > this.#logits[best]) best = i;
    return best;
  }

  close() {
    return this.#session.release();
  }
}
