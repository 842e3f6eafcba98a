"""Figures against their definitions."""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.benchmarks.metrics import (
    Traffic,
    bandwidth_buffer_bytes,
    bandwidth_samples,
    decode_roofline_fraction,
    figure,
    kv_bytes_per_position,
    median,
    percentile,
    tokens_per_s,
)

seconds = st.floats(1e-6, 1e3)


@given(st.lists(seconds, min_size=1))
def test_median_is_the_standard_librarys(samples):
    assert median(samples) == pytest.approx(statistics.median(samples))


@given(st.lists(seconds, min_size=2))
def test_percentile_is_the_standard_librarys(samples):
    expected = statistics.quantiles(samples, n=100, method="inclusive")
    assert percentile(samples, 95) == pytest.approx(expected[94])
    assert percentile(samples, 50) == pytest.approx(expected[49])


def test_no_samples_is_no_number():
    with pytest.raises(ValueError, match="no samples"):
        median([])
    with pytest.raises(ValueError, match="too coarse"):
        tokens_per_s(3, 0.0)


def test_what_was_not_measured_is_null():
    assert figure(None, "measured:clock") is None
    assert figure(0.5, "measured:clock", [0.4, 0.6]) == {
        "value": 0.5,
        "source": "measured:clock",
        "samples": [0.4, 0.6],
    }
    json.dumps(figure(0.5, "x", (0.5,)))


def test_roofline_by_hand():
    # 100 tokens/s of 0.2 GB each are 20 GB/s; of 40 GB/s that is half.
    assert tokens_per_s(50, 0.5) == 100
    traffic = Traffic(weight_bytes=199_000_000, kv_bytes_per_position=10_000)
    assert traffic.bytes_per_token(100) == 200_000_000
    assert decode_roofline_fraction(100, traffic.bytes_per_token(100), 40e9) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Qwen3-0.6B: 28 layers, 8 key-value heads of 128, fp16: 112 KiB a position
        ({"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}, 114_688),
        # GPT-2 small without grouped heads
        ({"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768}, 36_864),
        ({"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "head_dim": None}, 36_864),
    ],
)
def test_kv_bytes(config, expected):
    assert kv_bytes_per_position(config) == expected
    assert kv_bytes_per_position(config, 1) == expected // 2


def test_kv_bytes_is_what_a_real_cache_holds():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    cache = transformers.DynamicCache()
    transformers.LlamaForCausalLM(config)(torch.arange(5)[None], past_key_values=cache)
    held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes_per_position(config.to_dict(), 1) * 5 == held


def test_bandwidth_is_that_of_a_memory():
    samples = bandwidth_samples(1, 64 * 2**20)
    assert len(samples) >= 5
    assert all(1e8 < sample < 1e13 for sample in samples)  # slower than a disk or faster than any cache: not memory
    assert bandwidth_buffer_bytes() % 8 == 0
    assert bandwidth_buffer_bytes() > 2**20
