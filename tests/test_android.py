"""android-demo/: core's own tests on a JVM, and the app's engine on a real GGUF against the Session."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from demos import IDS, QUESTION, ROOT, llama_cpp, make_artifact, make_bundle, tool
from edgekd import targets
from edgekd.bundle import SUMS
from edgekd.conversation import chat_ids, render_chat
from edgekd.files import digest
from edgekd.manifest import MANIFEST
from scripted import spoken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DEMO = ROOT / "android-demo"
TEXTS = ["Hello, world!", "def f(x):\n    return x + 1\n", "naïve café 你好 🚀 12345", "<|im_end|> is text", " "]


@pytest.fixture(scope="module")
def classes() -> Path:
    """What Kotlin's compiler makes of core and the engine; core's tests have passed."""
    tool("javac", get="apt install openjdk-17-jdk-headless")
    for needed in (DEMO / "build/tools/kotlin/kotlin-compiler.jar", Path("/usr/share/java/junit4.jar")):
        if not needed.exists():
            pytest.skip(f"{needed} is missing: make test-android")
    done = subprocess.run([DEMO / "tools/test-core.sh"], capture_output=True, text=True)
    assert done.returncode == 0 and "OK (" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    return DEMO / "build/jvm"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app's JNI source, linked to the libllama of this machine."""
    include, lib = llama_cpp()
    java = Path(tool("javac", get="apt install openjdk-17-jdk-headless")).resolve().parents[1] / "include"
    out = tmp_path_factory.mktemp("jni") / "libedgekd_jni.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{java}", f"-I{java}/linux", f"-I{include}"]
    link = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lllama", "-o", str(out)]
    subprocess.run(["cc", *flags, str(DEMO / "native/edgekd_jni.c"), *link], check=True)
    return out


def drive(classes: Path, library: Path, folder: Path, key: str | None = None) -> dict[str, Any]:
    """What the app's own classes made of an artifact; with a public key, of a bundle."""
    job = {"ids": IDS, "count": 24, "chat": QUESTION, "texts": TEXTS, "public_key": key}
    path = f"{classes}:{DEMO}/build/tools/kotlin/kotlin-stdlib.jar"
    command = ["java", "-cp", path, "io.edgekd.demo.DriveKt", str(library), str(folder), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_apps_engine_says_what_the_session_says(classes: Path, library: Path, tmp_path: Path) -> None:
    artifact = make_artifact("gguf", tmp_path / "gguf")
    found = drive(classes, library, artifact.folder)
    session, contract = targets.open_artifact(artifact, threads=1), artifact.manifest.contract
    chat = render_chat(contract.chat_template or "", [{"role": "user", "content": QUESTION}], contract.special_tokens)
    prompt, tokens = chat_ids(session, contract, chat), list(session.generate(IDS, 24))
    assert found["tokens"] == tokens and len(tokens) == 24
    assert found["prompt"] == prompt
    assert found["answer"] == spoken(session, session.generate(prompt, 24))
    assert found["texts"] == found["texts_by_file"] == [session.tokenize(text) for text in TEXTS]
    assert found["bytes_by_file"] == b"".join(map(session.token_bytes, tokens)).hex()
    session.close()
    assert found["failure"] is None and found["answers"] == 4
    record = found["bench"]
    assert record["files_digest"] == digest(artifact.manifest.files) and record["size_bytes"] == artifact.size_bytes
    benchmark = record["benchmark"]
    assert benchmark["settings"]["ttft_from"] == "text"
    for figure in (benchmark["load_s"], benchmark["decode_tokens_per_s"], benchmark["ttft_s"]["64"]):
        assert figure["value"] > 0 and len(figure["samples"]) == 2


def test_damage_and_a_wrong_answer_are_told(classes: Path, library: Path, tmp_path: Path) -> None:
    artifact = make_artifact("gguf", tmp_path / "gguf")
    shutil.copytree(artifact.folder, tmp_path / "damaged")
    (tmp_path / "damaged/tokenizer.json").write_text("{}", "utf-8")
    assert drive(classes, library, tmp_path / "damaged")["refused"] == "file_changed"
    manifest = json.loads((artifact.folder / MANIFEST).read_text("utf-8"))
    manifest["parity"]["golden"][0]["tokens"][0] ^= 1
    (artifact.folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    assert drive(classes, library, artifact.folder)["failure"].startswith("Golden answer 1: token 1 is ")


def test_with_a_key_only_what_it_signed_is_opened(classes: Path, library: Path, tmp_path: Path) -> None:
    artifact, bundle = make_artifact("gguf", tmp_path / "gguf"), tmp_path / "bundle"
    key = make_bundle(artifact, bundle, "android")
    found = drive(classes, library, bundle, key)
    assert found["failure"] is None and found["answers"] == 4 + 6, "the texts' ids and the chat are the Session's too"
    assert drive(classes, library, artifact.folder, key)["refused"] == "not_signed"
    data = bytearray((bundle / SUMS).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / SUMS).write_bytes(data)
    assert drive(classes, library, bundle, key)["refused"] == "bad_signature"


def test_the_executorch_flavour_compiles() -> None:
    tool("aapt2", get="make test-android")
    for needed in ("kotlin/kotlin-compiler.jar", "android.jar", "executorch.jar"):
        if not (DEMO / "build/tools" / needed).exists():
            pytest.skip(f"android-demo/build/tools/{needed} is missing: make test-android")
    done = subprocess.run([DEMO / "tools/compile-executorch.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    made = DEMO / "build/executorch/classes/io/edgekd/demo"
    assert (made / "ExecutorchEngine.class").exists() and not (made / "GgufEngine.class").exists()


def test_the_apk_is_signed_aligned_and_asks_for_nothing() -> None:
    for name in ("aapt2", "zipalign", "apksigner", "clang", "ld.lld", "dexdump", "keytool"):
        tool(name, get="make test-android")
    if not (DEMO / "build/tools/android.jar").exists():
        pytest.skip("android-demo/build/tools is missing: make test-android")
    done = subprocess.run([DEMO / "tools/build-apk.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    apk = DEMO / "build/edgekd-demo.apk"

    def told(*command: object) -> str:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "Verified using v2 scheme (APK Signature Scheme v2): true" in told("apksigner", "verify", "-v", apk)
    told("zipalign", "-c", "-p", "4", apk)
    checked = subprocess.run(["zipalign", "-c", "-v", "16384", apk], capture_output=True, text=True).stdout
    libraries = [line for line in checked.splitlines() if ".so " in line]
    assert len(libraries) == 4 and all(line.endswith("(OK)") for line in libraries), checked
    assert "uses-permission" not in told("aapt2", "dump", "badging", apk)
    names = told("unzip", "-Z1", apk).split()
    for abi in ("arm64-v8a", "x86_64"):
        assert {f"lib/{abi}/libedgekd_jni.so", f"lib/{abi}/librnllama.so"} <= set(names)
    assert "Lio/edgekd/demo/MainActivity;" in told("dexdump", apk)
