/** Whether the model fits, before it is loaded. */

import { cacheBytes } from "./manifest.js";

/** Room for the runtime itself, its work buffers and the page. */
const RUNTIME_BYTES = 96 * 2 ** 20;

/** Bytes that the artifact takes when it is loaded with a full cache. */
export function requiredBytes(manifest, modelBytes) {
  return modelBytes + (cacheBytes(manifest) ?? 0) + RUNTIME_BYTES;
}

/** A sentence with the numbers where memory is short, else null. */
export function memoryShortage(manifest, modelBytes, availableBytes) {
  const required = requiredBytes(manifest, modelBytes);
  if (availableBytes == null || required <= availableBytes) return null;
  const mib = (bytes) => `${Math.ceil(bytes / 2 ** 20)} MiB`;
  return `The model needs ${mib(required)} of memory (${mib(modelBytes)} of weights, the cache of ` +
    `${manifest.contract.context_length} tokens and the runtime); there are ${mib(availableBytes)}.`;
}
