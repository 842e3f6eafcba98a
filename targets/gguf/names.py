"""What a model is to llama.cpp: architecture, hyperparameters, and the place of every weight.

Shapes follow ``torch.nn.Linear``: weights are ``(out, in)``; GGUF stores the same bytes and lists dimensions reversed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint import Checkpoint
from ...errors import Unsupported
from ..shared import decoder as _decoder
from ..shared.decoder import Architecture

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from ...quant.folder import Grid


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
    arch = _decoder.read_config(config, "GGUF")
    if arch.name == "qwen2" and arch.heads * arch.head_dim != arch.hidden:
        raise Unsupported(
            f"config.json: head_dim {arch.head_dim} of {arch.heads} heads is not hidden_size {arch.hidden}, and "
            "llama.cpp's Qwen2 knows no other.",
            "Leave student.hidden_size out, or use a Llama or Qwen3 student.",
        )
    return arch


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

    _decoder.check_weights(arch, checkpoint, "GGUF")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.name.upper()], arch.layers)
    found = []
    for source, shape in _decoder.weight_shapes(arch, checkpoint.tied).items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, source
        found.append(Weight(source, name, shape, _heads_to_reorder(arch, source)))
    return found


def _heads_to_reorder(arch: Architecture, source: str) -> int:
    if arch.name != "llama":
        return 0
    return {"q_proj": arch.heads, "k_proj": arch.kv_heads}.get(source.split(".")[-2], 0)
