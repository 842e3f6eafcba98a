#!/usr/bin/env bash
# Kotlin's compiler: kotlinc.sh ARGUMENTS. Java 8 bytecode, warnings are errors.
set -euo pipefail
lib=$(dirname "$0")/../build/tools/kotlin
jars=$lib/kotlin-compiler.jar:$lib/kotlin-stdlib.jar:$lib/kotlin-script-runtime.jar:$lib/kotlin-reflect.jar
exec java -Xmx1500m -cp "$jars:$lib/kotlinx-coroutines-core-jvm.jar:$lib/annotations-13.0.jar" \
    org.jetbrains.kotlin.cli.jvm.K2JVMCompiler -no-reflect -no-stdlib -Werror -jvm-target 1.8 "$@"
