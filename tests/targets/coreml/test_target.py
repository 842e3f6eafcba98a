"""The Core ML target against transformers in fp32, on two-layer random models, through the interpreter of the package:
Core ML itself runs on Apple's systems alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("coremltools")

import cases
from cases import (
    GRID_RECIPES,
    IDS,
    ODD_WIDTH,
    UNTIED,
    export_to,
    held,
    logits,
    quantized,
    reference,
    spec_of,
)
from edgekd import targets
from edgekd.checkpoint import Checkpoint
from edgekd.errors import BadArtifact, EdgekdError, Unsupported
from edgekd.manifest import Artifact, load_artifact
from edgekd.quant.grid import quantize_int8_rows
from edgekd.quant.store.reader import open_quantized
from edgekd.session import Session
from edgekd.student import load_model
from edgekd.targets.coreml.mil import Interpreter
from edgekd.targets.coreml.pack import WeightFile, palettize
from edgekd.targets.coreml.session import step_inputs

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="there, sessions use Core ML itself")

ARCHITECTURES = cases.ARCHITECTURES | UNTIED
HALF = 2.0**-11
"""What rounding to float16 costs, relative to the number."""

spec, export = partial(spec_of, "coreml"), partial(export_to, "coreml")


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for float16: every tensor of two layers is rounded to it, which adds up to some roundings of the
    largest logit; where the most likely token differs, the two were as good as tied."""
    assert actual.shape == expected.shape and actual.dtype == np.float32
    allowed = 8 * HALF * np.abs(expected).max()
    assert np.abs(actual - expected).max() < allowed
    rows = np.arange(len(expected))
    assert (expected.max(-1) - expected[rows, actual.argmax(-1)] < 2 * allowed).all()


def program(artifact: Artifact) -> Interpreter:
    return Interpreter(artifact.main_file.parent)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fp16_agrees_with_transformers(name: str, tmp_path: Path, student_factory: Any) -> None:
    kind, changes = ARCHITECTURES[name]
    student = student_factory(tmp_path / "student", kind, **changes)  # weights are exact in fp16
    expected = reference(student, IDS)
    assert_near(logits(export(student, "fp16", tmp_path / "out"), IDS), expected)
    if "rope" in name:  # without the scaling the logits would be others altogether
        plain = student_factory(tmp_path / "plain", kind)
        assert np.abs(reference(plain, IDS) - expected).max() > 1


@pytest.mark.parametrize("name", [*ARCHITECTURES, "odd width", "odd width untied"])
def test_the_quantized_student_runs_as_its_dequantized_weights(name: str, tmp_path: Path, student_factory: Any) -> None:
    kind, changes = ARCHITECTURES.get(name, ("qwen3", ODD_WIDTH | {"tie_word_embeddings": "untied" not in name}))
    student = student_factory(tmp_path / "student", kind, **changes)
    for recipe in GRID_RECIPES:
        packed = quantized(student, tmp_path / f"{recipe}-quantized", recipe)
        assert_near(logits(export(student, recipe, tmp_path / recipe, packed), IDS), reference(student, IDS, packed))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_large_and_small_activations(factor: float, tmp_path: Path, student_factory: Any) -> None:
    """Hidden states of thousands, whose squares pass float16's 65504, and of thousandths, whose squares vanish."""
    student = student_factory(tmp_path / "student", "llama", tie_word_embeddings=False)
    weights = load_file(student / "model.safetensors")
    for name in weights:
        if "embed" in name or "o_proj" in name or "down_proj" in name:
            weights[name] = (weights[name].float() * factor).half()
    save_file(weights, student / "model.safetensors")
    with torch.no_grad():
        hidden = load_model(student)(torch.tensor([IDS]), output_hidden_states=True).hidden_states[-2]
    assert (hidden.abs().max() > 500) if factor > 1 else (hidden.abs().max() < 0.02)
    assert_near(logits(export(student, "fp16", tmp_path / "out"), IDS), reference(student, IDS))


