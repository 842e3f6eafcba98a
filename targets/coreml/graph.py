"""The decoder as a MIL program, Core ML's own graph, written operator by operator; and the model description around it.

Nothing is traced and nothing here reads a weight: matrices stand in the program as constants without storage, which
``pack`` fills in while the file is written. So the integers of the grid arrive in the file as they are, and
full-precision weights never exist.

The program keeps the cache as state (iOS 18, macOS 15) in two tensors, and computes in float16. Its inputs:

- ``inputIds`` int32 ``(1, T)``: the tokens.
- ``positionIds`` int32 ``(1, T)``: their positions, consecutive; the cache is written from the first one on.
- ``causalMask`` float16 ``(1, 1, T, S)``: what each token may see of the first ``S`` entries of the cache: 0, or the
  lowest number; ``S`` is at least the last position + 1, and may be more, so that an app can keep to few shapes.
- ``outputIds`` int32 ``(K,)``: which of the ``T`` tokens want logits.

Its output is ``logits`` float16 ``(1, K, V)``; its states are ``keyCache`` and ``valueCache``, float16
``(L, 1, N, C, D)``. Where swift-transformers has a name for one, it is that.

Shapes: ``H`` query heads, ``N`` key heads, ``G = H / N``, ``D`` head size, ``E`` hidden size, ``C`` context length,
``L`` layers, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...architecture import Rotary
from ...quant.recipe import GROUP
from ..shared.decoder import EMBEDDING, HEAD, Architecture
from .tools import builder

if TYPE_CHECKING:
    from coremltools.proto.Model_pb2 import ModelDescription

MASKED = -65504.0
"""What ``causalMask`` holds for what must not be seen: the lowest finite float16."""
Form = Literal["plain", "int4", "int8", "palette4"]
Part = Literal["q", "scale", "value", "indices", "palette", "cos", "sin"]


@dataclass(frozen=True)
class Stored:
    """A constant that is filled in while the file is written."""

    source: str
    """The parameter, by its HF name; empty for a table of the rotary embedding."""
    part: Part
    dtype: Literal["int4", "int8", "uint4", "float16"]
    shape: tuple[int, ...]
    rotary: Rotary | None = None
    """Whose table it is."""

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        bits = {"int4": 4, "uint4": 4, "int8": 8, "float16": 16}[self.dtype]
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Settings:
    """What the recipe asks of the program."""

    forms: Mapping[str, Form]
    """How each parameter is stored."""
    tied: bool
    context_length: int


@dataclass(frozen=True)
class Graph:
    """A program without its weights."""

    program: Any
    stored: dict[str, Stored]
    """By the name of the constant."""


@dataclass
class _Writer:
    """What the functions below share while they write the program."""

    arch: Architecture
    settings: Settings
    mb: Any
    stored: dict[str, Stored] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)

    def const(self, name: str, stored: Stored) -> Any:
        """A constant without storage: one number, repeated with stride zero."""
        types = builder().types
        one = np.zeros((), types.nptype_from_builtin(types.string_to_builtin(_MIL_TYPES[stored.dtype])))
        self.stored[name] = stored
        return self.mb.const(val=np.broadcast_to(one, stored.shape, subok=True), name=name)

    def zeros(self, size: int) -> Any:
        """The bias of a product that has none: the builder would make one for each."""
        name = f"zeros_{size}"
        if name not in self.values:
            self.values[name] = self.mb.const(val=np.zeros(size, np.float16), name=name)
        return self.values[name]

    def weight(self, name: str, shape: tuple[int, ...]) -> Any:
        """A parameter, the same value wherever it is used: so a tied embedding is looked up and multiplied by as one.

        When such a value is decompressed, at load or as it is used, is Core ML's choice (coremltools documents no
        more of it).
        """
        if name not in self.values:
            self.values[name] = self._weight(name, shape)
        return self.values[name]

    def _weight(self, name: str, shape: tuple[int, ...]) -> Any:
        mil, form = mil_name(name), self.settings.forms[name]
        if form == "plain":
            return self.const(mil, Stored(name, "value", "float16", shape))
        rows, width = shape
        if form == "palette4":
            indices = self.const(f"{mil}_indices", Stored(name, "indices", "uint4", shape))
            palettes = (rows // palette_rows(rows), 1, 16, 1)
            palette = self.const(f"{mil}_palette", Stored(name, "palette", "float16", palettes))
            return self.mb.constexpr_lut_to_dense(indices=indices, lut=palette, name=mil)
        scales = (rows, width // GROUP if form == "int4" else 1)
        q = self.const(f"{mil}_q", Stored(name, "q", form, shape))
        scale = self.const(f"{mil}_scale", Stored(name, "scale", "float16", scales))
        return self.mb.constexpr_blockwise_shift_scale(data=q, scale=scale, name=mil)


def _scaled(w: _Writer, x: Any, factor: float) -> Any:
    """``x`` times a number."""
    return x if factor == 1 else w.mb.mul(x=x, y=np.float16(factor))


def _capped(w: _Writer, x: Any, cap: float | None) -> Any:
    """``x`` bent to stay within a number."""
    return x if cap is None else _scaled(w, w.mb.tanh(x=_scaled(w, x, 1 / cap)), cap)


_MIL_TYPES = {"int4": "int4", "uint4": "uint4", "int8": "int8", "float16": "fp16"}


def mil_name(name: str) -> str:
    """A parameter's name in the program, where a name holds letters, digits and underscores alone."""
    return name.replace(".", "_")


