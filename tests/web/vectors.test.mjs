// The golden vectors through web-demo/core: node --test vectors.test.mjs
import assert from "node:assert/strict";
import { webcrypto } from "node:crypto";
import { readFileSync } from "node:fs";
import test from "node:test";

import { SIGNATURE, SUMS, checkBundle, readBundle } from "../../web-demo/core/bundle.js";
import { textIds, promptParts, renderChat, fittedChat } from "../../web-demo/core/conversation.js";
import { realText } from "../../web-demo/core/definitions.js";
import { cacheBytes, checkFiles, parseManifest } from "../../web-demo/core/manifest.js";
import { memoryShortage } from "../../web-demo/core/memory.js";
import { selfTest } from "../../web-demo/core/selftest.js";
import { Sha256, sha256OfBlob } from "../../web-demo/core/sha256.js";
import { median, percentile, tokensPerSecond } from "../../web-demo/core/statistics.js";
import { Utf8Stream } from "../../web-demo/core/utf8.js";

globalThis.crypto ??= webcrypto; // which node 18 has by this name alone

const read = (name) => JSON.parse(readFileSync(new URL(`../vectors/${name}.json`, import.meta.url), "utf8"));
const bytes = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));

/** The code of what a function refuses, or "none". */
async function refused(work) {
  try {
    await work();
    return "none";
  } catch (error) {
    if (error.name !== "Refusal") throw error;
    return error.code;
  }
}

for (const { name, hex, times, expect } of read("hashes").cases) {
  test(`hashes: ${name}`, async () => {
    const hash = new Sha256();
    for (let n = 0; n < times; n++) hash.update(bytes(hex));
    assert.equal(hash.hex(), expect);
    assert.equal(await sha256OfBlob(new Blob(Array(times).fill(bytes(hex)))), expect);
  });
}

for (const { name, manifest, files, target, expect } of read("manifests").cases) {
  test(`manifests: ${name}`, async () => {
    const blobs = new Map(Object.entries(files).map(([path, text]) => [path, new Blob([text])]));
    const open = async () => {
      const parsed = parseManifest(manifest, [target]);
      await checkFiles(parsed, blobs);
      return parsed;
    };
    if (expect.refused) return assert.equal(await refused(open), expect.refused);
    const parsed = await open();
    const { context_length, vocab_size, bos_id, eos_ids, add_bos } = parsed.contract;
    const size_bytes = Object.keys(parsed.files).reduce((sum, path) => sum + blobs.get(path).size, 0);
    const { main_file } = parsed;
    const found = { name: parsed.name, target: parsed.target, main_file, context_length, vocab_size, bos_id, eos_ids, add_bos };
    assert.deepEqual({ ...found, size_bytes, cache_bytes: cacheBytes(parsed) }, expect.ok);
  });
}

test("manifests: a golden id outside of the vocabulary is refused, as the apps do", async () => {
  const { manifest } = read("manifests").cases.find((one) => one.name === "golden answers");
  const given = JSON.parse(manifest);
  given.parity.golden[0].prompt_ids = [given.contract.vocab_size - 1];
  assert.equal(await refused(() => parseManifest(JSON.stringify(given), [given.target])), "none");
  given.parity.golden[0].prompt_ids = [given.contract.vocab_size];
  assert.equal(await refused(() => parseManifest(JSON.stringify(given), [given.target])), "bad_value");
});

for (const { name, bundle, signature, public_key, files, expect } of read("bundles").cases) {
  test(`bundles: ${name}`, async () => {
    const texts = Object.entries({ ...files, [SUMS]: bundle, [SIGNATURE]: signature }).filter(([, text]) => text !== null);
    const blobs = new Map(texts.map(([path, text]) => [path, new Blob([text])]));
    const open = async () => {
      const list = await readBundle(blobs, public_key);
      const parsed = parseManifest(files["manifest.json"], ["gguf"]);
      await checkFiles(parsed, blobs);
      await checkBundle(list, parsed, blobs);
    };
    assert.equal(await refused(open), expect.refused ?? "none");
  });
}

const prompts = read("prompts");
// An undefined value through `trim`: jinja2 gives nothing, @huggingface/jinja refuses the chat. Chats of tool calls alone.
const STRICTER = /^gemma: calls/;
for (const { name, template, chat, tools, add_generation_prompt, expect } of prompts.cases) {
  test(`prompts: ${name}`, async (t) => {
    t.mock.timers.enable({ apis: ["Date"], now: new Date(prompts.now) });
    const contract = { chat_template: prompts.templates[template].source, special_tokens: prompts.special_tokens };
    const more = { tools: tools ? prompts.tools : null, add_generation_prompt };
    const render = () => renderChat(contract, prompts.chats[chat], more);
    if (expect.refused) return assert.equal(await refused(render), "template_refused");
    const may = prompts.templates[template].level === "full" || STRICTER.test(name);
    if (may && (await refused(render)) === "template_refused") return;
    assert.equal(render(), expect.text);
    const parts = promptParts(render(), prompts.special_ids, prompts.special_strips);
    assert.deepEqual(parts.map((part) => part.id ?? part), expect.parts);
  });
}

// What is left to the callers of llama.cpp's tokenizer, the page's does itself.
const ours = ({ contract, start }) => start && !contract.normalizer && !contract.space_prefix;
for (const { name, contract, text, expect } of read("texts").cases.filter(ours)) {
  test(`texts: ${name}`, () => {
    const tokenizer = { encode: (given) => [given] };
    assert.deepEqual(textIds(tokenizer, { ...contract, context_length: 9 }, text), [...expect.before, expect.text]);
  });
}