@pytest.mark.parametrize("recipe", GRID_RECIPES)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen3", {}), ("llama", {"tie_word_embeddings": False}), ("qwen2", ODD_WIDTH), ("qwen3", ODD_WIDTH)],
)
def test_the_file_holds_the_integers_bit_for_bit(
    kind: str, changes: dict[str, Any], recipe: str, tmp_path: Path, student_factory: Any
) -> None:
    student = student_factory(tmp_path / "student", kind, **changes)
    packed = open_quantized(quantized(student, tmp_path / "quantized", recipe))
    artifact = export(student, recipe, tmp_path / "out", tmp_path / "quantized")
    assert (artifact.manifest.grid_digest, artifact.manifest.method) == (packed.digest, "rtn")
    package = program(artifact)
    quantities = 0
    for name in packed:
        found = package.weight(name.replace(".", "_"))
        if packed.kinds[name] == "plain":
            assert np.array_equal(found, packed.tensor(name).numpy().astype(np.float16)), name
            continue
        q, scale = found
        expected = held(packed, name)
        assert q.dtype == np.int8 and scale.dtype == np.float16
        assert np.array_equal(q, expected[0]) and np.array_equal(scale, expected[1]), name
        quantities += 1
    assert package.op_counts["constexpr_blockwise_shift_scale"] == quantities


def test_the_student_is_there_as_it_was(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "llama", tie_word_embeddings=False)
    package = program(export(student, "fp16", tmp_path / "out"))
    for name, value in load_file(student / "model.safetensors").items():
        assert np.array_equal(package.weight(name.replace(".", "_")), value.numpy()), name
    assert not any(op.startswith("constexpr") for op in package.op_counts)