def palette_rows(rows: int) -> int:
    """Neighbouring outputs of a matrix that share a lookup table: 16, or what divides their number."""
    return math.gcd(rows, 16)


def _linear(w: _Writer, x: Any, name: str, shape: tuple[int, int], bias: str = "") -> Any:
    added = w.weight(bias, shape[:1]) if bias else w.zeros(shape[0])
    return w.mb.linear(x=x, weight=w.weight(name, shape), bias=added)


def _norm(w: _Writer, x: Any, name: str, size: int) -> Any:
    """RMSNorm over the last axis.

    float16 ends at 65504, and an activation of 256 has a larger square: so ``x`` is divided by its largest magnitude
    first, and epsilon by its square. The floor keeps that quotient in range too; a row so small is all epsilon.
    """
    mb, root = w.mb, math.sqrt(w.arch.norm_eps)
    half = np.float16
    largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
    largest = mb.maximum(x=largest, y=half(root / 128))
    x = mb.real_div(x=x, y=largest)
    mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
    epsilon = mb.real_div(x=half(root), y=largest)
    inverse = mb.rsqrt(x=mb.add(x=mean, y=mb.mul(x=epsilon, y=epsilon)), epsilon=half(0))
    return mb.mul(x=mb.mul(x=x, y=inverse), y=w.weight(name, (size,)))


def _rotate(w: _Writer, x: Any, rotary: Rotary, tables: tuple[Any, Any]) -> Any:
    """The rotary embedding of ``x (1, heads, T, D)``; the table of sines has the sign of the first half's swap."""
    mb, rest = w.mb, w.arch.head_dim - rotary.dim
    still = ()
    if rest:
        x, *still = mb.split(x=x, split_sizes=[rotary.dim, rest], axis=-1)
    first, second = mb.split(x=x, num_splits=2, axis=-1)
    swapped = mb.concat(values=[second, first], axis=-1)
    x = mb.add(x=mb.mul(x=x, y=tables[0]), y=mb.mul(x=swapped, y=tables[1]))
    return mb.concat(values=[x, *still], axis=-1) if still else x


@dataclass(frozen=True)
class _Step:
    """What every layer reads of the inputs."""

    masks: Mapping[int | None, Any]
    """By the layer's window: ``(1, 1, G * T, S)``."""
    rotary: Mapping[Rotary, tuple[Any, Any]]
    """Cosines and sines ``(1, 1, T, dim)``."""
    begin: Any
    """First position, ``(1,)``."""
    end: Any
    """Last position + 1, ``(1,)``."""
    seen: Any
    """``S``, ``(1,)``."""


