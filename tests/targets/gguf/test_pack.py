"""Blocks against the ``gguf`` package's own dequantizers, which know nothing of edgekd."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.targets.gguf.pack import pack_q4_0, pack_q8_0, reorder_heads

shapes = st.tuples(st.integers(1, 5), st.integers(1, 4))


def integers(shape: tuple[int, int], low: int, high: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random integers ``(out, 32 * groups)`` and scales of 8-bit significand ``(out, groups)``."""
    rng = np.random.default_rng(seed)
    q = rng.integers(low, high + 1, (shape[0], shape[1] * 32)).astype(np.int8)
    scale = rng.integers(128, 256, shape) * 2.0 ** rng.integers(-20, 0, shape)
    return q, scale.astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1))
def test_q4_0_blocks_hold_integers_and_scales(shape: tuple[int, int], seed: int) -> None:
    q, scale = integers(shape, -8, 7, seed)
    packed = pack_q4_0(q, scale)
    assert packed.dtype == np.uint8 and packed.shape == (shape[0], shape[1] * 18)
    value = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(value, q * np.repeat(scale, 32, axis=1))


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1))
def test_q8_0_blocks_hold_integers_and_scales(shape: tuple[int, int], seed: int) -> None:
    q, scale = integers(shape, -127, 127, seed)
    packed = pack_q8_0(q, scale)
    assert packed.dtype == np.uint8 and packed.shape == (shape[0], shape[1] * 34)
    value = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(value, q * np.repeat(scale, 32, axis=1))


def test_a_scale_that_fp16_rounds_is_refused() -> None:
    q, scale = integers((1, 1), -8, 7, 0)
    with pytest.raises(AssertionError, match="exact in fp16"):
        pack_q4_0(q, scale * np.float32(1.0001))


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3))
def test_reordered_heads_put_rotary_partners_side_by_side(heads: int, half: int, width: int) -> None:
    rows = np.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    moved = reorder_heads(rows, heads)
    for head in range(heads):
        for i in range(half):
            assert np.array_equal(moved[head * 2 * half + 2 * i], rows[head * 2 * half + i])
            assert np.array_equal(moved[head * 2 * half + 2 * i + 1], rows[head * 2 * half + half + i])
