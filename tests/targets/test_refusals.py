"""What every target refuses: before any work what its format has no place for, and a student that is not whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cases import GRID_RECIPES, export_to, quantized, skip_without, spec_of
from edgekd import targets
from edgekd.checkpoint import Checkpoint
from edgekd.errors import EdgekdError, SpecError, Unsupported

NATIVE = {"gguf": ["gguf-q4_k_m"], "coreml": ["coreml-palettize-4"]}
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "{title} cannot hold: .*GPT2LMHeadModel"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
    (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
        "a mixture of experts",
    ),
    ({"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 16}, "keep a state"),
    ({"model_type": "qwen2_vl", "architectures": None, "vision_config": {"depth": 2}}, "inputs other than text"),
    ({"rope_parameters": {"rope_type": "spiral", "factor": 4.0}}, "rope_parameters"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
]
OWN_CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("coreml", {"head_dim": 31}, "head_dim 31 is odd"),
    ("coreml", {"max_position_embeddings": 2**24}, r"16777216 makes .* 8.6 GB.*Set context: 4194304 or less"),
    ("executorch", {"head_dim": 33}, "head_dim 33"),
    ("executorch", {"max_position_embeddings": 2**24}, "cache of 16777216 tokens takes"),
]
FITS = [(target, damage, "fp16") for target in targets.TARGETS for damage in ("missing", "extra", "shape", "nan")]
FITS += [(target, "overflow", "fp16") for target in targets.TARGETS]
FITS += [("coreml", damage, "coreml-palettize-4") for damage in ("missing", "extra", "shape", "nan", "overflow")]


@pytest.fixture(params=targets.TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return request.param


@pytest.fixture
def config(tiny_student: Path) -> dict[str, Any]:
    """A Llama's, that every target takes."""
    return Checkpoint(tiny_student).config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def test_what_every_target_takes(target: str, config: dict[str, Any], tiny_student: Path) -> None:
    targets.check(config, tiny_student, spec_of(target, "fp16", *GRID_RECIPES, *NATIVE.get(target, [])))


@pytest.mark.parametrize(("change", "cause"), CHANGES)
def test_what_no_target_has_a_place_for(
    change: dict[str, Any], cause: str, target: str, config: dict[str, Any], tiny_student: Path
) -> None:
    with pytest.raises(Unsupported, match=cause.format(title=targets.load_target(target).TITLE)):
        targets.check(config | change, tiny_student, spec_of(target))


@pytest.mark.parametrize(("target", "change", "cause"), OWN_CHANGES)
def test_what_one_target_has_no_place_for(
    target: str, change: dict[str, Any], cause: str, config: dict[str, Any], tiny_student: Path
) -> None:
    skip_without(target)
    asked = {"context": change["max_position_embeddings"]} if "max_position_embeddings" in change else {}
    with pytest.raises(Unsupported, match=cause):
        targets.check(config | change, tiny_student, spec_of(target, **asked))


def test_wrong_specs(target: str, tiny_student: Path, tmp_path: Path) -> None:
    config = Checkpoint(tiny_student).config
    other = "onnx-fp32" if target == "gguf" else "gguf-q4_0"
    for recipe in (other, "q3_k"):
        with pytest.raises(SpecError, match=f"{target} has no recipe '{recipe}'"):
            targets.check(config, tiny_student, spec_of(target, "fp16", recipe))
    with pytest.raises(SpecError, match="context 512 is longer than the student's 256"):
        targets.check(config, tiny_student, spec_of(target, context=512))
    with pytest.raises(EdgekdError, match=r"no tokenizer"):
        targets.check(config, tmp_path, spec_of(target))


@pytest.mark.parametrize(("target", "damage", "recipe"), FITS)
def test_a_student_that_does_not_fit_leaves_nothing_behind(
    target: str,
    damage: str,
    recipe: str,
    tmp_path: Path,
    student_factory: Callable[..., Path],
    damage_student: Callable[[Path, str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_without(target)
    if target == "executorch":
        monkeypatch.setattr("edgekd.targets.executorch.lower.lower", None)  # it is not come to
    student = student_factory(tmp_path / "student", num_hidden_layers=1)
    name = damage_student(student, damage)
    with pytest.raises(EdgekdError, match=name):
        export_to(target, student, recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_the_wrong_quantized_student(
    target: str, tmp_path: Path, tiny_student: Path, student_factory: Callable[..., Path]
) -> None:
    other = quantized(student_factory(tmp_path / "other", num_hidden_layers=1), tmp_path / "quantized")
    with pytest.raises(EdgekdError, match="another student"):
        export_to(target, tiny_student, "portable-int4", tmp_path / "out", other)
    for recipe, asked in (("portable-int4-head4", "portable-int4"), ("portable-int4", "int8")):
        own = quantized(tiny_student, tmp_path / recipe, recipe)
        with pytest.raises(EdgekdError, match=f"for the recipe {recipe}, not {asked}"):
            export_to(target, tiny_student, asked, tmp_path / "out", own)
    with pytest.raises(EdgekdError, match="quantized already"):
        export_to(target, own, "portable-int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()
