"""A Core ML decoder: prefill and decode, in Core ML on macOS and in the interpreter of ``targets.mil`` elsewhere.

The interpreter runs the saved package, operator by operator, rounding as its types say: what it proves is the program
and the weights, not Apple's compiler, and its speed says nothing. Shapes: ``T`` tokens, ``V`` vocabulary. Logits are
float32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import BadArtifact
from ..manifest import Contract
from ..session import check_ids, check_room, generate
from ._coreml_graph import MASKED
from ._tokenizer import JsonTokenizer

BATCH_TOKENS = 512


class Engine(Protocol):
    """What runs the package."""

    def reset(self) -> None:
        """Empty the cache."""
        ...

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits ``(1, K, V)``; the cache is written."""
        ...


class Interpreted:
    """The package in edgekd's interpreter."""

    def __init__(self, package: Path) -> None:
        from .mil import Interpreter

        self._program = Interpreter(package)
        self.reset()

    def reset(self) -> None:
        self._state = self._program.make_state()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._program.run(dict(inputs), self._state)["logits"]


class Native:
    """The package in Core ML itself: written to its documentation, not run."""

    def __init__(self, package: Path) -> None:
        from ._coreml import model

        try:
            self._model = model(package)
        except Exception as error:  # its exceptions have no common parent but this
            reason = " ".join(str(error).split())[:300]
            raise BadArtifact(
                f"{package}: Core ML does not load it: {reason}.", "Export the artifact again."
            ) from error
        self.reset()

    def reset(self) -> None:
        self._state = self._model.make_state()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._model.predict(dict(inputs), state=self._state)["logits"]


def open_engine(package: Path) -> Engine:
    """Core ML where there is one."""
    return Native(package) if sys.platform == "darwin" else Interpreted(package)


def step_inputs(ids: Sequence[int], start: int, *, all_logits: bool) -> dict[str, np.ndarray]:
    """The program's inputs for ``T`` ids behind ``start`` cached ones, whose last, or all, want logits."""
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    hidden = np.arange(start + len(ids)) > positions[:, None]
    return {
        "inputIds": np.asarray(ids, np.int32)[None],
        "positionIds": positions[None],
        "causalMask": np.where(hidden, np.float16(MASKED), np.float16(0))[None, None],
        "outputIds": np.arange(0 if all_logits else len(ids) - 1, len(ids), dtype=np.int32),
    }


class CoremlSession:
    """A Core ML decoder: the ``Session`` protocol."""

    def __init__(self, package: Path, contract: Contract) -> None:
        self._folder, self._contract = package.parent, contract
        self._engine: Engine | None = open_engine(package)
        self._used = 0

    @property
    def vocab_size(self) -> int:
        """Length ``V`` of the logits."""
        return self._contract.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens the cache holds."""
        return self._contract.context_length

    @cached_property
    def _json(self) -> JsonTokenizer:
        return JsonTokenizer(self._folder / "tokenizer.json", "coreml")

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text by ``tokenizer.json``: Core ML has no tokenizer."""
        self._open()
        return self._json.tokenize(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; nothing for a special one."""
        self._open()
        check_ids([token], self.vocab_size)
        return self._json.token_bytes(token)

    def reset(self) -> None:
        """Empty the cache."""
        self._open().reset()
        self._used = 0

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Append ids; logits of the last ``(V,)``, or of all ``(T, V)``."""
        if not len(ids):
            raise ValueError("no ids to prefill")
        check_ids(ids, self.vocab_size)
        self._open()
        check_room(self._used, len(ids), self.context_length)
        pieces = [self._feed(ids[i : i + BATCH_TOKENS], all_logits) for i in range(0, len(ids), BATCH_TOKENS)]
        return np.concatenate(pieces) if all_logits else pieces[-1][0]

    def decode(self, token: int) -> np.ndarray:
        """Append one id; its logits ``(V,)``."""
        return self.prefill([token])

    def _feed(self, ids: Sequence[int], all_logits: bool) -> np.ndarray:
        """Append a piece; logits of its last id ``(1, V)``, or of all."""
        logits = self._open().run(step_inputs(ids, self._used, all_logits=all_logits))
        self._used += len(ids)
        return logits[0].astype(np.float32)

    def generate(
        self, ids: Sequence[int], max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Yield new tokens until an end-of-sequence token, ``max_tokens``, or a full cache."""
        return generate(self, self._contract.eos_ids, ids, max_tokens, temperature, seed)

    def close(self) -> None:
        """Free the weights and the cache."""
        self._engine = None

    def _open(self) -> Engine:
        if self._engine is None:
            raise ValueError("the session is closed")
        return self._engine
