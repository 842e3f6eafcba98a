#!/usr/bin/env bash
# Makes what test_arm64.py runs, in build/arm64, once and again when constraints.txt changes: a program over llama.cpp,
# cross-compiled from the source that make unpacks; one over the C++ libraries in ExecuTorch's wheel for arm64; and Debian's
# arm64 Python with onnxruntime's wheel, unpacked beside each other and not installed. PYTHON is the interpreter whose pip
# fetches them, LLAMA_SOURCE the folder of llama.cpp.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=$PWD/build/arm64 here=$PWD/tests/arm64
mkdir -p "$out/downloads"
pip=("$python" -m pip --disable-pip-version-check)
wheels=(--no-deps -c constraints.txt --only-binary :all: --python-version 3.11
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64)

if [ ! "$out/gguf_logits" -nt constraints.txt ]; then
    llama=${LLAMA_SOURCE:?make test-arm64 names it} built=$out/llama
    # The instructions of phones of the last years; what is below has slower kernels of its own, which are not run here.
    cmake -S "$llama" -B "$built" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+i8mm+fp16 \
        -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF >"$out/cmake.log"
    cmake --build "$built" -j "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" --target llama >>"$out/cmake.log"
    aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Werror -static "$here/gguf_logits.cpp" -I"$llama/include" \
        -I"$llama/ggml/include" "$built/src/libllama.a" "$built"/ggml/src/libggml{,-cpu,-base}.a -o "$out/gguf_logits"
fi

if [ ! "$out/executorch_logits" -nt constraints.txt ]; then
    number=$(sed -n 's/^executorch==//p' constraints.txt)
    "${pip[@]}" download -q "${wheels[@]}" -d "$out/downloads" "executorch==$number"
    rm -rf "$out/executorch"
    unzip -q "$out/downloads/executorch-$number"-*.whl 'executorch/lib/*' 'executorch/include/*' -d "$out"
    sdk=$out/executorch
    aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra "$here/executorch_logits.cpp" "$here/executorch_ops.cpp" \
        -DC10_USING_CUSTOM_GENERATED_MACROS -isystem "$sdk/include" \
        -isystem "$sdk/include/executorch/runtime/core/portable_type/c10" -L"$sdk/lib" -Wl,-rpath,"$sdk/lib" -Wl,--no-as-needed \
        -lexecutorch -lexecutorch_kernels_optimized -lexecutorch_kernels_quantized -lexecutorch_backend_xnnpack \
        -lexecutorch_threadpool -o "$out/executorch_logits"
fi

if [ ! "$out/site" -nt constraints.txt ]; then
    root=$out/root
    .ci/unpack_debian.sh "$root" bookworm arm64 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib \
        libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5
    # onnxruntime asks these files for the processor, qemu would show it this machine's, and it crashes where a line is missing.
    mkdir -p "$root/proc" "$root/sys/devices/system/cpu"
    printf '%s\n' 'processor : 0' 'BogoMIPS : 50.00' 'Features : fp asimd aes crc32 atomics fphp asimdhp cpuid asimdrdm asimddp i8mm' \
        'CPU implementer : 0x41' 'CPU architecture: 8' 'CPU variant : 0x1' 'CPU part : 0xd0b' 'CPU revision : 0' >"$root/proc/cpuinfo"
    for file in possible present online; do echo 0 >"$root/sys/devices/system/cpu/$file"; done
    rm -rf "$out/site"
    "${pip[@]}" install -q "${wheels[@]}" --no-compile --target "$out/site" onnxruntime numpy
fi
