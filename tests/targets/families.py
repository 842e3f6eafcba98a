"""Tiny random decoders of every family, as transformers makes them, and what is said of each in the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from cases import LLAMA3_ROPE

SIZES: dict[str, Any] = {
    "vocab_size": 700,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
WINDOW = 24
LONG = {
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 20.0, 30.0, 40.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
GEMMA2 = {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0}
"""Caps low enough to be felt."""
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "Llama, linear rope": ("llama", {"rope_parameters": LINEAR}),
    "Llama, dynamic rope": ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}),
    "Llama 3.1 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "Llama, YaRN": ("llama", {"rope_parameters": YARN}),
    "Mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "Mistral, sliding window": ("mistral", {"sliding_window": WINDOW}),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4}),
    "SmolLM3, other layers without rope": ("smollm3", {"no_rope_layers": [0, 1]}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen2.5, heads of their own": ("qwen2", {"head_dim": 32}),
    "Qwen2.5, YaRN": ("qwen2", {"rope_parameters": YARN}),
    "Qwen2.5, sliding window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "Qwen3, YaRN": ("qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "Phi-3": ("phi3", {}),
    "Phi-3, sliding window": ("phi3", {"sliding_window": WINDOW}),
    "Phi-4-mini": (
        "phi3",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                **LONG,
            },
        },
    ),
    "Granite 3": (
        "granite",
        {
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.1,
            "logits_scaling": 1.5,
        },
    ),
    "OLMo 2": ("olmo2", {}),
    "Gemma 2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, **GEMMA2}),
    "Gemma 2, scaled attention": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 20, **GEMMA2}),
    "Gemma 3": (
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "rope_parameters": GEMMA3_ROPES,
        },
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral, and other mixtures of experts": ("mixtral", {"num_local_experts": 8}),
    "Gemma 3 with images, and other multimodal models": ("gemma3", {"text_config": {"model_type": "gemma3_text"}}),
    "Mamba, and other state-space models": ("mamba", {"state_size": 16}),
    "GPT-2, and all others": ("gpt2", {}),
}
ODD = {
    "hidden_size": 80,
    "intermediate_size": 72,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
"""No whole blocks of 32."""


def config_of(case: str, *, tied: bool, **settings: Any) -> PreTrainedConfig:
    """Its configuration; ``settings`` come before its own."""
    model_type, keys = CASES[case]
    return CONFIG_MAPPING[model_type](**{**SIZES, **keys, **settings, "tie_word_embeddings": tied})


def architectures() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every case with a window and a context as real models have them, and one of every kind that is refused."""
    for case, (_, keys) in CASES.items():
        real = {"max_position_embeddings": 8192} | ({"sliding_window": 4096} if keys.get("sliding_window") else {})
        for tied in (True, False) if case == "Gemma 2" else (True,):
            name = case if tied else f"{case}, a head of its own"
            yield name, json.loads(config_of(case, tied=tied, **real).to_json_string())
    for name, (model_type, keys) in REFUSED.items():
        yield name, {"model_type": model_type, **SIZES, **keys}


def make_family(folder: Path, case: str, *, tied: bool, **settings: Any) -> Path:
    """A random student, its weights exact in fp16 and large enough for its logits to be far apart."""
    model_type, keys = CASES[case]
    if "rope_parameters" in keys and model_type == "phi3":  # its factors are as many as a head's pairs
        settings = {key: value for key, value in settings.items() if key == "intermediate_size"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(case, tied=tied, **settings))
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 0.3 if "norm" in name or "embed" in name or "bias" in name else value.shape[-1] ** -0.5
            # Around one, and around zero where one is added.
            value.copy_(spread * torch.randn_like(value) + ("norm" in name and "gemma" not in model_type))
    model.half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
