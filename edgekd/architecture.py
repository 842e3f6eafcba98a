"""What a decoder is made of: ``config.json``, read here and nowhere else, as features.

The file may be a stranger's, so every key is checked before its value is used. A key that is absent has the default of
the model's own class in transformers, and a family's own name for a number (GPT-2's ``n_embd``) is that class's too.

``read_architecture`` asks the table ``FAMILIES`` for the reader of a ``model_type``. A new family is a reader of a few
lines there: targets know features and no names. Shapes follow ``torch.nn.Linear``: weights are ``(out, in)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import EdgekdError, Unsupported
from .files import read_json

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Size = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(gt=0, le=2**16)]
"""Of what transformers, or one of our tables, holds something in memory for each."""
Id = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 is some files' word for "none"
Positive = Annotated[float, Field(gt=0, lt=1e30)]
Turns = Annotated[float, Field(ge=1e-3, lt=1e6)]


class Rope(BaseModel):
    """``rope_parameters``, or ``rope_scaling`` as it was called. What is not named here stays in ``model_extra``."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Positive | None = None
    factor: Positive | None = None
    attention_factor: Positive | None = None
    mscale: Annotated[float, Field(ge=0, lt=1e30)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, lt=1e30)] | None = None
    beta_fast: Turns | None = None
    beta_slow: Turns | None = None
    truncate: bool | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Positive | None = None
    full_attention: Rope | None = None
    sliding_attention: Rope | None = None
    """Where they differ by ``layer_types``."""


class Decoder(BaseModel):
    """The language model's part of a ``config.json``, under the names that most families use."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    model_type: str = ""
    architectures: list[str] | None = None
    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | list[Size] | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | list[Count] | None = None
    num_key_value_heads: Count | list[Count] | None = None
    head_dim: Count | None = None
    max_position_embeddings: Size | None = None
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] | None = None
    rope_theta: Positive | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    rope_local_base_freq: Positive | None = None
    partial_rotary_factor: Positive | None = None
    original_max_position_embeddings: Positive | None = None
    no_rope_layers: list[Annotated[int, Field(ge=0, le=1)]] | None = None
    no_rope_layer_interval: Count | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    embedding_multiplier: Positive | None = None
    residual_multiplier: Positive | None = None
    attention_multiplier: Positive | None = None
    logits_scaling: Positive | None = None
    query_pre_attn_scalar: Positive | None = None
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    sliding_window: Size | None = None
    sliding_window_pattern: Count | None = None
    max_window_layers: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    layer_types: list[str] | None = None
    bos_token_id: Id | list[Id] | None = None
    eos_token_id: Id | list[Id] | None = None
    pad_token_id: Id | list[Id] | None = None
    quantization_config: dict[str, object] | None = None
    transformers_weights: str | None = None
    num_labels: Count | None = None

    def size(self, key: str) -> int:
        """A number that has to be there.

        Raises:
            EdgekdError: it is absent, or differs from layer to layer.
        """
        value = getattr(self, key)
        if isinstance(value, int):
            return value
        what = "is missing" if value is None else "differs from layer to layer"
        raise EdgekdError(f"config.json: key {key!r} {what}.", "Save the model again, or use another one.")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; as many as of queries where the file names none."""
        return self.size("num_attention_heads" if self.num_key_value_heads is None else "num_key_value_heads")

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return head_size(self.head_dim, self.size("hidden_size"), self.size("num_attention_heads"))


