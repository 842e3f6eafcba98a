"""Writing a quantized student: rows of integers and scales in, a folder that is whole or not there out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...checkpoint import INDEX_FILE, Checkpoint
from ...errors import DoesNotFit, EdgekdError
from ...files import atomic_folder, write_json
from ...student import check_model
from ..grid import check_finite, pack_int4
from ..recipe import Kind, Recipe, stored_bits
from .layout import (
    DTYPES,
    RECORD_FILE,
    SCALES_FILE,
    Record,
    Stored,
    block_rows,
    bytes_of,
    is_embedding,
    quantization_config,
    storage,
)
from .reader import QuantizedStudent, dequantize

SHARD_BYTES = 10**9
_COPIED = {".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class _Plan:
    """What a folder will hold."""

    kinds: dict[str, Kind]
    """Of every parameter."""
    shards: list[list[str]]
    """The parameters of every weight file."""
    stored: dict[str, list[Stored]]
    """The tensors that hold each parameter."""

    @property
    def size_bytes(self) -> int:
        return sum(s.size_bytes for parts in self.stored.values() for s in parts)


class _File:
    """A safetensors file whose tensors are filled in place, in any order, so that none need be whole in memory.

    The format is a length, a JSON header and the bytes; the header needs only names, dtypes and shapes.
    """

    def __init__(self, path: Path, tensors: list[Stored]) -> None:
        # Wide types first: every tensor is then aligned to its own width.
        offset = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._at: dict[str, int] = {}
        for t in sorted(tensors, key=lambda t: -t.dtype.itemsize):
            header[t.name] = {
                "dtype": DTYPES[t.dtype],
                "shape": list(t.shape),
                "data_offsets": [offset, offset + t.size_bytes],
            }
            self._at[t.name] = offset
            offset += t.size_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        base = self._file.tell()
        self._file.truncate(base + offset)
        self._at = {name: base + at for name, at in self._at.items()}
        self._left = {t.name: t.size_bytes for t in tensors}

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next rows of a tensor."""
        data = bytes_of(tensor)
        self._file.seek(self._at[name])
        self._file.write(data)
        self._at[name] += len(data)
        self._left[name] -= len(data)

    def close(self) -> None:
        self._file.close()

    def unfilled(self) -> list[str]:
        """Tensors that were given too few rows, or too many."""
        return [name for name, left in self._left.items() if left]


class Writer:
    """A quantized student being written; ``new_quantized`` makes one. Tensors come in any order, rows in theirs."""

    def __init__(self, source: Checkpoint, folder: Path, plan: _Plan) -> None:
        self.source, self.kinds = source, plan.kinds
        self._folder, self._stored = folder, plan.stored
        self._of: dict[str, _File] = {}
        weight_map: dict[str, str] = {}
        for number, names in enumerate(plan.shards, 1):
            file = f"model-{number:05d}-of-{len(plan.shards):05d}.safetensors"
            parts = [s for n in names for s in (self._stored[n][:1] if is_embedding(n) else self._stored[n])]
            weight_map |= {part.name: file for part in parts}
            self._of |= dict.fromkeys((part.name for part in parts), _File(folder / file, parts))
        scales = [
            s for n, kind in self.kinds.items() if is_embedding(n) and kind != "plain" for s in self._stored[n][1:]
        ]
        if scales:
            self._of |= dict.fromkeys((s.name for s in scales), _File(folder / SCALES_FILE, scales))
        size = sum(s.size_bytes for parts in self._stored.values() for s in parts if s.name in weight_map)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """The student's matrix, a few rows at a time, in the dtype of its file."""
        return self.source.rows(name, block_rows(self.source.shape(name)[1]))

    def put(self, name: str, q: torch.Tensor, scale: torch.Tensor) -> None:
        """The next rows of a quantized matrix: q int8 ``(rows, I)``, scale float32 ``(rows, G)`` or ``(rows,)``.

        Raises:
            EdgekdError: an embedding beyond fp16's range.
        """
        module = name.removesuffix(".weight")
        self._append(f"{module}.weight_scale", scale.half())
        if is_embedding(name):
            half = dequantize(q, scale).half()
            if half.isinf().any():
                with self.source.naming(name):
                    raise EdgekdError("holds weights beyond fp16's range (65504).", "Train or save the model again.")
            self._append(name, half)
        elif self.kinds[name] == "int4":
            self._append(f"{module}.weight_packed", pack_int4(q))
        else:
            unsigned = q.view(torch.uint8) ^ 0x80
            self._append(f"{module}.weight_packed", torch.nn.functional.pad(unsigned, (0, -q.shape[1] % 4)))

    def put_plain(self, name: str, value: torch.Tensor) -> None:
        """A tensor that is not quantized, whole; it is stored in the student's dtype."""
        with self.source.naming(name):
            check_finite(value)
        self._append(name, value.to(self._stored[name][0].dtype))

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        self._of[name].append(name, tensor)

    def _finish(self, recipe: Recipe, method: str) -> None:
        """Write what is beside the weights. The digests are taken from what was written: it has been read back once."""
        for name, kind in self.kinds.items():
            if kind != "plain" and not is_embedding(name):
                self._append(f"{name.removesuffix('.weight')}.weight_shape", torch.tensor(self.source.shape(name)))
        self._close()
        if unfilled := [name for file in set(self._of.values()) for name in file.unfilled()]:
            raise AssertionError(f"rows are missing or too many: {unfilled}")
        _copy_rest(self.source, self._folder, self.kinds)
        record = Record(
            schema_version=1,
            recipe=recipe.name,
            method=method,
            group_size=32,
            student_digest=self.source.digest,
            grid_digest="",
            plain_digest="",
            bits_per_weight=_bits_per_weight(self.source, self.kinds, self._stored),
            tensors=self.kinds,
        )
        written = QuantizedStudent(self._folder, record, Checkpoint(self._folder, beside=SCALES_FILE))
        write_json(self._folder / RECORD_FILE, record.model_dump() | dict(written.digests()))

    def _close(self) -> None:
        for file in set(self._of.values()):
            file.close()


