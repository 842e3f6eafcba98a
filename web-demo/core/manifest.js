/** The artifact's manifest, and whether the files are those that it names. */

import { Refusal } from "./refusal.js";
import { Sha256, sha256OfBlob } from "./sha256.js";

export const NEWEST_SCHEMA = 1;
const MAX_TOKENS = 2 ** 24;
const AGAIN = "Export the artifact again.";

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isCount = (value) => Number.isInteger(value) && value >= 1 && value <= MAX_TOKENS;
const isText = (value) => typeof value === "string" && value.length > 0;
const isOptional = (value, type) => value == null || typeof value === type;
export const isInside = (name) => name !== "" && !name.startsWith("/") && !name.includes("\\") && !name.split("/").includes("..");

function check(holds, key, what, code = "bad_value") {
  if (!holds) throw new Refusal(code, `manifest.json: key '${key}' is not ${what}.`, AGAIN);
}

function checkContract(contract) {
  check(isObject(contract), "contract", "an object");
  const isId = (id) => Number.isInteger(id) && id >= 0 && id < contract.vocab_size;
  check(isCount(contract.context_length), "contract.context_length", "a number of tokens");
  check(isCount(contract.vocab_size), "contract.vocab_size", "a number of tokens");
  check(Array.isArray(contract.eos_ids) && contract.eos_ids.every(isId), "contract.eos_ids", "a list of ids");
  check(contract.bos_id == null || isId(contract.bos_id), "contract.bos_id", "an id");
  check(typeof contract.add_bos === "boolean", "contract.add_bos", "true or false");
  check(isOptional(contract.chat_template, "string"), "contract.chat_template", "text");
  const ids = contract.special_ids;
  check(ids == null || (isObject(ids) && Object.values(ids).every(isId)), "contract.special_ids", "ids by text");
}

function checkGolden(parity, vocabSize) {
  const isIds = (ids) => Array.isArray(ids) && ids.every((id) => Number.isInteger(id) && id >= 0 && id < vocabSize);
  const isAnswer = ({ prompt_ids, tokens, text, messages }) =>
    isIds(prompt_ids) && isIds(tokens) && isOptional(text, "string") && (messages == null || (Array.isArray(messages) && messages.every(isObject)));
  const golden = parity?.golden ?? [];
  check(Array.isArray(golden) && golden.every((answer) => isObject(answer) && isAnswer(answer)), "parity.golden", "a list of answers");
}

/** Facts of a manifest that the page relies on, checked; `targets` are those that it runs. */
export function parseManifest(text, targets) {
  if (text == null) throw new Refusal("no_manifest", "The folder has no manifest.json.", "Choose an artifact of edgekd.");
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch (error) {
    throw new Refusal("not_json", `manifest.json is not JSON: ${error.message}.`, AGAIN);
  }
  check(isObject(manifest), "(top level)", "an object", "not_json");
  const schema = manifest.schema_version;
  check(Number.isInteger(schema) && schema >= 1, "schema_version", "a version");
  if (schema > NEWEST_SCHEMA) {
    const words = `manifest.json has schema ${schema}; this app reads up to ${NEWEST_SCHEMA}.`;
    throw new Refusal("newer_schema", words, "Update the app.");
  }
  check(isText(manifest.target), "target", "text");
  if (!targets.includes(manifest.target)) {
    const words = `The artifact is for ${manifest.runtime ?? manifest.target}, which this app does not run.`;
    throw new Refusal("other_target", words, `Export one for ${targets.join(" or ")}.`);
  }
  for (const key of ["name", "recipe", "main_file"]) check(isText(manifest[key]), key, "text");
  check(isObject(manifest.files), "files", "an object");
  for (const [name, sum] of Object.entries(manifest.files)) {
    check(isInside(name), `files.${name}`, "a name inside the folder", "leaves_folder");
    check(typeof sum === "string", `files.${name}`, "a sha256");
  }
  check(manifest.main_file in manifest.files, "main_file", "among files");
  checkContract(manifest.contract);
  checkGolden(manifest.parity, manifest.contract.vocab_size);
  return manifest;
}

/** Bytes of the cache of a whole context; null: the manifest does not tell. */
export function cacheBytes(manifest) {
  const each = manifest.traffic?.kv_bytes_per_position;
  return each == null ? null : each * manifest.contract.context_length;
}

/** Digest of the manifest's `files`, as edgekd writes it: of their JSON with sorted keys, in ASCII. */
export function filesDigest(manifest) {
  const json = JSON.stringify(Object.fromEntries(Object.entries(manifest.files).sort(([a], [b]) => (a < b ? -1 : 1))));
  const ascii = json.replace(/[\x7f-\uffff]/g, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);
  return new Sha256().update(new TextEncoder().encode(ascii)).hex();
}

/** Compare every listed file with its sha256; `files` are Blobs by relative name. */
export async function checkFiles(manifest, files, onProgress = () => {}) {
  const sizes = Object.keys(manifest.files).map((name) => files.get(name)?.size ?? 0);
  const all = sizes.reduce((sum, size) => sum + size, 0);
  let done = 0;
  for (const [name, expected] of Object.entries(manifest.files)) {
    const blob = files.get(name);
    if (!blob) throw new Refusal("file_missing", `${name} is missing.`, "Choose the artifact's whole folder.");
    const sum = await sha256OfBlob(blob, (bytes) => onProgress((done + bytes) / all));
    if (sum !== expected) throw new Refusal("file_changed", `${name} is not the file its manifest names.`, "Copy the artifact again.");
    done += blob.size;
  }
}
