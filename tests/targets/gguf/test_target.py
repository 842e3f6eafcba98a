"""The GGUF target against transformers in fp32, on two-layer random models, through llama.cpp itself."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cases import (
    ARCHITECTURES,
    IDS,
    LLAMA3_ROPE,
    export_to,
    logits,
    mean_kl,
    reference,
    spec_of,
)
from edgekd import targets
from edgekd.architecture import read_architecture
from edgekd.checkpoint import Checkpoint
from edgekd.errors import BadArtifact, EdgekdError, SpecError, Unsupported
from edgekd.files import file_sha256
from edgekd.manifest import load_artifact
from edgekd.quant.calibrate import second_moments
from edgekd.quant.grid import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8_rows
from edgekd.quant.quantize import quantize
from edgekd.quant.store.reader import open_quantized
from edgekd.spec import TargetSpec
from edgekd.targets import load_recipe

TOLERANCE = 0.1
"""Between llama.cpp's kernels for one token and for many, on logits of standard deviation 1 to 3: both round
activations and cache to fp16, in another order."""

spec, export = partial(spec_of, "gguf"), partial(export_to, "gguf")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_f16_agrees_with_transformers(name: str, tmp_path: Path, student_factory: Any) -> None:
    kind, settings = ARCHITECTURES[name]
    student = student_factory(tmp_path / "student", kind, **settings)
    artifact = export(student, "fp16", tmp_path / "out")
    expected, actual = reference(student, IDS), logits(artifact, IDS)
    difference = np.abs(expected - actual).max()
    best = np.sort(expected, axis=-1)
    clear = best[:, -1] - best[:, -2] > 0.04  # nearer ties fp16 may order otherwise
    assert difference < 0.02 and clear.mean() > 0.8
    assert np.array_equal(expected.argmax(-1)[clear], actual.argmax(-1)[clear])
    if "rope" in name:  # without the scaling the logits would be others altogether
        plain = student_factory(tmp_path / "plain", kind)
        assert np.abs(reference(plain, IDS) - expected).max() > 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_reads_the_same_weights_back(name: str, tmp_path: Path, student_factory: Any) -> None:
    kind, settings = ARCHITECTURES[name]
    student = student_factory(tmp_path / "student", kind, **settings)
    artifact = export(student, "fp16", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(artifact.folder, gguf_file="model.gguf", dtype=torch.float32)
    state = again.state_dict()
    for name, weight in load_file(student / "model.safetensors").items():
        assert torch.equal(state[name], weight.float()), name


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_file_holds_the_integers_bit_for_bit(kind: str, tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", kind, intermediate_size=80, tie_word_embeddings=kind == "qwen3")
    quantize(student, tmp_path / "quantized", load_recipe("portable-int4"))
    packed = open_quantized(tmp_path / "quantized")
    given = export(student, "portable-int4", tmp_path / "given", quantized=tmp_path / "quantized")
    computed = export(student, "portable-int4", tmp_path / "computed")
    assert given.manifest.grid_digest == packed.digest and computed.manifest.grid_digest == packed.digest
    assert file_sha256(given.main_file) == file_sha256(computed.main_file)

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(given.main_file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], 2)
    seen = set()
    for source in packed:
        tensor = tensors[names.get_name(source, try_suffixes=(".weight", ".bias"))]
        seen.add(tensor.tensor_type.name)
        rows = np.arange(tensor.data.shape[0])
        if kind == "llama" and source.endswith(("q_proj.weight", "k_proj.weight")):  # undo the order of rotary pairs
            rows = rows.reshape(-1, 16, 2).swapaxes(1, 2).reshape(-1)
        if tensor.tensor_type.name == "Q4_0":
            blocks = tensor.data[rows].reshape(len(rows), -1, 18)
            scale = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[..., 0].astype(np.float32)
            q = np.concatenate([blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4], axis=-1).astype(np.int8) - 8
            expected_q, expected_scale = packed.integers(source)
            assert np.array_equal(q.reshape(len(rows), -1), expected_q) and np.array_equal(scale, expected_scale)
        elif tensor.tensor_type.name == "Q8_0":
            blocks = tensor.data[rows].reshape(len(rows), -1, 34)
            scale = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[..., 0].astype(np.float32)
            q = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(len(rows), -1)
            expected_q, expected_scale = packed.integers(source)
            assert np.array_equal(q, expected_q) and np.array_equal(
                scale.T, np.tile(expected_scale, (scale.shape[1], 1))
            )
        else:
            assert np.array_equal(tensor.data[rows], packed.tensor(source).numpy()), source
    assert seen == {"Q4_0", "Q8_0", "F32"}  # F32: norms, and down_proj, 80 wide: no blocks of 32


def test_the_quantized_student_runs_as_its_dequantized_weights(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen3")
    weights = load_file(student / "model.safetensors")
    expected = {}
    for recipe in ("portable-int4", "int8"):
        folder = tmp_path / f"{recipe}-reference"
        folder.mkdir()
        (folder / "config.json").write_bytes((student / "config.json").read_bytes())
        changed = {}
        for name, weight in weights.items():
            if weight.ndim == 1:
                changed[name] = weight
            elif recipe == "int8" or "embed" in name:
                changed[name] = dequantize_int8(*quantize_int8_rows(weight))
            else:
                changed[name] = dequantize_int4(*quantize_int4(weight))
        save_file({name: value.contiguous().float() for name, value in changed.items()}, folder / "model.safetensors")
        expected[recipe] = reference(folder, IDS)
    for recipe, other in (("portable-int4", "int8"), ("int8", "portable-int4")):
        actual = logits(export(student, recipe, tmp_path / recipe), IDS)
        # llama.cpp rounds activations to int8 on the way, so the match is close, not exact.
        assert mean_kl(expected[recipe], actual) < 0.05 < 0.2 < mean_kl(expected[other], actual)


def test_k_quants_shrink_and_stay_near(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen3", hidden_size=256, intermediate_size=256, head_dim=64)
    expected = reference(student, IDS)
    moments = tmp_path / "moments.safetensors"
    save_file(second_moments(student, torch.tensor([IDS])), moments)
    bits, kl = [], []
    for recipe in ("fp16", "gguf-q6_k", "gguf-q5_k_m", "gguf-q4_k_m"):
        artifact = export(student, recipe, tmp_path / recipe, moments=moments)
        assert sorted(path.name for path in artifact.folder.iterdir()) == [
            "chat_template.jinja",
            "manifest.json",
            "model.gguf",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        bits.append(artifact.manifest.bits_per_weight)
        kl.append(mean_kl(expected, logits(artifact, IDS)))
    assert bits == sorted(bits, reverse=True) and kl == sorted(kl)
    assert kl[0] < 1e-4 and kl[-1] < 1


def test_the_artifact_tells_what_it_is(tmp_path: Path, tiny_student: Path) -> None:
    artifact = targets.export(tiny_student, spec("int8", context=64), "int8", tmp_path / "out", name="tiny")
    assert load_artifact(artifact.folder) == artifact
    manifest, checkpoint = artifact.manifest, Checkpoint(tiny_student)
    assert (manifest.target, manifest.recipe, manifest.main_file) == ("gguf", "int8", "model.gguf")
    assert manifest.student_digest == checkpoint.digest and manifest.parameters == checkpoint.parameters
    assert 8.5 <= manifest.bits_per_weight < 8.7  # 34 bytes a block of 32, and the norms in fp32
    assert set(manifest.versions) == {"edgekd", "llama-cpp-python", "gguf"}
    session = targets.open_artifact(artifact.folder, threads=1)
    assert session.context_length == manifest.contract.context_length == 64
    assert session.vocab_size == manifest.contract.vocab_size == 700
    session.close()


def test_a_stream_ends_before_the_end_token(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "llama", tie_word_embeddings=False)
    weights = load_file(student / "model.safetensors")
    weights["lm_head.weight"][:] = 0
    weights["model.norm.weight"][:] = 0  # all logits equal: greedy takes id 0, the end of text
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    session = targets.open_artifact(export(student, "fp16", tmp_path / "out"), threads=1)
    assert list(session.generate([5, 6], 10)) == []
    session.close()


def test_a_damaged_file_is_refused(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "portable-int4", tmp_path / "out")
    data = artifact.main_file.read_bytes()
    rng = np.random.default_rng(0)
    for size in [0, 3, 4, 20, len(data) - 1, *rng.integers(24, len(data), 20).tolist()]:
        artifact.main_file.write_bytes(data[:size])
        with pytest.raises(BadArtifact, match=r"llama\.cpp does not load it"):
            targets.open_artifact(artifact, threads=1)
    with pytest.raises(BadArtifact, match="not the file its manifest names"):
        targets.open_artifact(artifact.folder)


def test_llama3_rope_is_read_from_either_generation_of_config(tiny_student: Path) -> None:
    config = Checkpoint(tiny_student).config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    old = {key: value for key, value in config.items() if key != "rope_parameters"} | {
        "rope_theta": 10000.0,
        "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
    }
    factors = read_architecture(old).rotaries[0].factors
    assert factors == read_architecture(config | {"rope_parameters": LLAMA3_ROPE}).rotaries[0].factors
    assert len(factors) == 16 and factors[0] == 1.0 and factors[-1] == 8.0 and list(factors) == sorted(factors)
    with pytest.raises(Unsupported, match=r"GGUF's qwen3 cannot hold: .* rope_parameters"):
        targets.check(Checkpoint(tiny_student).config | {"rope_parameters": LLAMA3_ROPE}, tiny_student, spec())


def test_a_target_that_there_is_not(tiny_student: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'gguf'"):
        targets.check(Checkpoint(tiny_student).config, tiny_student, TargetSpec(target="ggfu", recipes=["fp16"]))


def test_an_existing_folder_is_kept_and_a_killed_export_is_swept(tmp_path: Path, tiny_student: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(EdgekdError, match="exists already"):
        export(tiny_student, "fp16", out)
    out.rmdir()
    left = tmp_path / f".out.{2**22 + 1}-{'0' * 16}.tmp"  # a process number that Linux never gives
    left.mkdir()
    (left / "model.gguf").write_bytes(b"half")
    export(tiny_student, "fp16", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_recipe_that_needs_moments_and_has_none(tmp_path: Path, tiny_student: Path) -> None:
    with pytest.raises(EdgekdError, match="second moments"):
        export(tiny_student, "gguf-q4_k_m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_of_the_file(tmp_path: Path, tiny_student: Path) -> None:
    fields = gguf.GGUFReader(export(tiny_student, "portable-int4", tmp_path / "out").main_file).fields
    config = json.loads((tiny_student / "config.json").read_text())
    values = {key: fields[key].contents() for key in fields}
    assert values["general.architecture"] == "qwen3" and values["general.name"] == "tiny"
    assert values["general.file_type"] == 2 and values["general.quantization_version"] == 2
    assert values["qwen3.attention.key_length"] == values["qwen3.attention.value_length"] == config["head_dim"]
    assert values["qwen3.context_length"] == 256 and values["qwen3.block_count"] == 2
