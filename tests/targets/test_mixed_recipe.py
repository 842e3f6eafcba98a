"""``portable-mixed``: int4 and int8 by matrix, the same integers in every target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cases import IDS, export_to, logits, mean_kl, reference, skip_without
from edgekd.errors import EdgekdError
from edgekd.quant import sensitivity
from edgekd.quant.quantize import quantize
from edgekd.quant.store.reader import open_quantized
from edgekd.targets import load_recipe

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("coreml", "executorch")]
TARGETS = ["gguf", "onnx", *SLOW]
LIKE = {"q_proj": 1.0, "down_proj": 0.5}  # those of attention's inputs that ONNX packs together are apart


@pytest.fixture
def packed(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quantized student with q in int8 beside k and v in int4, and some of down."""
    found = sensitivity.sensitivities

    def steered(folder: Path, ids: torch.Tensor) -> dict[str, float]:
        return {name: LIKE.get(name.split(".")[-2], 1e-6) for name in found(folder, ids)}

    monkeypatch.setattr(sensitivity, "sensitivities", steered)
    recipe = load_recipe("portable-mixed").with_bits(6.9)
    quantize(tiny_student, tmp_path / "quantized", recipe, ids=torch.tensor([IDS[:64]]))
    return tmp_path / "quantized"


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_computes_what_the_quantized_student_does(
    target: str, tiny_student: Path, packed: Path, tmp_path: Path
) -> None:
    skip_without(target)
    opened = open_quantized(packed)
    kinds = {name.split(".")[-2]: kind for name, kind in opened.kinds.items() if ".0." in name}
    assert kinds["q_proj"] == "int8" and kinds["k_proj"] == kinds["gate_proj"] == "int4"
    artifact = export_to(target, tiny_student, "portable-mixed", tmp_path / "out", packed, context=128)
    assert artifact.manifest.grid_digest == opened.digest
    ids, ours = IDS[:48], reference(tiny_student, IDS[:48], packed)
    got = logits(artifact, ids)
    runtime = mean_kl(ours, got)
    assert runtime < 0.1 * mean_kl(reference(tiny_student, ids), ours)


def test_a_recipe_without_a_budget_refuses_such_a_student(tiny_student: Path, packed: Path, tmp_path: Path) -> None:
    skip_without("gguf")
    with pytest.raises(EdgekdError, match="was quantized for the recipe portable-mixed, not portable-int4"):
        export_to("gguf", tiny_student, "portable-int4", tmp_path / "out", packed)
    with pytest.raises(EdgekdError, match="needs calibration text"):
        export_to("gguf", tiny_student, "portable-mixed", tmp_path / "out")
