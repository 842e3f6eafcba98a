"""The program file, with the weights put in where their stand-ins were lowered.

A ``.pte`` is a flatbuffer and segments behind it: one of constants for the kernels outside the backend, one for each of
the backend's graphs, and one for each named tensor these refer to by a key. XNNPACK's keys are the sha256 of the bytes
(its cache of packed weights is shared by all programs of a process and goes by the key), so real weights get real keys.
A tied head of int8 or fp16 is the embedding's very bytes: its segment then lies inside the constants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._executorch_model import EMBEDDING, Weights, packed, packed_embedding, stand_in

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager

_ALIGNMENT = 128  # of segments
_TENSOR_ALIGNMENT = 16  # of constants


@dataclass(frozen=True)
class _Blob:
    """Bytes that are read when written."""

    size: int
    read: Callable[[], Any]
    """A buffer of ``size`` bytes."""


def _bytes(data: bytes) -> _Blob:
    return _Blob(len(data), lambda: data)


def write_program(path: Path, manager: ExecutorchProgramManager, weights: Weights) -> int:
    """Write the program with real matrices; the bytes that its weights take."""
    program, named = manager.executorch_program, manager._named_data
    stored = {key: _bytes(bytes(named.buffers[entry.buffer_index])) for key, entry in named.pte_data.items()}
    renamed: dict[bytes, bytes] = {}
    keys: dict[str, str] = {}
    for name, number in weights.numbers.items():
        kind = weights.kind(name)
        old = _sha(packed(stand_in(number, kind, weights.source.shape(name)), kind))
        if old in stored:
            keys[name] = _sha(packed(_matrix(weights, name), kind))
            renamed[old.encode()] = keys[name].encode()
            size = stored.pop(old).size
            stored[keys[name]] = _Blob(size, lambda name=name, kind=kind: packed(_matrix(weights, name), kind))
    constants, embedding = _constants(program, weights)
    for item in program.backend_delegate_data:
        for old_key, new_key in renamed.items():
            item.data = item.data.replace(old_key, new_key)
    shared = keys.get(EMBEDDING) if weights.kind(EMBEDDING) == "int8" else None
    _write(path, program, constants, dict(sorted(stored.items())), {shared: embedding} if shared else {})
    return sum(blob.size for key, blob in stored.items() if key != shared) + constants[embedding].size


def _matrix(weights: Weights, name: str) -> torch.Tensor:
    return weights.plain(name) if weights.kind(name) == "plain" else weights.quantized(name)[0]


def _sha(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _constants(program: Any, weights: Weights) -> tuple[list[_Blob], int]:
    """Constants of the program, and which of them is the embedding."""
    kind = weights.kind(EMBEDDING)
    wanted = packed_embedding(
        stand_in(weights.numbers[EMBEDDING], kind, weights.source.shape(EMBEDDING)), kind
    ).tobytes()
    blobs = [_bytes(buffer.storage) for buffer in program.constant_buffer]
    (index,) = (i for i, buffer in enumerate(program.constant_buffer) if buffer.storage == wanted)
    blobs[index] = _Blob(len(wanted), lambda: packed_embedding(_matrix(weights, EMBEDDING), kind))
    return blobs, index


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _write(path: Path, program: Any, constants: list[_Blob], named: dict[str, _Blob], inside: dict[str, int]) -> None:
    """Lay out the segments, then write the flatbuffer and them.

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

    offsets, end = [], 0
    places: list[tuple[int, _Blob]] = []
    for blob in constants:
        # Where the head shares the embedding, it wants a segment's alignment.
        end = _aligned(end, _ALIGNMENT if len(offsets) in inside.values() else _TENSOR_ALIGNMENT)
        offsets.append(end)
        places.append((end, blob))
        end += blob.size
    segments = [DataSegment(0, end)]

    def add(blob: _Blob) -> int:
        nonlocal end
        end = _aligned(end, _ALIGNMENT)
        segments.append(DataSegment(end, blob.size))
        places.append((end, blob))
        end += blob.size
        return len(segments) - 1

    for plan in program.execution_plan:
        for delegate in plan.delegates:
            data = program.backend_delegate_data[delegate.processed.index].data
            segment = add(_bytes(data))
            delegate.processed = BackendDelegateDataReference(DataLocation.SEGMENT, segment)
    program.backend_delegate_data = []
    program.named_data = []
    for key, blob in named.items():
        if key in inside:
            segments.append(DataSegment(offsets[inside[key]], blob.size))
            segment = len(segments) - 1
        else:
            segment = add(blob)
        program.named_data.append(NamedData(key, segment))
    program.constant_segment, program.constant_buffer = SubsegmentOffsets(0, offsets), []
    program.segments = segments
    head = _flatbuffer(program, end)
    with path.open("wb") as file:
        file.write(head)
        base = _aligned(len(head), _ALIGNMENT)
        for offset, blob in places:
            file.seek(base + offset)
            file.write(blob.read())


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
