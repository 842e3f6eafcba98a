"""What a model is to llama.cpp: architecture, hyperparameters, and the place of every weight.

Shapes follow ``torch.nn.Linear``: weights are ``(out, in)``; GGUF stores the same bytes and lists dimensions reversed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import EdgekdError, Unsupported
from ..student import Checkpoint

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from ..quant.folder import Grid

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Architecture:
    """The hyperparameters that a GGUF file states."""

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


@dataclass(frozen=True)
class Weight:
    """One tensor on its way from the model folder to the file."""

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0
    """Heads whose rows are reordered from transformers' half-split rotary layout to llama.cpp's pairs; 0: none."""


def read_config(config: Mapping[str, Any]) -> Architecture:
    """Check a ``config.json`` and read it.

    Raises:
        Unsupported: an architecture or a setting that the exporter does not write.
    """
    model_type = str(config.get("model_type"))
    classes = config.get("architectures") or [_CLASSES.get(model_type)]
    if model_type not in _CLASSES or classes != [_CLASSES[model_type]]:
        raise Unsupported(
            f"config.json: {', '.join(map(str, classes))} (model_type {model_type!r}) has no GGUF export here.",
            "Use a student of the Llama, Qwen2 or Qwen3 architecture.",
        )
    _refuse_odd_settings(config, model_type)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        head_dim = int(config.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads))
        if model_type == "qwen2" and heads * head_dim != hidden:
            raise Unsupported(
                f"config.json: head_dim {head_dim} of {heads} heads is not hidden_size {hidden}, and llama.cpp's Qwen2 "
                "knows no other.",
                "Leave student.hidden_size out, or use a Llama or Qwen3 student.",
            )
        theta, factors = _rope(config, model_type, head_dim)
        return Architecture(
            name=model_type,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            vocab_size=int(config["vocab_size"]),
            context_length=int(config["max_position_embeddings"]),
            rms_eps=float(config["rms_norm_eps"]),
            rope_theta=theta,
            rope_factors=factors,
        )
    except KeyError as error:
        raise EdgekdError(f"config.json: key {error} is missing.", "Save the model again.") from error


def _refuse_odd_settings(config: Mapping[str, Any], model_type: str) -> None:
    layer_types = config.get("layer_types") or []
    odd = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": model_type != "qwen2" and bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "layer_types": any(kind != "full_attention" for kind in layer_types),
        "quantization_config": bool(config.get("quantization_config")),
    }
    for key in (key for key, is_odd in odd.items() if is_odd):
        raise Unsupported(
            f"config.json: {key}: {config[key]!r:.80} has no GGUF export for {model_type}.",
            "Train a student without it, or export another target.",
        )


def _rope(config: Mapping[str, Any], model_type: str, head_dim: int) -> tuple[float, tuple[float, ...]]:
    """Base of the rotary embedding and its scaling factors."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if kind == "default" and partial == 1.0 and not any(isinstance(value, dict) for value in parameters.values()):
        return theta, ()
    if kind == "llama3" and model_type == "llama" and partial == 1.0:
        return theta, _llama3_factors(parameters, theta, head_dim)
    raise Unsupported(
        f"config.json: rope_parameters: {dict(parameters)!r:.120} has no GGUF export for {model_type}.",
        "Supported: rope_type default, and llama3 for the Llama architecture.",
    )


def _llama3_factors(parameters: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """Frequency divisors of Llama 3.1's rotary scaling (Llama 3 Herd of Models, 2024, and its reference code)."""
    factor, original = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
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


def add_hyperparameters(writer: GGUFWriter, arch: Architecture, context_length: int) -> None:
    """Write the architecture's keys."""
    writer.add_vocab_size(arch.vocab_size)
    writer.add_context_length(context_length)
    writer.add_embedding_length(arch.hidden)
    writer.add_block_count(arch.layers)
    writer.add_feed_forward_length(arch.intermediate)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.rms_eps)


def weights(arch: Architecture, checkpoint: Checkpoint | Grid) -> list[Weight]:
    """Every weight of the model, in file order.

    Raises:
        EdgekdError: a tensor is missing or has another shape than config.json says.
        Unsupported: a tensor that has no place in the architecture.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.name.upper()], arch.layers)
    found = []
    for source, (shape, heads) in _expected(arch, checkpoint.tied).items():
        if source not in set(checkpoint):
            raise EdgekdError(f"{checkpoint.folder}: tensor {source!r} is missing.", "Save the model again.")
        if checkpoint.shape(source) != shape:
            raise EdgekdError(
                f"{checkpoint.folder}: tensor {source!r} has shape {checkpoint.shape(source)}, by config.json {shape}.",
                "Check config.json against the weights.",
            )
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, source
        found.append(Weight(source, name, shape, heads))
    known = {weight.source for weight in found} | ({"lm_head.weight"} if checkpoint.tied else set())
    extra = [name for name in checkpoint if name not in known and not name.endswith(_IGNORED_SUFFIX)]
    if extra:
        raise Unsupported(
            f"{checkpoint.folder}: tensor {extra[0]!r} has no place in GGUF's {arch.name} ({len(extra)} such).",
            "Export a plain Llama, Qwen2 or Qwen3 model.",
        )
    return found


def _expected(arch: Architecture, tied: bool) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape, and heads to reorder, of every tensor."""
    hidden, wide = arch.hidden, arch.intermediate
    query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    query_heads, key_heads = (arch.heads, arch.kv_heads) if arch.name == "llama" else (0, 0)
    block: dict[str, tuple[tuple[int, ...], int]] = {
        "input_layernorm.weight": ((hidden,), 0),
        "self_attn.q_proj.weight": ((query, hidden), query_heads),
        "self_attn.k_proj.weight": ((key, hidden), key_heads),
        "self_attn.v_proj.weight": ((key, hidden), 0),
        "self_attn.o_proj.weight": ((hidden, query), 0),
        "post_attention_layernorm.weight": ((hidden,), 0),
        "mlp.gate_proj.weight": ((wide, hidden), 0),
        "mlp.up_proj.weight": ((wide, hidden), 0),
        "mlp.down_proj.weight": ((hidden, wide), 0),
    }
    if arch.name == "qwen2":
        block |= {f"self_attn.{p}_proj.bias": ((size,), 0) for p, size in (("q", query), ("k", key), ("v", key))}
    if arch.name == "qwen3":
        block |= {f"self_attn.{p}_norm.weight": ((arch.head_dim,), 0) for p in ("q", "k")}
    whole: dict[str, tuple[tuple[int, ...], int]] = {"model.embed_tokens.weight": ((arch.vocab_size, hidden), 0)}
    for layer in range(arch.layers):
        whole |= {f"model.layers.{layer}.{name}": value for name, value in block.items()}
    whole["model.norm.weight"] = ((hidden,), 0)
    if not tied:
        whole["lm_head.weight"] = ((arch.vocab_size, hidden), 0)
    return whole