def _step(w: _Writer, position_ids: Any, mask: Any) -> _Step:
    mb, arch = w.mb, w.arch
    begin = mb.slice_by_index(x=position_ids, begin=[0, 0], end=[1, 1], squeeze_mask=[True, False])
    count = mb.gather(x=mb.shape(x=position_ids), indices=[1], axis=0)
    seen = mb.gather(x=mb.shape(x=mask), indices=[3], axis=0)
    masks = {window: _windowed(w, window, position_ids, mask) for window in _windows(w)}
    group = arch.heads // arch.kv_heads
    if group > 1:
        masks = {window: mb.tile(x=part, reps=[1, 1, group, 1]) for window, part in masks.items()}
    tables = {rotary: _tables(w, number, position_ids) for number, rotary in enumerate(arch.rotaries)}
    return _Step(masks, tables, begin, mb.add(x=begin, y=count), seen)


def _tables(w: _Writer, number: int, position_ids: Any) -> tuple[Any, Any]:
    """Cosines and sines of the positions."""
    rotary, mark = w.arch.rotaries[number], f"_{number}" if number else ""
    stored = [Stored("", part, "float16", (w.settings.context_length, rotary.dim), rotary) for part in ("cos", "sin")]
    rows = [
        w.mb.gather(x=w.const(f"rotary{mark}_{table.part}", table), indices=position_ids, axis=0) for table in stored
    ]
    cos, sin = (w.mb.expand_dims(x=part, axes=[1]) for part in rows)
    return cos, sin


def _windows(w: _Writer) -> list[int | None]:
    """The windows of the layers; of one that holds the whole context, None."""
    return list(dict.fromkeys(a.window_in(w.settings.context_length) for a in w.arch.attention if a))


def _windowed(w: _Writer, window: int | None, position_ids: Any, mask: Any) -> Any:
    """``mask (1, 1, T, S)`` with the entries hidden that lie before a token's window."""
    if window is None:
        return mask
    mb = w.mb
    entries = mb.range_1d(start=0, end=mb.gather(x=mb.shape(x=mask), indices=3, axis=0), step=1)
    first = mb.expand_dims(x=mb.sub(x=position_ids, y=np.int32(window - 1)), axes=[1, 3])
    return mb.select(cond=mb.less(x=entries, y=first), a=np.float16(MASKED), b=mask)


def _cached(w: _Writer, state: Any, layer: int, new: Any, step: _Step) -> Any:
    """Write ``new (1, N, T, D)`` into a layer of the cache and return what may be seen of it, ``(1, N, S, D)``."""
    mb, arch = w.mb, w.arch
    begin = mb.concat(values=[[layer, 0, 0], step.begin, [0]], axis=0)
    end = mb.concat(values=[[layer + 1, 1, arch.kv_heads], step.end, [arch.head_dim]], axis=0)
    whole = mb.slice_update(x=mb.read_state(input=state), update=mb.expand_dims(x=new, axes=[0]), begin=begin, end=end)
    whole = mb.coreml_update_state(state=state, value=whole)
    seen = mb.concat(values=[[layer + 1, 1, arch.kv_heads], step.seen, [arch.head_dim]], axis=0)
    return mb.slice_by_index(
        x=whole,
        begin=[layer, 0, 0, 0, 0],
        end=seen,
        begin_mask=[False, True, True, True, True],
        end_mask=[False, True, True, False, True],
        squeeze_mask=[True, False, False, False, False],
    )


