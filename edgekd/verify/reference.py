"""The side that an artifact is held against: held-out windows, and what a Hugging Face model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import SpecError
from .parity import Logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def held_out_windows(ids: np.ndarray, count: int, context: int) -> np.ndarray:
    """``count`` windows ``(count, context)`` spread evenly over packed ``(N, T)``; fewer where the text is short."""
    flat = np.ascontiguousarray(ids).reshape(-1)
    whole = flat[: len(flat) // context * context].reshape(-1, context)
    if not len(whole):
        raise SpecError(f"the text has {len(flat)} tokens, a window needs {context}.", "Give more text.")
    return whole[np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)]


def logits_of(model: PreTrainedModel, vocab_size: int | None = None) -> Logits:
    """Ids ``(T,)`` to logits float32 ``(T, V)``, rows of the vocabulary's padding cut off."""
    import torch

    def logits(ids: Sequence[int] | np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found = model(torch.as_tensor(np.asarray(ids), dtype=torch.long)[None], use_cache=False).logits
        return found[0, :, :vocab_size].float().numpy()

    return logits


def remembering(logits: Logits, windows: np.ndarray) -> Logits:
    """The same logits; those of some windows are computed once, and kept.

    Args:
        windows: int ``(N, T)``, few.
    """
    kept: dict[bytes, np.ndarray | None] = {ids.tobytes(): None for ids in windows}

    def remembered(ids: np.ndarray) -> np.ndarray:
        key = ids.tobytes()
        if key not in kept:
            return logits(ids)
        if (found := kept[key]) is None:
            found = kept[key] = logits(ids)
        return found

    return remembered
