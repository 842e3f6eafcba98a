"""ios-demo/: its project, plists and sources; where Swift is, core's tests, the engines and the app's types too."""

from __future__ import annotations

import base64
import json
import plistlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demos import IDS, QUESTION, ROOT, llama_cpp, make_artifact, make_bundle, tool
from edgekd import targets
from edgekd.conversation import chat_ids, render_chat
from edgekd.files import Json, digest
from edgekd.manifest import MANIFEST, Artifact, load_artifact
from edgekd.proof import BenchRecord
from edgekd.targets.coreml.session import Interpreted, step_inputs
from edgekd.targets.coreml.target import MINIMUM_IOS
from scripted import spoken

DEMO = ROOT / "ios-demo"
APP, PROJECT = DEMO / "App/EdgekdDemo", DEMO / "App/EdgekdDemo.xcodeproj/project.pbxproj"
SWIFT = DEMO / "tools/swift.sh"
TEXTS = [
    "Hello, world!",
    "def f(x):\n    return x + 1\n",
    "naïve café 你好 🚀 12345",
    "<|im_end|> is text",
    " ",
    "\x0b\x85",
]


def sources(*folders: str) -> dict[Path, str]:
    """The Swift of some folders, and its text."""
    return {path: path.read_text("utf-8") for name in folders for path in sorted((DEMO / name).rglob("*.swift"))}


SHIPPED = sources("Sources/EdgeCore", "Sources/EdgeLlama", "Sources/EdgeCoreML", "Sources/EdgeExecuTorch", "App")


# --- everywhere -------------------------------------------------------------------------------------------------------


def test_the_project_builds_every_file_of_the_app_and_links_the_package() -> None:
    project: Any = pytest.importorskip("pbxproj").XcodeProject.load(str(PROJECT))
    at = project.objects
    (target,) = at.get_targets()
    phases = {at[phase].isa: [at[file] for file in at[phase].files] for phase in target.buildPhases}

    def paths(phase: str) -> list[str]:
        return sorted(at[file.fileRef].path for file in phases[phase])

    assert paths("PBXSourcesBuildPhase") == sorted(path.name for path in APP.glob("*.swift"))
    assert paths("PBXResourcesBuildPhase") == ["PrivacyInfo.xcprivacy"]
    linked = [at[file.productRef].productName for file in phases["PBXFrameworksBuildPhase"]]
    assert linked == [at[one].productName for one in target.packageProductDependencies] == ["EdgeDemo"]
    groups = [group for group in at.get_objects_in_section("PBXGroup") if "path" in group]
    assert [group.path for group in groups] == [APP.name]
    assert sorted(at[child].path for child in groups[0].children) == sorted(path.name for path in APP.iterdir())
    (package,) = at.get_objects_in_section("XCLocalSwiftPackageReference")
    assert 'name: "EdgeDemo"' in (PROJECT.parents[1] / package.relativePath / "Package.swift").read_text("utf-8")
    for settings in at.get_configurations_on_targets():
        for key in ("INFOPLIST_FILE", "CODE_SIGN_ENTITLEMENTS"):
            assert (PROJECT.parents[1] / settings.buildSettings[key]).is_file()
    identifiers = re.findall(r"^\t\t(\w{24})\b[^\n]* = \{", PROJECT.read_text("utf-8"), re.M)
    assert len(identifiers) == len(set(identifiers)) > 20


def test_the_app_project_and_package_ask_for_the_system_that_the_exporter_does() -> None:
    assert set(re.findall(r"IPHONEOS_DEPLOYMENT_TARGET = ([\d.]+);", PROJECT.read_text("utf-8"))) == {
        f"{MINIMUM_IOS}.0"
    }
    assert f".iOS(.v{MINIMUM_IOS})" in (DEMO / "Package.swift").read_text("utf-8")


def test_the_app_asks_for_memory_and_for_nothing_else() -> None:
    entitlements = plistlib.loads((APP / "EdgekdDemo.entitlements").read_bytes())
    assert entitlements == {"com.apple.developer.kernel.increased-memory-limit": True}
    info = plistlib.loads((APP / "Info.plist").read_bytes())
    asked = [key for key in info if "UsageDescription" in key or key in ("NSAppTransportSecurity", "UIBackgroundModes")]
    assert asked == []
    assert info["EdgekdBundleKey"] == "" and info["UIFileSharingEnabled"] and info["UIRequiredDeviceCapabilities"]


NETWORK = (
    r"URLSession|URLRequest|import Network\b|NWConnection|CFSocket|CFStream|WebKit|\bsocket\(|\bconnect\(|https?://"
)


