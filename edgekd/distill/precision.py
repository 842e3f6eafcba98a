"""Which precision a training takes where the spec leaves it open: bfloat16 where it is clearly faster on this machine.

What a CPU's flags promise is not what its kernels hold: with AVX512-BF16 and without AMX, bfloat16 costs more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import EdgekdError
from ..files import read_json, write_json
from .ranks import ALONE, Ranks

if TYPE_CHECKING:
    from ..spec import TrainingSpec

Precision = Literal["float32", "bfloat16"]
_PASSES = 3
# bfloat16 rounds more, and two runs of one spec should choose alike: it must be faster by more than the clock's noise.
# Where a CPU or a GPU has units for it, it is twice as fast; where it has not, it was 0.7 to 1.1 times as fast.
_GAIN = 0.75


def choose_precision(
    spec: TrainingSpec, one_pass: Callable[[Precision], None], file: Path, ranks: Ranks = ALONE
) -> Precision:
    """``spec.precision``, or for "auto" bfloat16 where its forward and backward pass take clearly less time here.

    Args:
        one_pass: the training's own forward and backward pass, of which nothing stays.
        file: remembers the choice and what was measured, so that a training that goes on takes the same.
        ranks: the processes that train together, and take what the first of them measured.
    """
    if spec.precision != "auto":
        return spec.precision
    chosen = ranks.tell(_remembered(file) if ranks.first else "")
    if not chosen:
        seconds = {name: _seconds(one_pass, name) for name in ("float32", "bfloat16")}
        chosen = ranks.tell("bfloat16" if seconds["bfloat16"] < _GAIN * seconds["float32"] else "float32")
        if ranks.first:
            write_json(file, {"precision": chosen, "seconds": seconds, "source": "measured:training-pass"})
    return "bfloat16" if chosen == "bfloat16" else "float32"


def _remembered(file: Path) -> str:
    """What was chosen before; empty where nothing was."""
    try:
        return "bfloat16" if read_json(file)["precision"] == "bfloat16" else "float32"
    except (EdgekdError, KeyError):
        return ""


def _seconds(one_pass: Callable[[Precision], None], precision: Precision) -> float:
    """The first pass also warms up."""
    return fastest(partial(one_pass, precision), _PASSES)


def fastest(one_pass: Callable[[], None], passes: int) -> float:
    """Seconds of the fastest of a few passes."""
    samples = []
    for _ in range(passes):
        began = time.perf_counter()
        one_pass()
        samples.append(time.perf_counter() - began)
    return min(samples)
