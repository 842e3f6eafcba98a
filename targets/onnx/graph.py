"""The decoder as an ONNX graph: its nodes, and where the bytes of every initialiser come from.

The graph is the one that onnxruntime's fused kernels want: ``MatMulNBits`` for quantized matrices,
``GroupQueryAttention`` with the rotary embedding and the key-value cache inside, ``GatherBlockQuantized`` for the
embedding. It runs under onnxruntime-genai too (input and output names are its). Nothing here reads a weight.

Shapes: ``B`` batch, ``S`` tokens fed, ``P`` tokens in the cache before, ``T`` after, ``E`` hidden size, ``N`` outputs
and ``K`` inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...architecture import Attention, Rotary
from ...quant.recipe import GROUP, Kind
from ..shared.decoder import EMBEDDING, HEAD, Architecture
from ..shared.recipes import Real

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

OPSET, IR_VERSION = 23, 11  # the first opset with RMSNormalization, which onnxruntime has since 1.22
DATA_FILE = "model.onnx_data"  # as optimum and transformers.js name it
HEAD_FILE = "head.onnx"
HIDDEN = "hidden"
BATCH = "batch_size"
"""The dimension that transformers.js knows by its name: the others it takes from its own cache."""
POSITIONS = "position_ids"
COSINES = "rotary.cos"
"""Its first dimension is the context length."""
MS = "com.microsoft"
_PAGE = 4096
BLOCK = GROUP
"""Weights that share a scale; of int8 rows too, for the kernels round activations to int8 in such blocks, and wide ones
cost quality (KL to the unrounded model 2.3e-4 with blocks of 32, 4.1e-4 with 256)."""


@dataclass(frozen=True)
class Stored:
    """An initialiser in the data file: rows of model parameters below each other, encoded."""

    name: str
    dtype: Literal["uint8", "float16", "float32"]
    shape: tuple[int, ...]
    part: Literal["q", "scale", "value", "transposed", "cos", "sin"]
    """Which bytes: integers, scales, or a plain tensor as it is or transposed; or a table of the rotary embedding."""
    sources: tuple[str, ...]
    kind: Kind
    rotary: Rotary | None = None
    """Whose table it is."""

    @property
    def size_bytes(self) -> int:
        """Bytes in the data file."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Settings:
    """What the recipe and the providers ask of the graph."""

    kinds: Mapping[str, Kind]
    """How each parameter is stored."""
    tied: bool
    activations: Real
    context_length: int
    plain: Real = "float16"
    """In what matrices are stored that are not quantized."""
    rotary_apart: bool = False
    """The rotary embedding by nodes of its own, for runtimes whose attention has none inside (DirectML)."""
    accuracy_level: int = 4
    """What ``MatMulNBits`` may round activations to: 4 is int8, the fast kernels; 0 leaves them as they are."""


