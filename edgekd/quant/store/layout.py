"""The quantized student on disk: one model folder that edgekd's exporters, transformers and vLLM all read.

The layout is compressed-tensors' *pack-quantized* (W4A16, group 32, symmetric), not GPTQ's: it keeps weights
``(out, in)`` with plain symmetric integers and one scale per group, it mixes int4 and int8 by module, and it needs no
zero points; GPTQ's transposes, adds a constant to zero points, and allows one bit width for the whole model.

For a module ``M`` with weight ``(O, I)``:

- int4: ``M.weight_packed`` int32 ``(O, I/8)`` (``pack_int4``'s bytes), ``M.weight_scale`` fp16 ``(O, I/32)``,
  ``M.weight_shape`` int64 ``(2,)``.
- int8: the same with four integers + 128 in an int32 and ``weight_scale`` ``(O, 1)``.
- An embedding, int4 or int8: compressed-tensors defines packed embeddings, but transformers 5.23 fails to load them
  and vLLM reads them for no model in general. So it lies there dequantized to fp16, which every reader takes, and
  ``grid.safetensors`` beside it holds the scales. fp16 holds ``scale * q`` of int4 exactly, and of int8 up to
  127 * 2**-11 < 0.07 of a step, so dividing by the scale and rounding gives back the very integers. A tied head is this
  same tensor, stored once.
- Everything else (norms, biases) is as in the student, or as quantization-aware distillation left it.

``grid.json`` holds the kind of every tensor and the digests. The index names the weight files, so that other readers
pass over ``grid.safetensors``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from ..grid import GROUP, pack_int4
from ..recipe import Kind

Block = tuple[torch.Tensor, torch.Tensor]
"""Some rows of a matrix: q int8 ``(rows, I)`` and scale float32, ``(rows, G)`` for int4 and ``(rows,)`` for int8."""

RECORD_FILE = "grid.json"
SCALES_FILE = "grid.safetensors"
"""Both as every folder has had them so far, and the keys of the first: what is on disk must stay readable."""
BLOCK_WEIGHTS = 2**20
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors names them."""


class Record(BaseModel):
    """``grid.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1]
    recipe: str
    method: str
    group_size: Literal[32]
    student_digest: str
    grid_digest: str
    plain_digest: str
    bits_per_weight: float
    tensors: dict[str, Kind]


@dataclass(frozen=True)
class Stored:
    """One tensor of a weight file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def is_embedding(name: str) -> bool:
    """Whether a parameter is looked up rather than multiplied."""
    return name.endswith("embed_tokens.weight")


def storage(name: str, kind: Kind, shape: tuple[int, ...]) -> list[Stored]:
    """The tensors that hold a quantized matrix."""
    module, (rows, width) = name.removesuffix(".weight"), shape
    words, groups = (width // 8, width // GROUP) if kind == "int4" else (-(-width // 4), 1)
    scale = Stored(f"{module}.weight_scale", torch.float16, (rows, groups))
    if is_embedding(name):
        return [Stored(name, torch.float16, shape), scale]
    return [
        Stored(f"{module}.weight_packed", torch.int32, (rows, words)),
        scale,
        Stored(f"{module}.weight_shape", torch.int64, (2,)),
    ]


def block_rows(width: int) -> int:
    """How many rows of ``width`` weights are read at a time."""
    return max(1, BLOCK_WEIGHTS // width)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes as safetensors stores them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def digest_of_integers(tensors: Iterable[tuple[str, Iterable[Block]]]) -> str:
    """sha256 over integers and scales, whatever file they come from: ``grid_digest``.

    Args:
        tensors: HF parameter name and blocks of whole rows in order (one block may be the whole matrix). The order of
            the tensors does not matter.
    """
    lines = []
    for name, blocks in tensors:
        integers, scales = hashlib.sha256(), hashlib.sha256()
        rows, kind = 0, ""
        for q, scale in blocks:
            rows, width, kind = rows + q.shape[0], q.shape[1], "int4" if scale.ndim == 2 else "int8"
            integers.update(bytes_of(pack_int4(q) if kind == "int4" else q))
            scales.update(bytes_of(scale.half()))
        lines.append(f"{name} {kind} {rows}x{width} {integers.hexdigest()} {scales.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def digest_of_plain(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over tensors that are not quantized, in order: ``plain_digest``."""
    whole = hashlib.sha256()
    for name, tensor in tensors:
        whole.update(f"{name} {DTYPES[tensor.dtype]} {tuple(tensor.shape)}\n".encode())
        whole.update(hashlib.sha256(bytes_of(tensor)).digest())
    return whole.hexdigest()


def quantization_config(kinds: dict[str, Kind], tied: bool) -> dict[str, Any]:
    """The ``quantization_config`` that compressed-tensors reads."""
    common = {"type": "int", "symmetric": True, "dynamic": False}
    groups: dict[str, Any] = {}

    def modules(kind: Kind) -> list[str]:
        return sorted(n.removesuffix(".weight") for n, k in kinds.items() if k == kind and not is_embedding(n))

    if int8 := modules("int8"):
        groups["int8"] = {"targets": int8, "weights": {**common, "num_bits": 8, "strategy": "channel"}}
    if modules("int4"):
        int4 = {**common, "num_bits": 4, "strategy": "group", "group_size": GROUP}
        groups["int4"] = {"targets": ["Linear"], "weights": int4}
    matrices = [n for n, k in kinds.items() if k == "plain" and n.endswith("_proj.weight")]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*(["lm_head"] if tied else []), *sorted(n.removesuffix(".weight") for n in matrices)],
    }
