#!/usr/bin/env bash
# Builds native/edgekd_jni.c for Android with clang and lld alone: it needs nothing of libc, so it needs no NDK. It and
# llama.cpp's library come to build/jniLibs, aligned for pages of 16 KB.
set -euo pipefail
cd "$(dirname "$0")/.."
llama=build/tools/llama
for pair in aarch64:arm64-v8a x86_64:x86_64; do
    abi=${pair##*:}
    libs=$llama/android/src/main/jniLibs/$abi
    mkdir -p build/jniLibs/$abi
    cp $libs/librnllama.so build/jniLibs/$abi/
    # llama.rn renames ggml's names, and one of them is in llama.h's own interface.
    clang --target="${pair%%:*}-linux-android26" -O2 -Wall -Wextra -Werror -ffreestanding -nostdlib -shared -fPIC \
        -fuse-ld=lld -Wl,-z,max-page-size=16384 -Wl,-soname,libedgekd_jni.so -Wl,--no-undefined \
        -Dggml_log_level=lm_ggml_log_level -Inative/freestanding -I/usr/include/android/nativehelper -I$llama/cpp \
        native/edgekd_jni.c -L$libs -lrnllama -o build/jniLibs/$abi/libedgekd_jni.so
done
