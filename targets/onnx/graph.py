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

from ...quant.recipe import GROUP, Kind
from ..shared.decoder import EMBEDDING, HEAD, Architecture
from ..shared.recipes import Real

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

OPSET, IR_VERSION = 23, 11  # the first opset with RMSNormalization, which onnxruntime has since 1.22
DATA_FILE = "model.onnx.data"
HEAD_FILE = "head.onnx"
HIDDEN = "hidden"
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
        array = np.asarray(value, np.int64)
        name = f"constant {value}"
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
        _matmul(graph, hidden, HEAD, (HEAD,), shape)
    elif settings.kinds[EMBEDDING] != "plain":
        _matmul(graph, hidden, EMBEDDING, (EMBEDDING,), shape)
    else:
        table = graph.store(Stored(EMBEDDING, settings.plain, shape, "value", (EMBEDDING,), "plain"))
        table = graph.cast(table, settings.plain, settings.activations)
        graph.node("MatMul", [hidden, graph.node("Transpose", [table], perm=[1, 0])])
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


def _attention(graph: _Graph, x: str, layer: int, lengths: tuple[str, str], rotary: tuple[str, str]) -> str:
    """Self-attention of one layer over normed ``x (B, S, E)``, without the output projection."""
    arch, at = graph.arch, f"model.layers.{layer}.self_attn."
    query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    sizes = {"q": query, "k": key, "v": key}
    biases = {p: f"{at}{p}_proj.bias" for p in sizes} if arch.qkv_bias else {}
    kinds = {graph.settings.kinds[f"{at}{p}_proj.weight"] for p in sizes}
    norms = arch.qk_norm == "head"
    if len(kinds) == 1:
        bias = graph.vector(f"{at}qkv_proj.bias", query + 2 * key, tuple(biases.values())) if biases else ""
        sources = tuple(f"{at}{p}_proj.weight" for p in sizes)
        packed = _matmul(graph, x, f"{at}qkv_proj.weight", sources, (query + 2 * key, arch.hidden), bias)
        parts = [packed, "", ""]
        if norms or graph.settings.rotary_apart:
            parts = [f"{packed}.{p}" for p in sizes]
            graph.node("Split", [packed, graph.constant(list(sizes.values()))], parts, axis=-1)
    else:
        parts = [
            _matmul(
                graph,
                x,
                f"{at}{p}_proj.weight",
                (f"{at}{p}_proj.weight",),
                (size, arch.hidden),
                graph.vector(biases[p], size) if biases else "",
            )
            for p, size in sizes.items()
        ]
    if norms:  # GroupQueryAttention takes their weights too, but its CPU kernel refuses them
        for i, p in enumerate(("q", "k")):
            heads = graph.node("Reshape", [parts[i], graph.constant([0, 0, -1, arch.head_dim])])
            heads = _norm(graph, heads, f"{at}{p}_norm.weight", arch.head_dim)
            parts[i] = graph.node("Reshape", [heads, graph.constant([0, 0, -1])])
    inside = not graph.settings.rotary_apart
    if not inside:
        for i in range(2):
            parts[i] = graph.node("RotaryEmbedding", [parts[i], POSITIONS, *rotary], domain=MS, interleaved=0)
    inputs = [*parts, *(f"past_key_values.{layer}.{p}" for p in ("key", "value")), *lengths]
    outputs = [f"{at}output", *(f"present.{layer}.{p}" for p in ("key", "value"))]
    return graph.node(
        "GroupQueryAttention",
        [*inputs, *rotary] if inside else inputs,
        outputs,
        domain=MS,
        num_heads=arch.heads,
        kv_num_heads=arch.kv_heads,
        do_rotary=int(inside),
        rotary_interleaved=0,
    )


def _mlp(graph: _Graph, x: str, layer: int) -> str:
    arch, at = graph.arch, f"model.layers.{layer}.mlp."

    def project(p: str, y: str, shape: tuple[int, int]) -> str:
        return _matmul(graph, y, f"{at}{p}_proj.weight", (f"{at}{p}_proj.weight",), shape)

    wide = (arch.intermediate, arch.hidden)
    gate = project("gate", x, wide)
    up = project("up", x, wide)
    swish = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])  # onnxruntime makes one node of the two
    return project("down", graph.node("Mul", [swish, up]), wide[::-1])


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


def build(arch: Architecture, settings: Settings) -> Models:
    """The graphs of a student."""
    graph = _Graph(arch, settings)
    lengths = _lengths(graph)
    table = (settings.context_length, arch.head_dim // 2)
    rotary = (
        graph.store(Stored(COSINES, settings.activations, table, "cos", (), "plain")),
        graph.store(Stored("rotary.sin", settings.activations, table, "sin", (), "plain")),
    )
    total = _embedding(graph, "input_ids")
    x = _norm(graph, total, "model.layers.0.input_layernorm.weight", arch.hidden)
    for layer in range(arch.layers):
        at, following = f"model.layers.{layer}.", f"model.layers.{layer + 1}.input_layernorm.weight"
        heads = _attention(graph, x, layer, lengths, rotary)
        attended = _matmul(
            graph,
            heads,
            f"{at}self_attn.o_proj.weight",
            (f"{at}self_attn.o_proj.weight",),
            (arch.hidden, arch.heads * arch.head_dim),
        )
        x, total = _add_norm(graph, total, attended, f"{at}post_attention_layernorm.weight")
        fed = _mlp(graph, x, layer)
        x, total = _add_norm(graph, total, fed, following if layer + 1 < arch.layers else "model.norm.weight")
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
    cache = ["B", arch.kv_heads, "P", arch.head_dim]
    grown = ["B", arch.kv_heads, "C", arch.head_dim]
    pairs = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    inputs = [
        _info("input_ids", "int64", ["B", "S"]),
        _info("attention_mask", "int64", ["B", "T"]),
        *([_info(POSITIONS, "int64", ["B", "S"])] if graph.settings.rotary_apart else []),
        *(_info(f"past_key_values.{pair}", graph.settings.activations, cache) for pair in pairs),
    ]
    outputs = [
        _info("logits", graph.settings.activations, ["B", 1, arch.vocab_size]),  # the 1 tells onnxruntime-genai
        *(_info(f"present.{pair}", graph.settings.activations, grown) for pair in pairs),
        _info(HIDDEN, graph.settings.activations, ["B", "S", arch.hidden]),
    ]
    return _model("decoder", graph, inputs, outputs, graph.places)


def _head_model(graph: _Graph, places: Mapping[str, int]) -> ModelProto:
    arch, real = graph.arch, graph.settings.activations
    inputs = [_info(HIDDEN, real, ["B", "S", arch.hidden])]
    return _model("head", graph, inputs, [_info("logits", real, ["B", "S", arch.vocab_size])], places)


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
