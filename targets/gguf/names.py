"""What a model is to llama.cpp: architecture, hyperparameters, and the place of every weight.

Shapes follow ``torch.nn.Linear``: weights are ``(out, in)``; GGUF stores the same bytes and lists dimensions reversed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...architecture import Architecture, Feature, Rotary
from ...errors import Unsupported
from ...quant.source import Source
from ..shared import decoder as _decoder

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Weight:
    """One tensor on its way from the model folder to the file."""

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0
    """Heads whose rows are reordered from transformers' half-split rotary layout to llama.cpp's pairs; 0: none."""


@dataclass(frozen=True)
class Runtime:
    """A decoder as llama.cpp knows it, by a name of its own."""

    needs: frozenset[Feature]
    """Features that it always has."""
    may: frozenset[Feature]
    """Features that it has where the file says so."""
    pairs: bool = False
    """Whether it rotates neighbouring channels, where transformers rotates halves of a head."""
    head: Literal["either", "tied", "own"] = "either"
    """Whether its head is the embedding, or a tensor of its own."""
    window_period: bool = False
    """Whether layers have windows, every so many of them but one."""
    still_period: int = 0
    """Of so many layers the last has no rotary embedding."""


_BIASES = frozenset({Feature.QKV_BIAS, Feature.OUT_BIAS, Feature.MLP_BIAS})
_ROPES = frozenset({Feature.LINEAR_ROPE, Feature.YARN_ROPE})
_SCALES = frozenset({Feature.EMBEDDING_SCALE, Feature.RESIDUAL_SCALE, Feature.LOGIT_SCALE, Feature.ATTENTION_SCALE})
_FUSED = frozenset({Feature.FUSED_QKV, Feature.FUSED_GATE_UP})
_GEMMA = frozenset({Feature.NORM_OFFSET, Feature.NORMS_AROUND, Feature.EMBEDDING_SCALE, Feature.GELU_TANH})
_SMOLLM3 = _BIASES | _ROPES | {Feature.FREE_HEADS}
_LLAMA = _BIASES | _ROPES | {Feature.FREE_HEADS, Feature.LLAMA3_ROPE, Feature.LONG_ROPE}
RUNTIMES = {
    "gemma3": Runtime(
        _GEMMA | {Feature.HEAD_NORM},
        frozenset({Feature.FREE_HEADS, Feature.SLIDING_WINDOW, Feature.ROPE_BY_LAYER, Feature.LINEAR_ROPE}),
        window_period=True,
    ),
    "gemma2": Runtime(
        _GEMMA | {Feature.ATTENTION_CAP, Feature.LOGIT_CAP},
        frozenset({Feature.FREE_HEADS, Feature.SLIDING_WINDOW, Feature.LINEAR_ROPE}),
        head="tied",
        window_period=True,
    ),
    "olmo2": Runtime(frozenset({Feature.NORMS_AFTER, Feature.WIDE_NORM}), _ROPES, head="own"),
    "phi3": Runtime(_FUSED, frozenset({Feature.PARTIAL_ROPE, Feature.LONG_ROPE})),
    "qwen3": Runtime(frozenset({Feature.HEAD_NORM}), _ROPES | {Feature.FREE_HEADS}),
    "qwen2": Runtime(frozenset({Feature.QKV_BIAS}), _ROPES),
    "smollm3": Runtime(frozenset({Feature.NO_ROPE}), _SMOLLM3, pairs=True, still_period=4),
    "llama": Runtime(frozenset(), _LLAMA, pairs=True),
    "granite": Runtime(frozenset(), _LLAMA | _SCALES, pairs=True),
}
"""Those that need most come first."""
FEATURES = frozenset[Feature]().union(*(runtime.needs | runtime.may for runtime in RUNTIMES.values()))


def runtime_of(arch: Architecture) -> str:
    """llama.cpp's name for an architecture: of those whose needs are met, the first that lacks least."""
    has = arch.features(arch.context_length)
    able = {name: runtime for name, runtime in RUNTIMES.items() if runtime.needs <= has}
    return min(able, key=lambda name: len(has - able[name].needs - able[name].may))


def check(arch: Architecture, context_length: int) -> None:
    """Refuse what llama.cpp does not know, or not of this decoder.

    Raises:
        Unsupported: names the features.
    """
    _decoder.check_features(arch, FEATURES, "GGUF", context_length)
    name = runtime_of(arch)
    runtime = RUNTIMES[name]
    _decoder.check_features(arch, runtime.needs | runtime.may, f"GGUF's {name}", context_length)
    if runtime.head == "tied" and not arch.tied:
        raise _other(name, "a head that is the embedding", "tie_word_embeddings")
    if runtime.window_period and _window_period(arch) is None:
        raise _other(name, "windows in every so many layers but the last of them", "layer_types")
    turns = [layer is None or layer.rotary is not None for layer in arch.attention]
    if runtime.still_period and turns != [bool((i + 1) % runtime.still_period) for i in range(arch.layers)]:
        raise _other(name, f"every {runtime.still_period}th layer without a rotary embedding", "no_rope_layers")


