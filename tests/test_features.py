"""Decoders as features: sizes against transformers' own models, by architectures that no reader makes yet too."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from edgekd.architecture import FAMILIES, Architecture, Attention, Feature, Rotary, read_architecture
from edgekd.errors import EdgekdError, Unsupported
from edgekd.targets import TARGETS, load_target
from edgekd.targets.shared.decoder import check_features, rotary_tables

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
PLAIN = read_architecture({"model_type": "llama", **SIZES})


def config_of(model_type: str, **keys: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**SIZES | keys)


def shapes_of(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of transformers' model; a tied head is not there."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    return {name: weight.shape for name, weight in arch.weights().items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", [{}, {"head_dim": 32}, {"attention_bias": True, "mlp_bias": True}], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_the_weights_of_its_class(model_type: str, keys: dict[str, Any], tied: bool) -> None:
    config = config_of(model_type, tie_word_embeddings=tied, **keys)
    said = json.loads(config.to_json_string())
    arch = read_architecture(said)
    if model_type == "llama" or not keys.get("attention_bias"):  # the others' classes do not look at both
        assert shapes(arch) == shapes_of(config)
        assert arch.parameters() == sum(map(math.prod, shapes_of(config).values()))
    assert (arch.unknown, arch.class_name) == (None, FAMILIES[model_type].class_name)


def test_a_plain_mlp_that_no_reader_makes_yet_has_the_weights_of_its_class() -> None:
    assert shapes(replace(PLAIN, gated=False, head_dim=16)) == shapes_of(config_of("arcee", head_dim=16))


ROTARY = Rotary(10000.0, 16)
EXAMPLES: dict[Feature, dict[str, Any]] = {
    Feature.UNKNOWN: {"unknown": Feature.UNKNOWN},
    Feature.EXPERTS: {"unknown": Feature.EXPERTS},
    Feature.MULTIMODAL: {"unknown": Feature.MULTIMODAL},
    Feature.STATE_SPACE: {"unknown": Feature.STATE_SPACE},
    Feature.TWO_WAY: {"two_way": True},
    Feature.QKV_BIAS: {"qkv_bias": True},
    Feature.OUT_BIAS: {"out_bias": True},
    Feature.MLP_BIAS: {"mlp_bias": True},
    Feature.HEAD_NORM: {"qk_norm": "head"},
    Feature.WIDE_NORM: {"qk_norm": "whole"},
    Feature.NORM_OFFSET: {"norm_offset": True},
    Feature.NORMS_AFTER: {"norms": "after"},
    Feature.NORMS_AROUND: {"norms": "around"},
    Feature.FREE_HEADS: {"heads": 6},
    Feature.EMBEDDING_SCALE: {"embedding_scale": 8.0},
    Feature.RESIDUAL_SCALE: {"residual_scale": 0.2},
    Feature.LOGIT_SCALE: {"logit_scale": 0.1},
    Feature.ATTENTION_SCALE: {"attention_scale": 0.1},
    Feature.ATTENTION_CAP: {"attention_cap": 50.0},
    Feature.LOGIT_CAP: {"logit_cap": 30.0},
    Feature.GELU_TANH: {"activation": "gelu_tanh"},
    Feature.OTHER_ACTIVATION: {"activation": "relu2"},
    Feature.PLAIN_MLP: {"gated": False},
    Feature.SLIDING_WINDOW: {"attention": (Attention(ROTARY), Attention(ROTARY, 16))},
    Feature.NO_ATTENTION: {"attention": (Attention(ROTARY), None)},
    Feature.NO_POSITIONS: {"attention": (Attention(None),)},
    Feature.NO_ROPE: {"attention": (Attention(ROTARY), Attention(None))},
    Feature.ROPE_BY_LAYER: {"attention": (Attention(ROTARY), Attention(replace(ROTARY, theta=1e6)))},
    Feature.PARTIAL_ROPE: {"attention": (Attention(replace(ROTARY, dim=8)),)},
    Feature.LLAMA3_ROPE: {"attention": (Attention(replace(ROTARY, scaling="llama3", factors=(1.0,) * 8)),)},
    Feature.LINEAR_ROPE: {"attention": (Attention(replace(ROTARY, scaling="linear")),)},
    Feature.YARN_ROPE: {"attention": (Attention(replace(ROTARY, scaling="yarn")),)},
    Feature.LONG_ROPE: {"attention": (Attention(replace(ROTARY, scaling="longrope")),)},
    Feature.OTHER_ROPE: {"attention": (Attention(replace(ROTARY, scaling="mrope")),)},
    Feature.FUSED_QKV: {"fused": frozenset({"qkv"})},
    Feature.FUSED_GATE_UP: {"fused": frozenset({"gate_up"})},
}


@pytest.mark.parametrize("feature", Feature)
def test_every_feature_is_told_and_refused_by_name(feature: Feature) -> None:
    assert PLAIN.features(128) == frozenset()
    arch = replace(PLAIN, **EXAMPLES[feature])
    assert arch.features(128) == {feature}
    check_features(arch, frozenset({feature}), "ONNX", 128)
    with pytest.raises(Unsupported) as caught:
        check_features(arch, frozenset(Feature) - {feature}, "ONNX", 128)
    assert str(caught.value).startswith(f"ONNX cannot hold: {feature.words} (LlamaForCausalLM, config.json: ")


def test_several_features_make_one_sentence() -> None:
    arch = replace(PLAIN, attention=(Attention(ROTARY, 16),), logit_cap=30.0, attention_cap=50.0)
    with pytest.raises(Unsupported, match=r"^ONNX cannot hold: soft caps of attention, soft caps of logits, sliding"):
        check_features(arch, frozenset(), "ONNX", 128)


@pytest.mark.parametrize(("model_type", "first"), [("qwen2", 1), ("qwen3", 2), ("qwen3", 3)])
def test_windows_begin_where_transformers_begins_them(model_type: str, first: int) -> None:
    config = config_of(model_type, use_sliding_window=True, sliding_window=16, max_window_layers=first)
    said = json.loads(config.to_json_string())
    for keys in (said, {key: value for key, value in said.items() if key != "layer_types"}):
        windows = [layer and layer.window for layer in read_architecture(keys).attention]
        assert windows == [16 if kind == "sliding_attention" else None for kind in config.layer_types]


LONG = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 4.0, 9.0]}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn of another ramp": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn with mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn with its own attention factor": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5},
    "longrope": {"rope_type": "longrope", **LONG},
    "longrope with a factor": {"rope_type": "longrope", "factor": 2.5, **LONG},
}


@pytest.mark.parametrize("tokens", [30, 100])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_tables_are_those_of_transformers(name: str, tokens: int) -> None:
    """Of part of a head, in a context that is trained and in a longer one."""
    original = {} if "rope_type" not in ROPES[name] or "dynamic" in name else {"original_max_position_embeddings": 40}
    rope = {"rope_theta": 5000.0, "partial_rotary_factor": 0.5, **ROPES[name], **original}
    said = {"model_type": "llama", **SIZES, "rope_parameters": rope}
    config = CONFIG_MAPPING["llama"].from_dict(said)
    theirs = Phi3RotaryEmbedding(config)  # Llama's own leaves a partial one to others
    expected = theirs(torch.zeros(()), torch.arange(tokens)[None])
    (rotary,) = read_architecture(said).rotaries
    for mine, table in zip(rotary_tables(rotary, tokens), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), table[0, :, :4], atol=2e-5, rtol=0)


def test_old_keys_say_the_same() -> None:
    """``rope_scaling`` with ``type``, the base beside it, and the trained context at the top."""
    sizes = {"model_type": "phi3", **SIZES, "original_max_position_embeddings": 40}
    old = {"rope_scaling": {"type": "su", **LONG}, "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    new = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 5000.0, "partial_rotary_factor": 0.5, **LONG}}
    assert read_architecture(sizes | old) == read_architecture(sizes | new)
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    new = {"rope_parameters": {"full_attention": full, "sliding_attention": {"rope_theta": 1e4}}}
    kinds = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "head_dim": 16}
    for keys in (old | {"sliding_window_pattern": 3}, new | kinds):
        arch = read_architecture({"model_type": "gemma3_text", **SIZES, "head_dim": 16} | keys)
        turns = [layer and layer.rotary for layer in arch.attention]
        assert turns == [Rotary(1e4, 16)] * 2 + [
            Rotary(1e6, 16, "linear", (8.0,) * 8, factor=8.0, original_context=128)
        ]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_that_says_nothing_of_rope_has_that_of_its_class(model_type: str) -> None:
    said = {"model_type": model_type, **SIZES}
    written = json.loads(CONFIG_MAPPING[model_type].from_dict(said).to_json_string())
    assert read_architecture(said).rotaries == read_architecture(written).rotaries


@pytest.mark.parametrize(
    ("rope", "needs"),
    [
        ({"type": "linear"}, "linear needs factor"),
        ({"type": "llama3", "factor": 8.0}, "llama3 needs factor, and low_freq_factor below high_freq_factor"),
        ({"type": "longrope", "short_factor": [1.0]}, "longrope needs short_factor and long_factor, 8 numbers each"),
        ({"type": "yarn", "original_max_position_embeddings": 0.5}, "yarn needs original_max_position_embeddings"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor 2.0 of 16 channels is no pair"),
    ],
)
def test_a_rope_that_lacks_a_number_is_refused(rope: dict[str, Any], needs: str) -> None:
    with pytest.raises(EdgekdError, match=needs):
        read_architecture({"model_type": "llama", **SIZES, "rope_scaling": rope})


def test_layers_without_rope_are_those_of_transformers() -> None:
    for keys in ({}, {"no_rope_layer_interval": 2}, {"no_rope_layers": [0, 1, 1]}):
        config = config_of("smollm3", **keys)
        turns = [
            int(layer is not None and layer.rotary is not None)
            for layer in read_architecture({"model_type": "smollm3", **SIZES, **keys}).attention
        ]
        assert turns == config.no_rope_layers[:3]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 64}, "a mixture of experts"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "inputs other than text"),
        ({"model_type": "mamba", "state_size": 16}, "layers that keep a state instead of attending"),
        ({"model_type": "falcon_h1", "mamba_d_state": 16}, "layers that keep a state instead of attending"),
    ],
)
def test_other_kinds_of_models_are_refused_by_kind(config: dict[str, Any], words: str) -> None:
    arch = read_architecture({**SIZES, **config})
    for name in TARGETS:
        target: Any = load_target(name)
        with pytest.raises(Unsupported, match=rf"{target.TITLE} cannot hold: {words}"):
            check_features(arch, target.FEATURES, target.TITLE, 128)


def test_layers_may_turn_differently() -> None:
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    keys = {"model_type": "llama", **SIZES, "layer_types": kinds, "sliding_window": 9, "rope_parameters": nested}
    arch = read_architecture(keys)
    assert [layer and layer.rotary and layer.rotary.theta for layer in arch.attention] == [1e6, 1e4, 1e6]
    assert {Feature.ROPE_BY_LAYER, Feature.SLIDING_WINDOW} == arch.features(128)
    with pytest.raises(EdgekdError, match="'layer_types' names 3 of 2 layers"):
        read_architecture(keys | {"num_hidden_layers": 2})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Qwen3-0.6B: 28 layers, 8 key-value heads of 128, fp16: 112 KiB a position
        (
            SIZES
            | {
                "model_type": "qwen3",
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
            },
            114_688,
        ),
        # GPT-2 small without grouped heads
        ({"model_type": "gpt2"}, 36_864),
        ({"model_type": "gpt2", "head_dim": None, "n_inner": None}, 36_864),
    ],
)
def test_kv_bytes(config: dict[str, Any], expected: int) -> None:
    assert read_architecture(config).kv_bytes(1, 2) == expected
    assert read_architecture(config).kv_bytes(3, 1) == 3 * expected // 2


def test_kv_bytes_is_what_a_real_cache_holds() -> None:
    config = config_of("mistral", sliding_window=None)
    model, cache = AutoModelForCausalLM.from_config(config), transformers.DynamicCache()
    model(torch.arange(5)[None], past_key_values=cache)
    held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    said = json.loads(config.to_json_string())
    assert read_architecture(said).kv_bytes(5, 1) == held
    assert read_architecture(said | {"sliding_window": 3}).kv_bytes(5, 1) == held * 3 // 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_operations_are_those_that_torch_counts(model_type: str, tied: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of(model_type, tie_word_embeddings=tied, sliding_window=64)
    config._attn_implementation = "eager"
    model, arch = (
        AutoModelForCausalLM.from_config(config).eval(),
        read_architecture(json.loads(config.to_json_string())),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(7)[None])  # eager attention computes the masked half too
    assert counter.get_total_flops() == 7 * arch.flops_per_token(7)


def test_a_family_that_is_not_known_is_estimated() -> None:
    arch = read_architecture({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    real = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"]())
    assert arch.parameters() == pytest.approx(real.num_parameters(), rel=0.25)
    for name in TARGETS:
        target: Any = load_target(name)
        with pytest.raises(Unsupported, match=rf"{target.TITLE} cannot hold: an architecture .* \(GPT2LMHeadModel"):
            check_features(arch, target.FEATURES, target.TITLE, 128)
