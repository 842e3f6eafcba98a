"""Small models of random weights, whose distributions are sharp enough to tell right from wrong."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM


def random_qwen3(
    seed: int, *, vocab: int, layers: int, hidden: int = 32, mlp: int = 48, scale: float = 3
) -> Qwen3ForCausalLM:
    """One whose weights are ``scale`` times those that transformers begins with."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    made = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True, bos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made


def save_random_decoder(folder: Path, kind: str, *, layers: int, tied: bool, mlp: int) -> Path:
    """A model folder of 96 ids and 64 channels."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=96,
        hidden_size=64,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def random_ids(count: int = 24, seed: int = 1) -> torch.Tensor:
    """Text for it, ``(count, 32)``."""
    return torch.randint(0, 96, (count, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
