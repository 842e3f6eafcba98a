#!/usr/bin/env bash
# Builds llama.cpp's Vulkan backend as a library of its own, to be added to the installed llama.cpp of the same version
# by GGML_BACKEND_PATH. SOURCE OUT JOBS: llama.cpp's source, the folder to build in, processes at a time.
# On Debian and its like it installs what is missing: the shader compiler, Mesa's drivers, which compute on the CPU where
# there is no GPU, and where Vulkan's headers are too old those of Debian 13, which are unpacked into OUT alone.
set -euo pipefail
source=$1 out=$2 jobs=$3
flags=$(dirname "$0")/../targets/gguf/build_flags.py
mkdir -p "$out"

if ! command -v glslc >/dev/null || ! ldconfig -p | grep -q "libvulkan\.so\.1 "; then
    command -v apt-get >/dev/null || { echo "glslc and Vulkan's loader are needed: install them." >&2; exit 1; }
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends glslc libvulkan1 mesa-vulkan-drivers
fi

options=()
if ! python3 -I "$flags" vulkan >/dev/null 2>&1; then
    headers=$(cd "$out" && pwd)/headers
    if [ ! -d "$headers/usr/include/spirv" ]; then
        command -v dpkg >/dev/null || { echo "Newer headers of Vulkan and SPIR-V are needed: install them." >&2; exit 1; }
        "$(dirname "$0")/unpack_debian.sh" "$headers" trixie "$(dpkg --print-architecture)" libvulkan-dev spirv-headers
    fi
    options=("-DVulkan_INCLUDE_DIR=$headers/usr/include" "-DSPIRV-Headers_DIR=$headers/usr/share/cmake/SPIRV-Headers"
        "-DVulkan_LIBRARY=$(ldconfig -p | awk '/libvulkan\.so\.1 /{print $NF; exit}')")
fi

# shellcheck disable=SC2046 - the flags are words
cmake -S "$source" -B "$out" -DCMAKE_BUILD_TYPE=Release $(python3 -I "$flags" none) -DGGML_VULKAN=ON -DGGML_BACKEND_DL=ON \
    "${options[@]}" -DLLAMA_CURL=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build "$out" -j "$jobs" --target ggml-vulkan
