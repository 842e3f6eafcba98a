"""What every target knows of a decoder: its hyperparameters, read from ``config.json`` and checked, and the shape of
every weight.

Shapes follow ``torch.nn.Linear``: weights are ``(out, in)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architecture import Decoder, Rope, read_decoder
from ...checkpoint import EMBEDDING, HEAD, Checkpoint
from ...errors import EdgekdError, SpecError, Unsupported
from ...spec import TargetSpec

if TYPE_CHECKING:
    import numpy as np

    from ...quant.folder import Grid

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_CACHE_BYTES = 2 * 2**30
"""Of a key-value cache that is there in full from the start: about what a phone gives an app in all."""


@dataclass(frozen=True)
class Architecture:
    """The hyperparameters that a file states."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_eps: float
    rope_theta: float
    rope_factors: tuple[float, ...]
    """Divisors of the ``head_dim / 2`` rotary frequencies (Llama 3.1); empty: no scaling."""


def read_config(config: Mapping[str, Any], form: str) -> Architecture:
    """Check a ``config.json`` and read it.

    Args:
        form: the file format, for messages.

    Raises:
        EdgekdError: a number that is needed is missing.
        Unsupported: an architecture or a setting that the exporters do not write.
    """
    decoder = read_decoder(config)
    classes = decoder.architectures or [_CLASSES.get(decoder.model_type, "no architecture")]
    if classes != [_CLASSES.get(decoder.model_type)] or "text_config" in config:
        raise Unsupported(
            f"config.json: {', '.join(classes)} (model_type {decoder.model_type!r}) has no {form} export here.",
            "Use a student of the Llama, Qwen2 or Qwen3 architecture.",
        )
    _refuse_odd_settings(decoder, form)
    heads = decoder.size("num_attention_heads")
    if heads % decoder.kv_heads:
        raise Unsupported(
            f"config.json: num_attention_heads {heads} is not divisible by num_key_value_heads {decoder.kv_heads}.",
            "Check config.json.",
        )
    theta, factors = _rope(decoder, form)
    if decoder.rms_norm_eps is None:
        raise EdgekdError("config.json: key 'rms_norm_eps' is missing.", "Save the model again.")
    return Architecture(
        name=decoder.model_type,
        layers=decoder.size("num_hidden_layers"),
        hidden=decoder.size("hidden_size"),
        intermediate=decoder.size("intermediate_size"),
        heads=heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_size,
        vocab_size=decoder.size("vocab_size"),
        context_length=decoder.size("max_position_embeddings"),
        rms_eps=decoder.rms_norm_eps,
        rope_theta=theta,
        rope_factors=factors,
    )


def check_context(spec: TargetSpec, arch: Architecture) -> None:
    """Refuse a context longer than the student's.

    Raises:
        SpecError: it is.
    """
    if spec.context and spec.context > arch.context_length:
        raise SpecError(
            f"targets: context {spec.context} is longer than the student's {arch.context_length} "
            "(config.json: max_position_embeddings).",
            "Ask for a shorter one.",
        )


def check_head_dim(arch: Architecture) -> None:
    """Refuse heads without a whole number of rotary pairs.

    Raises:
        Unsupported: the head size is odd.
    """
    if arch.head_dim % 2:
        raise Unsupported(
            f"config.json: head_dim {arch.head_dim} is odd: the rotary embedding turns pairs.", "Use an even head_dim."
        )


def cache_bytes(arch: Architecture, context_length: int, value_bytes: int) -> int:
    """Bytes of the keys and values of ``context_length`` tokens, over all layers."""
    return 2 * value_bytes * arch.layers * context_length * arch.kv_heads * arch.head_dim