@dataclass
class _Graph:
    """Nodes and initialisers, gathered in order."""

    arch: Architecture
    settings: Settings
    nodes: list[NodeProto] = field(default_factory=list)
    stored: dict[str, Stored] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, int]:
        """Where each initialiser begins in the data file."""
        return offsets(list(self.stored.values()))

    def node(
        self, op: str, inputs: list[str], outputs: int | list[str] = 1, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node and return the name of its first output."""
        from onnx import helper

        name = f"{len(self.nodes)}.{op}"
        names = outputs if isinstance(outputs, list) else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name, domain=domain, **attributes))
        return names[0]

    def constant(self, value: int | list[int]) -> str:
        """Whole numbers, inside the graph's own file."""
        return self._constant(np.asarray(value, np.int64), f"constant {value}")

    def scaled(self, x: str, factor: float) -> str:
        """``x`` times a number."""
        if factor == 1:
            return x
        array = np.asarray(factor, self.settings.activations)
        return self.node("Mul", [x, self._constant(array, f"factor {factor}")])

    def capped(self, x: str, cap: float | None) -> str:
        """``x`` bent to stay within a number."""
        return x if cap is None else self.scaled(self.node("Tanh", [self.scaled(x, 1 / cap)]), cap)

    def _constant(self, array: np.ndarray, name: str) -> str:
        self.constants[name] = array
        return name

    def store(self, stored: Stored) -> str:
        """An initialiser of the data file."""
        self.stored[stored.name] = stored
        return stored.name

    def cast(self, value: str, have: str, want: str) -> str:
        """``value`` in another dtype; of an initialiser, onnxruntime does it once, at load."""
        from onnx import TensorProto

        if have == want:
            return value
        return self.node("Cast", [value], to=TensorProto.FLOAT if want == "float32" else TensorProto.FLOAT16)

    def vector(self, name: str, size: int, sources: tuple[str, ...] = ()) -> str:
        """A norm's weight or a bias, in the activations' dtype; ``sources`` where it is put together of several."""
        return self.store(Stored(name, self.settings.activations, (size,), "value", sources or (name,), "plain"))


def _bits(kind: Kind) -> int:
    return 4 if kind == "int4" else 8


def _quantized(
    graph: _Graph, name: str, sources: tuple[str, ...], kind: Kind, shape: tuple[int, int]
) -> tuple[str, str]:
    """Integers and scales of a matrix ``(N, K)``; returns the names of both, scales in the activations' dtype."""
    bits, blocks = _bits(kind), -(-shape[1] // BLOCK)
    q = graph.store(Stored(f"{name}.q", "uint8", (shape[0], blocks, BLOCK * bits // 8), "q", sources, kind))
    scale = graph.store(Stored(f"{name}.scale", "float16", (shape[0], blocks), "scale", sources, kind))
    return q, graph.cast(scale, "float16", graph.settings.activations)


def _matmul(graph: _Graph, x: str, name: str, sources: tuple[str, ...], shape: tuple[int, int], bias: str = "") -> str:
    """``x (.., K)`` times the matrices of ``sources``, stacked to ``(N, K)``."""
    settings = graph.settings
    kind = settings.kinds[sources[0]]
    if kind != "plain":
        q, scale = _quantized(graph, name, sources, kind, shape)
        inputs = [x, q, scale, "", "", bias] if bias else [x, q, scale]
        return graph.node(
            "MatMulNBits",
            inputs,
            domain=MS,
            N=shape[0],
            K=shape[1],
            bits=_bits(kind),
            block_size=BLOCK,
            accuracy_level=settings.accuracy_level,
        )
    weight = graph.store(Stored(name, settings.plain, shape[::-1], "transposed", sources, kind))
    y = graph.node("MatMul", [x, graph.cast(weight, settings.plain, settings.activations)])
    return graph.node("Add", [y, bias]) if bias else y


def _embedding(graph: _Graph, ids: str) -> str:
    """Rows of the embedding for ids ``(B, S)``: ``(B, S, E)``."""
    name, settings, arch = EMBEDDING, graph.settings, graph.arch
    shape = (arch.vocab_size, arch.hidden)
    kind = settings.kinds[name]
    if kind == "plain":
        table = graph.store(Stored(name, settings.plain, shape, "value", (name,), kind))
        return graph.cast(graph.node("Gather", [table, ids]), settings.plain, settings.activations)
    bits, blocks = _bits(kind), -(-arch.hidden // BLOCK)
    # Where the width is whole blocks, these are the bytes of the tied head's MatMulNBits, in another shape.
    q = graph.store(Stored(f"{name}.rows", "uint8", (shape[0], shape[1] * bits // 8), "q", (name,), kind))
    scale = graph.store(Stored(f"{name}.scale", "float16", (shape[0], blocks), "scale", (name,), kind))
    return graph.node(
        "GatherBlockQuantized",
        [q, ids, graph.cast(scale, "float16", settings.activations)],
        domain=MS,
        bits=bits,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )


def _head(graph: _Graph, hidden: str) -> None:
    """Logits of ``hidden``."""
    arch, settings = graph.arch, graph.settings
    shape = (arch.vocab_size, arch.hidden)
    if not settings.tied:
        y = _matmul(graph, hidden, HEAD, (HEAD,), shape)
    elif settings.kinds[EMBEDDING] != "plain":
        y = _matmul(graph, hidden, EMBEDDING, (EMBEDDING,), shape)
    else:
        table = graph.store(Stored(EMBEDDING, settings.plain, shape, "value", (EMBEDDING,), "plain"))
        table = graph.cast(table, settings.plain, settings.activations)
        y = graph.node("MatMul", [hidden, graph.node("Transpose", [table], perm=[1, 0])])
    graph.capped(graph.scaled(y, arch.logit_scale), arch.logit_cap)
    graph.nodes[-1].output[0] = "logits"


def _norm(graph: _Graph, x: str, weight: str, size: int) -> str:
    return graph.node("RMSNormalization", [x, graph.vector(weight, size)], axis=-1, epsilon=graph.arch.norm_eps)


def _add_norm(graph: _Graph, x: str, skip: str, weight: str) -> tuple[str, str]:
    """The norm of ``x + skip``, and that sum."""
    outputs = [f"{weight}.norm", "", "", f"{weight}.sum"]
    gamma = graph.vector(weight, graph.arch.hidden)
    normed = graph.node(
        "SkipSimplifiedLayerNormalization", [x, skip, gamma], outputs, domain=MS, epsilon=graph.arch.norm_eps
    )
    return normed, outputs[3]


def _project(graph: _Graph, x: str, name: str, shape: tuple[int, int], *, biased: bool = False) -> str:
    """``x`` times one matrix, and its bias."""
    bias = graph.vector(f"{name}.bias", shape[0]) if biased else ""
    return _matmul(graph, x, f"{name}.weight", (f"{name}.weight",), shape, bias)


def _heads(graph: _Graph, x: str, at: str, *, apart: bool) -> list[str]:
    """Queries, keys and values of ``x (B, S, E)``; all in the first, and the others empty, unless they must be
    ``apart``, or are stored in different ways."""
    arch = graph.arch
    query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    sizes = {f"{at}{p}_proj": size for p, size in (("q", query), ("k", key), ("v", key))}
    if len({graph.settings.kinds[f"{name}.weight"] for name in sizes}) > 1:
        return [_project(graph, x, name, (n, arch.hidden), biased=arch.qkv_bias) for name, n in sizes.items()]
    biases = tuple(f"{name}.bias" for name in sizes)
    bias = graph.vector(f"{at}qkv_proj.bias", query + 2 * key, biases) if arch.qkv_bias else ""
    sources = tuple(f"{name}.weight" for name in sizes)
    packed = _matmul(graph, x, f"{at}qkv_proj.weight", sources, (query + 2 * key, arch.hidden), bias)
    if not apart:
        return [packed, "", ""]
    parts = [f"{packed}.{p}" for p in "qkv"]
    graph.node("Split", [packed, graph.constant(list(sizes.values()))], parts, axis=-1)
    return parts


def _head_norm(graph: _Graph, x: str, weight: str, heads: int) -> str:
    """Queries or keys by their norm. GroupQueryAttention takes its weights too, but its CPU kernel refuses them."""
    size = graph.arch.head_dim
    if graph.arch.qk_norm == "whole":
        return _norm(graph, x, weight, heads * size)
    x = _norm(graph, graph.node("Reshape", [x, graph.constant([0, 0, -1, size])]), weight, size)
    return graph.node("Reshape", [x, graph.constant([0, 0, -1])])


def _attention(graph: _Graph, x: str, layer: int, lengths: tuple[str, str]) -> str:
    """Self-attention of one layer over ``x (B, S, E)``, without the output projection."""
    arch, at, attention = graph.arch, f"model.layers.{layer}.self_attn.", graph.arch.attention[layer]
    assert attention
    normed, rotary = arch.qk_norm != "none", attention.rotary
    tables = _tables(graph, rotary) if rotary else []
    apart = bool(tables) and graph.settings.rotary_apart
    parts = _heads(graph, x, at, apart=normed or apart)
    for i, (p, heads) in enumerate((("q", arch.heads), ("k", arch.kv_heads))):
        if normed:
            parts[i] = _head_norm(graph, parts[i], f"{at}{p}_norm.weight", heads)
        if apart and rotary:
            part = {"num_heads": heads, "rotary_embedding_dim": rotary.dim} if rotary.dim < arch.head_dim else {}
            parts[i] = graph.node("RotaryEmbedding", [parts[i], POSITIONS, *tables], domain=MS, interleaved=0, **part)
    inputs = [*parts, *(f"past_key_values.{layer}.{p}" for p in ("key", "value")), *lengths]
    outputs = [f"{at}output", *(f"present.{layer}.{p}" for p in ("key", "value"))]
    return graph.node(
        "GroupQueryAttention",
        inputs if apart else [*inputs, *tables],
        outputs,
        domain=MS,
        num_heads=arch.heads,
        kv_num_heads=arch.kv_heads,
        do_rotary=int(bool(tables) and not apart),
        rotary_interleaved=0,
        **_settings_of(graph, attention),
    )


def _settings_of(graph: _Graph, attention: Attention) -> dict[str, int | float]:
    """What of a layer's attention is not as it is by default."""
    arch = graph.arch
    found: dict[str, int | float] = {}
    if window := attention.window_in(graph.settings.context_length):
        found["local_window_size"] = window
    if arch.attention_scale is not None:
        found["scale"] = arch.attention_scale
    if arch.attention_cap is not None:
        found["softcap"] = arch.attention_cap
    return found


def _tables(graph: _Graph, rotary: Rotary) -> list[str]:
    """Cosines and sines of a rotary embedding."""
    place = graph.arch.rotaries.index(rotary)
    shape = (graph.settings.context_length, rotary.dim // 2)
    names = {"cos": COSINES, "sin": "rotary.sin"} if not place else {p: f"rotary.{place}.{p}" for p in ("cos", "sin")}
    return [
        graph.store(Stored(names[p], graph.settings.activations, shape, p, (), "plain", rotary)) for p in ("cos", "sin")
    ]


def _mlp(graph: _Graph, x: str, layer: int) -> str:
    arch, at = graph.arch, f"model.layers.{layer}.mlp."
    wide, biased = (arch.intermediate, arch.hidden), arch.mlp_bias
    gate = _project(graph, x, f"{at}gate_proj", wide, biased=biased)
    up = _project(graph, x, f"{at}up_proj", wide, biased=biased)
    if arch.activation == "silu":
        active = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])  # onnxruntime makes one node of the two
    else:
        active = graph.node("Gelu", [gate], approximate="tanh")
    return _project(graph, graph.node("Mul", [active, up]), f"{at}down_proj", wide[::-1], biased=biased)


def _lengths(graph: _Graph) -> tuple[str, str]:
    """From the mask ``(B, T)``: last position of every sequence ``(B,)`` and ``T``, both int32."""
    from onnx import TensorProto

    real = graph.node("ReduceSum", ["attention_mask", graph.constant([1])], keepdims=0)
    last = graph.node("Sub", [real, graph.constant([1])])
    total = graph.node("Gather", [graph.node("Shape", ["attention_mask"]), graph.constant(1)])
    return graph.node("Cast", [last], to=TensorProto.INT32), graph.node("Cast", [total], to=TensorProto.INT32)


@dataclass(frozen=True)
class Models:
    """Two graphs over one data file."""

    decoder: ModelProto
    """Ids to the logits of the last one, and ``hidden (B, S, E)``."""
    head: ModelProto
    """``hidden`` to the logits of every id, by the very node that ends the decoder. In one graph, a prefill would pay
    for all of them."""
    stored: list[Stored]
    """What the data file holds, in order."""


def _join(graph: _Graph, total: str, y: str, behind: str, before: str) -> tuple[str, str]:
    """A block's output ``y``, through the norm behind it, added to what has come so far; and that sum's norm before the
    next block. Both norms may be none."""
    y = graph.scaled(_norm(graph, y, behind, graph.arch.hidden) if behind else y, graph.arch.residual_scale)
    if before:
        return _add_norm(graph, total, y, before)
    total = graph.node("Add", [total, y])
    return total, total


def build(arch: Architecture, settings: Settings) -> Models:
    """The graphs of a student."""
    graph = _Graph(arch, settings)
    lengths = _lengths(graph)
    total = graph.scaled(_embedding(graph, "input_ids"), arch.embedding_scale)
    first = arch.norm_names(0).before_attention
    x = _norm(graph, total, first, arch.hidden) if first else total
    for layer in range(arch.layers):
        names = arch.norm_names(layer)
        following = arch.norm_names(layer + 1).before_attention if layer + 1 < arch.layers else "model.norm.weight"
        heads = _attention(graph, x, layer, lengths)
        shape = (arch.hidden, arch.heads * arch.head_dim)
        attended = _project(graph, heads, f"model.layers.{layer}.self_attn.o_proj", shape, biased=arch.out_bias)
        x, total = _join(graph, total, attended, names.behind_attention, names.before_mlp)
        x, total = _join(graph, total, _mlp(graph, x, layer), names.behind_mlp, following)
    graph.nodes[-1].output[:] = [HIDDEN]
    _head(graph, graph.node("Gather", [HIDDEN, graph.constant([-1])], axis=1))
    head = _Graph(arch, settings)
    _head(head, HIDDEN)
    stored = list(graph.stored.values())
    return Models(_decoder_model(graph), _head_model(head, graph.places), stored)


def offsets(stored: list[Stored]) -> dict[str, int]:
    """Where each initialiser begins in the data file. Two that are the same bytes in two shapes share them."""
    found: dict[str, int] = {}
    seen: dict[tuple[object, ...], int] = {}
    end = 0
    for item in stored:
        key = (item.part, item.sources, item.dtype, item.size_bytes)
        if key not in seen or item.part in ("cos", "sin"):
            align = _PAGE if item.size_bytes >= _PAGE else 64  # whole pages are mapped, not read
            seen[key] = -(-end // align) * align
            end = seen[key] + item.size_bytes
        found[item.name] = seen[key]
    return found


def only_looked_up(stored: list[Stored], tied: bool) -> set[int]:
    """Places of an embedding that no matrix product reads: of a tied one, rows that lie apart from the head's."""
    places = offsets(stored)
    rows = {f"{EMBEDDING}.rows"} if tied else {item.name for item in stored if item.sources == (EMBEDDING,)}
    return {places[item.name] for item in stored if item.name in rows} - {places.get(f"{EMBEDDING}.q")}


def _decoder_model(graph: _Graph) -> ModelProto:
    arch, layers = graph.arch, range(graph.arch.layers)
    cache = [BATCH, arch.kv_heads, "P", arch.head_dim]
    grown = [BATCH, arch.kv_heads, "C", arch.head_dim]
    pairs = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    inputs = [
        _info("input_ids", "int64", [BATCH, "S"]),
        _info("attention_mask", "int64", [BATCH, "T"]),
        *([_info(POSITIONS, "int64", [BATCH, "S"])] if graph.settings.rotary_apart else []),
        *(_info(f"past_key_values.{pair}", graph.settings.activations, cache) for pair in pairs),
    ]
    outputs = [
        _info("logits", graph.settings.activations, [BATCH, 1, arch.vocab_size]),  # the 1 tells onnxruntime-genai
        *(_info(f"present.{pair}", graph.settings.activations, grown) for pair in pairs),
        _info(HIDDEN, graph.settings.activations, [BATCH, "S", arch.hidden]),
    ]
    return _model("decoder", graph, inputs, outputs, graph.places)


def _head_model(graph: _Graph, places: Mapping[str, int]) -> ModelProto:
    arch, real = graph.arch, graph.settings.activations
    inputs = [_info(HIDDEN, real, [BATCH, "S", arch.hidden])]
    return _model("head", graph, inputs, [_info("logits", real, [BATCH, "S", arch.vocab_size])], places)


def _info(name: str, dtype: str, shape: list[Any]) -> ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _model(
    name: str, graph: _Graph, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto], places: Mapping[str, int]
) -> ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    initialisers = [numpy_helper.from_array(value, key) for key, value in graph.constants.items()]
    for item in graph.stored.values():
        tensor = TensorProto(
            name=item.name,
            data_type=helper.np_dtype_to_tensor_dtype(np.dtype(item.dtype)),
            dims=item.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", DATA_FILE), ("offset", places[item.name]), ("length", item.size_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        initialisers.append(tensor)
    return helper.make_model(
        helper.make_graph(graph.nodes, name, inputs, outputs, initialisers),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)],
        ir_version=IR_VERSION,
        producer_name="edgekd",
    )
