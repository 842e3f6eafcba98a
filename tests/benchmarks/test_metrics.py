"""Figures against their definitions."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.benchmarks.metrics import (
    bandwidth_buffer_bytes,
    bandwidth_samples,
    decode_roofline_fraction,
    median,
    percentile,
    tokens_per_s,
)
from edgekd.manifest import Traffic

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


def test_roofline_by_hand():
    # 100 tokens/s of 0.2 GB each are 20 GB/s; of 40 GB/s that is half.
    assert tokens_per_s(50, 0.5) == 100
    traffic = Traffic(weight_bytes=199_000_000, kv_bytes_per_position=10_000)
    assert traffic.bytes_per_token(100) == 200_000_000
    assert decode_roofline_fraction(100, traffic.bytes_per_token(100), 40e9) == pytest.approx(0.5)


def test_bandwidth_is_that_of_a_memory():
    samples = bandwidth_samples(1, 64 * 2**20)
    assert len(samples) >= 5
    assert all(1e8 < sample < 1e13 for sample in samples)  # slower than a disk or faster than any cache: not memory
    assert bandwidth_buffer_bytes() % 8 == 0
    assert bandwidth_buffer_bytes() > 2**20
