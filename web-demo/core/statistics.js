/** The statistics of edgekd's harness, by its definitions. */

import { Refusal } from "./refusal.js";

/** The `q`-th percentile (0 to 100), linear between samples. */
export function percentile(samples, q) {
  if (!samples.length) throw new RangeError("no samples");
  const sorted = [...samples].sort((a, b) => a - b);
  const at = ((sorted.length - 1) * q) / 100;
  const low = Math.floor(at), high = Math.ceil(at);
  return sorted[low] + (sorted[high] - sorted[low]) * (at - low);
}

/** The mean of the middle two of an even number. */
export const median = (samples) => percentile(samples, 50);

export function tokensPerSecond(tokens, seconds) {
  if (!(seconds > 0)) throw new Refusal("clock", `${tokens} tokens in ${seconds} s: the clock is too coarse.`, "Time more tokens.");
  return tokens / seconds;
}
