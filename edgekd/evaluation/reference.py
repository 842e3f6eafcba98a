"""A model folder as a session: what artifacts are held against, in float32, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..manifest import Contract
from ..session import Session
from ..student import load_model, load_tokenizer
from ..targets.shared.session import DecoderSession
from ..targets.shared.tokenizer import JsonTokenizer, contract_of


class _TorchEngine:
    """A transformers model with its cache: the ``Engine`` protocol."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        import torch

        self._torch: Any = torch
        self._model: Any = load_model(folder).eval()
        self._vocab_size = vocab_size
        self._cache: Any = None

    def feed(self, ids: Sequence[int], start: int) -> np.ndarray:
        return self.feed_all(ids, start)[-1]

    def feed_all(self, ids: Sequence[int], start: int) -> np.ndarray:
        with self._torch.inference_mode():
            given = self._torch.as_tensor(np.asarray(ids), dtype=self._torch.long)[None]
            found = self._model(given, past_key_values=self._cache, use_cache=True)
        self._cache = found.past_key_values
        logits: np.ndarray = found.logits[0, :, : self._vocab_size].float().numpy()
        return logits

    def reset(self) -> None:
        self._cache = None

    def rewind(self, length: int) -> bool:
        if any(type(layer).__name__ != "DynamicLayer" for layer in self._cache.layers):
            return False  # a window's has let go of what was before it
        self._cache.crop(length - self._cache.get_seq_length())  # a negative number of tokens is removed
        return True

    def close(self) -> None:
        self._model = self._cache = None


def open_reference(folder: Path, context_length: int) -> tuple[Session, Contract]:
    """A model's session and contract, of so long a context.

    Raises:
        EdgekdError: and its children: no model folder that transformers reads.
    """
    tokenizer, vocab_size = load_tokenizer(folder), Checkpoint(folder).architecture.vocab_size
    engine = _TorchEngine(folder, vocab_size)
    contract = contract_of(tokenizer, folder, vocab_size, context_length)
    return DecoderSession(engine, JsonTokenizer(folder / "tokenizer.json", "train"), contract), contract
