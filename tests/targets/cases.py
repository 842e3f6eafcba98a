"""What the tests of every target share: models to export, and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd import targets
from edgekd.manifest import Artifact
from edgekd.quant.quantize import quantize
from edgekd.quant.store.reader import QuantizedStudent, load_dequantized, open_quantized
from edgekd.spec import TargetSpec
from edgekd.student import load_model
from edgekd.targets import load_recipe

IDS = np.random.default_rng(1).integers(3, 700, 200).tolist()
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False, "head_dim": 16}),
    "llama 3.1 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # the one head_dim that transformers' reader of GGUF knows
}
UNTIED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
}
GRID_RECIPES = ("portable-int4", "portable-int4-head4", "int8")
ODD_WIDTH = {"intermediate_size": 80, "hidden_size": 72, "head_dim": 32}
"""No whole blocks of 32: such matrices are int8."""


def skip_without(target: str) -> None:
    """Skip a test of a target whose packages are not installed."""
    if missing := targets.absent(targets.load_target(target).PACKAGES):
        pytest.skip(f"not installed: {missing}")


def spec_of(target: str, *recipes: str, **options: Any) -> TargetSpec:
    return TargetSpec(target=target, recipes=list(recipes) or ["fp16"], **options)


def export_to(
    target: str,
    student: Path,
    recipe: str,
    out: Path,
    quantized: Path | None = None,
    moments: Path | None = None,
    **options: Any,
) -> Artifact:
    spec = spec_of(target, recipe, **options)
    return targets.export(student, spec, recipe, out, name="tiny", quantized=quantized, moments=moments)


def quantized(student: Path, out: Path, recipe: str = "portable-int4") -> Path:
    wanted = load_recipe(recipe)
    if wanted.bits is not None:
        wanted = wanted.with_bits(7.5)  # a small model is an embedding for the most part
    quantize(student, out, wanted, ids=torch.tensor([IDS[:64]]))
    return out


def logits(artifact: Artifact, ids: list[int]) -> np.ndarray:
    session = targets.open_artifact(artifact, threads=1)
    try:
        return session.prefill(ids, all_logits=True)
    finally:
        session.close()


def held(packed: QuantizedStudent, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The quantized student's integers ``(O, I)`` and scales ``(O, G)``, of int8 rows ``(O, 1)``."""
    q, scale = (part.numpy() for part in packed.integers(name))
    return q, scale.reshape(len(q), -1)


@torch.no_grad()
def reference(folder: Path, ids: list[int], packed: Path | None = None) -> np.ndarray:
    """Logits of transformers, of the student or with the quantized student's weights."""
    model = load_model(folder) if packed is None else load_dequantized(open_quantized(packed))
    return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of two arrays of logits ``(T, V)``, nats per token."""
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x), -1) for x in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
