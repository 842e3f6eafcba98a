"""What an exporter reads its tensors from: the student, or the quantized student of a recipe on the grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ...architecture import HEAD, Architecture
from ...checkpoint import Checkpoint
from ...errors import EdgekdError
from ...origin import read_origin
from ...quant.recipe import Recipe
from ...quant.source import Source

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...quant.recipe import Kind


def open_source(
    checkpoint: Checkpoint, recipe: Recipe, quantized: Path | None, scratch: Path
) -> tuple[Source, dict[str, object]]:
    """The student, or its quantized form, and the manifest's fields that say what is packed.

    Args:
        quantized: the quantized student's folder; None rounds the student to nearest.
        scratch: a folder to make for that.

    Raises:
        EdgekdError: ``quantized`` was made from another student or for another recipe.
    """
    fields: dict[str, object] = {"student_digest": checkpoint.digest, "parameters": checkpoint.parameters}
    if origin := read_origin(checkpoint.folder):
        fields["dequantized_from"] = origin.dequantized_from
    if not recipe.on_grid:
        return checkpoint, fields
    from ...quant.quantize import quantize
    from ...quant.store.reader import open_quantized

    if quantized is None:
        quantize(checkpoint.folder, scratch, recipe)
    opened = open_quantized(quantized or scratch)
    record = opened.record
    if record.student_digest != checkpoint.digest:
        raise EdgekdError(f"{quantized} was quantized from another student.", "Quantize this one.")
    if not all(recipe.takes(name, opened.shape(name), kind) for name, kind in opened.kinds.items()):
        raise EdgekdError(
            f"{quantized} was quantized for the recipe {record.recipe}, not {recipe.name}.",
            f"Take --recipe {record.recipe}.",
        )
    return opened, fields | {
        "grid_digest": opened.digest,
        "method": record.method,
        "int8_by_width": opened.int8_by_width,
    }


def narrow(source: Source, name: str, dtype: str) -> np.ndarray:
    """One of the source's tensors in a dtype that may hold less.

    Raises:
        EdgekdError: a weight that is not finite, or does not fit.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        value = source.tensor(name).float().numpy().astype(dtype)
    if not np.isfinite(value).all():
        raise EdgekdError(
            f"{source.folder}: tensor {name!r} has weights that are not finite, or too large for {dtype}.",
            "Train the student again with a lower learning rate, or take a recipe in fp32 where the target has one.",
        )
    return value


def exact_half(scale: np.ndarray) -> np.ndarray:
    """float32 scales in fp16, which holds each of the grid's exactly."""
    import numpy as np

    half = scale.astype("<f2")
    assert np.array_equal(half.astype(np.float32), scale), "a scale is not exact in fp16"
    return half


def plain_form(source: Source, arch: Architecture, *, split: bool = True) -> tuple[Plain, Architecture]:
    """A source and its architecture without what is a matter of storage: norms have the one added to their weights that
    they multiply by beside them, and matrices that are one on disk are several.

    Args:
        split: whether they are; else they stay one.
    """
    rows: dict[str, tuple[str, int, int]] = {}
    if split:
        query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        parts = {"qkv": {"q": query, "k": key, "v": key}, "gate_up": dict.fromkeys(("gate", "up"), arch.intermediate)}
        for name, weight in arch.weights().items():
            start = 0
            for part, count in parts.get(weight.role, {}).items():
                rows[name.replace(f"{weight.role}_proj", f"{part}_proj")] = (name, start, count)
                start += count
    plain = replace(arch, norm_offset=False, fused=frozenset() if split else arch.fused)
    norms = {name for name, weight in arch.weights().items() if weight.role in ("norm", "head_norm")}
    return Plain(source, rows, frozenset(norms if arch.norm_offset else ())), plain


@dataclass(frozen=True)
class Plain:
    """A source as ``plain_form`` gives it, read lazily like the one that it is made of."""

    _source: Source
    _rows: Mapping[str, tuple[str, int, int]]
    """The matrix that holds each of the parts, the first of its rows, and their number."""
    _norms: frozenset[str]
    """Those to add one to."""

    @property
    def folder(self) -> Path:
        """Of the source."""
        return self._source.folder

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self._source.tied

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """How each parameter is stored; a tied head is not among them."""
        split = {whole for whole, _, _ in self._rows.values()}
        held = {n: kind for n, kind in self._source.kinds.items() if n not in split and not (self.tied and n == HEAD)}
        return held | {name: self._source.kinds[whole] for name, (whole, _, _) in self._rows.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        if name not in self._rows:
            return self._source.shape(name)
        whole, _, count = self._rows[name]
        return (count, *self._source.shape(whole)[1:])

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter: one that is not quantized in the dtype of its file, others dequantized."""
        whole, start, count = self._rows.get(name, (name, 0, 0))
        value = self._source.tensor(whole)
        if name in self._norms:
            return value.float() + 1
        return value[start : start + count] if count else value

    def blocks(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The integers and scales of a quantized matrix, a few rows at a time."""
        if name not in self._rows:
            yield from self._source.blocks(name)
            return
        whole, first, count = self._rows[name]
        at = 0
        for q, scale in self._source.blocks(whole):
            wanted = slice(max(first - at, 0), max(first + count - at, 0))
            at += len(q)
            if len(q[wanted]):
                yield q[wanted].contiguous(), scale[wanted].contiguous()