def _other(name: str, has: str, key: str) -> Unsupported:
    return Unsupported(f"GGUF's {name} has {has}, this student another (config.json: {key}).", "Export another target.")


def _window_period(arch: Architecture) -> int | None:
    """Of how many layers the last one alone has no window; None where there is no such number, or where rotary
    embeddings do not go by it."""
    windowed = [layer is not None and layer.window is not None for layer in arch.attention]
    period = next((i + 1 for i, has in enumerate(windowed) if not has), arch.layers + 1)
    kinds = {(has, layer) for has, layer in zip(windowed, arch.attention, strict=True)}
    if windowed != [bool((i + 1) % period) for i in range(arch.layers)] or len(kinds) > len(set(windowed)):
        return None
    return period


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
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    _add_rope(writer, main_rotary(arch).at(context_length))
    runtime = RUNTIMES[runtime_of(arch)]
    if runtime.window_period:
        _add_windows(writer, arch)
    if Feature.EMBEDDING_SCALE in runtime.may:
        writer.add_embedding_scale(arch.embedding_scale)
        writer.add_residual_scale(arch.residual_scale)
        writer.add_attention_scale(arch.head_dim**-0.5 if arch.attention_scale is None else arch.attention_scale)
        writer.add_logit_scale(1 / arch.logit_scale)  # llama.cpp divides
    if arch.attention_cap is not None:
        writer.add_attn_logit_softcapping(arch.attention_cap)
    if arch.logit_cap is not None:
        writer.add_final_logit_softcapping(arch.logit_cap)


def main_rotary(arch: Architecture) -> Rotary:
    """The rotary embedding of the layers without a window, or of all."""
    layers = [layer for layer in arch.attention if layer and layer.rotary]
    rotary = next((layer.rotary for layer in layers if layer.window is None), layers[0].rotary)
    assert rotary
    return rotary


def _add_rope(writer: GGUFWriter, rotary: Rotary) -> None:
    from gguf import RopeScalingType

    writer.add_rope_dimension_count(rotary.dim)
    writer.add_rope_freq_base(rotary.theta)
    if rotary.scaling not in ("linear", "longrope", "yarn"):
        return
    writer.add_rope_scaling_type(RopeScalingType(rotary.scaling))
    if rotary.scaling != "linear":
        writer.add_rope_scaling_orig_ctx_len(rotary.original_context)
    if rotary.scaling != "longrope":
        writer.add_rope_scaling_factor(rotary.factor)
    if rotary.scaling == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rotary.betas[0])
        writer.add_rope_scaling_yarn_beta_slow(rotary.betas[1])
    # llama.cpp has the number that YaRN's authors propose, and multiplies by this one.
    own = 1 + 0.1 * math.log(rotary.factor) if rotary.scaling == "yarn" and rotary.factor > 1 else 1.0
    writer.add_rope_scaling_attn_factors(rotary.attention_factor / own)


def _add_windows(writer: GGUFWriter, arch: Architecture) -> None:
    """A file without these keys would have those of Google's models."""
    period = _window_period(arch)
    assert period
    windowed = next((layer for layer in arch.attention if layer and layer.window is not None), None)
    # Where no layer has one, none goes by it.
    writer.add_sliding_window((windowed and windowed.window) or arch.context_length)
    writer.add_sliding_window_pattern(period)
    if windowed and windowed.rotary:
        writer.add_rope_freq_base_swa(windowed.rotary.theta)


def rope_tensors(arch: Architecture, context_length: int) -> dict[str, tuple[float, ...]]:
    """Divisors of frequencies that stand in the file as tensors. Of LongRoPE, llama.cpp takes one of two by the context
    that it is given; both are those of the artifact's, as in every other format."""
    rotary = main_rotary(arch).at(context_length)
    names = {"llama3": ["rope_freqs"], "longrope": ["rope_factors_long", "rope_factors_short"]}
    return {f"{name}.weight": rotary.factors for name in names.get(rotary.scaling, [])}


def weights(arch: Architecture, source: Source) -> list[Weight]:
    """Every weight of the model, in file order.

    Raises:
        EdgekdError: a tensor is missing or has another shape than config.json says.
        Unsupported: a tensor that has no place in the architecture.
    """
    _decoder.check_weights(arch, source, "GGUF")
    runtime = runtime_of(arch)
    found = plan(arch, runtime)
    if RUNTIMES[runtime].head == "own" and arch.tied:
        found.append(Weight(_decoder.EMBEDDING, "output.weight", (arch.vocab_size, arch.hidden)))
    return found


def plan(arch: Architecture, runtime: str) -> list[Weight]:
    """Every weight that an architecture has, in file order, and its place in a file of llama.cpp's architecture."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[runtime.upper()], arch.layers)
    reordered = {"q": arch.heads, "k": arch.kv_heads} if RUNTIMES[runtime].pairs else {}
    found = []
    for held, weight in arch.weights().items():
        name = names.get_name(held, try_suffixes=(".weight", ".bias"))
        assert name is not None, held
        found.append(Weight(held, name, weight.shape, reordered.get(weight.role, 0)))
    return found