def _attention(w: _Writer, x: Any, layer: int, caches: tuple[Any, Any], step: _Step) -> Any:
    """Self-attention of one layer over normed ``x (1, T, E)``, without the output projection.

    The ``G`` query heads of a key head stand below each other as rows, so that keys and values need not be repeated.
    """
    mb, arch, at = w.mb, w.arch, f"model.layers.{layer}.self_attn."

    attention = arch.attention[layer]
    assert attention

    def heads(part: str, count: int) -> Any:
        bias = f"{at}{part}_proj.bias" if arch.qkv_bias else ""
        y = _linear(w, x, f"{at}{part}_proj.weight", (count * arch.head_dim, arch.hidden), bias)
        if arch.qk_norm == "whole" and part != "v":
            y = _norm(w, y, f"{at}{part}_norm.weight", count * arch.head_dim)
        y = mb.reshape(x=y, shape=[1, -1, count, arch.head_dim])
        if arch.qk_norm == "head" and part != "v":
            y = _norm(w, y, f"{at}{part}_norm.weight", arch.head_dim)
        y = mb.transpose(x=y, perm=[0, 2, 1, 3])
        rotary = attention.rotary
        return y if part == "v" or rotary is None else _rotate(w, y, rotary, step.rotary[rotary])

    query, key, value = heads("q", arch.heads), heads("k", arch.kv_heads), heads("v", arch.kv_heads)
    key, value = (_cached(w, state, layer, new, step) for state, new in zip(caches, (key, value), strict=True))
    query = mb.reshape(x=query, shape=[1, arch.kv_heads, -1, arch.head_dim])
    y = _attend(w, query, key, value, step.masks[attention.window_in(w.settings.context_length)])
    y = mb.transpose(x=mb.reshape(x=y, shape=[1, arch.heads, -1, arch.head_dim]), perm=[0, 2, 1, 3])
    return mb.reshape(x=y, shape=[1, -1, arch.heads * arch.head_dim])


