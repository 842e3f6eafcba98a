#!/usr/bin/env bash
# Builds the gguf flavour into build/edgekd-demo.apk without Gradle, SDK, NDK or network: compiled, shrunk, aligned and
# signed. fetch.sh must have run once. KEYSTORE and KEY_PASSWORD name a key; else a key for testing is made.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=build/tools work=build/apk apk=build/edgekd-demo.apk
android=$tools/android.jar kotlin=$tools/kotlin/kotlin-stdlib.jar
rm -rf $work $apk
mkdir -p $work/{java,classes,dex}

aapt2 compile --dir app/src/main/res -o $work/resources.zip
aapt2 link -o $work/base.apk -I /usr/share/android-framework-res/framework-res.apk --manifest app/src/main/AndroidManifest.xml \
    --min-sdk-version 26 --target-sdk-version 34 --version-code 1 --version-name 0.1 --java $work/java $work/resources.zip

tools/native.sh

javac -nowarn -Xlint:-options -source 8 -target 8 -bootclasspath $android -d $work/classes $work/java/io/edgekd/demo/R.java
tools/kotlinc.sh -no-jdk -cp "$android:$kotlin:$work/classes" -d $work/classes \
    core/src/main app/src/main/kotlin app/src/gguf/kotlin
(cd $work/classes && jar cf ../app.jar .)
java -cp $tools/r8.jar com.android.tools.r8.R8 --release --min-api 26 --lib $android --lib $tools/kotlin/annotations-13.0.jar --pg-conf app/rules.pro \
    --output $work/dex $work/app.jar $kotlin

cp $work/base.apk $work/unaligned.apk
(cd $work/dex && zip -q ../unaligned.apk classes*.dex)
mkdir -p $work/lib && cp -r build/jniLibs/. $work/lib/
(cd $work && zip -q -0 -r unaligned.apk lib)
python3 tools/align.py $work/unaligned.apk $work/aligned.apk

keystore=${KEYSTORE:-build/testing.jks} password=${KEY_PASSWORD:-testing}
[ -f "$keystore" ] || keytool -genkeypair -keystore "$keystore" -storepass "$password" -keypass "$password" -alias key \
    -dname CN=testing -keyalg RSA -keysize 3072 -validity 10000 2>/dev/null
apksigner sign --ks "$keystore" --ks-pass "pass:$password" --min-sdk-version 26 --out $apk $work/aligned.apk
ls -l $apk
