"""Damaged and hostile artifacts, their sums put right: a sentence or success, never the caller's death or a hang."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from artifacts import forge, proto, run

from edgekd import targets
from edgekd.errors import BadArtifact, EdgekdError
from edgekd.manifest import load_artifact
from edgekd.spec import TargetSpec

NAMES = ("gguf", "onnx", "coreml", "executorch")
MUTANTS = {"gguf": 100, "onnx": 60, "coreml": 60, "executorch": 30}


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of every target."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name in NAMES:
        spec = TargetSpec(target=name, recipes=["portable-int4"], context=64)
        targets.export(tiny_teacher, spec, "portable-int4", folder / name, name="tiny")
    return {name: folder / name for name in NAMES}


def refused(artifact: Path, said: str = "", kind: type[EdgekdError] = BadArtifact) -> None:
    start = time.monotonic()
    with pytest.raises(kind, match=said):
        targets.open_artifact(artifact, threads=1)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("name", NAMES)
def test_mutants(made: dict[str, Path], name: str) -> None:
    counts, wrong = run(made[name], MUTANTS[name])
    assert wrong == []
    assert counts["trial passes"] and counts["trial refused"], counts
    assert not counts["trial hangs"]


def contract(artifact: Path, **change: int) -> dict[str, Any]:
    return load_artifact(artifact).manifest.contract.model_dump() | change


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [{"context_length": 2**24}, {"context_length": 65}, {"vocab_size": 319}])
def test_the_manifests_numbers_are_the_models(
    made: dict[str, Path], tmp_path: Path, name: str, change: dict[str, int]
) -> None:
    forged = forge(made[name], tmp_path / "forged", {}, contract=contract(made[name], **change))
    refused(forged, "context" if "context_length" in change else "vocabulary")


@pytest.mark.parametrize(("name", "file"), [(name, "tokenizer.json") for name in NAMES[1:]] + [("onnx", "head.onnx")])
def test_a_file_that_is_needed_must_be_listed(made: dict[str, Path], tmp_path: Path, name: str, file: str) -> None:
    manifest = load_artifact(made[name]).manifest
    files = {key: value for key, value in manifest.files.items() if key != file}
    refused(forge(made[name], tmp_path / "forged", {}, files=files), f"does not list '{file}'")


def test_nothing_is_hidden_in_a_package(made: dict[str, Path], tmp_path: Path) -> None:
    forged = forge(made["coreml"], tmp_path / "forged", {})
    (forged / "model.mlpackage" / "Data" / "more").write_bytes(b"x")
    refused(forged, "does not list 'model.mlpackage/Data/more'")


def test_nothing_is_hidden_from_genai(made: dict[str, Path], tmp_path: Path) -> None:
    details = load_artifact(made["onnx"]).manifest.details
    assert details
    details["tokenizer"]["used"] = "onnxruntime-genai"
    forged = forge(made["onnx"], tmp_path / "forged", {}, details=details)
    (forged / "special_tokens_map.json").write_text("{}")
    refused(forged, "does not list 'special_tokens_map.json'")


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("change", ["none", "empty", "missing", "mistyped", "more"])
def test_details_have_keys_and_types(made: dict[str, Path], tmp_path: Path, name: str, change: str) -> None:
    details: dict[str, Any] = load_artifact(made[name]).manifest.details or {}
    key = next(reversed(details))
    forged: dict[str, Any] | None = {
        "none": None,
        "empty": {},
        "missing": {k: v for k, v in details.items() if k != key},
        "mistyped": details | {key: [3]},
        "more": details | {"more": 1},
    }[change]
    refused(forge(made[name], tmp_path / "forged", {}, details=forged), "details: key")


def edit_gguf(artifact: Path, out: Path, key: str, value: int | float) -> Path:
    """Another number for a key of the header."""
    data = bytearray((artifact / "model.gguf").read_bytes())
    at = data.index(key.encode()) + len(key)
    kind = int.from_bytes(data[at : at + 4], "little")
    data[at + 4 : at + 8] = struct.pack({4: "<I", 6: "<f"}[kind], value)
    return forge(artifact, out, {"model.gguf": bytes(data)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen3.block_count", 0), ("qwen3.block_count", 2**31), ("qwen3.attention.layer_norm_rms_epsilon", -1.0),
        ("qwen3.attention.head_count", 0), ("qwen3.attention.head_count_kv", 0), ("qwen3.embedding_length", 0),
        ("qwen3.attention.key_length", 2**30), ("qwen3.context_length", 0),
    ],
)  # fmt: skip
def test_numbers_of_gguf(made: dict[str, Path], tmp_path: Path, key: str, value: float) -> None:
    refused(edit_gguf(made["gguf"], tmp_path / "forged", key, value))


def test_a_context_that_file_and_manifest_agree_on_takes_no_memory(made: dict[str, Path], tmp_path: Path) -> None:
    forged = edit_gguf(made["gguf"], tmp_path / "one", "qwen3.context_length", 2**24)
    forged = forge(forged, tmp_path / "two", {}, contract=contract(forged, context_length=2**24))
    refused(forged, "makes no context of 16777216 tokens", EdgekdError)


def test_tensor_types_of_gguf(made: dict[str, Path], tmp_path: Path) -> None:
    whole = (made["gguf"] / "model.gguf").read_bytes()
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    for kind in (4, 5, 9, 24, 36, 39, 99, 2**31):
        data = whole[:at] + struct.pack("<I", kind) + whole[at + 4 :]
        refused(forge(made["gguf"], tmp_path / "forged", {"model.gguf": data}), r"model\.gguf|tried in a process")


def edit_onnx(artifact: Path, out: Path, change: Any, file: str = "model.onnx") -> Path:
    import onnx

    model = onnx.load(artifact / file, load_external_data=False)
    change(model.graph)
    return forge(artifact, out, {file: model.SerializeToString()})


@pytest.mark.parametrize("name", ["../outside.data", "/etc/passwd", "unlisted.data", "manifest.json", "a\0b"])
@pytest.mark.parametrize("file", ["model.onnx", "head.onnx"])
def test_data_of_onnx_is_the_artifacts_own(made: dict[str, Path], tmp_path: Path, name: str, file: str) -> None:
    def change(graph: Any) -> None:
        entries = [entry for one in graph.initializer for entry in one.external_data if entry.key == "location"]
        entries[-1].value = name

    data = made["onnx"] / "model.onnx.data"
    shutil.copy(data, tmp_path / "outside.data")
    forged = edit_onnx(made["onnx"], tmp_path / "forged", change, file)
    shutil.copy(data, forged / "unlisted.data")
    refused(forged, "does not list")


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: graph.ClearField("output"),
        lambda graph: graph.ClearField("input"),
        lambda graph: graph.output.pop(0),
        lambda graph: graph.output[0].type.tensor_type.shape.dim.pop(),
        lambda graph: setattr(graph.output[0].type.tensor_type.shape.dim[2], "dim_param", "V"),
        lambda graph: graph.ClearField("node"),
    ],
)
def test_graphs_that_are_no_decoders(made: dict[str, Path], tmp_path: Path, change: Any) -> None:
    refused(edit_onnx(made["onnx"], tmp_path / "forged", change))


def test_paths_in_a_package_stay_inside(made: dict[str, Path], tmp_path: Path) -> None:
    name = "model.mlpackage/Manifest.json"
    manifest = json.loads((made["coreml"] / name).read_text())
    entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    for path in ("../../../outside", "/etc/passwd", "a\0b", 3):
        entry["path"] = path
        refused(forge(made["coreml"], tmp_path / "forged", {name: json.dumps(manifest).encode()}), "outside|path")


def test_the_harness_sees_a_caller_die(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    import artifacts

    monkeypatch.setattr(artifacts, "as_caller", lambda folder: os.abort())
    counts, wrong = run(made["gguf"], 20)
    assert counts["caller signal SIGABRT"] == len(wrong) == counts["trial passes"] > 0


def test_mutations_of_a_message_change_it() -> None:
    import random

    import onnx

    model = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node("Add", ["a", "b"], ["c"])], "g", [], [])
    )
    data = model.SerializeToString()
    assert len({proto(onnx.ModelProto)(data, random.Random(seed)) for seed in range(50)}) > 20