def test_lookup_tables(tmp_path: Path, student_factory: Any) -> None:
    """4-bit palettes run as their values, keep near the student, and embedding and head are the int8 grid's."""
    student = student_factory(tmp_path / "student", "qwen3", tie_word_embeddings=False)
    artifact = export(student, "coreml-palettize-4", tmp_path / "out")
    assert (artifact.manifest.recipe, artifact.manifest.grid_digest) == ("coreml-palettize-4", None)
    package, model = program(artifact), load_model(student)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = package.weight(name.replace(".", "_"))
            if name.endswith("_proj.weight"):
                indices, palette = found
                rows = len(indices) // len(palette)
                table = palette.reshape(-1, 16).astype(np.float32)
                assert rows == 16 and indices.max() == 15
                values = np.take_along_axis(np.repeat(table, rows, 0), indices.astype(np.int64), 1)
                assert np.square(values - parameter.numpy()).mean() < 0.02 * parameter.square().mean()
            elif parameter.ndim == 2:
                q, scale = quantize_int8_rows(parameter)
                assert np.array_equal(found[0], q) and np.array_equal(found[1][:, 0], scale)
                values = (q * scale[:, None]).numpy()
            else:
                continue
            parameter.copy_(torch.from_numpy(values))
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    assert_near(logits(artifact, IDS), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_a_palette_is_the_nearest_of_its_values(groups: int, pairs: int, seed: int, ragged: bool) -> None:
    rows = 8 * groups if ragged else 16 * groups
    w = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 2 * pairs)).astype(np.float32))
    indices, palette = palettize(w)
    assert indices.shape == w.shape and palette.shape[1] == 16 and rows % len(palette) == 0
    table = np.repeat(palette, rows // len(palette), 0).astype(np.float32)
    distance = np.abs(w.numpy()[:, :, None] - table[:, None])
    chosen = np.take_along_axis(distance, indices[:, :, None].astype(np.int64), -1)[..., 0]
    assert np.allclose(chosen, distance.min(-1), atol=1e-6)


def test_two_exports_are_the_same_bytes(tmp_path: Path, tiny_student: Path) -> None:
    for recipe in ("portable-int4", "coreml-palettize-4"):
        packed = quantized(tiny_student, tmp_path / "quantized") if recipe == "portable-int4" else None
        first, second = (
            export(tiny_student, recipe, tmp_path / recipe / str(i), packed if i else None) for i in (0, 1)
        )
        assert first.manifest.files == second.manifest.files
    assert sorted(first.manifest.files) == [
        "chat_template.jinja",
        "config.json",
        "model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        "model.mlpackage/Manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_coremltools_reads_the_package(tmp_path: Path, tiny_student: Path) -> None:
    """The vendor's own reader: the package, its program, and a weight by the vendor's own unpacking."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto import load as milproto

    artifact = export(tiny_student, "portable-int4", tmp_path / "out", quantized(tiny_student, tmp_path / "quantized"))
    model = coremltools.models.MLModel(str(artifact.main_file.parent), skip_model_load=True)
    found = model.get_spec()
    assert found.specificationVersion == 9
    assert [feature.name for feature in found.description.input] == [
        "inputIds",
        "positionIds",
        "causalMask",
        "outputIds",
    ]
    assert [feature.name for feature in found.description.state] == ["keyCache", "valueCache"]
    contract = artifact.manifest.contract.model_dump(exclude={"special_tokens"})
    assert json.loads(model.user_defined_metadata["edgekd.contract"]) == contract
    digest = artifact.manifest.files["tokenizer.json"]
    assert model.user_defined_metadata["edgekd.tokenizer_sha256"] == digest
    read = milproto.load(found, found.specificationVersion, model.weights_dir).functions["main"]
    ops = {op.name: op for op in read.operations if op.op_type == "constexpr_blockwise_shift_scale"}
    packed = open_quantized(tmp_path / "quantized")
    for name, kind in packed.kinds.items():
        if kind != "plain":
            q, scale = held(packed, name)
            op = ops.pop(name.replace(".", "_"))
            assert np.array_equal(op.data.val, q) and np.array_equal(op.scale.val, scale), name
    assert not ops
    assert not any("int64" in str(var.sym_type) for op in read.operations for var in op.outputs)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["float16", "int8", "int4", "uint4"]), st.integers(1, 100)), max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_weight_files_are_those_of_coremltools(blobs: list[tuple[str, int]], seed: int) -> None:
    import tempfile

    from coremltools.libmilstoragepython import _BlobStorageWriter

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = _BlobStorageWriter(str(folder / "theirs"))
        with (folder / "ours").open("wb") as file:
            ours = WeightFile(file)
            for dtype, half in blobs:
                low = -8 if dtype == "int4" else 0 if dtype == "uint4" else -128
                values = rng.integers(low, -low + (low == 0) * 16, 2 * half)
                if dtype == "float16":
                    array = values.astype(np.float16)
                    expected = theirs.write_fp16_data(array.view(np.uint16))
                elif dtype == "int8":
                    array = values.astype(np.int8)
                    expected = theirs.write_int8_data(array)
                else:
                    given_values = values.astype(np.int8 if dtype == "int4" else np.uint8)
                    array = (values[0::2] & 15 | (values[1::2] & 15) << 4).astype(np.uint8)
                    expected = getattr(theirs, f"write_{dtype}_data")(given_values)
                middle = len(array) // 2
                assert ours.add(dtype, [array[:middle], array[middle:]]) == expected
            ours.close()
        del theirs
        if blobs:
            assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_the_artifact_tells_what_it_is(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "portable-int4", tmp_path / "out", context=64)
    assert load_artifact(artifact.folder) == artifact
    manifest, details = artifact.manifest, artifact.manifest.details
    assert (manifest.target, manifest.runtime, manifest.recipe) == ("coreml", "Core ML", "portable-int4")
    assert artifact.main_file.parent.name == "model.mlpackage"
    assert manifest.student_digest == Checkpoint(tiny_student).digest
    assert 5 < manifest.bits_per_weight < 9  # the embedding, int8, is most of it
    assert set(manifest.versions) == {"edgekd", "coremltools"}
    assert details is not None and details["minimum"] == {"ios": "18", "macos": "15"}
    package = program(artifact)
    assert {name: feature.shape for name, feature in package.inputs.items()} == {
        "inputIds": (1, (1, 64)),
        "positionIds": (1, (1, 64)),
        "causalMask": (1, 1, (1, 64), (1, 64)),
        "outputIds": ((1, 64),),
    }
    assert {feature.dtype for feature in package.inputs.values()} == {"int32", "float16"}
    assert {name: feature.shape for name, feature in package.states.items()} == dict.fromkeys(
        ("keyCache", "valueCache"), (2, 1, 2, 64, 32)
    )
    session = targets.open_artifact(artifact.folder, threads=1)
    assert session.context_length == manifest.contract.context_length == 64
    assert session.vocab_size == manifest.contract.vocab_size == 700
    session.close()


def test_what_swift_transformers_reads(tmp_path: Path, tiny_student: Path) -> None:
    """A class that it knows, the chat template, and no cleaning of spaces, which it does unless told not to; and
    transformers reads the folder as the student's own tokenizer still."""
    from edgekd.student import load_tokenizer

    artifact = export(tiny_student, "fp16", tmp_path / "out")
    config = json.loads((artifact.folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"].removesuffix("Fast") == "PreTrainedTokenizer"
    assert config["chat_template"] == artifact.manifest.contract.chat_template
    assert config["clean_up_tokenization_spaces"] is False
    assert json.loads((artifact.folder / "config.json").read_text())["model_type"] == "qwen3"
    again, own = load_tokenizer(artifact.folder), load_tokenizer(tiny_student)
    text = "def f(x):  return <|im_end|> 1 , 2 ."
    assert again(text)["input_ids"] == own(text)["input_ids"] and again.chat_template == own.chat_template


def test_the_tied_embedding_is_stored_once(tmp_path: Path, student_factory: Any) -> None:
    sizes = {}
    for tied in (True, False):
        student = student_factory(tmp_path / f"student {tied}", "llama", tie_word_embeddings=tied)
        sizes[tied] = export(student, "int8", tmp_path / f"out {tied}").manifest.details["weight_bytes"]
    head = 700 * (64 + 2)
    assert 0 <= sizes[False] - sizes[True] - head < 3 * 64


def test_without_rounding_little_is_left(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen3")
    package = export(student, "fp16", tmp_path / "out").main_file.parent
    expected, gaps = reference(student, IDS), []
    for rounded in (True, False):
        program = Interpreter(package, rounded=rounded)
        state = program.make_state()
        assert {str(one.dtype) for one in state.values()} == {"torch.float16" if rounded else "torch.float32"}
        half = len(IDS) // 2
        first = program.run(step_inputs(IDS[:half], 0, all_logits=True), state)["logits"]
        second = program.run(step_inputs(IDS[half:], half, all_logits=True), state)["logits"]
        gaps.append(np.abs(np.concatenate([first[0], second[0]]).astype(np.float32) - expected).max())
    assert gaps[1] < gaps[0] / 3  # the tables of the rotary embedding are in float16 still


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, student_factory: Any) -> Artifact:
    folder = tmp_path_factory.mktemp("long")
    student = student_factory(folder / "student", max_position_embeddings=1100)
    return export(student, "fp16", folder / "out")


@pytest.fixture
def session(artifact: Artifact) -> Iterator[Session]:
    session = targets.open_artifact(artifact, threads=1)
    yield session
    session.close()


def test_what_was_returned_is_the_callers_own(session: Session) -> None:
    kept = session.decode(IDS[0])
    again = kept.copy()
    session.decode(IDS[1])
    assert np.array_equal(kept, again)


def test_a_wider_mask_changes_nothing(artifact: Artifact) -> None:
    """So that an app may keep to few shapes: more of the cache in sight, and tokens of padding behind the last."""
    package = program(artifact)

    def run(ids: list[int], seen: int, wanted: int) -> np.ndarray:
        positions = np.arange(len(ids), dtype=np.int32)
        mask = np.where(np.arange(seen) > positions[:, None], np.float16(-65504), np.float16(0))[None, None]
        inputs = {
            "inputIds": np.array([ids], np.int32),
            "positionIds": positions[None],
            "causalMask": mask,
            "outputIds": np.array([wanted], np.int32),
        }
        return package.run(inputs, package.make_state())["logits"]

    tight, wide = run(IDS[:20], 20, 19), run(IDS[:20] + [0] * 12, 64, 19)
    assert tight.shape == (1, 1, 700)
    assert_near(wide[0].astype(np.float32), tight[0].astype(np.float32))


def test_a_damaged_artifact_is_refused(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "portable-int4", tmp_path / "out")
    for name in artifact.manifest.files:
        if not name.startswith("model.mlpackage"):
            continue
        path = artifact.folder / name
        whole = path.read_bytes()
        for size in (0, 3, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(BadArtifact):
                targets.open_artifact(artifact, threads=1).prefill([3, 4])
            with pytest.raises(BadArtifact, match="not the file its manifest names"):
                targets.open_artifact(artifact.folder)
        path.unlink()
        with pytest.raises(BadArtifact):
            targets.open_artifact(artifact, threads=1)
        path.write_bytes(whole)


def test_an_ios_without_the_operators(tiny_student: Path) -> None:
    config = Checkpoint(tiny_student).config
    with pytest.raises(
        Unsupported, match=r"minimum_ios 17: int4 in blocks \(portable-int4\) and .* iOS 18 and macOS 15"
    ):
        targets.check(config, tiny_student, spec("portable-int4", minimum_ios=17))
    with pytest.raises(Unsupported, match="minimum_ios 16: a key-value cache kept as state came with iOS 18"):
        targets.check(config, tiny_student, spec("fp16", minimum_ios=16))


def test_what_stands_in_for_core_ml_is_told_and_not_timed(tmp_path: Path, tiny_student: Path) -> None:
    from edgekd.runs.verbs import bench_artifact, verify_artifact
    from edgekd.spec import BenchSpec, VerifySpec

    artifact = export(tiny_student, "portable-int4", tmp_path / "out", quantized(tiny_student, tmp_path / "quantized"))
    with pytest.raises(EdgekdError, match=r"Core ML does not run on this machine; .*interpreter"):
        bench_artifact(artifact, BenchSpec(prompt_tokens=[8], decode_tokens=2, runs=1), lambda share, note: None)
    windows, asked = np.array([IDS[:64], IDS[64:128]]), VerifySpec(windows=2, context=64, greedy_tokens=4)
    figures = verify_artifact(artifact, tiny_student, windows, asked, lambda share, note: None, tmp_path / "quantized")
    assert "interpreter" in figures.stand_in
    assert figures.runtime.kl_mean < 1e-4 < figures.kl_mean
    assert figures.tokens.strings_identical == figures.tokens.strings
    assert targets.stand_in("gguf") is targets.stand_in("onnx") is None


def test_a_run_times_no_stand_in(tmp_path: Path, tiny_student: Path) -> None:
    from edgekd.plan import measure_machine
    from edgekd.runs.chain import stages
    from edgekd.runs.preflight import open_run
    from edgekd.spec import load_spec

    text = f"""
name: tiny
teacher: {{model: {tiny_student}}}
student: {{init: checkpoint, model: {tiny_student}}}
data: {{source: text, paths: [a.txt], context: 32}}
targets: [{{target: onnx, recipes: [portable-int4]}}, {{target: coreml, recipes: [portable-int4]}}]
verify: {{windows: 2, context: 32}}
bench: {{prompt_tokens: [8], decode_tokens: 4, runs: 1}}
"""
    (tmp_path / "spec.yaml").write_text(text)
    (tmp_path / "a.txt").write_text("text")
    run = open_run(load_spec(tmp_path / "spec.yaml"), base=tmp_path, out=tmp_path / "run")
    names = [stage.name for stage in stages(run, measure_machine(tmp_path))]
    wanted = {"verify coreml-portable-int4", "verify onnx-portable-int4", "bench onnx-portable-int4"}
    assert wanted <= set(names) and "bench coreml-portable-int4" not in names
