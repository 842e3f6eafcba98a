/** The page: a folder is chosen, checked, loaded and proved; then it chats, or is timed. All work is done in core/. */

import { checkBundle, readBundle } from "./core/bundle.js";
import { SETTINGS, measure, recordOf } from "./core/bench.js";
import { fittedChat, textIds } from "./core/conversation.js";
import { Decoder } from "./core/decoder.js";
import { checkFiles, parseManifest } from "./core/manifest.js";
import { memoryShortage } from "./core/memory.js";
import { Refusal } from "./core/refusal.js";
import { selfTest } from "./core/selftest.js";
import { TokenizerFile } from "./core/tokenizer.js";

const ENGINES = { gguf: "./engines/gguf.js", onnx: "./engines/onnx.js" };
const ANSWER_TOKENS = 512;
const WASM_BYTES = 4 * 2 ** 30;
const at = (id) => document.getElementById(id);
let model = null;
let messages = [];
let stopper = null;

/** Threads that this page may use: WebAssembly's need SharedArrayBuffer, which needs the server's headers. */
function threadsHere() {
  return globalThis.crossOriginIsolated ? Math.max(1, Math.min(8, navigator.hardwareConcurrency >> 1)) : 1;
}

/** Half of what the browser says the device has, at most what WebAssembly can address; null: it does not say. */
function availableBytes() {
  return navigator.deviceMemory ? Math.min(WASM_BYTES, (navigator.deviceMemory * 2 ** 30) / 2) : null;
}

/** Of the bundles that this page opens; empty: it opens every artifact. */
const publicKeyHere = () => document.querySelector("meta[name=edgekd-public-key]").content;

/** Check, load and prove an artifact; `files` are Blobs by their names inside its folder. */
export async function load(files, { folder, say = () => {}, most = availableBytes(), threads = threadsHere(), publicKey = publicKeyHere() } = {}) {
  const list = publicKey ? await readBundle(files, publicKey) : null;
  const manifest = parseManifest(await files.get("manifest.json")?.text(), Object.keys(ENGINES));
  const sizeBytes = Object.keys(manifest.files).reduce((sum, name) => sum + (files.get(name)?.size ?? 0), 0);
  const short = memoryShortage(manifest, sizeBytes, most);
  if (short) throw new Refusal("memory", short, "Choose a smaller model.");
  await checkFiles(manifest, files, (share) => say(`Checking the files: ${Math.round(100 * share)} %`));
  if (list) await checkBundle(list, manifest, files);
  if (!files.has("tokenizer.json")) throw new Refusal("file_missing", "The artifact has no tokenizer.json.", "Export the artifact again.");
  const tokenizer = new TokenizerFile(await files.get("tokenizer.json").text());
  const runtime = await import(ENGINES[manifest.target]);
  const open = async () => new Decoder(await runtime.open(manifest, files, threads), manifest.contract, tokenizer);
  say("Loading the model");
  const engine = await open();
  say("Comparing its golden answers");
  const test = await selfTest(engine, manifest, tokenizer);
  if (test.failure) {
    await engine.close();
    const words = `This device does not compute what the artifact should: ${test.failure}`;
    throw new Refusal("self_test", words, "Use another browser.");
  }
  return { manifest, folder: folder ?? manifest.name, sizeBytes, tokenizer, engine, open, test };
}

/** Time a loaded artifact on engines of its own; the record that edgekd reads. */
export async function bench(loaded, settings = SETTINGS, onRun) {
  await loaded.engine.close();
  const benchmark = await measure(loaded.open, loaded.tokenizer, loaded.manifest, settings, onRun);
  loaded.engine = await loaded.open();
  return recordOf(benchmark, loaded.manifest, loaded.folder, loaded.sizeBytes);
}

/** Ids of what comes next, and the messages that are kept: of a model without a template, the last text alone. */
export function prompt({ manifest, tokenizer }, chat) {
  if (manifest.contract.chat_template != null) return fittedChat(tokenizer, manifest.contract, chat, ANSWER_TOKENS);
  return { ids: textIds(tokenizer, manifest.contract, chat.at(-1).content), kept: chat };
}

function say(text) {
  at("status").textContent = text;
}

function line(role, text) {
  const element = document.createElement("p");
  element.className = role;
  element.textContent = text;
  at("chat").append(element);
  return element;
}

function told({ manifest, engine, test }) {
  const proof = test.answers ? `${test.tokens} golden tokens the same` : "no golden answers are recorded in its manifest";
  const alone = globalThis.crossOriginIsolated ? "" : " (this page is not cross-origin isolated: one thread)";
  return `${manifest.name}, ${manifest.target} ${manifest.recipe}: files checked, ${proof}; ${engine.threads} thread${engine.threads > 1 ? "s" : ""}${alone}.`;
}

/** Run one of the page's tasks: its buttons rest meanwhile, and what it refuses is shown. */
async function task(work) {
  const buttons = ["folder", "send", "bench"].map(at);
  buttons.forEach((button) => (button.disabled = true));
  try {
    await work();
  } catch (error) {
    say(error instanceof Refusal ? error.message : `A fault of this page: ${error.message}`);
  } finally {
    at("folder").disabled = false;
    ["send", "bench"].forEach((id) => (at(id).disabled = model === null));
  }
}

async function choose(list) {
  const files = new Map([...list].map((file) => [file.webkitRelativePath.split("/").slice(1).join("/") || file.name, file]));
  await model?.engine.close();
  model = null;
  messages = [];
  at("chat").replaceChildren();
  model = await load(files, { folder: list[0]?.webkitRelativePath.split("/")[0], say });
  say(told(model));
}

async function answer(text) {
  messages.push({ role: "user", content: text });
  line("user", text);
  const shown = line("assistant", "");
  const { ids, kept } = prompt(model, messages);
  messages = kept;
  stopper = new AbortController();
  at("stop").disabled = false;
  const start = performance.now();
  const tokens = await model.engine.stream(ids, ANSWER_TOKENS, (piece) => (shown.textContent += piece), stopper.signal);
  at("stop").disabled = true;
  messages.push({ role: "assistant", content: shown.textContent });
  if (!shown.textContent) shown.textContent = "(the model ended its answer at once)";
  say(`${ids.length} tokens read, ${tokens} written in ${((performance.now() - start) / 1000).toFixed(1)} s`);
}

async function timeIt() {
  const result = await bench(model, SETTINGS, (done, of) => say(`Run ${done} of ${of}`));
  const { decode_tokens_per_s: decode, ttft_s: ttft } = result.benchmark;
  const [length, first] = Object.entries(ttft).at(-1);
  say(`Decode ${decode.value.toPrecision(3)} tok/s; first token after ${(1000 * first.value).toFixed(0)} ms behind ${length} tokens.`);
  at("result").textContent = JSON.stringify(result, null, 1);
  at("save").href = URL.createObjectURL(new Blob([at("result").textContent], { type: "application/json" }));
  at("save").hidden = false;
}

at("folder").addEventListener("change", (event) => task(() => choose(event.target.files)));
at("stop").addEventListener("click", () => stopper?.abort());
at("bench").addEventListener("click", () => task(timeIt));
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value;
  at("text").value = "";
  if (text) task(() => answer(text));
});
say("Choose the folder of an artifact for GGUF or ONNX. It stays on this device.");
