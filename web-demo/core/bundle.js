/** A bundle: files that `edgekd bundle` lists, signed by whoever has the page's key; docs/bundles.md is the format. */

import { isInside, isObject } from "./manifest.js";
import { Refusal } from "./refusal.js";
import { sha256OfBlob } from "./sha256.js";

export const SUMS = "bundle.json";
export const SIGNATURE = "bundle.sig";
const SCHEMA = 1;
const AGAIN = "Make the bundle again.";

/** Bytes of base64; null: it is none. */
function bytesOf(base64) {
  try {
    return Uint8Array.from(atob(base64.trim()), (char) => char.charCodeAt(0));
  } catch {
    return null;
  }
}

async function isSigned(data, signature, publicKey) {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) throw new Refusal("no_ed25519", "Browsers verify signatures on secure pages alone.", "Serve this one by HTTPS, or on localhost.");
  try {
    const key = await subtle.importKey("raw", bytesOf(publicKey), "Ed25519", false, ["verify"]);
    return await subtle.verify("Ed25519", key, bytesOf(signature), data);
  } catch (error) {
    if (error.name === "NotSupportedError") throw new Refusal("no_ed25519", "This browser cannot verify Ed25519 signatures.", "Use a newer one.");
    return false; // the key or the signature is none
  }
}

/** What a bundle lists, once its signature by `publicKey`, raw and in base64, has been verified; `files` are Blobs by name. */
export async function readBundle(files, publicKey) {
  for (const name of [SUMS, SIGNATURE]) {
    if (!files.has(name)) throw new Refusal("not_signed", `${name} is missing: this page opens signed bundles alone.`, "Choose one.");
  }
  const data = new Uint8Array(await files.get(SUMS).arrayBuffer());
  if (!(await isSigned(data, await files.get(SIGNATURE).text(), publicKey))) {
    throw new Refusal("bad_signature", `${SIGNATURE} is no signature by the page's key.`, "Do not use the bundle.");
  }
  return listed(new TextDecoder().decode(data));
}

function listed(text) {
  const bad = (key) => new Refusal("bad_value", `${SUMS}: key '${key}' is not what a bundle has there.`, AGAIN);
  let sums;
  try {
    sums = JSON.parse(text);
  } catch (error) {
    throw new Refusal("not_json", `${SUMS} is not JSON: ${error.message}.`, AGAIN);
  }
  if (!Number.isInteger(sums?.schema_version)) throw bad("schema_version");
  if (sums.schema_version > SCHEMA) {
    throw new Refusal("newer_schema", `${SUMS} has schema ${sums.schema_version}; this page reads up to ${SCHEMA}.`, "Update the page.");
  }
  if (!isObject(sums.files)) throw bad("files");
  for (const [name, told] of Object.entries(sums.files)) {
    if (!isInside(name)) throw new Refusal("leaves_folder", `${SUMS} lists ${name}.`, AGAIN);
    if (typeof told?.sha256 !== "string" || !Number.isInteger(told.bytes)) throw bad(`files.${name}`);
  }
  return sums.files;
}

/** Compare the folder with the list. The manifest's own files are compared with the manifest's sums: see `checkFiles`. */
export async function checkBundle(list, manifest, files) {
  for (const [name, { sha256, bytes }] of Object.entries(list)) {
    const blob = files.get(name);
    if (!blob) throw new Refusal("file_missing", `${name} is missing.`, "Choose the whole bundle.");
    const sum = Object.hasOwn(manifest.files, name) ? manifest.files[name] : await sha256OfBlob(blob);
    if (sum !== sha256 || blob.size !== bytes) {
      throw new Refusal("file_changed", `${name} is not the file that the bundle lists.`, "Copy the bundle again.");
    }
  }
  const strange = [...files.keys()].find((name) => !Object.hasOwn(list, name) && name !== SUMS && name !== SIGNATURE);
  if (strange !== undefined) throw new Refusal("not_listed", `${strange} is not in the list of the bundle.`, "Remove it, or copy the bundle again.");
}