def head_size(head_dim: int | None, hidden: int, heads: int) -> int:
    """Channels of a head: as stated, else those that make the heads together as wide as the hidden states."""
    return head_dim or max(1, hidden // heads)


class Feature(Enum):
    """What a decoder may have beyond a Llama's parts: in words, and the keys of ``config.json`` that say so."""

    words: str
    keys: str

    def __init__(self, words: str, keys: str) -> None:
        self.words, self.keys = words, keys

    UNKNOWN = "an architecture that edgekd does not know", "model_type, architectures"
    EXPERTS = "a mixture of experts", "model_type, num_experts, num_local_experts"
    MULTIMODAL = "inputs other than text", "model_type, text_config"
    STATE_SPACE = "layers that keep a state instead of attending", "model_type, layer_types"
    TWO_WAY = "attention that looks ahead", "use_bidirectional_attention"
    QKV_BIAS = "biases of query, key and value", "attention_bias"
    OUT_BIAS = "a bias of attention's output", "attention_bias"
    MLP_BIAS = "biases of the MLP", "mlp_bias"
    HEAD_NORM = "norms of each head's query and key", "model_type"
    WIDE_NORM = "norms of query and key over their whole width", "model_type"
    NORM_OFFSET = "norms whose weight is added to one", "model_type"
    NORMS_AFTER = "norms behind a block instead of before it", "model_type"
    NORMS_AROUND = "norms before and behind each block", "model_type"
    FREE_HEADS = "heads that together are not as wide as hidden_size", "head_dim"
    EMBEDDING_SCALE = "a scaled embedding", "embedding_multiplier"
    RESIDUAL_SCALE = "scaled residuals", "residual_multiplier"
    LOGIT_SCALE = "scaled logits", "logits_scaling"
    ATTENTION_SCALE = (
        "attention scaled by another number than the head size's root",
        "attention_multiplier, query_pre_attn_scalar",
    )
    ATTENTION_CAP = "soft caps of attention", "attn_logit_softcapping"
    LOGIT_CAP = "soft caps of logits", "final_logit_softcapping"
    GELU_TANH = "the activation gelu_tanh", "hidden_act"
    OTHER_ACTIVATION = "an activation that edgekd does not know", "hidden_act"
    PLAIN_MLP = "an MLP without a gate", "model_type"
    SLIDING_WINDOW = "sliding windows of attention", "sliding_window, use_sliding_window, layer_types"
    NO_ATTENTION = "layers of another kind than attention", "layer_types"
    NO_POSITIONS = "no rotary embedding at all", "no_rope_layers"
    NO_ROPE = "layers without a rotary embedding", "no_rope_layers"
    ROPE_BY_LAYER = "rotary embeddings that differ by layer", "rope_parameters"
    PARTIAL_ROPE = "a rotary embedding of part of a head", "rope_parameters, partial_rotary_factor"
    LLAMA3_ROPE = "Llama 3.1's scaled rotary embedding", "rope_parameters, rope_scaling"
    LINEAR_ROPE = "a linearly scaled rotary embedding", "rope_parameters, rope_scaling"
    YARN_ROPE = "a rotary embedding scaled by YaRN", "rope_parameters, rope_scaling"
    LONG_ROPE = "a rotary embedding scaled by LongRoPE", "rope_parameters, rope_scaling"
    OTHER_ROPE = "a scaled rotary embedding that edgekd does not know", "rope_parameters, rope_scaling"
    FUSED_QKV = "query, key and value in one matrix", "model_type"
    FUSED_GATE_UP = "gate and up projection in one matrix", "model_type"


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding: pair ``i`` of the first ``dim`` channels turns by ``theta ** (-2 i / dim) / factors[i]`` a
    position, and cosines and sines are multiplied by ``attention_factor``."""

    theta: float
    dim: int
    scaling: str = "default"
    """``rope_type``; of a kind that ``_SCALINGS`` does not know, ``factors`` say nothing."""
    factors: tuple[float, ...] = ()
    """``dim / 2`` divisors of the frequencies; empty: none."""
    long_factors: tuple[float, ...] = ()
    """Those that hold instead in a context longer than ``original_context``."""
    attention_factor: float = 1.0
    factor: float = 1.0
    """What the kinds that have one number make their divisors of."""
    original_context: int = 0
    """The context that was trained before the frequencies were scaled."""
    betas: tuple[float, float] = (32.0, 1.0)
    """YaRN's: turns within that context from which on a pair keeps its frequency, and below which it is divided."""

    def at(self, context_length: int) -> Rotary:
        """What it is throughout a context of so many tokens."""
        if self.long_factors and context_length > self.original_context:
            return replace(self, factors=self.long_factors, long_factors=())
        return self


@dataclass(frozen=True)
class Attention:
    """Attention of one layer."""

    rotary: Rotary | None
    window: int | None = None
    """Positions that a token sees, itself included; None: all."""

    def window_in(self, context_length: int) -> int | None:
        """The window in a context of so many tokens; of one that holds all of it, None."""
        return None if self.window is None or self.window >= context_length else self.window


Role = Literal["embedding", "head", "norm", "head_norm", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]


class Weight(NamedTuple):
    """What a parameter is. A bias has the role of its matrix."""

    role: Role
    shape: tuple[int, ...]
    layer: int | None = None


class Norms(NamedTuple):
    """The norms about the blocks of a layer, by parameter name; empty where none stands."""

    before_attention: str
    behind_attention: str
    before_mlp: str
    behind_mlp: str


@dataclass(frozen=True)
class Architecture:
    """A decoder: its sizes, and its features where they are not a Llama's."""

    model_type: str
    class_name: str
    """As ``architectures`` has it."""
    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    attention: tuple[Attention | None, ...]
    """Of every layer; None: a layer without."""
    tied: bool
    unknown: Feature | None = None
    """What it is where ``FAMILIES`` lacks it; sizes are then read as a Llama's, and good for estimates alone."""
    quantized: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    norm_offset: bool = False
    """A norm multiplies by 1 + w."""
    norms: Literal["before", "after", "around"] = "before"
    """Where they stand by attention and MLP."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float | None = None
    """None: ``head_dim ** -0.5``."""
    attention_cap: float | None = None
    logit_cap: float | None = None
    activation: str = "silu"
    gated: bool = True
    two_way: bool = False
    """Whether a token sees those behind it."""
    fused: frozenset[Literal["qkv", "gate_up"]] = frozenset()
    """Matrices that are one on disk."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.attention)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotary embeddings of the layers that have one, each once."""
        return tuple(dict.fromkeys(layer.rotary for layer in self.attention if layer and layer.rotary))

    def features(self, context_length: int) -> frozenset[Feature]:
        """What of the features counts for a context of so many tokens: a window that holds all of it is none."""
        found = {
            Feature.TWO_WAY: self.two_way,
            Feature.QKV_BIAS: self.qkv_bias,
            Feature.OUT_BIAS: self.out_bias,
            Feature.MLP_BIAS: self.mlp_bias,
            Feature.HEAD_NORM: self.qk_norm == "head",
            Feature.WIDE_NORM: self.qk_norm == "whole",
            Feature.NORM_OFFSET: self.norm_offset,
            Feature.NORMS_AFTER: self.norms == "after",
            Feature.NORMS_AROUND: self.norms == "around",
            Feature.FREE_HEADS: self.heads * self.head_dim != self.hidden,
            Feature.EMBEDDING_SCALE: self.embedding_scale != 1,
            Feature.RESIDUAL_SCALE: self.residual_scale != 1,
            Feature.LOGIT_SCALE: self.logit_scale != 1,
            Feature.ATTENTION_SCALE: self.attention_scale not in (None, self.head_dim**-0.5),
            Feature.ATTENTION_CAP: self.attention_cap is not None,
            Feature.LOGIT_CAP: self.logit_cap is not None,
            Feature.GELU_TANH: self.activation == "gelu_tanh",
            Feature.OTHER_ACTIVATION: self.activation not in ("silu", "gelu_tanh"),
            Feature.PLAIN_MLP: not self.gated,
            Feature.FUSED_QKV: "qkv" in self.fused,
            Feature.FUSED_GATE_UP: "gate_up" in self.fused,
        }
        own = {feature for feature, there in found.items() if there} | ({self.unknown} if self.unknown else set())
        return frozenset(own) | self._by_layer(context_length)

    def _by_layer(self, context_length: int) -> frozenset[Feature]:
        layers = {layer for layer in self.attention if layer}
        ropes = self.rotaries
        kinds = {kind for rope in ropes if (kind := _ROPE_FEATURES.get(rope.scaling, Feature.OTHER_ROPE))}
        found = {
            Feature.NO_ATTENTION: None in self.attention,
            Feature.SLIDING_WINDOW: any(a.window_in(context_length) for a in layers),
            Feature.NO_POSITIONS: not ropes,
            Feature.NO_ROPE: bool(ropes) and any(layer.rotary is None for layer in layers),
            Feature.ROPE_BY_LAYER: len(ropes) > 1,
            Feature.PARTIAL_ROPE: any(rope.dim != self.head_dim for rope in ropes),
        }
        return frozenset(feature for feature, there in found.items() if there) | kinds

    def weights(self) -> dict[str, Weight]:
        """Role and shape of every parameter, by its name in the file, in order; a tied head is the embedding."""
        found = {EMBEDDING: Weight("embedding", (self.vocab_size, self.hidden))}
        for layer, attention in enumerate(self.attention):
            parts = self._layer(layer, attends=attention is not None)
            found |= {f"model.layers.{layer}.{name}": part._replace(layer=layer) for name, part in parts.items()}
        found["model.norm.weight"] = Weight("norm", (self.hidden,))
        return found if self.tied else found | {HEAD: Weight("head", (self.vocab_size, self.hidden))}

    def _layer(self, layer: int, *, attends: bool) -> dict[str, Weight]:
        """A layer's parameters: matrices and the norms about them, then biases, then norms of query and key."""
        attention, mlp = self._attention_matrices() if attends else {}, self._mlp_matrices()
        norm, at = Weight("norm", (self.hidden,)), f"model.layers.{layer}."
        before, behind, middle, end = ({n.removeprefix(at): norm} if n else {} for n in self.norm_names(layer))
        found = {**before, **attention, **behind} if attends else {}
        found |= {**middle, **mlp, **end}
        for name, matrix in {**attention, **mlp}.items():
            biased = self.mlp_bias if name in mlp else self.out_bias if matrix.role == "o" else self.qkv_bias
            if biased:
                found[name.replace(".weight", ".bias")] = Weight(matrix.role, matrix.shape[:1])
        if attends and self.qk_norm != "none":
            heads = {"q": self.heads, "k": self.kv_heads} if self.qk_norm == "whole" else {"q": 1, "k": 1}
            norms = {p: Weight("head_norm", (count * self.head_dim,)) for p, count in heads.items()}
            found |= {f"self_attn.{p}_norm.weight": norm for p, norm in norms.items()}
        return found

    def norm_names(self, layer: int) -> Norms:
        """The norms of a layer, by their names in the file. Llama's ``post_attention_layernorm`` stands before the MLP,
        Gemma's and OLMo's of the same name behind attention."""
        first, second, third, fourth = (
            f"model.layers.{layer}.{name}_layernorm.weight"
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        )
        return {
            "before": Norms(first, "", second, ""),
            "after": Norms("", second, "", fourth),
            "around": Norms(first, second, third, fourth),
        }[self.norms]

    def _attention_matrices(self) -> dict[str, Weight]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows: dict[Role, int] = {"q": query, "k": key, "v": key}
        if "qkv" in self.fused:
            rows = {"qkv": query + 2 * key}
        found = {f"self_attn.{role}_proj.weight": Weight(role, (count, self.hidden)) for role, count in rows.items()}
        return found | {"self_attn.o_proj.weight": Weight("o", (self.hidden, query))}

    def _mlp_matrices(self) -> dict[str, Weight]:
        wide = self.intermediate
        rows: dict[Role, int] = {"gate": wide, "up": wide} if self.gated else {"up": wide}
        if "gate_up" in self.fused:
            rows = {"gate_up": 2 * wide}
        found = {f"mlp.{role}_proj.weight": Weight(role, (count, self.hidden)) for role, count in rows.items()}
        return found | {"mlp.down_proj.weight": Weight("down", (self.hidden, wide))}

    def layer_matrices(self) -> list[str]:
        """Names of the matrices in a decoder layer: ``q_proj``."""
        parts = self._layer(0, attends=True)
        return [name.split(".")[-2] for name, weight in parts.items() if len(weight.shape) == 2]

    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(math.prod(weight.shape) for weight in self.weights().values())

    def layer_parameters(self) -> int:
        """Number of a decoder layer's weights."""
        return sum(math.prod(weight.shape) for weight in self._layer(0, attends=True).values())

    def kv_bytes(self, context_length: int, value_bytes: int) -> int:
        """Bytes of the keys and values of so many positions over all layers; a window's layer keeps its window."""
        kept = sum(_seen(layer, context_length) for layer in self.attention)
        return 2 * value_bytes * kept * self.kv_heads * self.head_dim

    def flops_per_token(self, context_length: int) -> int:
        """Operations of one token's forward pass with so many positions to attend to: two for each weight of a matrix
        that is multiplied by (the head, though tied; not the embedding), and attention's two products."""
        matrices = sum(math.prod(w.shape) for w in self.weights().values() if len(w.shape) == 2)
        lookups = 0 if self.tied else self.vocab_size * self.hidden
        attended = sum(_seen(layer, context_length) for layer in self.attention)
        return 2 * (matrices - lookups) + 4 * attended * self.heads * self.head_dim


def _seen(layer: Attention | None, context_length: int) -> int:
    """Positions of a context that a layer attends to."""
    return 0 if layer is None else min(context_length, layer.window or context_length)


def read_config(path: Path) -> dict[str, object]:
    """A ``config.json`` as it stands, once it has been checked.

    Raises:
        EdgekdError: it cannot be read, or a key holds what no model could have.
    """
    config = read_json(path, remedy="Save the model again.")
    read_decoder(config, str(path))
    return config


def read_decoder(config: Mapping[str, object], subject: str = "config.json") -> Decoder:
    """Check a ``config.json`` and read it.

    Args:
        subject: the file, for messages.

    Raises:
        EdgekdError: a key holds what no model could have.
    """
    nested = config.get("text_config") or {}
    if not isinstance(nested, dict):
        raise EdgekdError(f"{subject}: key 'text_config' is no object.", "Save the model again.")
    own = {**config, **nested}
    values = {key: own[name] for key, name in _names(own.get("model_type")).items() if name in own}
    try:
        return Decoder.model_validate({**_defaults(own.get("model_type")), **values})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, found = first["loc"][0], repr(first["input"])
        raise EdgekdError(
            f"{subject}: key {key!r}: {first['msg']}, not {found:.80}.", "Save the model again."
        ) from error


def _names(model_type: Any) -> dict[str, str]:
    """The name that a family gives each key of ``Decoder``."""
    aliases = getattr(_class(model_type), "attribute_map", {})
    return {key: aliases.get(key, key) for key in Decoder.model_fields}


def _defaults(model_type: Any) -> dict[str, object]:
    """The numbers and switches that a model class takes where the file is silent. The ids are never among them: those
    of a class are another vocabulary's."""
    kind, names = _class(model_type), _names(model_type)
    found = {key: getattr(kind, name, None) for key, name in names.items() if not key.endswith("_token_id")}
    found["rope_theta"] = getattr(kind, "default_theta", None)
    return {key: value for key, value in found.items() if type(value) in (int, float, bool, str)}


def _class(model_type: Any) -> Any:
    """The class of configurations in transformers, or None for a family that it does not know."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None


def read_architecture(config: Mapping[str, object], subject: str = "config.json") -> Architecture:
    """Check a ``config.json`` and read it, by the reader of its ``model_type``. A family that ``FAMILIES`` lacks is
    read as a Llama, for estimates.

    Args:
        subject: the file, for messages.

    Raises:
        EdgekdError: a number that is needed is missing, or a key holds what no model could have.
        Unsupported: the heads of keys do not divide those of queries.
    """
    decoder = read_decoder(config, subject)
    family, classes = FAMILIES.get(decoder.model_type), decoder.architectures
    if family is None or config.get("text_config") or (classes or [family.class_name]) != [family.class_name]:
        names = ", ".join(classes or [decoder.model_type])
        return replace(_estimate(decoder), class_name=names, unknown=_unknown(config))
    if decoder.size("num_attention_heads") % decoder.kv_heads:
        raise Unsupported(
            f"{subject}: num_attention_heads {decoder.size('num_attention_heads')} is not divisible by "
            f"num_key_value_heads {decoder.kv_heads}.",
            "Check config.json.",
        )
    return replace(family.read(decoder), class_name=family.class_name)


def _llama(decoder: Decoder) -> Architecture:
    """Llama (Touvron et al. 2023). It has no windows; a file that asks for them is taken at its word."""
    kinds = _kinds(decoder)
    if decoder.use_sliding_window:
        kinds = ["sliding_attention"] * len(kinds)
    if decoder.rms_norm_eps is None:
        raise EdgekdError("config.json: key 'rms_norm_eps' is missing.", "Save the model again.")
    return Architecture(
        model_type=decoder.model_type,
        class_name="",
        vocab_size=decoder.size("vocab_size"),
        hidden=decoder.size("hidden_size"),
        intermediate=decoder.size("intermediate_size"),
        heads=decoder.size("num_attention_heads"),
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_size,
        context_length=decoder.size("max_position_embeddings"),
        norm_eps=decoder.rms_norm_eps,
        attention=_attention(decoder, kinds),
        tied=bool(decoder.tie_word_embeddings),
        quantized=bool(decoder.quantization_config),
        qkv_bias=bool(decoder.attention_bias),
        out_bias=bool(decoder.attention_bias),
        mlp_bias=bool(decoder.mlp_bias),
        activation=_ACTIVATIONS.get(decoder.hidden_act or "", "other"),
    )


def _mistral(decoder: Decoder) -> Architecture:
    """Mistral (Jiang et al. 2023): a Llama with one window for every layer."""
    kind = "full_attention" if decoder.sliding_window is None else "sliding_attention"
    return replace(_llama(decoder), attention=_attention(decoder, [kind] * decoder.size("num_hidden_layers")))


def _qwen2(decoder: Decoder) -> Architecture:
    """Qwen2 (Yang et al. 2024): biases of query, key and value, and windows from some layer on."""
    return replace(_llama(decoder), attention=_qwen_attention(decoder), qkv_bias=True, out_bias=False)


def _qwen3(decoder: Decoder) -> Architecture:
    """Qwen3 (Yang et al. 2025): norms of each head's query and key."""
    return replace(_llama(decoder), attention=_qwen_attention(decoder), qk_norm="head")


def _qwen_attention(decoder: Decoder) -> tuple[Attention | None, ...]:
    kinds = _kinds(decoder)
    if decoder.layer_types is None and decoder.use_sliding_window:
        full = kinds[: decoder.max_window_layers or 0]
        kinds = full + ["sliding_attention"] * (len(kinds) - len(full))
    return _attention(decoder, kinds)


def _smollm3(decoder: Decoder) -> Architecture:
    """SmolLM3 (Bakouch et al. 2025): every fourth layer has no rotary embedding, and may have a window instead."""
    layers, step = decoder.size("num_hidden_layers"), decoder.no_rope_layer_interval or 4
    turns = decoder.no_rope_layers or [int((layer + 1) % step != 0) for layer in range(layers)]
    turns = turns[:layers]
    if len(turns) < layers:
        raise EdgekdError(
            f"config.json: key 'no_rope_layers' names {len(turns)} of {layers} layers.", "Save the model again."
        )
    windowed = decoder.use_sliding_window and decoder.sliding_window is not None
    kinds = ["full_attention" if turn or not windowed else "sliding_attention" for turn in turns]
    attention = _attention(decoder, decoder.layer_types or kinds)
    return replace(
        _llama(decoder),
        attention=tuple(
            a if a is None or turn else replace(a, rotary=None) for a, turn in zip(attention, turns, strict=True)
        ),
    )


def _gemma2(decoder: Decoder) -> Architecture:
    """Gemma 2 (Gemma Team 2024): norms by 1 + w around each block, a scaled embedding, soft caps, and a window in every
    other layer."""
    return replace(_gemma(decoder, 2), attention_cap=decoder.attn_logit_softcapping)


def _gemma3(decoder: Decoder) -> Architecture:
    """Gemma 3 (Gemma Team 2025): norms of queries and keys instead of attention's caps, a window in five layers of six,
    and another rotary embedding in those."""
    arch = _gemma(decoder, decoder.sliding_window_pattern or 6)
    return replace(arch, qk_norm="head", two_way=bool(decoder.use_bidirectional_attention))


def _gemma(decoder: Decoder, period: int) -> Architecture:
    """What both have."""
    layers = range(decoder.size("num_hidden_layers"))
    kinds = decoder.layer_types or ["sliding_attention" if (i + 1) % period else "full_attention" for i in layers]
    scalar = decoder.query_pre_attn_scalar
    return replace(
        _llama(decoder.model_copy(update={"hidden_act": decoder.hidden_activation, "layer_types": kinds})),
        norm_offset=True,
        norms="around",
        embedding_scale=decoder.size("hidden_size") ** 0.5,
        attention_scale=None if scalar is None else scalar**-0.5,
        logit_cap=decoder.final_logit_softcapping,
    )


def _phi3(decoder: Decoder) -> Architecture:
    """Phi-3 and Phi-4-mini (Abdin et al. 2024): a Mistral whose matrices are fused on disk."""
    return replace(_mistral(decoder), fused=frozenset({"qkv", "gate_up"}))


def _granite(decoder: Decoder) -> Architecture:
    """Granite 3 (Granite Team 2024): a Llama with four multipliers."""
    return replace(
        _llama(decoder),
        embedding_scale=decoder.embedding_multiplier or 1.0,
        residual_scale=decoder.residual_multiplier or 1.0,
        logit_scale=1 / (decoder.logits_scaling or 1.0),
        attention_scale=decoder.attention_multiplier,
    )


def _olmo2(decoder: Decoder) -> Architecture:
    """OLMo 2 (OLMo Team 2024): norms behind each block, and of query and key over their whole width."""
    return replace(_llama(decoder), norms="after", qk_norm="whole", mlp_bias=False)


def _unknown(config: Mapping[str, Any]) -> Feature:
    """Of what kind a family is that is not known."""
    keys = {key for key, value in {**config, **(config.get("text_config") or {})}.items() if value}
    marks = {
        Feature.MULTIMODAL: {"text_config", "vision_config", "audio_config"},
        Feature.STATE_SPACE: {
            "state_size",
            "mamba_d_state",
            "ssm_state_size",
            "linear_conv_kernel_dim",
            "conv_L_cache",
        },
        Feature.EXPERTS: {"num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"},
    }
    return next((feature for feature, names in marks.items() if keys & names), Feature.UNKNOWN)


def _estimate(decoder: Decoder) -> Architecture:
    """A family that is not known, read as a Llama with full attention: of several widths the largest, and four times
    the hidden size where none is named; a context and an epsilon of 0 where the file says nothing."""
    width = decoder.intermediate_size
    filled = {
        "intermediate_size": width if isinstance(width, int) else max(width or [4 * decoder.size("hidden_size")]),
        "max_position_embeddings": decoder.max_position_embeddings or 0,
        "rms_norm_eps": decoder.rms_norm_eps or 0.0,
        "layer_types": None,
        "hidden_act": "silu",
    }
    return _llama(decoder.model_copy(update=filled))


class Family(NamedTuple):
    """The class of transformers that a ``model_type`` has, and its reader."""

    class_name: str
    read: Callable[[Decoder], Architecture]


FAMILIES = {
    "gemma2": Family("Gemma2ForCausalLM", _gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3),
    "granite": Family("GraniteForCausalLM", _granite),
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _mistral),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2),
    "phi3": Family("Phi3ForCausalLM", _phi3),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def _kinds(decoder: Decoder) -> list[str]:
    """Every layer's kind by ``layer_types``; full attention where the file has none."""
    layers = decoder.size("num_hidden_layers")
    kinds = ["full_attention"] * layers if decoder.layer_types is None else decoder.layer_types
    if len(kinds) != layers:
        raise EdgekdError(
            f"config.json: key 'layer_types' names {len(kinds)} of {layers} layers.", "Save the model again."
        )
    return kinds


