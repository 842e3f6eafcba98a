"""A Core ML decoder: prefill and decode, in Core ML on macOS, elsewhere in the interpreter of ``targets.coreml.mil``.

The interpreter runs the saved package, operator by operator, rounding as its types say: what it proves is the program
and the weights, not Apple's compiler, and its speed says nothing. Shapes: ``T`` tokens, ``V`` vocabulary. Logits are
float32.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ...errors import BadArtifact
from ...manifest import Contract
from ..shared.artifact import check_contract
from .graph import MASKED


class Runner(Protocol):
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

    def sizes(self) -> tuple[int, int]:
        """Vocabulary and context length.

        Raises:
            BadArtifact: the program is not a decoder of this target.
        """
        logits, states = self._program.outputs.get("logits"), self._program.states.values()
        lengths = [state.shape[3] for state in states if len(state.shape) == 5]
        found = [logits.shape[-1] if logits and logits.shape else None, min(lengths, default=None)]
        match found:
            case [int(vocab_size), int(context_length)]:
                return vocab_size, context_length
        raise BadArtifact(
            f"{self._program.path} is no decoder of this target: no logits, or no cache.", "Export it again."
        )

    def reset(self) -> None:
        self._state = self._program.make_state()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._program.run(dict(inputs), self._state)["logits"]


class Native:
    """The package in Core ML itself: written to its documentation, not run."""

    def __init__(self, package: Path) -> None:
        from .tools import model

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


def stand_in(asked: Mapping[str, object] | None = None) -> str | None:
    """What runs artifacts on this machine in place of Core ML, if it is not Core ML itself."""
    return None if sys.platform == "darwin" else "edgekd.targets.coreml.mil, an interpreter of the package's program"


def open_runner(package: Path) -> Runner:
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


class CoremlEngine:
    """A Core ML decoder: the ``Engine`` protocol."""

    def __init__(self, package: Path, contract: Contract) -> None:
        runner = open_runner(package)
        if isinstance(runner, Interpreted):
            check_contract(package, contract, *runner.sizes())
        self._runner: Runner | None = runner

    def feed(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids; logits of the last."""
        return self._run(ids, start, all_logits=False)[0]

    def feed_all(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids; logits of all."""
        return self._run(ids, start, all_logits=True)

    def _run(self, ids: Sequence[int], start: int, *, all_logits: bool) -> np.ndarray:
        assert self._runner
        logits = self._runner.run(step_inputs(ids, start, all_logits=all_logits))
        return logits[0].astype(np.float32)

    def reset(self) -> None:
        """Empty the cache."""
        assert self._runner
        self._runner.reset()

    def rewind(self, length: int) -> bool:
        """What is behind is written over."""
        return True

    def close(self) -> None:
        """Free the weights and the cache."""
        self._runner = None