def _refuse_odd_settings(decoder: Decoder, form: str) -> None:
    if decoder.quantization_config:
        raise Unsupported(
            "config.json: the model is quantized already (quantization_config).",
            "Give the student it was made from; a quantized student of edgekd goes behind --grid.",
        )
    layer_types = decoder.layer_types or []
    odd = {
        "hidden_act": decoder.hidden_act != "silu",
        "attention_bias": decoder.model_type != "qwen2" and bool(decoder.attention_bias),
        "mlp_bias": bool(decoder.mlp_bias),
        "use_sliding_window": bool(decoder.use_sliding_window),
        "layer_types": any(kind != "full_attention" for kind in layer_types),
    }
    for key in (key for key, is_odd in odd.items() if is_odd):
        raise Unsupported(
            f"config.json: {key}: {getattr(decoder, key)!r:.80} has no {form} export for {decoder.model_type}.",
            "Train a student without it, or export another target.",
        )


def _rope(decoder: Decoder, form: str) -> tuple[float, tuple[float, ...]]:
    """Base of the rotary embedding and its scaling factors."""
    rope = decoder.rope_parameters or decoder.rope_scaling or Rope()
    kind = rope.rope_type or rope.type or "default"
    theta = rope.rope_theta or decoder.rope_theta or 10000.0
    partial = rope.partial_rotary_factor or decoder.partial_rotary_factor or 1.0
    by_layer = any(isinstance(value, dict) for value in (rope.model_extra or {}).values())
    if kind == "default" and partial == 1.0 and not by_layer:
        return theta, ()
    if kind == "llama3" and decoder.model_type == "llama" and partial == 1.0:
        return theta, _llama3_factors(rope, theta, decoder.head_size)
    raise Unsupported(
        f"config.json: rope_parameters: {rope.model_dump(exclude_none=True)!r:.120} has no {form} export for "
        f"{decoder.model_type}.",
        "Supported: rope_type default, and llama3 for the Llama architecture.",
    )


def _llama3_factors(rope: Rope, theta: float, head_dim: int) -> tuple[float, ...]:
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
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def rotary_tables(arch: Architecture, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position, float32 ``(context_length, head_dim / 2)`` each."""
    import numpy as np

    exponents = np.arange(0, arch.head_dim, 2, dtype=np.float32) / np.float32(arch.head_dim)
    frequencies = 1 / np.power(np.float32(arch.rope_theta), exponents)
    if arch.rope_factors:
        frequencies = frequencies / np.array(arch.rope_factors, np.float32)
    angles = np.arange(context_length, dtype=np.float32)[:, None] * frequencies[None]
    return np.cos(angles), np.sin(angles)


def weight_shapes(arch: Architecture, tied: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by its HF name."""
    hidden, wide = arch.hidden, arch.intermediate
    query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }
    if arch.name == "qwen2":
        block |= {f"self_attn.{p}_proj.bias": (size,) for p, size in (("q", query), ("k", key), ("v", key))}
    if arch.name == "qwen3":
        block |= {f"self_attn.{p}_norm.weight": (arch.head_dim,) for p in ("q", "k")}
    whole: dict[str, tuple[int, ...]] = {EMBEDDING: (arch.vocab_size, hidden)}
    for layer in range(arch.layers):
        whole |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    whole["model.norm.weight"] = (hidden,)
    if not tied:
        whole[HEAD] = (arch.vocab_size, hidden)
    return whole


def check_weights(arch: Architecture, source: Checkpoint | Grid, form: str) -> None:
    """Compare a model folder's tensors with what its configuration says.

    Args:
        form: the file format, for messages.

    Raises:
        EdgekdError: a tensor is missing or has another shape.
        Unsupported: a tensor that has no place in the architecture.
    """
    expected = weight_shapes(arch, source.tied)
    shapes, folder = {name: source.shape(name) for name in source}, source.folder
    for name, shape in expected.items():
        if name not in shapes:
            raise EdgekdError(f"{folder}: tensor {name!r} is missing.", "Save the model again.")
        if shapes[name] != shape:
            raise EdgekdError(
                f"{folder}: tensor {name!r} has shape {shapes[name]}, by config.json {shape}.",
                "Check config.json against the weights.",
            )
    known = expected.keys() | ({HEAD} if source.tied else set())
    extra = [name for name in shapes if name not in known]
    if extra:
        raise Unsupported(
            f"{folder}: tensor {extra[0]!r} has no place in {form}'s {arch.name} ({len(extra)} such).",
            "Export a plain Llama, Qwen2 or Qwen3 model.",
        )