def test_the_app_names_nothing_that_reaches_a_network() -> None:
    assert len(SHIPPED) > 20
    found = [(path.name, match[0]) for path, text in SHIPPED.items() for match in re.finditer(NETWORK, text)]
    assert found == []


REASONS = {
    "NSPrivacyAccessedAPICategoryDiskSpace": r"volumeAvailableCapacity|volumeTotalCapacity|systemFreeSize|systemSize\b",
    "NSPrivacyAccessedAPICategoryFileTimestamp": r"\.creationDate|\.modificationDate|contentModification|\bf?stat\(",
    "NSPrivacyAccessedAPICategorySystemBootTime": r"systemUptime|mach_absolute_time",
    "NSPrivacyAccessedAPICategoryUserDefaults": r"UserDefaults|AppStorage",
    "NSPrivacyAccessedAPICategoryActiveKeyboards": r"activeInputModes",
}
"""Of Apple's list of interfaces that need a reason, what an app like this might call."""


def test_the_privacy_manifest_names_what_the_app_calls() -> None:
    privacy = plistlib.loads((APP / "PrivacyInfo.xcprivacy").read_bytes())
    assert privacy["NSPrivacyTracking"] is False
    assert privacy["NSPrivacyTrackingDomains"] == privacy["NSPrivacyCollectedDataTypes"] == []
    text = "\n".join(SHIPPED.values())
    called = {category for category, names in REASONS.items() if re.search(names, text)}
    declared = {one["NSPrivacyAccessedAPIType"] for one in privacy["NSPrivacyAccessedAPITypes"]}
    assert declared == called and all(
        one["NSPrivacyAccessedAPITypeReasons"] for one in privacy["NSPrivacyAccessedAPITypes"]
    )


# --- where Swift is ---------------------------------------------------------------------------------------------------

swift_only = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def swift() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of Swift's toolchain."""

    def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        return subprocess.run([SWIFT, *words], cwd=DEMO, capture_output=True, text=True, **options)

    if (there := run("swift", "--version")).returncode:
        pytest.skip(there.stderr.strip().splitlines()[-1])
    return run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libllama of this machine with its headers, in a folder that Swift's toolchain sees."""
    include, lib = llama_cpp()
    folder = tmp_path_factory.mktemp("llama")
    shutil.copytree(lib, folder / "lib")
    shutil.copytree(include, folder / "include")
    return folder


