"""Core ML's weight file, read without Core ML: a header, then for each tensor a metadata record and its bytes.

Both records are 64 bytes, little-endian; the format is that of coremltools' ``mlmodel/src/MILBlob/Blob``
(``StorageFormat.hpp``). Integers narrower than a byte are packed in order, the first in the lowest bits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from ....errors import BadArtifact, Unsupported

RECORD_BYTES = 64
ALIGNMENT_BYTES = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<II")  # tensors, version
_METADATA = struct.Struct("<IIQQQ")  # sentinel, type, bytes, offset of the data, bits of padding


@dataclass(frozen=True)
class Element:
    """A tensor's element type: its code in the file, its width, and the numpy type that holds it unpacked."""

    code: int
    bits: int
    dtype: type[np.generic]


ELEMENTS = {
    "FLOAT16": Element(1, 16, np.float16),
    "FLOAT32": Element(2, 32, np.float32),
    "UINT8": Element(3, 8, np.uint8),
    "INT8": Element(4, 8, np.int8),
    "INT16": Element(6, 16, np.int16),
    "UINT16": Element(7, 16, np.uint16),
    "INT4": Element(8, 4, np.int8),
    "UINT1": Element(9, 1, np.uint8),
    "UINT2": Element(10, 2, np.uint8),
    "UINT4": Element(11, 4, np.uint8),
    "UINT3": Element(12, 3, np.uint8),
    "UINT6": Element(13, 6, np.uint8),
    "INT32": Element(14, 32, np.int32),
    "UINT32": Element(15, 32, np.uint32),
}


def unpack(packed: np.ndarray, count: int, bits: int, *, signed: bool = False) -> np.ndarray:
    """Integers of ``bits`` bits from a stream of bytes.

    Args:
        packed: uint8 ``(ceil(count · bits / 8),)``.
        bits: 1 to 7.
        signed: they are two's complement.

    Returns:
        ``(count,)``, int8 if signed, else uint8.
    """
    mask = np.uint8((1 << bits) - 1)
    if 8 % bits == 0:
        per_byte = 8 // bits
        places = np.empty((len(packed), per_byte), np.uint8)
        for place in range(per_byte):
            places[:, place] = (packed >> (place * bits)) & mask
        values = places.reshape(-1)[:count]
    else:
        values = np.zeros(count, np.uint8)
        stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
        for place in range(bits):
            values |= stream[:, place] << place
    if not signed:
        return values
    sign = 1 << (bits - 1)
    return (values ^ sign).view(np.int8) - np.int8(sign)


@dataclass(frozen=True)
class Blob:
    """One tensor of a weight file, checked and not yet read."""

    file: WeightFile
    offset: int
    shape: tuple[int, ...]
    element: str

    def read(self) -> np.ndarray:
        """The tensor; a view of the file where its elements are whole bytes."""
        kind, count = ELEMENTS[self.element], prod(self.shape)
        stop = self.offset + (count * kind.bits + 7) // 8
        data = self.file.bytes[self.offset : stop]
        if kind.bits < 8:
            return unpack(data, count, kind.bits, signed=self.element == "INT4").reshape(self.shape)
        return data.view(kind.dtype).reshape(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """A weight file, mapped into memory on first use."""

    path: Path

    @cached_property
    def bytes(self) -> np.ndarray:
        """The whole file, uint8, copied on write.

        Raises:
            BadArtifact: it is missing, or is no weight file of this version.
        """
        try:
            data = np.memmap(self.path, np.uint8, "c")
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise self._damaged(f"cannot be read: {error}") from error
        if len(data) < RECORD_BYTES:
            raise self._damaged(f"has {len(data)} bytes, less than its header")
        _, version = _HEADER.unpack_from(data.data)
        if version != VERSION:
            raise self._damaged(f"is of version {version}, not {VERSION}")
        return np.asarray(data)

    def blob(self, offset: int, shape: tuple[int, ...], element: str) -> Blob:
        """The tensor whose metadata stands at ``offset``.

        Args:
            element: the type the program gives it, a key of ``ELEMENTS``.

        Raises:
            Unsupported: a type that this reader does not know.
            BadArtifact: no tensor of that type and shape stands there, or not all of it.
        """
        if element not in ELEMENTS:
            raise Unsupported(f"{self.path}: weights of type {element} are not supported.")
        kind, where = ELEMENTS[element], f"at byte {offset}"
        if offset % ALIGNMENT_BYTES or not 0 <= offset <= len(self.bytes) - RECORD_BYTES:
            raise self._damaged(f"has no metadata {where} of its {len(self.bytes)} bytes")
        sentinel, code, size, start, padding = _METADATA.unpack_from(self.bytes.data, offset)
        if sentinel != SENTINEL:
            raise self._damaged(f"has no metadata {where}")
        if code != kind.code:
            raise self._damaged(f"holds type {code} {where}, not {kind.code} ({element})")
        bits = prod(shape) * kind.bits
        if size != (bits + 7) // 8 or (kind.bits < 8 and padding != size * 8 - bits):
            raise self._damaged(f"holds {size} bytes {where}, not those of {element} {list(shape)}")
        if start % ALIGNMENT_BYTES or start + size > len(self.bytes):
            raise self._damaged(f"ends at byte {len(self.bytes)}, inside the tensor {where}")
        return Blob(self, start, shape, element)

    def _damaged(self, what: str) -> BadArtifact:
        return BadArtifact(f"{self.path} {what}.", "Export the package again.")
