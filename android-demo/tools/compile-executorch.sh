#!/usr/bin/env bash
# Compiles the executorch flavour into build/executorch against the classes of ExecuTorch's own Android library. They are all that
# fetch.sh gets of it: nothing here is linked, packed or run.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=build/tools work=build/executorch
jars=$tools/android.jar:$tools/kotlin/kotlin-stdlib.jar
rm -rf $work
mkdir -p $work/{java,classes}
aapt2 compile --dir app/src/main/res -o $work/resources.zip
aapt2 link -o $work/base.apk -I /usr/share/android-framework-res/framework-res.apk --manifest app/src/main/AndroidManifest.xml \
    --java $work/java $work/resources.zip
javac -nowarn -Xlint:-options -source 8 -target 8 -bootclasspath $tools/android.jar -d $work/classes $work/java/io/edgekd/demo/R.java
tools/kotlinc.sh -no-jdk -cp "$jars:$tools/executorch.jar:$work/classes" -d $work/classes \
    core/src/main app/src/main/kotlin app/src/executorch/kotlin