def _attention(decoder: Decoder, kinds: Sequence[str]) -> tuple[Attention | None, ...]:
    """Attention of every layer, by its kind."""
    width = None if decoder.use_sliding_window is False else decoder.sliding_window
    found: dict[str, Attention | None] = dict.fromkeys(kinds)
    if "full_attention" in found:
        found["full_attention"] = Attention(_rotary(decoder, "full_attention"))
    if "sliding_attention" in found:
        if width is None:
            raise EdgekdError("config.json: key 'sliding_window' does not say how wide it is.", "Save the model again.")
        found["sliding_attention"] = Attention(_rotary(decoder, "sliding_attention"), width)
    return tuple(found[kind] for kind in kinds)


def _rotary(decoder: Decoder, kind: Literal["full_attention", "sliding_attention"]) -> Rotary:
    """The rotary embedding of the layers of a kind. ``rope_scaling`` was the key before ``rope_parameters``; a second
    base, of layers with a window, had a key of its own, and was never scaled."""
    local, scaling = decoder.rope_local_base_freq, decoder.rope_scaling
    rope = scaling or decoder.rope_parameters or Rope()
    nested = getattr(decoder.rope_parameters or rope, kind)
    if nested is None and local and kind == "sliding_attention":
        return _scaled(decoder, Rope(rope_theta=local))
    return _scaled(decoder, nested or rope)


