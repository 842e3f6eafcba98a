"""The decoder as a torch module that lowers to XNNPACK whole but for the embedding, the rotary tables' rows, the
key-value cache and attention.

A root mean square is a product with a row of ``1 / E``, and the rotary embedding's half turn one with a matrix of ones
and minus ones: XNNPACK has kernels for these and, with a dynamic number of tokens, none for a mean or a slice.

Shapes: ``T`` tokens fed, ``E`` hidden size, ``H`` query heads, ``K`` key-value heads, ``D`` head size, ``C`` context
length, ``V`` vocabulary, ``O`` outputs and ``I`` inputs of a matrix, ``G`` groups of ``I``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ...quant.grid import pack_int4
from ...quant.recipe import GROUP, Kind
from ...quant.source import Source
from ..shared.decoder import EMBEDDING, HEAD, Architecture, rotary_tables
from ..shared.recipes import Real
from ..shared.source import narrow

_DIGITS = 8


@dataclass
class Weights:
    """Where the module takes its tensors from."""

    source: Source
    real: Real
    """Of matrices that are not quantized, as they are stored; float16 with stand-ins alone."""
    stand_ins: bool
    """Give every matrix a stand-in: what is lowered is then small, and the packer knows each matrix by its number. For
    XNNPACK alone: Vulkan rearranges weights when it lowers, and gets the real ones."""
    numbers: dict[str, int] = field(default_factory=dict)

    def kind(self, name: str) -> Kind:
        """How a parameter is stored."""
        return self.source.kinds[name]

    def matrix(self, name: str) -> torch.Tensor:
        """Integers int8 ``(O, I)``, or a float32 matrix."""
        if self.stand_ins:
            return self.stand_in(name, torch.float32 if self.kind(name) == "plain" else torch.int8)
        return torch.cat([rows for rows, _ in self.blocks(name)])

    def stand_in(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A matrix's stand-in."""
        return stand_in(self.number(name), self.source.shape(name), dtype)

    def number(self, name: str) -> int:
        """A matrix's number."""
        return self.numbers.setdefault(name, len(self.numbers))

    def blocks(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Some rows after the others: int8 and their scales, float32 ``(rows, G)`` or ``(rows,)``; of a plain matrix,
        all of it as it is stored, and nothing."""
        if self.kind(name) == "plain":
            yield self.plain(name, self.real), torch.empty(0)
        else:
            yield from self.source.blocks(name)

    def scale(self, name: str) -> torch.Tensor:
        """Scales of a quantized matrix, float32 ``(O, G)`` or ``(O,)``."""
        return torch.cat([scale for _, scale in self.blocks(name)])

    def plain(self, name: str, dtype: Real = "float32") -> torch.Tensor:
        """A tensor that is not quantized."""
        return torch.from_numpy(narrow(self.source, name, dtype))

    def check(self) -> None:
        """Read what is not quantized, one tensor at a time: lowering, which looks at none of it, takes minutes.

        Raises:
            EdgekdError: a weight that is not finite, or does not fit.
        """
        for name, kind in self.source.kinds.items():
            if kind == "plain":
                self.plain(name, self.real if len(self.source.shape(name)) == 2 else "float32")

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of a matrix's stand-in in the program."""
        return cast(torch.dtype, getattr(torch, self.real)) if self.kind(name) == "plain" else torch.int8


def stand_in(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A matrix that takes the memory of a row and a column and tells its number: every row is the one before, from its
    second element on."""
    digits = [number >> 3 * place & 7 for place in range(_DIGITS)]
    memory = torch.zeros(sum(shape), dtype=dtype)
    memory[:_DIGITS] = torch.tensor(digits, dtype=dtype)
    return memory.as_strided(shape, (1, 1))  # ExecuTorch refuses a stride of zero


def packed(rows: torch.Tensor, kind: Kind) -> np.ndarray:
    """The bytes of a matrix's rows as XNNPACK reads them: int4 as codes q + 8, two to a byte, the first one low."""
    return np.ascontiguousarray(pack_int4(rows) if kind == "int4" else rows)


def packed_embedding(rows: torch.Tensor, kind: Kind) -> np.ndarray:
    """The bytes of an embedding's rows as ExecuTorch's kernels read them: int4 with the first code high."""
    if kind == "int4":
        codes = pack_int4(rows)
        return ((codes << 4) | (codes >> 4)).numpy()
    return np.ascontiguousarray(rows)


def embedding_stand_in(weights: Weights) -> torch.Tensor:
    """Of the shape and dtype that ``packed_embedding`` gives."""
    kind, (rows, width) = weights.kind(EMBEDDING), weights.source.shape(EMBEDDING)
    dtype = torch.uint8 if kind == "int4" else weights.stored_dtype(EMBEDDING)
    return stand_in(weights.number(EMBEDDING), (rows, width // 2 if kind == "int4" else width), dtype)


def table_bytes(weights: Weights) -> int:
    """Bytes of the embedding and its scales where the head does not read them too."""
    kind, (rows, width) = weights.kind(EMBEDDING), weights.source.shape(EMBEDDING)
    if weights.stand_ins and weights.source.tied and kind != "int4":  # int4 lies there in the head's order as well
        return 0
    scales = {"int4": width // GROUP, "int8": 1, "plain": 0}[kind]
    return embedding_stand_in(weights).nbytes + 2 * rows * scales


class Linear(nn.Module):
    """``x W^T + b``; of a quantized ``W``, with activations rounded to int8, token by token."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, weights: Weights, name: str, bias: str | None = None) -> None:
        super().__init__()
        self.kind, self.affine = weights.kind(name), not weights.stand_ins
        self.stored: torch.Tensor | None = None
        """What is lowered instead of ``weight``: XNNPACK takes matrices in float16, torch does not beside float32."""
        self.register_buffer("weight", weights.matrix(name))
        if self.kind == "plain" and weights.real == "float16":
            self.stored = weights.stand_in(name, torch.float16)
        self.register_buffer("bias", weights.plain(bias) if bias else None)
        if self.kind != "plain":
            scale = weights.scale(name)
            self.register_buffer("scale", scale)
            self.register_buffer("zero", torch.zeros(scale.shape, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        if self.kind == "plain":
            return functional.linear(x, self.weight, self.bias)
        if self.affine:
            weight = self._affine()
        elif self.kind == "int4":
            weight = ops.dequantize_per_channel_group(
                self.weight, self.scale, self.zero, -8, 7, torch.int8, GROUP, torch.float32
            )
        else:
            weight = ops.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
        return functional.linear(x, weight, self.bias)

    def _affine(self) -> torch.Tensor:
        """The weight by torchao's operator, the one that Vulkan's patterns know."""
        low, high, block = (-8, 7, GROUP) if self.kind == "int4" else (-127, 127, self.weight.shape[1])
        scale, zero = (part.view(len(self.weight), -1) for part in (self.scale, self.zero))
        return torch.ops.torchao.dequantize_affine(
            self.weight, [1, block], scale, zero, torch.int8, low, high, output_dtype=torch.float32
        )


def round_activations(x: torch.Tensor, *, affine: bool) -> torch.Tensor:
    """``x`` rounded to int8 with a scale and a zero point a token: what the backend's kernels do on the way in."""
    if affine:
        from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as torchao

        return torchao._apply_int8_act_asym_per_token_quant_dequant(x)
    ops = torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    q = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return ops.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)


def project(x: torch.Tensor, *matrices: Linear) -> list[torch.Tensor]:
    """Products of ``x``, rounded once, with several matrices."""
    wanted = any(matrix.kind != "plain" for matrix in matrices)
    rounded = round_activations(x, affine=matrices[0].affine) if wanted else x
    return [matrix(x if matrix.kind == "plain" else rounded) for matrix in matrices]


class Norm(nn.Module):
    """RMSNorm over the last ``size`` elements."""

    weight: torch.Tensor
    mean: torch.Tensor
    eps: torch.Tensor

    def __init__(self, weights: Weights, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weights.plain(name))
        self.register_buffer("mean", torch.full((1, size), 1 / size))
        self.register_buffer("eps", torch.full((1,), eps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(functional.linear(x * x, self.mean, self.eps)) * self.weight


class Rotary(nn.Module):
    """The rotary embedding of heads ``(1, T, H, D)``; cosines and sines are ``(T, 1, D)``."""

    turn: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        half = torch.eye(size // 2)
        turn = torch.zeros(size, size)
        turn[: size // 2, size // 2 :], turn[size // 2 :, : size // 2] = -half, half
        self.register_buffer("turn", turn)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + functional.linear(x, self.turn) * sin


class Layer(nn.Module):
    """One decoder layer with its cache."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    q_norm: Norm
    k_norm: Norm

    def __init__(self, weights: Weights, arch: Architecture, number: int, context_length: int) -> None:
        super().__init__()
        at = f"model.layers.{number}."
        self.arch = arch
        self.input_norm = Norm(weights, f"{at}input_layernorm.weight", arch.hidden, arch.norm_eps)
        self.mlp_norm = Norm(weights, f"{at}post_attention_layernorm.weight", arch.hidden, arch.norm_eps)
        bias = arch.qkv_bias
        for p in "qkv":
            name = f"{at}self_attn.{p}_proj"
            setattr(self, p, Linear(weights, f"{name}.weight", f"{name}.bias" if bias else None))
        for p in ("q", "k") if arch.qk_norm == "head" else ():
            setattr(self, f"{p}_norm", Norm(weights, f"{at}self_attn.{p}_norm.weight", arch.head_dim, arch.norm_eps))
        self.o = Linear(weights, f"{at}self_attn.o_proj.weight")
        for p in ("gate", "up", "down"):
            setattr(self, p, Linear(weights, f"{at}mlp.{p}_proj.weight"))
        self.rotary = Rotary(arch.head_dim)
        cache = (1, context_length, arch.kv_heads, arch.head_dim)
        for p in ("keys", "values"):  # NumPy's zeros take no memory until they are touched
            self.register_buffer(p, torch.from_numpy(np.zeros(cache, np.float32)))

    def forward(self, x: torch.Tensor, position: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = self.arch.heads, self.arch.kv_heads, self.arch.kv_heads
        products = project(self.input_norm(x), self.q, self.k, self.v)
        q, k, v = (y.view(1, -1, n, self.arch.head_dim) for y, n in zip(products, heads, strict=True))
        if self.arch.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        ops = torch.ops.llama
        ops.update_cache(k, self.keys, position)
        ops.update_cache(v, self.values, position)
        attended = ops.custom_sdpa(q, self.keys, self.values, position, None, 0.0, True)
        (y,) = project(attended.view(1, -1, self.arch.heads * self.arch.head_dim), self.o)
        x = x + y
        gate, up = project(self.mlp_norm(x), self.gate, self.up)
        (y,) = project(gate * torch.sigmoid(gate) * up, self.down)
        return x + y


class Embedding(nn.Module):
    """Rows of the embedding ``(V, E)`` for ids ``(1, T)``."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.kind = weights.kind(EMBEDDING)
        if weights.stand_ins:
            self.register_buffer("weight", embedding_stand_in(weights))
        else:
            self.register_buffer("weight", torch.from_numpy(packed_embedding(weights.matrix(EMBEDDING), self.kind)))
        if self.kind != "plain":
            self.register_buffer("scale", weights.scale(EMBEDDING).half())  # exact

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        if self.kind == "int4":
            return ops.embedding_4bit.dtype(self.weight, self.scale, None, -8, 7, ids, dtype=torch.float32)
        if self.kind == "int8":
            return ops.embedding_byte.dtype(self.weight, self.scale, None, -127, 127, ids, dtype=torch.float32)
        return functional.embedding(ids, self.weight).float()


class Decoder(nn.Module):
    """Ids ``(1, T)`` and the position ``(1,)`` of the first to logits of the last ``(1, 1, V)``."""

    cos: torch.Tensor
    sin: torch.Tensor
    head: Linear

    def __init__(self, weights: Weights, arch: Architecture, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.embedding = Embedding(weights)
        self.layers = nn.ModuleList(Layer(weights, arch, n, context_length) for n in range(arch.layers))
        self.norm = Norm(weights, "model.norm.weight", arch.hidden, arch.norm_eps)
        self.head = Linear(weights, EMBEDDING if weights.source.tied else HEAD)
        for name, half in zip(("cos", "sin"), rotary_tables(arch, context_length), strict=True):
            self.register_buffer(name, torch.from_numpy(np.concatenate([half, half], -1)).unsqueeze(1))

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        position: Any = input_pos[0].item()  # a number that torch.export keeps as a symbol
        count = tokens.shape[1]
        torch._check(position >= 0)
        torch._check(position < self.context_length)
        torch._check(position + count <= self.context_length)
        cos, sin = self.cos.narrow(0, position, count), self.sin.narrow(0, position, count)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, position, cos, sin)
        (logits,) = project(self.norm(x[:, -1:]), self.head)
        return logits
