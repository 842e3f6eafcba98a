"""Weights into the graph's data file, some rows of one tensor in memory at a time.

``MatMulNBits`` holds, for outputs ``N`` and blocks ``K / block``, the codes q + 8 of int4 two to a byte, the first one
low, and q + 128 of int8, one to a byte; its zero points are 8 and 128 where none are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...quant.source import Source
from ..shared.decoder import rotary_tables
from ..shared.source import exact_half, narrow
from .graph import BLOCK, Stored, offsets

if TYPE_CHECKING:
    import torch


def pack_rows(q: torch.Tensor, kind: str, *, whole_blocks: bool) -> np.ndarray:
    """Codes of int8 ``q (rows, K)``, where asked padded with zeros of the grid: uint8 ``(rows, bytes)``."""
    from ...quant.grid import pack_int4

    if kind == "int4":
        return pack_int4(q).numpy()
    codes = q.numpy().view(np.uint8) ^ 0x80
    missing = -q.shape[1] % BLOCK if whole_blocks else 0
    return np.pad(codes, ((0, 0), (0, missing)), constant_values=0x80)


def write_data(path: Path, stored: list[Stored], weights: Source) -> None:
    """Write the data file.

    Raises:
        EdgekdError: a weight that is not finite, or does not fit the file's dtype.
    """
    places = offsets(stored)
    done: set[int] = set()
    with path.open("wb") as file:
        for item in stored:
            if places[item.name] in done:
                continue
            done.add(places[item.name])
            file.seek(places[item.name])
            for piece in _pieces(item, weights):
                file.write(np.ascontiguousarray(piece).data)
        file.truncate(max(places[item.name] + item.size_bytes for item in stored))


def _pieces(item: Stored, weights: Source) -> Iterator[np.ndarray]:
    """The bytes of an initialiser, in order."""
    if item.rotary:
        yield rotary_tables(item.rotary, item.shape[0])[item.part == "sin"].astype(item.dtype)
        return
    if item.part == "transposed":
        yield np.concatenate([narrow(weights, source, item.dtype) for source in item.sources]).T
        return
    for source in item.sources:
        if item.part == "value":
            yield narrow(weights, source, item.dtype)
            continue
        for q, scale in weights.blocks(source):
            if item.part == "q":
                yield pack_rows(q, item.kind, whole_blocks=len(item.shape) == 3)
            else:
                yield _scales(scale.numpy(), item.shape[1])


def _scales(scale: np.ndarray, blocks: int) -> np.ndarray:
    """fp16 ``(rows, blocks)``; the one scale of an int8 row stands in every block."""
    whole = scale if scale.ndim == 2 else np.repeat(scale[:, None], blocks, axis=1)
    return exact_half(whole)
