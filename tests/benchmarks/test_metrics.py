"""Figures against their definitions."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.benchmarks.machine import bandwidth_buffer_bytes, bandwidth_samples, last_level_cache_bytes
from edgekd.benchmarks.metrics import bootstrap_median, decode_roofline_fraction, median, percentile, tokens_per_s
from edgekd.manifest import Traffic

pytestmark = pytest.mark.alone
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
    assert bandwidth_buffer_bytes() >= min(4 * (last_level_cache_bytes() or 0), 2**28)


def test_bandwidth_is_not_bound_by_an_adder():
    """Summing integers, as fast as NumPy can, is slower than the reading alone: on some machines by half."""
    memory = max(bandwidth_samples(1, 64 * 2**20))
    assert memory > 0.9 * max(_numpy_sum() for _ in range(5))


def _numpy_sum() -> float:
    import time

    import numpy as np

    values = np.ones(64 * 2**20 // 8, np.int64)
    start = time.perf_counter()
    values.sum()
    return values.nbytes / (time.perf_counter() - start)


def test_the_intervals_coverage_is_about_95_percent():
    import numpy as np

    rng = np.random.default_rng(1)
    intervals = [bootstrap_median(rng.normal(10, 1, 25), draws=400, seed=i) for i in range(200)]
    assert 0.88 < np.mean([low <= 10 <= high for low, high in intervals]) <= 1
    assert bootstrap_median([1.0, 2.0]) is None
