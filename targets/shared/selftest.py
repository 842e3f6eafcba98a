"""What the targets' self-tests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipes import load_recipe

if TYPE_CHECKING:
    from ...quant.store.reader import QuantizedStudent


def check_agreement(one: Any, other: Any, words: str, least: float = 0.999) -> None:
    """Refuse numbers that are not each other's.

    Args:
        one, other: arrays of as many numbers, such as logits ``(T, V)``.
        words: what it means when they differ.

    Raises:
        RuntimeError: one is not finite, or their correlation is below ``least``.
    """
    import numpy as np

    pair = np.stack([np.ravel(one), np.ravel(other)])
    if not np.isfinite(pair).all():
        raise RuntimeError(f"{words}: they are not finite")
    if (similar := float(np.corrcoef(pair)[0, 1])) < least:
        raise RuntimeError(f"{words}: their correlation is {similar:.3f}")


def quantized_llama(folder: Path, **settings: Any) -> QuantizedStudent:
    """A random tied Llama on the portable grid."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ...quant.quantize import quantize
    from ...quant.store.reader import open_quantized

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **settings))
    model.save_pretrained(folder / "student")
    quantize(folder / "student", folder / "quantized", load_recipe("portable-int4"))
    return open_quantized(folder / "quantized")