@contextmanager
def new_quantized(student: Path, out: Path, recipe: Recipe, method: str) -> Iterator[Writer]:
    """Write a quantized student; ``out`` appears when the block ends without an error, and then is whole.

    Args:
        student: a model folder.
        out: the folder to make; it must not exist.
        method: how the integers are chosen, for the record.

    Raises:
        EdgekdError: ``out`` exists, the recipe is not on the grid, or the student is quantized already.
        DoesNotFit: not enough disk space.
    """
    source = Checkpoint(student)
    check_quantizes(out, recipe)
    _check_student(source)
    plan = _plan(source, recipe)
    needed, free = plan.size_bytes, shutil.disk_usage(_existing(out)).free
    if needed > free:
        raise DoesNotFit(f"{out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.", "Free some disk space.")
    with atomic_folder(out) as folder:
        writer = Writer(source, folder, plan)
        try:
            yield writer
            writer._finish(recipe, method)
        except BaseException:
            writer._close()
            raise


def check_quantizes(out: Path, recipe: Recipe) -> None:
    """What can be told before a student is at hand.

    Raises:
        EdgekdError: the recipe is not on the grid, or ``out`` exists.
    """
    if not recipe.on_grid:
        raise EdgekdError(f"recipe {recipe.name!r} quantizes nothing on the portable grid.", "Take portable-int4.")
    if out.exists():
        raise EdgekdError(f"{out} exists already.", "Remove it or name another folder.")


def _check_student(source: Checkpoint) -> None:
    if "quantization_config" in source.config:
        raise EdgekdError(f"{source.folder}/config.json: the model is quantized already.", "Give the student itself.")
    check_model(source.folder)


def _plan(source: Checkpoint, recipe: Recipe) -> _Plan:
    plan = _Plan({}, [[]], {})
    filled = 0
    for name in sorted(source):
        if name == "lm_head.weight" and source.tied:
            continue
        shape = source.shape(name)
        kind = plan.kinds[name] = recipe.kind_of(name, shape)
        plain = kind == "plain"
        stored = [Stored(name, source.tensor(name).dtype, shape)] if plain else storage(name, kind, shape)
        size = sum(s.size_bytes for s in stored)
        if plan.shards[-1] and filled + size > SHARD_BYTES:
            plan.shards.append([])
            filled = 0
        plan.stored[name] = stored
        plan.shards[-1].append(name)
        filled += size
    return plan


def _bits_per_weight(source: Checkpoint, kinds: dict[str, Kind], stored: dict[str, list[Stored]]) -> float:
    """Bits of integers, scales and plain tensors as an artifact needs them, per weight."""
    shapes = {name: source.shape(name) for name in kinds}
    bits = sum(stored_bits(k, shapes[n], 8 * stored[n][0].dtype.itemsize) for n, k in kinds.items())
    return bits / sum(map(math.prod, shapes.values()))


def _copy_rest(source: Checkpoint, folder: Path, kinds: dict[str, Kind]) -> None:
    """The configuration with its quantization, and the tokenizer's files."""
    quantization = quantization_config(kinds, source.tied)
    write_json(folder / "config.json", {**source.config, "quantization_config": quantization})
    for path in source.folder.iterdir():
        if path.suffix in _COPIED and path.name not in ("config.json", INDEX_FILE, RECORD_FILE):
            shutil.copyfile(path, folder / path.name)


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())
