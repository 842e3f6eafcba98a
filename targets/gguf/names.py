"""What a model is to llama.cpp: architecture, hyperparameters, and the place of every weight.

Shapes follow ``torch.nn.Linear``: weights are ``(out, in)``; GGUF stores the same bytes and lists dimensions reversed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architecture import Architecture, Feature
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


RUNTIMES = {
    "qwen3": Runtime(frozenset({Feature.HEAD_NORM}), frozenset({Feature.FREE_HEADS})),
    "qwen2": Runtime(frozenset({Feature.QKV_BIAS}), frozenset()),
    "llama": Runtime(frozenset(), frozenset({Feature.FREE_HEADS, Feature.LLAMA3_ROPE}), pairs=True),
}
"""Those that need most come first."""
FEATURES = frozenset[Feature]().union(*(runtime.needs | runtime.may for runtime in RUNTIMES.values()))


def runtime_of(arch: Architecture) -> str:
    """llama.cpp's name for an architecture: the first whose needs are met."""
    has = arch.features(arch.context_length)
    return next(name for name, runtime in RUNTIMES.items() if runtime.needs <= has)


def check(arch: Architecture, context_length: int) -> None:
    """Refuse what llama.cpp does not know, or not of this decoder.

    Raises:
        Unsupported: names the features.
    """
    _decoder.check_features(arch, FEATURES, "GGUF", context_length)
    name = runtime_of(arch)
    held = RUNTIMES[name].needs | RUNTIMES[name].may
    _decoder.check_features(arch, held, f"GGUF's {name}", context_length)


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
    writer.add_rope_dimension_count(arch.rotary.dim)
    writer.add_rope_freq_base(arch.rotary.theta)
    writer.add_layer_norm_rms_eps(arch.norm_eps)


def weights(arch: Architecture, source: Source) -> list[Weight]:
    """Every weight of the model, in file order.

    Raises:
        EdgekdError: a tensor is missing or has another shape than config.json says.
        Unsupported: a tensor that has no place in the architecture.
    """
    _decoder.check_weights(arch, source, "GGUF")
    return plan(arch, runtime_of(arch))


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
