"""Weights into GGUF blocks, one tensor in memory at a time.

Shapes: ``q (out, in)`` int8; ``scale (out, in / 32)`` float32; blocks ``(out, bytes of a row)`` uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...quant.recipe import GROUP
from ...quant.source import Source
from ..shared.source import exact_half, narrow
from .names import Weight

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

    from ...quant.recipe import Kind


def pack_q4_0(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Blocks of 32 weights: fp16 scale, then 16 bytes; byte ``j`` holds ``q[j] + 8`` low and ``q[j + 16] + 8`` high.

    Args:
        q: int8 ``(out, in)`` in [-8, 7].
        scale: float32 ``(out, in / 32)``, exact in fp16.
    """
    rows, groups = scale.shape
    codes = (q.reshape(rows, groups, 2, GROUP // 2) + 8).astype(np.uint8)
    nibbles = codes[:, :, 0] | (codes[:, :, 1] << 4)
    return np.concatenate([_fp16_bytes(scale), nibbles], axis=-1).reshape(rows, -1)


def pack_q8_0(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Blocks of 32 weights: fp16 scale, then 32 int8.

    Args:
        q: int8 ``(out, in)``.
        scale: float32 ``(out, in / 32)``, exact in fp16.
    """
    rows, groups = scale.shape
    codes = np.ascontiguousarray(q).view(np.uint8).reshape(rows, groups, GROUP)
    return np.concatenate([_fp16_bytes(scale), codes], axis=-1).reshape(rows, -1)


def _fp16_bytes(scale: np.ndarray) -> np.ndarray:
    return exact_half(scale)[..., None].view(np.uint8)


def reorder_heads(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows ``(heads * head_dim, ...)`` of a query or key projection from halves ``(2, head_dim / 2)`` to pairs
    ``(head_dim / 2, 2)``: transformers rotates halves, llama.cpp's Llama rotates neighbours."""
    if not heads:
        return rows
    split = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def tensor_type(weight: Weight, kind: Kind) -> GGMLQuantizationType:
    """The GGUF type of a tensor. int8 rows that are no multiple of 32 cannot be blocks: they become fp32, which holds
    ``scale * q`` exactly."""
    from gguf import GGMLQuantizationType as Type

    if len(weight.shape) == 1:
        return Type.F32
    if kind == "plain":
        return Type.F16
    if kind == "int4":
        return Type.Q4_0
    return Type.Q8_0 if weight.shape[-1] % GROUP == 0 else Type.F32


def encode(weight: Weight, source: Source) -> np.ndarray:
    """The tensor's data as the file holds it.

    Raises:
        EdgekdError: a weight that is not finite, or does not fit fp16.
    """
    if source.kinds[weight.source] != "plain":
        return _encode_integers(weight, source)
    dtype = "float16" if len(weight.shape) == 2 else "float32"
    return reorder_heads(narrow(source, weight.source, dtype), weight.heads)


def _encode_integers(weight: Weight, source: Source) -> np.ndarray:
    """A matrix on the portable grid: int4 groups, or int8 rows."""
    blocks = zip(*source.blocks(weight.source), strict=True)
    q, scale = (reorder_heads(np.concatenate([part.numpy() for part in parts]), weight.heads) for parts in blocks)
    if scale.ndim == 2:
        return pack_q4_0(q, scale)
    if q.shape[1] % GROUP:
        return q.astype(np.float32) * scale[:, None]
    return pack_q8_0(q, np.repeat(scale[:, None], q.shape[1] // GROUP, axis=1))


def write_file(
    writer: GGUFWriter,
    path: Path,
    plan: list[Weight],
    source: Source,
    *,
    vectors: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write a whole file: header, keys, then tensor after tensor. Matrices that are not quantized become fp16.

    Args:
        vectors: further tensors, which become float32.
    """
    import gguf

    for weight in plan:
        kind = tensor_type(weight, source.kinds[weight.source])
        shape = gguf.quant_shape_to_byte_shape(weight.shape, kind)
        size = int(np.prod(shape))
        writer.add_tensor_info(weight.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
    further = {name: np.array(values, np.float32) for name, values in (vectors or {}).items()}
    for name, values in further.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for weight in plan:
        writer.write_tensor_data(encode(weight, source))
    for values in further.values():
        writer.write_tensor_data(values)
    writer.close()
