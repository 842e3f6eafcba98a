"""Damaged and hostile artifacts, their sums put right: a sentence or success, never the caller's death or a hang."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import artifacts
import onnx
import pytest
from artifacts import forge, proto

from edgekd import targets
from edgekd.errors import BadArtifact, EdgekdError
from edgekd.manifest import load_artifact
from edgekd.spec import TargetSpec
from edgekd.targets.coreml.mil.package import proto as package_proto
from edgekd.targets.shared.proto import messages

NAMES = ("gguf", "onnx", "coreml", "executorch")
MUTANTS = {"gguf": 100, "onnx": 60, "coreml": 40, "executorch": 20}
PACKAGE = "model.mlpackage/Manifest.json"
Forge = Callable[[Path, Path], Path]
"""Makes of an artifact another, in a new folder."""


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of every target."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name in NAMES:
        spec = TargetSpec(target=name, recipes=["portable-int4"], context=64)
        targets.export(tiny_teacher, spec, "portable-int4", folder / name, name="tiny")
    return {name: folder / name for name in NAMES}


def harness(*arguments: object) -> Any:
    """The harness in a process that has no threads yet, and may fork."""
    command = [sys.executable, artifacts.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_mutants(made: dict[str, Path], name: str) -> None:
    told = harness(made[name], "--count", MUTANTS[name])
    assert told["wrong"] == []
    assert told["counts"]["trial passes"] and told["counts"]["trial refused"], told
    assert "trial hangs" not in told["counts"]


# --- one change each --------------------------------------------------------------------------------------------------


def contract(**change: int) -> Forge:
    return lambda artifact, out: forge(
        artifact, out, {}, contract=load_artifact(artifact).manifest.contract.model_dump() | change
    )


def details(change: Callable[[dict[str, Any]], Any]) -> Forge:
    def build(artifact: Path, out: Path) -> Path:
        told = load_artifact(artifact).manifest.details
        assert told
        return forge(artifact, out, {}, details=change(told))

    return build


def unlisted(name: str) -> Forge:
    def build(artifact: Path, out: Path) -> Path:
        files = load_artifact(artifact).manifest.files
        return forge(artifact, out, {}, files={key: value for key, value in files.items() if key != name})

    return build


def beside(name: str, data: bytes, build: Forge) -> Forge:
    def with_file(artifact: Path, out: Path) -> Path:
        forged = build(artifact, out)
        (forged / name).write_bytes(data)
        return forged

    return with_file


def gguf_key(key: str, value: float) -> Forge:
    """Another number for a key of the header."""

    def build(artifact: Path, out: Path) -> Path:
        data = bytearray((artifact / "model.gguf").read_bytes())
        at = data.index(key.encode()) + len(key)
        kind = int.from_bytes(data[at : at + 4], "little")
        data[at + 4 : at + 8] = struct.pack({4: "<I", 6: "<f"}[kind], value)
        return forge(artifact, out, {"model.gguf": bytes(data)})

    return build


def gguf_tensor_type(kind: int) -> Forge:
    def build(artifact: Path, out: Path) -> Path:
        whole = (artifact / "model.gguf").read_bytes()
        at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
        return forge(artifact, out, {"model.gguf": whole[:at] + struct.pack("<I", kind) + whole[at + 4 :]})

    return build


def graph(change: Callable[[Any], Any], file: str = "model.onnx") -> Forge:
    def build(artifact: Path, out: Path) -> Path:
        model = onnx.load(artifact / file, load_external_data=False)
        change(model.graph)
        return forge(artifact, out, {file: model.SerializeToString()})

    return build


def data_of(file: str, name: str) -> Forge:
    """A graph that takes one of its tensors from another file, which is there."""

    def change(graph: Any) -> None:
        entries = [entry for one in graph.initializer for entry in one.external_data if entry.key == "location"]
        entries[-1].value = name

    def build(artifact: Path, out: Path) -> Path:
        forged = graph(change, file)(artifact, out)
        for place in (forged, forged.parent):
            shutil.copy(artifact / "model.onnx_data", place / "other.data")
        return forged

    return build


def package_path(path: Any) -> Forge:
    def build(artifact: Path, out: Path) -> Path:
        manifest = json.loads((artifact / PACKAGE).read_text("utf-8"))
        manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path
        return forge(artifact, out, {PACKAGE: json.dumps(manifest).encode()})

    return build


def weight_file(name: str) -> Forge:
    """A program that takes one of its tensors from another file."""

    def build(artifact: Path, out: Path) -> Path:
        model = package_proto("Model_pb2").Model()
        (file,) = [file for file in load_artifact(artifact).manifest.files if file.endswith(".mlmodel")]
        model.ParseFromString((artifact / file).read_bytes())
        list(messages(model, "BlobFileValue"))[-1].fileName = name
        return forge(artifact, out, {file: model.SerializeToString()})

    return build


def last_key(told: dict[str, Any]) -> str:
    return list(told)[-1]


def by_genai(told: dict[str, Any]) -> dict[str, Any]:
    return told | {"tokenizer": told["tokenizer"] | {"used": "onnxruntime-genai"}}


BOUNDS = {
    "context of 2^24": (contract(context_length=2**24), "context"),
    "context of one more": (contract(context_length=65), "65"),
    "vocabulary of one less": (contract(vocab_size=319), "a vocabulary of 320, the manifest one of 319"),
    "vocabulary of one more": (contract(vocab_size=321), "a vocabulary of 320, the manifest one of 321"),
}
DETAILS = {
    "none": (details(lambda told: None), "details: key"),
    "empty": (details(lambda told: {}), "details: key"),
    "missing": (details(lambda told: {k: v for k, v in told.items() if k != last_key(told)}), "details: key"),
    "mistyped": (details(lambda told: told | {last_key(told): [3]}), "details: key"),
    "more": (details(lambda told: told | {"more": 1}), "details: key 'more'"),
}
NO_TOKENIZER = {"tokenizer not listed": (unlisted("tokenizer.json"), "does not list 'tokenizer.json'")}
CASES: dict[str, dict[str, tuple[Forge, str]]] = {
    "gguf": BOUNDS
    | {
        f"{key} {value}": (gguf_key(f"qwen3.{key}", value), "")
        for key, value in (
            ("block_count", 0),
            ("block_count", 2**31),
            ("attention.layer_norm_rms_epsilon", -1.0),
            ("attention.head_count", 0),
            ("attention.head_count_kv", 0),
            ("embedding_length", 0),
            ("attention.key_length", 2**30),
            ("context_length", 0),
        )
    }
    | {f"type {kind}": (gguf_tensor_type(kind), "") for kind in (4, 5, 9, 24, 36, 39, 99, 2**31)},
    "onnx": BOUNDS
    | DETAILS
    | NO_TOKENIZER
    | {
        "head not listed": (unlisted("head.onnx"), "does not list 'head.onnx'"),
        "file for genai": (
            beside("special_tokens_map.json", b"{}", details(by_genai)),
            "does not list 'special_tokens_map.json'",
        ),
        "no outputs": (graph(lambda graph: graph.ClearField("output")), ""),
        "no inputs": (graph(lambda graph: graph.ClearField("input")), ""),
        "no logits": (graph(lambda graph: graph.output.pop(0)), "gives no logits"),
        "no nodes": (graph(lambda graph: graph.ClearField("node")), ""),
    }
    | {
        f"{file} {name!r}": (data_of(file, name), "does not list")
        for file in ("model.onnx", "head.onnx")
        for name in ("../other.data", "/etc/passwd", "other.data", "manifest.json", "a\0b")
    },
    "coreml": BOUNDS
    | DETAILS
    | NO_TOKENIZER
    | {"more in the package": (beside("model.mlpackage/more", b"x", contract()), "does not list")}
    | {f"path {path!r}": (package_path(path), "outside|path") for path in ("../../../x", "/etc/passwd", "a\0b", 3)}
    | {
        f"weights {name!r}": (weight_file(name), "outside the package")
        for name in (
            "@model_path/../../../../onnx/model.onnx_data",
            "@model_path//etc/passwd",
            "/etc/passwd",
            "@model_path/a\0b",
        )
    },
    "executorch": BOUNDS | DETAILS | NO_TOKENIZER,
}


@pytest.mark.parametrize("name", NAMES)
def test_one_change_is_one_sentence(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    cases = list(CASES[name].items())
    forged = [build(made[name], tmp_path / str(number)) for number, (_, (build, _)) in enumerate(cases)]
    ends = harness(*forged, "--count", 0)
    for path, (what, (_, said)) in zip(forged, cases, strict=True):
        end = ends[path.name].removeprefix("refused: ")
        if not said:  # in a process of its own: all but passing and hanging will do
            assert end not in ("passes", "hangs"), what
        else:
            assert end.startswith("BadArtifact") and any(one in end for one in said.split("|")), (what, end)


def test_the_caller_gets_the_sentence(made: dict[str, Path], tmp_path: Path) -> None:
    forged = gguf_key("qwen3.attention.layer_norm_rms_epsilon", -1.0)(made["gguf"], tmp_path / "forged")
    with pytest.raises(BadArtifact, match="tried in a process of its own, it ends the process by SIGABRT"):
        targets.open_artifact(forged, threads=1)


def test_a_context_that_file_and_manifest_agree_on_is_bounded_too(made: dict[str, Path], tmp_path: Path) -> None:
    long = gguf_key("qwen3.context_length", 2**24)(made["gguf"], tmp_path / "one")
    with pytest.raises(EdgekdError, match="makes no context of 16777216 tokens"):
        targets.open_artifact(contract(context_length=2**24)(long, tmp_path / "two"), threads=1)


def test_the_harness_sees_a_caller_die(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([("passes", 0), ("signal: SIGABRT", 0), ("refused: x", 0), ("passes", 0), ("passes", 2**31)])
    monkeypatch.setattr(artifacts, "in_fork", lambda *arguments: next(ends))
    counts, wrong = artifacts.run(made["gguf"], 3)
    assert counts == {"trial passes": 2, "caller signal SIGABRT": 1, "trial refused": 1, "caller passes": 1}
    assert len(wrong) == 2 and "SIGABRT" in wrong[0] and "2147 MB" in wrong[1]


def test_mutations_of_a_message_change_it() -> None:
    node = onnx.helper.make_node("Add", ["a", "b"], ["c"])
    data = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])).SerializeToString()
    assert len({proto(onnx.ModelProto)(data, random.Random(seed)) for seed in range(50)}) > 20
