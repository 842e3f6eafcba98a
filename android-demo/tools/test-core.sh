#!/usr/bin/env bash
# Compiles core and the gguf flavour's engine for a JVM into build/jvm, and runs core's tests there.
set -euo pipefail
cd "$(dirname "$0")/.."
junit=/usr/share/java/junit4.jar:/usr/share/java/hamcrest-core.jar
jars=build/tools/kotlin/kotlin-stdlib.jar:$junit
rm -rf build/jvm
tools/kotlinc.sh -cp "$jars" -d build/jvm core/src app/src/gguf/kotlin app/src/testGguf/kotlin
classes=$(grep -rhoE '^class [A-Za-z]+Test' core/src/test/kotlin | sed 's/^class /io.edgekd.demo./')
java -Dedgekd.vectors=../tests/vectors -cp "build/jvm:$jars" org.junit.runner.JUnitCore $classes
