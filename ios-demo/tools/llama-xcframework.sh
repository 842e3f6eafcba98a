#!/usr/bin/env bash
# On a Mac with Xcode and CMake: builds llama.xcframework beside Package.swift, of the very source that edgekd's own
# llama.cpp is built of. Not run where edgekd is tested.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^llama-cpp-python==//p' ../constraints.txt)
mkdir -p build/llama
python3 -m pip download --no-deps --no-binary llama-cpp-python -d build "llama-cpp-python==$version"
tar -xzf "build/llama_cpp_python-$version.tar.gz" -C build/llama --strip-components 1
(cd build/llama/vendor/llama.cpp && ./build-xcframework.sh ios-device ios-sim macos)
rm -rf llama.xcframework
cp -R build/llama/vendor/llama.cpp/build-apple/llama.xcframework .
