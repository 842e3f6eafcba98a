#!/usr/bin/env bash
# Type-checks what only Apple's systems compile, the app and the engines of Core ML and ExecuTorch, against stubs of
# Apple's modules: typecheck.sh FOLDER, where the modules go. It proves names and types within this folder, and says
# nothing of Apple's SDK beyond what the stubs repeat of it. Runs inside `swift.sh`.
set -euo pipefail
cd "$(dirname "$0")/.."
modules=$1
module() { swiftc -emit-module -parse-as-library -suppress-warnings -I "$modules" -module-name "$1" -o "$modules/$1.swiftmodule" "${@:2}"; }

for name in UniformTypeIdentifiers UIKit Darwin os CryptoKit CoreML ExecuTorch SwiftUI; do
    module $name Tests/stubs/$name.swift
done
module EdgeCore Sources/EdgeCore/*.swift
module EdgeCoreML Sources/EdgeCoreML/*.swift
module EdgeExecuTorch Sources/EdgeExecuTorch/*.swift
echo 'import EdgeCore
extension Runtime { public static let llama = Runtime(target: "gguf") { _, _ in fatalError() } }' > "$modules/llama.swift"
module EdgeLlama "$modules/llama.swift"
swiftc -frontend -parse App/EdgekdDemo/*.swift
swiftc -typecheck -parse-as-library -warnings-as-errors -swift-version 5 -I "$modules" App/EdgekdDemo/*.swift