def _attend(w: _Writer, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Softmax attention ``(1, N, G * T, D)``. The operator divides by the root of ``D``, and has no caps."""
    mb, root = w.mb, math.sqrt(w.arch.head_dim)
    if w.arch.attention_scale is not None:
        query = _scaled(w, query, w.arch.attention_scale * root)
    if w.arch.attention_cap is None:
        return mb.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)
    scores = mb.matmul(x=_scaled(w, query, 1 / root), y=key, transpose_y=True)
    weights = mb.softmax(x=mb.add(x=_capped(w, scores, w.arch.attention_cap), y=mask), axis=-1)
    return mb.matmul(x=weights, y=value)


def _mlp(w: _Writer, x: Any, layer: int) -> Any:
    at, wide = f"model.layers.{layer}.mlp.", (w.arch.intermediate, w.arch.hidden)
    bias = {p: f"{at}{p}_proj.bias" if w.arch.mlp_bias else "" for p in ("gate", "up", "down")}
    gate = _linear(w, x, f"{at}gate_proj.weight", wide, bias["gate"])
    gate = w.mb.silu(x=gate) if w.arch.activation == "silu" else w.mb.gelu(x=gate, mode="TANH_APPROXIMATION")
    up = _linear(w, x, f"{at}up_proj.weight", wide, bias["up"])
    return _linear(w, w.mb.mul(x=gate, y=up), f"{at}down_proj.weight", wide[::-1], bias["down"])


def _layer(w: _Writer, x: Any, layer: int, caches: tuple[Any, Any], step: _Step) -> Any:
    """One layer: attention and MLP, each with the norms about it, added to what enters it."""
    mb, arch, at, names = w.mb, w.arch, f"model.layers.{layer}.self_attn.o_proj", w.arch.norm_names(layer)

    def normed(y: Any, name: str) -> Any:
        return _norm(w, y, name, arch.hidden) if name else y

    y = _attention(w, normed(x, names.before_attention), layer, caches, step)
    shape = (arch.hidden, arch.heads * arch.head_dim)
    y = _linear(w, y, f"{at}.weight", shape, f"{at}.bias" if arch.out_bias else "")
    x = mb.add(x=x, y=_scaled(w, normed(y, names.behind_attention), arch.residual_scale))
    y = normed(_mlp(w, normed(x, names.before_mlp), layer), names.behind_mlp)
    return mb.add(x=x, y=_scaled(w, y, arch.residual_scale))


def _decoder(w: _Writer, ids: Any, outputs: Any, caches: tuple[Any, Any], step: _Step) -> Any:
    mb, arch = w.mb, w.arch
    table = (arch.vocab_size, arch.hidden)
    x = _scaled(w, mb.gather(x=w.weight(EMBEDDING, table), indices=ids, axis=0), arch.embedding_scale)
    for layer in range(arch.layers):
        x = _layer(w, x, layer, caches, step)
    x = _norm(w, mb.gather(x=x, indices=outputs, axis=1), "model.norm.weight", arch.hidden)
    head = EMBEDDING if w.settings.tied else HEAD
    y = mb.linear(x=x, weight=w.weight(head, table), bias=w.zeros(arch.vocab_size))
    return mb.identity(x=_capped(w, _scaled(w, y, arch.logit_scale), arch.logit_cap), name="logits")


def build(arch: Architecture, settings: Settings) -> Graph:
    """The program of a student."""
    ct = builder()
    mb, types = ct.mb, ct.types
    writer = _Writer(arch, settings, mb)
    tokens, seen, wanted = (ct.get_new_symbol() for _ in range(3))  # T, S, K
    cache = _cache_shape(arch, settings)

    specs = [
        mb.TensorSpec((1, tokens), types.int32),
        mb.TensorSpec((1, tokens), types.int32),
        mb.TensorSpec((1, 1, tokens, seen), types.fp16),
        mb.TensorSpec((wanted,), types.int32),
        mb.StateTensorSpec(cache, types.fp16),
        mb.StateTensorSpec(cache, types.fp16),
    ]

    def decoder(
        inputIds: Any, positionIds: Any, causalMask: Any, outputIds: Any, keyCache: Any, valueCache: Any
    ) -> Any:
        step = _step(writer, positionIds, causalMask)
        return _decoder(writer, inputIds, outputIds, (keyCache, valueCache), step)

    # The builder numbers names through the life of the process; equal exports shall be equal files.
    counts, mb.name_count = mb.name_count, defaultdict(int)
    try:
        program = mb.program(input_specs=specs, opset_version=ct.iOS18)(decoder)
    finally:
        mb.name_count = counts
    return Graph(program, writer.stored)


def _cache_shape(arch: Architecture, settings: Settings) -> tuple[int, ...]:
    return (arch.layers, 1, arch.kv_heads, settings.context_length, arch.head_dim)


def describe(arch: Architecture, settings: Settings, metadata: Mapping[str, str]) -> ModelDescription:
    """Inputs with their ranges, outputs, states and the user's metadata, as ``model.mlmodel`` has them."""
    from coremltools.proto import FeatureTypes_pb2, Model_pb2

    kinds = FeatureTypes_pb2.ArrayFeatureType
    context = settings.context_length
    found = Model_pb2.ModelDescription()

    def array(feature: Any, kind: int, shape: tuple[int, ...]) -> Any:
        feature.dataType = kind
        feature.shape.extend(shape)
        return feature

    many, one = (1, context), (1, 1)
    for name, kind, ranges, default in (
        ("inputIds", kinds.INT32, (one, many), (1, 1)),
        ("positionIds", kinds.INT32, (one, many), (1, 1)),
        ("causalMask", kinds.FLOAT16, (one, one, many, many), (1, 1, 1, context)),
        ("outputIds", kinds.INT32, (many,), (1,)),
    ):
        feature = array(found.input.add(name=name).type.multiArrayType, kind, default)
        for low, high in ranges:
            feature.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)
    array(found.output.add(name="logits").type.multiArrayType, kinds.FLOAT16, ())
    for name in ("keyCache", "valueCache"):
        array(found.state.add(name=name).type.stateType.arrayType, kinds.FLOAT16, _cache_shape(arch, settings))
    found.metadata.userDefined.update(metadata)
    return found