@pytest.fixture(scope="module")
def built(swift: Any, llama: Path) -> Path:
    """Where what was built of the package lies; core's own tests have passed."""
    out = DEMO / "build/tests"
    options = ["-c", "release", "-Xswiftc", "-enable-testing", "--scratch-path", str(out)]
    done = swift("env", f"EDGEKD_LLAMA={llama}", "swift", "test", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ran = re.findall(r"Executed (\d+) tests, with (\d+) failures", done.stdout + done.stderr)
    assert ran and int(ran[-1][0]) > 30 and int(ran[-1][1]) == 0, ran
    return out / "release/drive"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact("gguf", tmp_path_factory.mktemp("artifact") / "gguf")


def drive(built: Path, wrapper: list[str] | None = None, **job: object) -> dict[str, Any]:
    """What the app's core and engines made of a job."""
    command = [*(wrapper or []), str(SWIFT), str(built), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


class TestSwift:
    pytestmark = swift_only

    def test_the_sources_are_formatted(self, swift: Any) -> None:
        names = ["Package.swift", "Sources", "Tests/EdgeCoreTests", "App"]
        done = swift("swift-format", "lint", "--strict", "--recursive", *names)
        assert done.returncode == 0, done.stderr[-3000:]

    def test_the_app_and_apples_engines_have_types(self, swift: Any, tmp_path: Path) -> None:
        assert (done := swift("tools/typecheck.sh", tmp_path)).returncode == 0, done.stderr[-3000:]
        for path, right, wrong in (
            (APP / "ContentView.swift", "model.isBusy", "model.isBussy"),
            (DEMO / "Sources/EdgeCoreML/CoreMLRunner.swift", "?.makeState()", "?.makeStates()"),
        ):
            copy = tmp_path / path.name
            copy.write_text(path.read_text("utf-8").replace(right, wrong), "utf-8")
            others = [other for other in path.parent.glob("*.swift") if other != path]
            done = swift("swiftc", "-typecheck", "-parse-as-library", "-I", tmp_path, copy, *others)
            assert done.returncode and wrong.split(".")[1].strip("()") in done.stderr, "a name that is none goes unseen"

    def test_the_apps_engine_says_what_the_session_says(self, built: Path, gguf: Artifact, tmp_path: Path) -> None:
        found = drive(built, folder=str(gguf.folder), ids=IDS, count=24, chat=QUESTION, texts=TEXTS)
        shown = drive(built, folder=str(gguf.folder), root=str(tmp_path / "app"), chat=QUESTION, bench=True)
        session, contract = targets.open_artifact(gguf, threads=1), gguf.manifest.contract
        chat = render_chat(
            contract.chat_template or "", [{"role": "user", "content": QUESTION}], contract.special_tokens
        )
        prompt, tokens = chat_ids(session, contract, chat), list(session.generate(IDS, 24))
        assert found["tokens"] == tokens and len(tokens) == 24
        assert found["prompt"] == prompt
        assert found["texts"] == found["texts_by_file"] == [session.tokenize(text) for text in TEXTS]
        assert found["bytes"] == found["bytes_by_file"] == list(b"".join(map(session.token_bytes, tokens)))
        assert shown["answer"] == spoken(session, session.generate(prompt, 512))
        session.close()
        same = sum(len(answer.tokens) for answer in gguf.manifest.parity.golden)
        assert (
            f"pycode, gguf portable-int4: files checked, {same} golden tokens the same." in shown["told"] and same > 20
        )
        record = BenchRecord.model_validate_json((tmp_path / "app/benchmark.json").read_text("utf-8"))
        assert record.files_digest == digest(gguf.manifest.files) and record.size_bytes == gguf.size_bytes
        benchmark = record.benchmark
        assert benchmark.settings.ttft_from == "text" and benchmark.settings.prompt_tokens == [16, 64]
        for figure in (
            benchmark.load_s,
            benchmark.decode_tokens_per_s,
            benchmark.ttft_s["64"],
            benchmark.peak_rss_bytes,
        ):
            assert figure.value and figure.value > 0 and len(figure.samples) == 2

    def test_the_core_ml_program_is_driven_as_the_session_drives_it(self, built: Path, tmp_path: Path) -> None:
        artifact = make_artifact("coreml", tmp_path / "coreml")
        job = {"folder": str(artifact.folder), "ids": IDS, "count": 12, "chat": QUESTION, "texts": TEXTS}
        runner, steps = Interpreted(artifact.main_file.parent), []

        def answer(given: Json) -> object:
            if "reset" in given:
                return runner.reset()
            steps.append(len(given["inputIds"]))
            return logits(runner, given)

        found = converse([str(SWIFT), str(built), json.dumps(job)], answer)
        session, contract = targets.open_artifact(artifact), artifact.manifest.contract
        assert found["tokens"] == list(session.generate(IDS, 12)) and len(found["tokens"]) == 12
        chat = render_chat(
            contract.chat_template or "", [{"role": "user", "content": QUESTION}], contract.special_tokens
        )
        assert found["prompt"] == chat_ids(session, contract, chat)
        assert found["texts"] == [session.tokenize(text) for text in TEXTS]
        session.close()
        assert steps == [len(IDS), *[1] * 11]

    def test_a_signed_bundle_comes_and_reads_what_it_read(self, built: Path, gguf: Artifact, tmp_path: Path) -> None:
        pytest.importorskip("cryptography")
        key = make_bundle(gguf, tmp_path / "bundle", "ios")
        job = {"folder": str(tmp_path / "bundle"), "root": str(tmp_path / "app"), "key": key, "verifies": True}
        told = converse([str(SWIFT), str(built), json.dumps(job)], is_signed)
        answers = load_artifact(tmp_path / "bundle").manifest.parity.golden
        tokens = sum(len(answer.tokens) for answer in answers)
        assert f"{tokens} golden tokens the same" in told["told"][-1] and sum(bool(a.text) for a in answers) == 6
        assert (tmp_path / "app/model/LICENSE").is_file()
        told = drive(built, **job | {"verifies": False})
        assert told["refused"] == "no_ed25519", "a system without CryptoKit takes no bundle for verified"

    def test_bundles_as_the_vectors_have_them(self, built: Path, tmp_path: Path) -> None:
        pytest.importorskip("cryptography")
        cases = json.loads((ROOT / "tests/vectors/bundles.json").read_text("utf-8"))["cases"]
        for number, case in enumerate(cases):
            folder = tmp_path / str(number)
            for name, text in (
                case["files"] | {"bundle.json": case["bundle"], "bundle.sig": case["signature"]}
            ).items():
                if text is not None:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(text.encode())
            job = {"folder": str(folder), "check": True, "key": case["public_key"], "verifies": True}
            told = converse([str(SWIFT), str(built), json.dumps(job)], is_signed)
            assert {key: told[key] for key in ("ok", "refused") if key in told} == case["expect"], case["name"]

    def test_what_is_wrong_is_told_in_a_sentence(self, built: Path, gguf: Artifact, tmp_path: Path) -> None:
        for kind, code in DAMAGE.items():
            folder = damaged(gguf, tmp_path / kind, kind)
            told = drive(built, folder=str(folder), root=str(tmp_path / "app"))
            assert told["refused"] == code, (kind, told)
            assert re.fullmatch(r"[A-Zg-z][^\n]+\.", told["words"]), told
        told = drive(built, folder=str(gguf.folder), root=str(tmp_path / "app"), available=2**20)
        assert told["refused"] == "memory" and "there are 1 MiB" in told["words"]

    def test_a_storage_that_is_full_half_way_is_told(self, built: Path, gguf: Artifact, tmp_path: Path) -> None:
        root = tmp_path / "app"
        root.mkdir()
        mount = f'mount -t tmpfs -o size=4m tmpfs {root} && exec "$@"'
        wrapper = [tool("unshare", get="apt install util-linux"), "--mount", "sh", "-c", mount, "-"]
        if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
            pytest.skip("only root can make a small storage here")
        assert gguf.size_bytes > 2**22
        told = drive(built, wrapper, folder=str(gguf.folder), root=str(root))
        assert told["refused"] == "storage" and "No space left on device" in told["words"]

    def test_an_app_that_is_ended_while_it_loads_says_so_once(
        self, built: Path, gguf: Artifact, tmp_path: Path
    ) -> None:
        root, mark = tmp_path / "app", tmp_path / "app/loading"
        drive(built, folder=str(gguf.folder), root=str(root))
        process = subprocess.Popen([SWIFT, built, json.dumps({"root": str(root)})], stdout=subprocess.PIPE)
        while not mark.exists():
            assert process.poll() is None, "it has ended by itself"
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert mark.exists()
        told = drive(built, root=str(root))
        assert told["refused"] == "ended" and "while it loaded" in told["words"]
        assert "golden tokens the same" in drive(built, root=str(root))["told"][-1]


DAMAGE = {
    "a wrong hash": "file_changed",
    "a truncated file": "file_changed",
    "a missing file": "file_missing",
    "a newer schema": "newer_schema",
    "another runtime": "other_target",
    "other tokens": "self_test",
    "a GGUF that is none": "not_loaded",
    "another vocabulary": "bad_value",
}


def damaged(artifact: Artifact, folder: Path, kind: str) -> Path:
    """A copy of an artifact with one fault."""
    shutil.copytree(artifact.folder, folder)
    manifest, model = json.loads((folder / MANIFEST).read_text("utf-8")), folder / artifact.manifest.main_file
    if kind == "a wrong hash":
        manifest["files"]["tokenizer.json"] = "0" * 64
    elif kind == "a truncated file":
        model.write_bytes(model.read_bytes()[:-100])
    elif kind == "a missing file":
        model.unlink()
    elif kind == "a newer schema":
        manifest["schema_version"] = 2
    elif kind == "another runtime":
        manifest["target"] = "onnx"
    elif kind == "other tokens":
        manifest["parity"]["golden"][0]["tokens"][0] ^= 1
    elif kind == "a GGUF that is none":
        shutil.copyfile(folder / "tokenizer.json", model)
        manifest["files"][model.name] = manifest["files"]["tokenizer.json"]
    elif kind == "another vocabulary":
        manifest["contract"]["vocab_size"] += 1
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return folder


def is_signed(given: Json) -> bool:
    """Ed25519, for a driver that has the bytes."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key, signature, data = map(base64.b64decode, given["verify"])
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def converse(command: list[str], answer: Callable[[Json], object]) -> dict[str, Any]:
    """Answers a driver line by line, until it tells what it made of its job."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    told: dict[str, Any] = {}
    for told in map(json.loads, process.stdout):
        if not {"inputIds", "reset", "verify"} & set(told):
            break
        process.stdin.write(json.dumps(answer(told)) + "\n")
        process.stdin.flush()
    process.communicate()
    assert process.returncode == 0
    return told


def logits(runner: Interpreted, given: Json) -> list[float]:
    """Of the last token; what the driver gives are the session's own inputs."""
    wanted = step_inputs(given["inputIds"], given["positionIds"][0], all_logits=False)
    shapes = {"inputIds": (1, -1), "positionIds": (1, -1), "outputIds": (-1,)}
    inputs = {key: np.array(given[key], wanted[key].dtype).reshape(shape) for key, shape in shapes.items()}
    inputs["causalMask"] = np.array(given["causalMask"], np.float16)[None, None]
    for key, value in wanted.items():
        assert inputs[key].shape == value.shape and (inputs[key] == value).all(), key
    return runner.run(inputs)[0, -1].astype(np.float32).tolist()
