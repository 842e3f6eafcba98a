#!/usr/bin/env bash
# Puts the libraries that the page uses into vendor/, in the versions and with the checksums of package-lock.json.
# The page itself then needs no network. With --tests, those that its tests drive it with come to node_modules/ too.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" = --tests ] && omit=() || omit=(--omit=dev)
npm ci --ignore-scripts --no-audit --no-fund "${omit[@]}"
mkdir -p vendor
from=node_modules
cp $from/@wllama/wllama/esm/index.min.js vendor/wllama.js
for kind in single multi; do cp $from/@wllama/wllama/esm/$kind-thread/wllama.wasm vendor/wllama-$kind.wasm; done
cp $from/onnxruntime-web/dist/{ort.wasm.min.mjs,ort-wasm-simd-threaded.mjs,ort-wasm-simd-threaded.wasm} vendor/
cp $from/@huggingface/tokenizers/dist/tokenizers.min.mjs vendor/tokenizers.mjs
cp $from/@huggingface/jinja/dist/index.js vendor/jinja.js
sed -i.bak '/^\/\/# sourceMappingURL=/d' vendor/*.js vendor/*.mjs && rm vendor/*.bak