def _scaled(decoder: Decoder, rope: Rope) -> Rotary:
    theta = rope.rope_theta or decoder.rope_theta or 10000.0
    partial = rope.partial_rotary_factor or decoder.partial_rotary_factor or 1.0
    if partial > 1 or decoder.head_size * partial < 2:
        raise EdgekdError(
            f"config.json: partial_rotary_factor {partial} of {decoder.head_size} channels is no pair.",
            "Save it again.",
        )
    plain = Rotary(theta, int(decoder.head_size * partial), rope.rope_type or rope.type or "default")
    if rope.short_factor and plain.scaling in ("su", "yarn"):  # LongRoPE's names before it had one
        plain = replace(plain, scaling="longrope")
    if any(isinstance(value, dict) for value in (rope.model_extra or {}).values()):
        plain = replace(plain, scaling="by layer")
    scale = _SCALINGS.get(plain.scaling)
    if scale is None:
        return plain
    longest = decoder.max_position_embeddings or 0
    original = decoder.original_max_position_embeddings or rope.original_max_position_embeddings or longest
    if original < 1:
        raise _incomplete(plain, "original_max_position_embeddings")
    return scale(replace(plain, original_context=int(original), factor=rope.factor or longest / original), rope)


def _incomplete(rotary: Rotary, needs: str) -> EdgekdError:
    return EdgekdError(f"config.json: rope_parameters: {rotary.scaling} needs {needs}.", "Save the model again.")


