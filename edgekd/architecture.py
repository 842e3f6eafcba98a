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


class Rope(BaseModel):
    """``rope_parameters``, or ``rope_scaling`` as it was called. What is not named here stays in ``model_extra``."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Positive | None = None
    factor: Positive | None = None
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
    partial_rotary_factor: Positive | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    sliding_window: Size | None = None
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
    ATTENTION_SCALE = "attention scaled by another number than the head size's root", "attention_multiplier"
    ATTENTION_CAP = "soft caps of attention", "attn_logit_softcapping"
    LOGIT_CAP = "soft caps of logits", "final_logit_softcapping"
    GELU_TANH = "the activation gelu_tanh", "hidden_act"
    OTHER_ACTIVATION = "an activation that edgekd does not know", "hidden_act"
    PLAIN_MLP = "an MLP without a gate", "model_type"
    SLIDING_WINDOW = "sliding windows of attention", "sliding_window, use_sliding_window, layer_types"
    NO_ATTENTION = "layers of another kind than attention", "layer_types"
    NO_ROPE = "layers without a rotary embedding", "no_rope_layers"
    ROPE_BY_LAYER = "rotary embeddings that differ by layer", "rope_parameters"
    PARTIAL_ROPE = "a rotary embedding of part of a head", "rope_parameters, partial_rotary_factor"
    LLAMA3_ROPE = "Llama 3.1's scaled rotary embedding", "rope_parameters, rope_scaling"
    OTHER_ROPE = "a scaled rotary embedding that edgekd does not know", "rope_parameters, rope_scaling"
    FUSED_QKV = "query, key and value in one matrix", "model_type"
    FUSED_GATE_UP = "gate and up projection in one matrix", "model_type"


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding: pair ``i`` of the first ``dim`` channels turns by ``theta ** (-2 i / dim) / factors[i]`` a
    position."""

    theta: float
    dim: int
    scaling: str = "default"
    """``rope_type``; of another kind than default and llama3, ``factors`` say nothing."""
    factors: tuple[float, ...] = ()
    """``dim / 2`` divisors of the frequencies; empty: none."""


@dataclass(frozen=True)
class Attention:
    """Attention of one layer."""

    rotary: Rotary | None
    window: int | None = None
    """Positions that a token sees, itself included; None: all; 0: it is limited, the file does not say to what."""


Role = Literal["embedding", "head", "norm", "head_norm", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]


