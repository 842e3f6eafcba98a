"""Whether a training's decoder layers are compiled: where that is clearly faster here, and the training long enough to
earn what compiling takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import EdgekdError
from ..files import read_json, write_json
from .precision import fastest

COMPILED = "compiled.json"
"""Remembers in a folder what ``perhaps_compiled`` chose."""
_LOG = logging.getLogger(__name__)
_WORTH_SECONDS = 900.0  # compiling forward, backward and validation takes minutes on a CPU
_FEWEST_PASSES = 200  # a training of fewer is not even timed
_PASSES = 3
_GAIN = 0.9  # of a pass; less is within the clock's noise


@contextmanager
def perhaps_compiled(
    layers: Sequence[nn.Module], one_pass: Callable[[], None], passes: int, file: Path, precision: str
) -> Iterator[bool]:
    """Inside, layers are compiled where it pays; outside, they are as they were.

    Args:
        layers: of one kind, which are compiled once.
        one_pass: the training's own forward and backward pass, of which nothing stays.
        passes: how many the whole training takes.
        file: remembers the choice and what was measured, so that a training that goes on keeps its speed.
    """
    try:
        yield bool(layers) and _choose(layers, one_pass, passes, file, precision)
    finally:
        _compile(layers, False)


def _choose(layers: Sequence[nn.Module], one_pass: Callable[[], None], passes: int, file: Path, precision: str) -> bool:
    if (before := _remembered(file, precision)) is not None:
        _compile(layers, before)
        return before
    if passes < _FEWEST_PASSES:
        return False
    eager = fastest(one_pass, 1)
    if eager * passes < _WORTH_SECONDS or not has_compiler(next(layers[0].parameters()).device.type):
        return False
    eager = min(eager, fastest(one_pass, _PASSES))
    _compile(layers, True)
    try:
        first = fastest(one_pass, 1)
        compiled = fastest(one_pass, _PASSES)
    except Exception as error:  # a compiler raises what it likes; the training goes on without
        _LOG.warning("torch.compile: %s. The training goes on without it.", str(error).strip().split("\n")[0][:200])
        first = compiled = float("inf")
    chosen = compiled < _GAIN * eager and (eager - compiled) * passes > first
    _compile(layers, chosen)
    if compiled < float("inf"):
        seconds = {"eager": eager, "compiled": compiled, "compiling": first}
        write_json(file, {"compiled": chosen, "precision": precision, "seconds": seconds, "source": "measured:pass"})
    return chosen


def _remembered(file: Path, precision: str) -> bool | None:
    """What was chosen before; None where nothing was."""
    try:
        told = read_json(file)
        return bool(told["compiled"]) if told["precision"] == precision else None
    except (EdgekdError, KeyError):
        return None


def _compile(layers: Sequence[nn.Module], on: bool) -> None:
    for layer in layers:
        module: Any = layer
        module._compiled_call_impl = None
        if on:
            module.compile()


def has_compiler(device: str) -> bool:
    """Whether there is what torch.compile calls: Triton for a GPU, a C++ compiler for a CPU."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False
