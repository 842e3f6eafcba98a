"""An ``.mlpackage`` on disk: the program, its weights a few rows at a time, and the manifest.

The weight file is Core ML's: a header of 64 bytes (number of blobs, version 2), then for every blob 64 bytes of
metadata (marker, type, size in bytes, offset of the data, unused bits at its end) and the data, each aligned to 64
bytes; four-bit numbers lie two to a byte, the first one low, signed ones in two's complement. Written here rather than
by coremltools, whose writer wants each tensor whole, at a byte an integer; a test compares the two byte by byte.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...quant.source import Source
from ..shared.decoder import rotary_tables
from ..shared.source import exact_half, narrow
from .graph import Graph, Stored, palette_rows
from .tools import builder

if TYPE_CHECKING:
    import torch
    from coremltools.proto.Model_pb2 import ModelDescription

SPECIFICATION_VERSION = 9
"""Of iOS 18 and macOS 15, the first with states and with four-bit blocks."""
MODEL_FILE = "Data/com.apple.CoreML/model.mlmodel"
WEIGHT_FILE = "Data/com.apple.CoreML/weights/weight.bin"
_ALIGN = 64
_MARKER = 0xDEADBEEF
_TYPES = {"float16": 1, "float32": 2, "int8": 4, "int4": 8, "uint4": 11}
_GAUSSIAN = (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733)
"""Where k-means begins, in standard deviations: the 16 values nearest to normally distributed ones (Max 1960)."""
_PALETTE_STEPS, _BINS, _PIECE = 8, 1024, 2**22


class WeightFile:
    """The weight file being written, blob after blob."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._count, self._end = file, 0, _ALIGN

    def add(self, dtype: str, pieces: Iterable[np.ndarray]) -> int:
        """Append a blob, given as arrays of whole bytes one after the other; returns where it begins."""
        start = -(-self._end // _ALIGN) * _ALIGN
        self._file.seek(start + _ALIGN)
        size = sum(self._file.write(np.ascontiguousarray(piece).data) for piece in pieces)
        self._file.seek(start)
        self._file.write(struct.pack("<IIQQQ32x", _MARKER, _TYPES[dtype], size, start + _ALIGN, 0))
        self._count, self._end = self._count + 1, start + _ALIGN + size
        return start

    def close(self) -> None:
        """Write the header."""
        self._file.seek(0)
        self._file.write(struct.pack("<II56x", self._count, 2))


def write_package(folder: Path, graph: Graph, description: ModelDescription, weights: Source) -> None:
    """Write the ``.mlpackage``.

    Raises:
        EdgekdError: a weight that is not finite, or does not fit float16.
    """
    from coremltools.proto import Model_pb2

    path = folder / WEIGHT_FILE
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        blobs = WeightFile(file)
        program = _program(graph, blobs, _Pieces(weights))
        blobs.close()
    model = Model_pb2.Model(specificationVersion=SPECIFICATION_VERSION, description=description, mlProgram=program)
    # Maps have no order of their own: without this, two exports would differ.
    (folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    (folder / "Manifest.json").write_text(json.dumps(_manifest(), indent=4, sort_keys=True), "utf-8")


def _program(graph: Graph, blobs: WeightFile, pieces: _Pieces) -> Any:
    """The program as a protocol buffer, its large constants in the weight file."""
    from coremltools.converters.mil.backend.mil.helper import (
        create_file_value_tensor,
        create_immediate_value,
        types_to_proto_primitive,
    )

    exporter = builder().Exporter(graph.program, "", SPECIFICATION_VERSION)
    placed: dict[str, int] = {}

    def value(var: Any) -> Any:
        name, array = var.op.name, var.val
        stored = graph.stored.get(name)
        if stored is None and not (isinstance(array, np.ndarray) and array.size >= 10 and array.dtype == np.float16):
            return create_immediate_value(var)
        if name not in placed:
            placed[name] = blobs.add(stored.dtype, pieces.of(stored)) if stored else blobs.add("float16", [array])
        return create_file_value_tensor(
            "@model_path/weights/weight.bin", placed[name], array.shape, types_to_proto_primitive(var.dtype)
        )

    exporter.get_milproto_value = value
    return exporter.export()


def _manifest() -> dict[str, object]:
    """``Manifest.json``. Identifiers are the same in every package, so that equal exports are equal files."""
    parts = {
        "model.mlmodel": ("CoreML Model Specification", MODEL_FILE),
        "weights": ("CoreML Model Weights", str(Path(WEIGHT_FILE).parent)),
    }
    ids = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"edgekd/{name}")).upper() for name in parts}
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            ids[name]: {
                "author": "com.apple.CoreML",
                "description": description,
                "name": name,
                "path": path.removeprefix("Data/"),
            }
            for name, (description, path) in parts.items()
        },
        "rootModelIdentifier": ids["model.mlmodel"],
    }


