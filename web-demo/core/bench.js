/** Time an artifact as edgekd's harness does, and write what was measured as its record (`edgekd.proof.BenchRecord`). */

import { firstText, realText, serve } from "./definitions.js";
import { cacheBytes, filesDigest } from "./manifest.js";
import { median, percentile, tokensPerSecond } from "./statistics.js";

export const SETTINGS = { prompt_tokens: [32, 256], decode_tokens: 64, runs: 3 };
const WARM_UP_TOKENS = 8;
const CLOCK = "measured:performance.now";

const known = (unit, value, source, samples = []) => ({ value, unit, source, samples });
const unknown = (unit, reason) => ({ value: null, unit, reason });

/** Prompt lengths and tokens that fit the context. */
export function fitted(settings, contextLength) {
  const decode = Math.min(settings.decode_tokens, Math.floor(contextLength / 2));
  const lengths = settings.prompt_tokens.filter((length) => length + decode <= contextLength).sort((a, b) => a - b);
  return { ...settings, decode_tokens: decode, prompt_tokens: lengths.length ? lengths : [contextLength - decode] };
}

/** One repetition on a freshly opened decoder. */
async function repetition(open, tokenizer, context, settings) {
  const start = performance.now();
  const decoder = await open();
  const load_s = (performance.now() - start) / 1000;
  try {
    const texts = settings.prompt_tokens.map((length) => realText(tokenizer, length));
    const first = await firstText(decoder, tokenizer, texts[0], context - settings.prompt_tokens[0]);
    await serve(decoder, tokenizer, texts.at(-1), Math.min(WARM_UP_TOKENS, settings.decode_tokens));
    const warm = {};
    for (const [i, length] of settings.prompt_tokens.entries()) {
      warm[length] = await firstText(decoder, tokenizer, texts[i], context - length);
    }
    const decode = await serve(decoder, tokenizer, texts.at(-1), settings.decode_tokens);
    return { load_s, first, warm, decode, threads: decoder.threads };
  } finally {
    await decoder.close();
  }
}

/** Measure `settings.runs` times; `onRun` is told after each how many are done. */
export async function measure(open, tokenizer, manifest, settings, onRun = () => {}) {
  const fit = fitted(settings, manifest.contract.context_length);
  const runs = [];
  for (let run = 1; run <= fit.runs; run++) {
    runs.push(await repetition(open, tokenizer, manifest.contract.context_length, fit));
    onRun(run, fit.runs);
  }
  return benchmarkOf(runs, manifest, fit);
}

/** Medians over the runs, each with its samples. */
export function benchmarkOf(runs, manifest, settings) {
  const longest = settings.prompt_tokens.at(-1);
  const ofRuns = (unit, values) => {
    const samples = values.filter((value) => value !== null);
    return samples.length ? known(unit, median(samples), CLOCK, samples) : unknown(unit, "no token had text");
  };
  const byLength = (unit, reading) =>
    Object.fromEntries(settings.prompt_tokens.map((n) => [String(n), ofRuns(unit, runs.map((run) => reading(run.warm[n], n)))]));
  const gaps = runs.flatMap((run) => run.decode.icl_s);
  const icl = (q) => {
    if (!gaps.length) return unknown("s", "no token had text");
    const each = runs.map((run) => run.decode.icl_s).filter((samples) => samples.length);
    return known("s", percentile(gaps, q), CLOCK, each.map((samples) => percentile(samples, q)));
  };
  const told = (unit) => unknown(unit, "a browser does not tell it");
  const traffic = manifest.traffic;
  const cache = cacheBytes(manifest);
  return {
    settings: {
      ttft_from: "text",
      threads: runs[0].threads,
      prompt_tokens: settings.prompt_tokens,
      decode_tokens: settings.decode_tokens,
      decode_after_tokens: longest,
      context_length: manifest.contract.context_length,
      runs: settings.runs,
      warm_up: `a first request, then ${longest} tokens prefilled and ${WARM_UP_TOKENS} decoded in every run, not counted`,
      torch_in_process: false,
    },
    machine: {
      logical_cores: globalThis.navigator?.hardwareConcurrency ?? null,
      os: globalThis.navigator?.userAgent ?? null,
      architecture: "wasm",
    },
    load_s: ofRuns("s", runs.map((run) => run.load_s)),
    tokenize_s: byLength("s", (request) => request.tokenize_s),
    ttft_s: byLength("s", (request) => request.ttft_s),
    first_token_s: byLength("s", (request) => request.first_token_s),
    prefill_tokens_per_s: byLength("tok/s", (request, n) => tokensPerSecond(n, request.prefill_s)),
    decode_tokens_per_s: ofRuns("tok/s", runs.map(({ decode }) => tokensPerSecond(decode.decode_tokens, decode.decode_s))),
    itl_s: ofRuns("s", runs.map((run) => run.decode.itl_s)),
    icl_s: ofRuns("s", gaps),
    icl_p50_s: icl(50),
    icl_p95_s: icl(95),
    icl_p99_s: icl(99),
    sampling_s: ofRuns("s", runs.flatMap((run) => run.decode.sampling_s)),
    first_ttft_s: ofRuns("s", runs.map((run) => run.first.ttft_s)),
    peak_rss_bytes: told("bytes"),
    rss_before_load_bytes: told("bytes"),
    kv_cache_bytes: cache === null ? unknown("bytes", "the manifest does not tell") : known("bytes", cache, "computed:manifest"),
    bandwidth_bytes_per_s: told("bytes/s"),
    bytes_per_token: traffic
      ? known("bytes", traffic.weight_bytes + traffic.kv_bytes_per_position * (longest + settings.decode_tokens / 2), "computed:manifest")
      : unknown("bytes", "the manifest does not tell"),
    decode_roofline_fraction: told("share"),
  };
}

/** The file that `edgekd bench` writes of an artifact, made elsewhere. */
export function recordOf(benchmark, manifest, folder, sizeBytes) {
  const { name, target, recipe, runtime } = manifest;
  const what = { artifact: folder, name, target, recipe, runtime, files_digest: filesDigest(manifest), size_bytes: sizeBytes };
  return { schema_version: 1, created: new Date().toISOString(), ...what, benchmark };
}
