"""The program file, with the weights put in where their stand-ins were lowered.

A ``.pte`` is a flatbuffer and segments behind it: one of constants for the kernels outside the backend, one for each of
the backend's graphs, and one for each named tensor these refer to by a key. XNNPACK's keys are the sha256 of the bytes
(its cache of packed weights is shared by all programs of a process and goes by the key), so real weights get real keys.
A tied head that is not int4 is the embedding's very bytes: its segment then lies inside the constants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...quant.recipe import Kind
from ..shared.decoder import EMBEDDING
from .model import Weights, embedding_stand_in, packed, packed_embedding

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager

_ALIGNMENT = 128  # of segments
_TENSOR_ALIGNMENT = 16  # of constants


@dataclass(frozen=True)
class _Blob:
    """Bytes that are read when written."""

    size: int
    read: Callable[[], Iterator[Any]]
    """Buffers of ``size`` bytes together."""


def _bytes(data: bytes) -> _Blob:
    return _Blob(len(data), lambda: iter([data]))


def _rows(weights: Weights, name: str, pack: Callable[[torch.Tensor, Kind], np.ndarray], size: int) -> _Blob:
    kind = weights.kind(name)
    return _Blob(size, lambda: (pack(rows, kind).data for rows, _ in weights.blocks(name)))


@dataclass(frozen=True)
class Written:
    """Sizes of a program file."""

    tensor_bytes: int
    """Of matrices, scales and vectors, and the rotary tables; a shared matrix counts once."""
    head_bytes: int
    """All that the runtime parses lies in the first so many bytes; numbers alone follow."""


def write_program(path: Path, manager: ExecutorchProgramManager, weights: Weights) -> Written:
    """Write the program with real matrices."""
    program, named = manager.executorch_program, manager._named_data
    stored = {key: _bytes(bytes(named.buffers[entry.buffer_index])) for key, entry in named.pte_data.items()}
    renamed: dict[bytes, bytes] = {}
    keys: dict[str, str] = {}
    for name in weights.numbers:
        kind = weights.kind(name)
        old = _sha([packed(weights.stand_in(name, weights.stored_dtype(name)), kind)])
        if old in stored:
            blob = _rows(weights, name, packed, stored.pop(old).size)
            keys[name] = _sha(blob.read())
            renamed[old.encode()] = keys[name].encode()
            stored[keys[name]] = blob
    for item in program.backend_delegate_data:
        for old_key, new_key in renamed.items():
            item.data = item.data.replace(old_key, new_key)
    constants = [_bytes(buffer.storage) for buffer in program.constant_buffer]
    inside: dict[str, int] = {}
    if weights.stand_ins:
        embedding = _embedding(program, weights)
        size = embedding_stand_in(weights).nbytes
        constants[embedding] = _rows(weights, EMBEDDING, packed_embedding, size)
        if EMBEDDING in keys and weights.kind(EMBEDDING) != "int4":
            inside[keys[EMBEDDING]] = embedding
    stored = dict(sorted(stored.items()))
    head_bytes = _write(path, program, constants, stored, inside)
    tensor_bytes = sum(blob.size for key, blob in stored.items() if key not in inside)
    return Written(tensor_bytes + sum(blob.size for blob in constants), head_bytes)


def _sha(pieces: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _embedding(program: Any, weights: Weights) -> int:
    """Which constant is the embedding's stand-in."""
    wanted = embedding_stand_in(weights).contiguous().numpy().tobytes()
    (index,) = (i for i, buffer in enumerate(program.constant_buffer) if buffer.storage == wanted)
    return index


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Segments:
    """Segments as they are laid out behind the program."""

    def __init__(self) -> None:
        self.places: list[tuple[int, _Blob]] = []
        self.table: list[tuple[int, int]] = []  # offset and size
        self.end = 0

    def put(self, blob: _Blob, alignment: int = _ALIGNMENT) -> int:
        """Where the blob begins."""
        offset = _aligned(self.end, alignment)
        self.places.append((offset, blob))
        self.end = offset + blob.size
        return offset

    def segment(self, offset: int, size: int) -> int:
        """Number of a segment; two may overlap."""
        self.table.append((offset, size))
        return len(self.table) - 1


def _write(path: Path, program: Any, constants: list[_Blob], named: dict[str, _Blob], inside: dict[str, int]) -> int:
    """Lay out the segments, write the flatbuffer and them, and return the end of what is parsed.

    Args:
        inside: named tensors that are one of the constants.
    """
    from executorch.exir.schema import (
        BackendDelegateDataReference,
        DataLocation,
        DataSegment,
        NamedData,
        SubsegmentOffsets,
    )

    segments = _Segments()
    of: dict[int, int] = {}
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            index = delegate.processed.index
            if index not in of:  # both methods share the backend's graphs
                blob = _bytes(program.backend_delegate_data[index].data)
                of[index] = segments.segment(segments.put(blob), blob.size)
            delegate.processed = BackendDelegateDataReference(DataLocation.SEGMENT, of[index])
    parsed = segments.end
    # A constant that is a named tensor too wants a segment's alignment.
    shared = set(inside.values())
    offsets = [
        segments.put(blob, _TENSOR_ALIGNMENT if i and i not in shared else _ALIGNMENT)
        for i, blob in enumerate(constants)
    ]
    first = offsets[0]
    constant = segments.segment(first, segments.end - first)
    program.named_data = [
        NamedData(key, segments.segment(offsets[inside[key]] if key in inside else segments.put(blob), blob.size))
        for key, blob in named.items()
    ]
    program.constant_segment = SubsegmentOffsets(constant, [offset - first for offset in offsets])
    program.constant_buffer, program.backend_delegate_data = [], []
    program.segments = [DataSegment(offset, size) for offset, size in segments.table]
    head = _flatbuffer(program, segments.end)
    base = _aligned(len(head), _ALIGNMENT)
    with path.open("wb") as file:
        file.write(head)
        for offset, blob in segments.places:
            file.seek(base + offset)
            file.writelines(blob.read())
    return base + parsed


def _flatbuffer(program: Any, segments_bytes: int) -> bytes:
    """The program itself, with the header that says where the segments begin."""
    from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
    from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header
    from executorch.exir._serialize.padding import pad_to

    result = _program_to_flatbuffer(program, constant_tensor_alignment=_TENSOR_ALIGNMENT)
    length = _aligned(_ExtendedHeader.EXPECTED_LENGTH, result.max_alignment)
    size = length + len(result.data)
    header = _ExtendedHeader(size, _aligned(size, _ALIGNMENT), segments_bytes)
    return _insert_flatbuffer_header(result.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", pad_to(header.to_bytes(), length))
