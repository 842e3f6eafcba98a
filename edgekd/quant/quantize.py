"""Choosing the integers: every method that needs no training, and the folder they are written to.

Shapes: weights ``(O, I)``; calibration ids ``(N, T)``.

Adding a method: one branch in ``quantize``, one name in ``spec.Method``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import EdgekdError
from ..matmul import fast_float32
from .calibrate import second_moments
from .gptq import gptq_student
from .grid import quantize_int4, quantize_int8_rows
from .recipe import Recipe
from .search import search_int4
from .sensitivity import with_most_sensitive_in_int8
from .store.reader import describe
from .store.writer import Writer, new_quantized

Progress = Callable[[float, str], None]


@fast_float32()
def quantize(
    student: Path,
    out: Path,
    recipe: Recipe,
    *,
    method: str = "rtn",
    ids: torch.Tensor | None = None,
    on_progress: Progress = lambda fraction, note: None,
) -> dict[str, Any]:
    """Quantize a student and write it as a folder.

    The student is read from its shards, row block by row block (``rtn``) or decoder layer by decoder layer (``search``
    and ``gptq``), whatever its size. int8 rows are rounded to nearest by every method.

    Args:
        student: a model folder.
        out: the folder to make; it must not exist.
        method: ``rtn`` (round to nearest), ``search`` (scales of least error weighted by the activations' second
            moments) or ``gptq``.
        ids: calibration text, int ``(N, T)``, for ``search``, ``gptq`` and a recipe with a budget of bits.
        on_progress: called with the share done and what is being done.

    Returns:
        ``describe``'s figures.

    Raises:
        EdgekdError: ``out`` exists, an unknown method, no or too short calibration text, a student that is quantized
            already, or non-finite weights.
        DoesNotFit: not enough disk space.
    """
    if method not in ("rtn", "search", "gptq"):
        raise EdgekdError(f"quantize.method: {method!r} is unknown here.", "There are: rtn, search, gptq.")
    recipe = with_most_sensitive_in_int8(recipe, student, ids)
    with new_quantized(student, out, recipe, method) as writer:
        moments: Mapping[str, torch.Tensor] = {}
        given: set[str] = set()
        if method != "rtn":
            if ids is None:
                raise EdgekdError(f"quantize.method: {method} needs calibration text.", "Give some, or take rtn.")
            if method == "search":
                moments = second_moments(student, ids, lambda done, total: on_progress(0.9 * done / total, ""))
            else:
                given = _gptq(student, writer, ids, on_progress)
        rest = [name for name in writer.kinds if name not in given]
        for number, name in enumerate(rest, 1):
            _put_rows(writer, name, moments.get(name))
            on_progress(number / len(rest) if method == "rtn" else 0.9 + 0.1 * number / len(rest), name)
    return describe(out)


def _gptq(student: Path, writer: Writer, ids: torch.Tensor, on_progress: Progress) -> set[str]:
    """Write what GPTQ chooses; the names of it."""
    given: set[str] = set()
    count = sum(kind == "int4" for kind in writer.kinds.values())
    for name, q, scale in gptq_student(student, ids, writer.kinds):
        writer.put(name, q, scale)
        given.add(name)
        on_progress(0.9 * len(given) / count, name)
    return given


def _put_rows(writer: Writer, name: str, moments: torch.Tensor | None) -> None:
    """One tensor, row block by row block: int4 scales searched where there are moments."""
    if writer.kinds[name] == "plain":
        return writer.put_plain(name, writer.source.tensor(name))
    for rows in writer.rows(name):
        with writer.source.naming(name):
            if writer.kinds[name] == "int8":
                block = quantize_int8_rows(rows)
            else:
                block = quantize_int4(rows) if moments is None else search_int4(rows, moments)
        writer.put(name, *block)