def _linear(rotary: Rotary, rope: Rope) -> Rotary:
    """Positions divided by a number (kaiokendev, 2023)."""
    if rope.factor is None:
        raise _incomplete(rotary, "factor")
    return replace(rotary, factors=(rope.factor,) * (rotary.dim // 2))


def _yarn(rotary: Rotary, rope: Rope) -> Rotary:
    """YaRN (Peng et al. 2023): pairs that turn often in the trained context keep their frequency, those that hardly
    turn are divided by ``factor``, and those between by what lies between."""
    if rope.truncate is False:
        return replace(rotary, scaling="yarn without truncation")
    dim, factor, betas = rotary.dim, rotary.factor, (rope.beta_fast or 32.0, rope.beta_slow or 1.0)
    if rotary.theta == 1:
        raise _incomplete(rotary, "a rope_theta other than 1")
    low, high = (
        dim * math.log(rotary.original_context / (beta * 2 * math.pi)) / (2 * math.log(rotary.theta)) for beta in betas
    )
    first, last = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    width = last - first or 0.001
    ramp = [min(max((pair - first) / width, 0.0), 1.0) for pair in range(dim // 2)]
    attention = rope.attention_factor
    if attention is None:
        scale, of_all = (rope.mscale, rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else (1.0, 0.0)
        attention = _yarn_scale(factor, scale) / _yarn_scale(factor, of_all)
    factors = tuple(1 / (part / factor + 1 - part) for part in ramp)
    return replace(rotary, factors=factors, attention_factor=attention, betas=betas)


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rotary: Rotary, rope: Rope) -> Rotary:
    """LongRoPE (Ding et al. 2024): divisors that were searched for, of short and of long contexts."""
    pairs, original = rotary.dim // 2, rotary.original_context
    short, long = rope.short_factor or [], rope.long_factor or []
    if len(short) != pairs or len(long) != pairs:
        raise _incomplete(rotary, f"short_factor and long_factor, {pairs} numbers each")
    attention, factor = rope.attention_factor, rotary.factor
    if attention is None:
        attention = 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(rotary, factors=tuple(short), long_factors=tuple(long), attention_factor=attention)


def _llama3(rotary: Rotary, rope: Rope) -> Rotary:
    """Llama 3.1's rotary scaling (Llama 3 Herd of Models, 2024, and its reference code)."""
    factor, low, high = rope.factor, rope.low_freq_factor, rope.high_freq_factor
    if factor is None or low is None or high is None or low >= high:
        raise _incomplete(rotary, "factor, and low_freq_factor below high_freq_factor")
    factors = []
    for i in range(0, rotary.dim, 2):
        wavelength = 2 * math.pi * rotary.theta ** (i / rotary.dim)
        if wavelength < rotary.original_context / high:
            factors.append(1.0)
        elif wavelength > rotary.original_context / low:
            factors.append(factor)
        else:
            smooth = (rotary.original_context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return replace(rotary, factors=tuple(factors))


_SCALINGS: dict[str, Callable[[Rotary, Rope], Rotary]] = {
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
_ROPE_FEATURES: dict[str, Feature | None] = {
    "default": None,
    "dynamic": None,  # it begins behind max_position_embeddings, where no artifact's context goes
    "linear": Feature.LINEAR_ROPE,
    "llama3": Feature.LLAMA3_ROPE,
    "longrope": Feature.LONG_ROPE,
    "yarn": Feature.YARN_ROPE,
}