const history = read("history");
for (const { name, messages, context_length, max_tokens, expect } of history.cases) {
  test(`history: ${name}`, async () => {
    const contract = { chat_template: history.template, special_tokens: {}, special_ids: {}, context_length };
    const fit = () => fittedChat({ encode: (text) => [...text] }, contract, messages, max_tokens);
    if (expect.refused) return assert.equal(await refused(fit), expect.refused);
    const { ids, kept } = fit();
    assert.equal(ids.join(""), expect.text);
    assert.deepEqual(kept.map((message) => messages.indexOf(message)), expect.keep);
  });
}

for (const { name, contract, length, expect } of read("room").cases) {
  test(`room: ${name}`, () => {
    const ids = () => textIds({ encode: (text) => [...text] }, contract, "x".repeat(length));
    if (!expect.refused) return assert.equal(ids().length, expect.tokens);
    assert.throws(ids, (error) => {
      assert.equal(error.code, expect.refused);
      if (error.code === "too_long") assert.deepEqual(error.message.match(/\d+/g).map(Number), expect.numbers);
      return true;
    });
  });
}

for (const { name, tokens, expect } of read("streams").cases) {
  test(`streams: ${name}`, () => {
    const stream = new Utf8Stream();
    assert.deepEqual(tokens.map((hex) => stream.push(bytes(hex))), expect.shown);
    assert.equal(stream.end(), expect.end);
  });
}

for (const { name, runs, decode_tokens, expect } of read("statistics").cases) {
  test(`statistics: ${name}`, () => {
    const near = (value, wanted) => assert.ok(Math.abs(value - wanted) <= 1e-9 * Math.abs(wanted), `${value} ${wanted}`);
    const intervals = runs.flatMap((run) => run.inter_token_s);
    const total = (samples) => samples.reduce((sum, sample) => sum + sample, 0);
    near(median(runs.map((run) => run.load_s)), expect.load_s);
    near(median(intervals), expect.inter_token_s);
    near(percentile(intervals, 95), expect.inter_token_p95_s);
    near(median(runs.map((run) => tokensPerSecond(decode_tokens, total(run.inter_token_s)))), expect.decode_tokens_per_s);
    for (const [length, wanted] of Object.entries(expect.prefill_tokens_per_s)) {
      near(median(runs.map((run) => tokensPerSecond(Number(length), run.prefill_s[length]))), wanted);
    }
  });
}

test("memory: a model that is too large is refused with the numbers", () => {
  const manifest = { contract: { context_length: 1000 }, traffic: { kv_bytes_per_position: 2 ** 20 } };
  const sentence = memoryShortage(manifest, 500 * 2 ** 20, 1500 * 2 ** 20);
  assert.match(sentence, /needs 1596 MiB of memory \(500 MiB of weights.*there are 1500 MiB/);
  assert.equal(memoryShortage(manifest, 500 * 2 ** 20, 1596 * 2 ** 20), null);
  assert.equal(memoryShortage(manifest, 500 * 2 ** 20, null), null);
});

test("benchmark: text of exactly so many tokens, or a sentence", () => {
  const words = { encode: (text) => text.split(" ").filter(Boolean) };
  for (const count of [1, 7, 300]) assert.equal(words.encode(realText(words, count)).length, count);
  const pairs = { encode: (text) => Array(2 * text.length) };
  assert.throws(() => realText(pairs, 7), { name: "Refusal", message: /makes 7 tokens of no text/ });
});

test("self-test: the first token that differs is named", async () => {
  const manifest = { parity: { golden: [{ prompt_ids: [1], tokens: [2, 3] }, { prompt_ids: [4], tokens: [5, 6] }] } };
  const answers = { 1: [2, 3], 4: [5, 7] };
  const engine = { greedy: async ([id], count) => answers[id].slice(0, count) };
  const found = await selfTest(engine, manifest);
  assert.deepEqual(found, { answers: 2, tokens: 3, failure: "Golden answer 2: token 2 is 7, not 6." });
  answers[4] = [5, 6];
  assert.deepEqual(await selfTest(engine, manifest), { answers: 2, tokens: 4, failure: null });
  assert.deepEqual(await selfTest(engine, { parity: null }), { answers: 0, tokens: 0, failure: null });
});

test("self-test: texts and chats are read as they were", async () => {
  const contract = { chat_template: "{{ messages[0].content }}!", special_tokens: {}, special_ids: { "!": 1 }, context_length: 9, eos_ids: [] };
  const tokenizer = { encode: (text) => [text.length] };
  const engine = { greedy: async (ids, count) => [ids.at(-1) + 1].slice(0, count) };
  const failure = async (answer) => (await selfTest(engine, { contract, parity: { golden: [answer] } }, tokenizer)).failure;
  const messages = [{ role: "user", content: "four" }];
  assert.equal(await failure({ prompt_ids: [4], tokens: [], text: "four" }), null);
  assert.equal(await failure({ prompt_ids: [5], tokens: [], text: "four" }), "Golden answer 1: its text is read as 4, not 5.");
  assert.equal(await failure({ prompt_ids: [4, 1], tokens: [2], text: "four!", messages }), null);
  assert.equal(await failure({ prompt_ids: [4, 1], tokens: [3], text: "four!", messages }), "Golden answer 1: token 1 is 2, not 3.");
  assert.equal(await failure({ prompt_ids: [4, 1], tokens: [2], text: "four?", messages }), "Golden answer 1: its chat is rendered as another text.");
});