class _Pieces:
    """The bytes of constants, from the student or its quantized form."""

    def __init__(self, weights: Source) -> None:
        self._weights = weights
        self._palette: tuple[str, np.ndarray, np.ndarray] | None = None

    def of(self, stored: Stored) -> Iterator[np.ndarray]:
        """A constant's bytes, in order."""
        if stored.rotary:
            cos, sin = rotary_tables(stored.rotary, stored.shape[0])
            whole = np.concatenate([cos, cos] if stored.part == "cos" else [-sin, sin], axis=1)
            yield whole.astype("<f2")
        elif stored.part == "value":
            yield narrow(self._weights, stored.source, "<f2")
        elif stored.part in ("indices", "palette"):
            yield self._palettized(stored)
        else:
            for q, scale in self._blocks(stored):
                yield exact_half(scale.numpy()) if stored.part == "scale" else pack(q, stored.dtype)

    def _blocks(self, stored: Stored) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self._weights.kinds[stored.source] != "plain":
            yield from self._weights.blocks(stored.source)
            return
        import torch

        from ...quant.grid import quantize_int8_rows

        matrix = torch.from_numpy(narrow(self._weights, stored.source, "float32"))
        for rows in matrix.split(max(1, _PIECE // matrix.shape[1])):
            yield quantize_int8_rows(rows)

    def _palettized(self, stored: Stored) -> np.ndarray:
        """Indices, two to a byte, or the palette: they are made together, and asked for one after the other."""
        if self._palette is None or self._palette[0] != stored.source:
            import torch

            w = torch.from_numpy(narrow(self._weights, stored.source, "float16"))
            self._palette = (stored.source, *palettize(w))
        _, indices, palette = self._palette
        return indices[:, 0::2] | (indices[:, 1::2] << 4) if stored.part == "indices" else palette


def pack(q: torch.Tensor, dtype: str) -> np.ndarray:
    """Integers of the grid as the weight file holds them: int8 ``(rows, I)``, or int4 as uint8 ``(rows, I/2)``."""
    from ...quant.grid import pack_int4

    # The grid's packing holds q + 8; turning the highest bit of each half over gives two's complement.
    return pack_int4(q).numpy() ^ 0x88 if dtype == "int4" else q.numpy()


def palettize(w: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen values for every few rows, and which of them each weight takes: k-means (Lloyd 1982) on a histogram.

    Args:
        w: ``(O, I)``.

    Returns:
        Indices uint8 ``(O, I)`` and palettes float16 ``(O / rows, 16)`` in ascending order.
    """
    import torch

    rows = palette_rows(w.shape[0])
    indices = np.empty(w.shape, np.uint8)
    palettes = np.empty((w.shape[0] // rows, 16), np.float16)
    step = max(1, _PIECE // (rows * w.shape[1]))
    for start in range(0, len(palettes), step):
        part = slice(start, start + step)
        x = w[part.start * rows : part.stop * rows].float()
        x = x.reshape(-1, rows * w.shape[1])
        palette = _centroids(x).half()
        borders = ((palette[:, 1:].float() + palette[:, :-1].float()) / 2).contiguous()
        found = torch.searchsorted(borders, x, out_int32=True).to(torch.uint8)
        indices[part.start * rows : part.stop * rows] = found.reshape(-1, w.shape[1]).numpy()
        palettes[part] = palette.numpy()
    return indices, palettes


def _centroids(x: torch.Tensor) -> torch.Tensor:
    """Sixteen values near those of each row of ``x (P, n)``: ``(P, 16)``, ascending."""
    import torch

    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    width = ((high - low) / _BINS).clamp_min(torch.finfo(torch.float32).tiny)
    bins = ((x - low) / width).long().clamp_(0, _BINS - 1)
    counts = torch.zeros(len(x), _BINS).scatter_add_(1, bins, torch.ones_like(x))
    sums = torch.zeros(len(x), _BINS).scatter_add_(1, bins, x)
    means = torch.where(counts > 0, sums / counts.clamp_min(1), low + (torch.arange(_BINS) + 0.5) * width)
    half = torch.tensor(_GAUSSIAN)
    centroids = x.mean(1, keepdim=True) + x.std(1, keepdim=True) * torch.cat([-half.flip(0), half])
    for _ in range(_PALETTE_STEPS):
        borders = ((centroids[:, 1:] + centroids[:, :-1]) / 2).contiguous()
        nearest = torch.searchsorted(borders, means.contiguous())
        members = torch.zeros_like(centroids).scatter_add_(1, nearest, counts)
        total = torch.zeros_like(centroids).scatter_add_(1, nearest, sums)
        centroids = torch.where(members > 0, total / members.clamp_min(1), centroids)
    return centroids
