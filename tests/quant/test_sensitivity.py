"""What int4 costs each Linear, and which of them a budget keeps in int8."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from random_models import random_ids, save_random_decoder

from edgekd.checkpoint import Checkpoint
from edgekd.errors import EdgekdError
from edgekd.quant import sensitivity
from edgekd.quant.grid import dequantize_int4, quantize_int4
from edgekd.quant.quantize import quantize
from edgekd.quant.store.reader import load_dequantized, open_quantized
from edgekd.student import load_model
from edgekd.targets import load_recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.matmul.has_bfloat16", lambda: False)


def make(folder: Path, kind: str, *, tied: bool = True, mlp: int = 128) -> Path:
    return save_random_decoder(folder, kind, layers=3, tied=tied, mlp=mlp)


def measured(folder: Path, names: list[str], ids: torch.Tensor) -> dict[str, float]:
    """KL of the model with one matrix rounded, in transformers."""
    model = load_model(folder)
    found = {}
    with torch.no_grad():
        before = model(ids.long()).logits.double().log_softmax(-1)
        for name in names:
            weight = model.get_parameter(name)
            kept = weight.clone()
            weight.copy_(dequantize_int4(*quantize_int4(weight)))
            after = model(ids.long()).logits.double().log_softmax(-1)
            found[name] = float((before.exp() * (before - after)).sum(-1).mean())
            weight.copy_(kept)
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "granite"])
def test_they_are_near_the_measured_kl(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.quant.calibrate.BATCH_TOKENS", 96)  # several batches
    monkeypatch.setattr(sensitivity, "WINDOWS", 24)
    folder, ids = make(tmp_path, kind), random_ids()
    found = sensitivity.sensitivities(folder, ids)
    names = [name for name in Checkpoint(folder) if name.endswith("proj.weight")]
    assert found.keys() == set(names)
    expected = measured(folder, names, ids)
    ratios = [found[name] / expected[name] for name in names]
    assert 0.6 < math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1.7
    assert all(0.25 < ratio < 4 for ratio in ratios)
    ranks = torch.tensor([[float(v[name]) for name in names] for v in (found, expected)]).argsort(1).argsort(1)
    assert torch.corrcoef(ranks.float())[0, 1] > 0.8


def test_what_saves_most_for_a_bit_is_kept_in_int8_and_the_budget_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = make(tmp_path, "llama", tied=False), random_ids(4)
    source = Checkpoint(folder)
    linears = [name for name in source if name.endswith("proj.weight")]
    first, second = "model.layers.1.self_attn.v_proj.weight", "model.layers.2.mlp.down_proj.weight"
    costs = dict.fromkeys(linears, 1e-9) | {first: 1.0, second: 3.0}  # the second is four times the first's size
    monkeypatch.setattr(sensitivity, "sensitivities", lambda *_: costs)
    recipe = load_recipe("portable-mixed")
    shapes = {name: source.shape(name) for name in source}
    weights = sum(map(math.prod, shapes.values()))

    def size(kept: list[str]) -> float:
        small = [name for name in linears if name not in kept]
        plain = [name for name, shape in shapes.items() if len(shape) == 1]
        return sum(
            math.prod(s) * (32 if n in plain else 4.5 if n in small else 8 + 16 / s[1]) for n, s in shapes.items()
        )

    for wanted in ([], [first], [first, second]):
        chosen = sensitivity.with_most_sensitive_in_int8(recipe.with_bits(size(wanted) / weights), folder, ids)
        kinds = {name: chosen.kind_of(name, shapes[name]) for name in source}
        assert [name for name in (first, second) if kinds[name] == "int8"] == wanted
        assert kinds[EMBEDDING] == kinds[HEAD] == "int8"
        assert [name for name in linears if kinds[name] == "int8"] == wanted, "not a bit more than the budget"


@pytest.mark.parametrize("method", ["rtn", "search", "gptq"])
def test_a_quantized_student_of_a_budget(tmp_path: Path, method: str) -> None:
    folder = make(tmp_path / "student", "llama")
    recipe = load_recipe("portable-mixed").with_bits(6.6)
    figures = quantize(folder, tmp_path / "out", recipe, method=method, ids=random_ids(8))
    assert figures["recipe"] == "portable-mixed" and figures["bits_per_weight"] <= 6.6
    opened = open_quantized(tmp_path / "out")
    kinds = [kind for name, kind in opened.kinds.items() if name.endswith("proj.weight")]
    assert {"int4", "int8"} == set(kinds)
    assert all(recipe.takes(name, opened.shape(name), kind) for name, kind in opened.kinds.items())
    assert not all(load_recipe("portable-int4").takes(n, opened.shape(n), k) for n, k in opened.kinds.items())
    load_dequantized(opened)


def test_too_small_a_budget_and_no_text_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "student", "llama")
    recipe = load_recipe("portable-mixed")
    with pytest.raises(EdgekdError, match=r"this student has \d\.\d\d\. Give at least \d\.\d\d\.$") as refused:
        quantize(folder, tmp_path / "out", recipe.with_bits(4.5), method="gptq", ids=random_ids(4))
    least = float(str(refused.value).rstrip(".").rsplit(" ", 1)[1])
    quantize(folder, tmp_path / "least", recipe.with_bits(least), ids=random_ids(4))
    with pytest.raises(EdgekdError, match="needs calibration text"):
        quantize(folder, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