class Weight(NamedTuple):
    """What a parameter is. A bias has the role of its matrix."""

    role: Role
    shape: tuple[int, ...]
    layer: int | None = None


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
    known: bool = True
    """Whether ``FAMILIES`` has it; if not, sizes are read as a Llama's, and good for estimates alone."""
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
    fused: frozenset[Literal["qkv", "gate_up"]] = frozenset()
    """Matrices that are one on disk."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.attention)

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding of a decoder that has one and the same in every layer."""
        (rotary,) = {layer.rotary for layer in self.attention if layer and layer.rotary}
        return rotary

    def features(self, context_length: int) -> frozenset[Feature]:
        """What of the features counts for a context of so many tokens: a window that holds all of it is none."""
        found = {
            Feature.UNKNOWN: not self.known,
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
        return frozenset(feature for feature, there in found.items() if there) | self._by_layer(context_length)

    def _by_layer(self, context_length: int) -> frozenset[Feature]:
        layers = {layer for layer in self.attention if layer}
        ropes = {layer.rotary for layer in layers if layer.rotary}
        found = {
            Feature.NO_ATTENTION: None in self.attention,
            Feature.SLIDING_WINDOW: any(a.window is not None and a.window < context_length for a in layers),
            Feature.NO_ROPE: any(layer.rotary is None for layer in layers),
            Feature.ROPE_BY_LAYER: len(ropes) > 1,
            Feature.PARTIAL_ROPE: any(rope.dim != self.head_dim for rope in ropes),
            Feature.LLAMA3_ROPE: any(rope.scaling == "llama3" for rope in ropes),
            Feature.OTHER_ROPE: any(rope.scaling not in ("default", "llama3") for rope in ropes),
        }
        return frozenset(feature for feature, there in found.items() if there)

    def weights(self) -> dict[str, Weight]:
        """Role and shape of every parameter, by its name in the file, in order; a tied head is the embedding."""
        found = {EMBEDDING: Weight("embedding", (self.vocab_size, self.hidden))}
        for layer, attention in enumerate(self.attention):
            parts = self._layer(attends=attention is not None)
            found |= {f"model.layers.{layer}.{name}": part._replace(layer=layer) for name, part in parts.items()}
        found["model.norm.weight"] = Weight("norm", (self.hidden,))
        return found if self.tied else found | {HEAD: Weight("head", (self.vocab_size, self.hidden))}

    def _layer(self, *, attends: bool) -> dict[str, Weight]:
        """A layer's parameters: matrices and the norms about them, then biases, then norms of query and key."""
        attention, mlp = self._attention_matrices() if attends else {}, self._mlp_matrices()
        before, behind, middle, end = self._norms()
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

    def _norms(self) -> list[dict[str, Weight]]:
        """Those before attention, behind it, before the MLP and behind it. Llama's ``post_attention_layernorm`` stands
        before the MLP, Gemma's and OLMo's of the same name behind attention."""
        first, second = "input_layernorm", "post_attention_layernorm"
        third, fourth = "pre_feedforward_layernorm", "post_feedforward_layernorm"
        names = {
            "before": (first, "", second, ""),
            "after": ("", second, "", fourth),
            "around": (first, second, third, fourth),
        }
        norm = Weight("norm", (self.hidden,))
        return [{f"{name}.weight": norm} if name else {} for name in names[self.norms]]

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

    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(math.prod(weight.shape) for weight in self.weights().values())

    def layer_parameters(self) -> int:
        """Number of a decoder layer's weights."""
        return sum(math.prod(weight.shape) for weight in self._layer(attends=True).values())

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
        return replace(_estimate(decoder), class_name=", ".join(classes or [decoder.model_type]))
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


def _estimate(decoder: Decoder) -> Architecture:
    """A family that is not known, read as a Llama with full attention: of several widths the largest, and four times
    the hidden size where none is named; a context and an epsilon of 0 where the file says nothing."""
    width = decoder.intermediate_size
    filled = {
        "intermediate_size": width if isinstance(width, int) else max(width or [4 * decoder.size("hidden_size")]),
        "max_position_embeddings": decoder.max_position_embeddings or 0,
        "rms_norm_eps": decoder.rms_norm_eps or 0.0,
        "layer_types": None,
    }
    return replace(_llama(decoder.model_copy(update=filled)), known=False)


class Family(NamedTuple):
    """The class of transformers that a ``model_type`` has, and its reader."""

    class_name: str
    read: Callable[[Decoder], Architecture]


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _mistral),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3),
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
    width = 0 if decoder.use_sliding_window is False else decoder.sliding_window or 0
    found: dict[str, Attention | None] = dict.fromkeys(kinds)
    if "full_attention" in found:
        found["full_attention"] = Attention(_rotary(decoder, "full_attention"))
    if "sliding_attention" in found:
        found["sliding_attention"] = Attention(_rotary(decoder, "sliding_attention"), width)
    return tuple(found[kind] for kind in kinds)


def _rotary(decoder: Decoder, kind: Literal["full_attention", "sliding_attention"]) -> Rotary:
    """The rotary embedding of the layers of a kind."""
    rope = decoder.rope_parameters or decoder.rope_scaling or Rope()
    rope = getattr(rope, kind) or rope
    theta = rope.rope_theta or decoder.rope_theta or 10000.0
    partial = rope.partial_rotary_factor or decoder.partial_rotary_factor or 1.0
    dim = int(decoder.head_size * partial)
    scaling = rope.rope_type or rope.type or "default"
    if any(isinstance(value, dict) for value in (rope.model_extra or {}).values()):
        scaling = "by layer"
    return Rotary(theta, dim, scaling, _llama3_factors(rope, theta, dim) if scaling == "llama3" else ())


def _llama3_factors(rope: Rope, theta: float, dim: int) -> tuple[float, ...]:
    """Frequency divisors of Llama 3.1's rotary scaling (Llama 3 Herd of Models, 2024, and its reference code)."""
    factor, original = rope.factor, rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if factor is None or original is None or low is None or high is None or low >= high:
        raise EdgekdError(
            "config.json: rope_parameters: llama3 needs factor, original_max_position_embeddings, and low_freq_factor "
            "below high_freq_factor.",
            "Save the model again.",
        )
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
