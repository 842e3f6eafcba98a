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

from ...architecture import Rotary as RotaryEmbedding
from ...quant.grid import pack_int4
from ...quant.recipe import GROUP, Kind
from ...quant.source import Source
from ..shared.decoder import EMBEDDING, HEAD, Architecture, rotary_tables
from ..shared.recipes import Real
from ..shared.source import narrow

_DIGITS = 8
HIDDEN = -1e9
"""Added to the score of what must not be seen; of minus infinity, a block of them alone makes ExecuTorch's attention
give NaN."""


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


class Scale(nn.Module):
    """``x`` times a number."""

    factor: torch.Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.full((1,), factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def scale(factor: float) -> nn.Module:
    """``Scale``, where there is something to do."""
    return nn.Identity() if factor == 1 else Scale(factor)


def cap(bound: float | None) -> nn.Module:
    """``x`` bent to stay within a number."""
    return nn.Identity() if bound is None else nn.Sequential(Scale(1 / bound), nn.Tanh(), Scale(bound))


class Silu(nn.Module):
    """By two operators that XNNPACK has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class GeluTanh(nn.Module):
    """GELU by its tanh: ``x sigmoid(2 u)`` is ``x (1 + tanh u) / 2``. XNNPACK has the other one alone, and takes it for
    this."""

    cubic: torch.Tensor
    linear: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        root = (8 / np.pi) ** 0.5
        self.register_buffer("cubic", torch.full((1,), 0.044715 * root))
        self.register_buffer("linear", torch.full((1,), root))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x * (x * x * self.cubic + self.linear))


class Rotary(nn.Module):
    """The rotary embedding of heads ``(1, T, H, D)``; cosines and sines are ``(T, 1, D)``. Where it turns part of a
    head, the other channels' cosines are 1 and their sines 0."""

    turn: torch.Tensor

    def __init__(self, size: int, turned: int) -> None:
        super().__init__()
        half, turn = turned // 2, torch.zeros(size, size)
        turn[:half, half:turned], turn[half:turned, :half] = -torch.eye(half), torch.eye(half)
        self.register_buffer("turn", turn)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + functional.linear(x, self.turn) * sin


def rotary_rows(rotary: RotaryEmbedding, size: int, context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``(C, 1, D)`` for ``Rotary``."""
    cos, sin = (np.concatenate([half, half], -1) for half in rotary_tables(rotary, context_length))
    still = ((0, 0), (0, size - rotary.dim))
    rows = np.pad(cos, still, constant_values=1), np.pad(sin, still)
    return torch.from_numpy(rows[0]).unsqueeze(1), torch.from_numpy(rows[1]).unsqueeze(1)


@dataclass(frozen=True)
class Step:
    """What every layer reads of the inputs."""

    position: int
    rotary: dict[RotaryEmbedding, tuple[torch.Tensor, torch.Tensor]]
    masks: dict[int | None, torch.Tensor]
    """What is added to scores ``(T, C)``, by window; only those that attention does not know itself."""


class Attention(nn.Module):
    """Attention of one layer over its cache, without projections."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, arch: Architecture, window: int | None, context_length: int) -> None:
        super().__init__()
        self.arch, self.window = arch, window
        self.factor = arch.head_dim**-0.5 if arch.attention_scale is None else arch.attention_scale
        self.scale, self.cap = scale(self.factor), cap(arch.attention_cap)
        cache = (1, context_length, arch.kv_heads, arch.head_dim)
        for p in ("keys", "values"):  # NumPy's zeros take no memory until they are touched
            self.register_buffer(p, torch.from_numpy(np.zeros(cache, np.float32)))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step) -> torch.Tensor:
        """``(1, T, H * D)`` of heads ``(1, T, H or K, D)``."""
        ops, at = torch.ops.llama, step.position
        ops.update_cache(k, self.keys, at)
        ops.update_cache(v, self.values, at)
        if self.arch.attention_cap is not None:
            y = self._capped(q, step.masks[self.window])
        elif self.window is not None:
            mask = step.masks[self.window]
            y = ops.custom_sdpa(q, self.keys, self.values, at, mask, 0.0, False, self.factor)
        else:
            y = ops.custom_sdpa(q, self.keys, self.values, at, None, 0.0, True, self.factor)
        return y.reshape(1, -1, self.arch.heads * self.arch.head_dim)

    def _capped(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """By products of its own: ExecuTorch's attention has no caps."""
        arch, group, size = self.arch, self.arch.heads // self.arch.kv_heads, self.arch.head_dim
        q = self.scale(q).view(-1, arch.kv_heads, group, size).permute(1, 2, 0, 3).reshape(arch.kv_heads, -1, size)
        scores = self.cap(torch.bmm(q, self.keys[0].permute(1, 2, 0)))
        scores = scores.view(arch.kv_heads, group, -1, len(self.keys[0])) + mask
        weights = torch.softmax(scores, -1).view(arch.kv_heads, -1, len(self.keys[0]))
        y = torch.bmm(weights, self.values[0].permute(1, 0, 2))
        return y.view(arch.kv_heads, group, -1, size).permute(2, 0, 1, 3)


class Layer(nn.Module):
    """One decoder layer with its cache."""

    before_attention: nn.Module
    behind_attention: nn.Module
    before_mlp: nn.Module
    behind_mlp: nn.Module
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
        at, attention = f"model.layers.{number}.", arch.attention[number]
        assert attention
        self.arch, self.turns = arch, attention.rotary
        for place, name in arch.norm_names(number)._asdict().items():
            norm = Norm(weights, name, arch.hidden, arch.norm_eps) if name else nn.Identity()
            setattr(self, place, norm)
        biased = {"o": arch.out_bias, **dict.fromkeys("qkv", arch.qkv_bias)}
        for p in "qkvo":
            name = f"{at}self_attn.{p}_proj"
            setattr(self, p, Linear(weights, f"{name}.weight", f"{name}.bias" if biased[p] else None))
        for p in ("gate", "up", "down"):
            name = f"{at}mlp.{p}_proj"
            setattr(self, p, Linear(weights, f"{name}.weight", f"{name}.bias" if arch.mlp_bias else None))
        for p, heads in (("q", arch.heads), ("k", arch.kv_heads)) if arch.qk_norm != "none" else ():
            size = arch.head_dim * (heads if arch.qk_norm == "whole" else 1)
            setattr(self, f"{p}_norm", Norm(weights, f"{at}self_attn.{p}_norm.weight", size, arch.norm_eps))
        self.rotary = Rotary(arch.head_dim, self.turns.dim) if self.turns else None
        self.attention = Attention(arch, attention.window_in(context_length), context_length)
        self.activation = Silu() if arch.activation == "silu" else GeluTanh()
        self.residual = scale(arch.residual_scale)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        (y,) = project(self._attend(self.before_attention(x), step), self.o)
        x = x + self.residual(self.behind_attention(y))
        gate, up = project(self.before_mlp(x), self.gate, self.up)
        (y,) = project(self.activation(gate) * up, self.down)
        return x + self.residual(self.behind_mlp(y))

    def _attend(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        q, k, v = project(x, self.q, self.k, self.v)
        if self.arch.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        heads = self.arch.heads, self.arch.kv_heads, self.arch.kv_heads
        q, k, v = (y.view(1, -1, n, self.arch.head_dim) for y, n in zip((q, k, v), heads, strict=True))
        if self.arch.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None and self.turns is not None:
            q, k = (self.rotary(y, *step.rotary[self.turns]) for y in (q, k))
        return self.attention(q, k, v, step)


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

    slots: torch.Tensor
    seen: torch.Tensor
    hidden: torch.Tensor

    def __init__(self, weights: Weights, arch: Architecture, context_length: int) -> None:
        super().__init__()
        self.arch, self.context_length = arch, context_length
        self.embedding, self.embedding_scale = Embedding(weights), scale(arch.embedding_scale)
        self.layers = nn.ModuleList(Layer(weights, arch, n, context_length) for n in range(arch.layers))
        self.norm = Norm(weights, "model.norm.weight", arch.hidden, arch.norm_eps)
        self.head = Linear(weights, EMBEDDING if weights.source.tied else HEAD)
        self.logits = nn.Sequential(scale(arch.logit_scale), cap(arch.logit_cap))
        for number, rotary in enumerate(arch.rotaries):
            for part, rows in zip(("cos", "sin"), rotary_rows(rotary, arch.head_dim, context_length), strict=True):
                self.register_buffer(f"{part}_{number}", rows)
        self.windows = {attention.window_in(context_length) for attention in arch.attention if attention}
        if arch.attention_cap is None:
            self.windows -= {None}
        if self.windows:
            self.register_buffer("slots", torch.arange(context_length))
            self.register_buffer("seen", torch.zeros(1))
            self.register_buffer("hidden", torch.full((1,), HIDDEN))

    @property
    def table_bytes(self) -> int:
        """Bytes of what is no weight: cosines, sines and numbers of positions."""
        return sum(table.nbytes for name, table in self.named_buffers(recurse=False))

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        position: Any = input_pos[0].item()  # a number that torch.export keeps as a symbol
        count = tokens.shape[1]
        torch._check(position >= 0)
        torch._check(position < self.context_length)
        torch._check(position + count <= self.context_length)
        turns = {
            rotary: (self._rows(f"cos_{n}", position, count), self._rows(f"sin_{n}", position, count))
            for n, rotary in enumerate(self.arch.rotaries)
        }
        step = Step(position, turns, {window: self._mask(window, position, count) for window in self.windows})
        x = self.embedding_scale(self.embedding(tokens))
        for layer in self.layers:
            x = layer(x, step)
        (logits,) = project(self.norm(x[:, -1:]), self.head)
        return self.logits(logits)

    def _rows(self, name: str, position: int, count: int) -> torch.Tensor:
        return self.get_buffer(name).narrow(0, position, count)

    def _mask(self, window: int | None, position: int, count: int) -> torch.Tensor:
        """What is added to the cache's scores: entries to come, and those before the window, are hidden."""
        back = self._rows("slots", position, count).unsqueeze(1) - self.slots
        hidden = back < 0
        if window is not None:
            hidden = torch.logical_or(hidden, back >= window)
        return torch.where(hidden, self.hidden, self.seen)
