"""A family that no target knows by name: Mistral, which is a Llama with a sliding window. Its reader is all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, MistralForCausalLM

from cases import IDS, export_to, logits, mean_kl, quantized, reference, spec_of
from edgekd import targets
from edgekd.checkpoint import Checkpoint
from edgekd.errors import SpecError, Unsupported
from edgekd.student import load_tokenizer

ROOT = Path(__file__).parents[2]
PLAIN = {"gguf": "fp16", "onnx": "onnx-fp32", "coreml": "fp16", "executorch": "executorch-fp32"}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, student_factory: Any) -> dict[int | None, Path]:
    """Random Mistrals by their window, all with the same weights."""
    folder = tmp_path_factory.mktemp("mistral")
    llama = student_factory(folder / "llama", "llama", tie_word_embeddings=False)
    config = json.loads((llama / "config.json").read_text())
    found: dict[int | None, Path] = {}
    for window in (None, 64):
        own = {"model_type": "mistral", "architectures": None, "sliding_window": window}
        theirs = MistralConfig.from_dict(config | own)
        found[window] = folder / f"window-{window}"
        MistralForCausalLM.from_pretrained(llama, config=theirs).save_pretrained(found[window])
        load_tokenizer(llama).save_pretrained(found[window])
    return found


@pytest.mark.parametrize("target", PLAIN)
def test_it_is_exported_like_a_llama(target: str, students: dict[int | None, Path], tmp_path: Path) -> None:
    student = students[None]
    artifact = export_to(target, student, PLAIN[target], tmp_path / "artifact")
    assert mean_kl(reference(student, IDS), logits(artifact, IDS)) < 1e-3


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_its_quantized_form_runs(target: str, students: dict[int | None, Path], tmp_path: Path) -> None:
    student, packed = students[None], quantized(students[None], tmp_path / "quantized")
    artifact = export_to(target, student, "portable-int4", tmp_path / "artifact", packed)
    assert mean_kl(reference(student, IDS, packed), logits(artifact, IDS)) < 0.02


@pytest.mark.parametrize("target", PLAIN)
def test_a_window_is_refused_by_name(target: str, students: dict[int | None, Path]) -> None:
    student = students[64]
    for context in (None, 65):
        with pytest.raises(Unsupported, match=r"cannot hold: sliding windows .*sliding_window.* context: 64 or less"):
            targets.check(Checkpoint(student).config, student, spec_of(target, context=context))
    targets.check(Checkpoint(student).config, student, spec_of(target, context=64))
    with pytest.raises(SpecError, match="longer than the student's"):
        targets.check(Checkpoint(student).config, student, spec_of(target, context=512))


def test_a_window_that_holds_the_context_is_none(students: dict[int | None, Path], tmp_path: Path) -> None:
    """And where it does not, the difference shows: what is refused would have been wrong."""
    student, ids = students[64], IDS[:64]
    artifact = export_to("onnx", student, "onnx-fp32", tmp_path / "artifact", context=64)
    assert mean_kl(reference(student, ids), logits(artifact, ids)) < 1e-3
    longer = export_to("onnx", students[None], "onnx-fp32", tmp_path / "longer")
    assert mean_kl(reference(student, IDS), logits(longer, IDS)) > 0.01


def test_one_module_alone_names_it() -> None:
    """A word of a chat's template, a tokenizer's or a comment is no decision; a quoted name in code would be one."""
    sources = (path for folder in ("edgekd", "targets", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    found = [path for path in sources if re.search(r"[\"'_]mistral|Mistral[A-Z]", path.read_text("utf-8"))]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["edgekd/architecture.py"]
