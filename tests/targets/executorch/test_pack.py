"""What is written for ExecuTorch against ExecuTorch's own packer and kernels, and how segments lie in the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("executorch")

from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401 - registers the embedding operators

from edgekd.quant.recipe import Kind
from edgekd.targets.executorch.model import packed, packed_embedding, stand_in
from edgekd.targets.executorch.pack import _Blob, _Segments

shapes = st.tuples(st.integers(1, 6), st.integers(1, 4))
seeds = st.integers(0, 2**32 - 1)
BOUNDS = {"int4": (-8, 7), "int8": (-127, 127)}


def integers(shape: tuple[int, int], kind: Kind, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random integers ``(rows, 32 * groups)`` and scales, int4 ``(rows, groups)``, int8 ``(rows,)``."""
    rng, (rows, groups) = np.random.default_rng(seed), shape
    low, high = BOUNDS[kind]
    q = torch.from_numpy(rng.integers(low, high + 1, (rows, 32 * groups)).astype(np.int8))
    scale = rng.integers(128, 256, (rows, groups)) * 2.0 ** rng.integers(-14, 0, (rows, groups))
    scale = torch.from_numpy(scale.astype(np.float32))
    return q, scale if kind == "int4" else scale[:, 0]


@given(shapes, seeds)
def test_int4_rows_are_packed_as_xnnpacks_own_packer_does(shape: tuple[int, int], seed: int) -> None:
    q, _ = integers(shape, "int4", seed)
    expected = NodeVisitor.convert_to_qc4w(q).numpy()  # codes q + 8 are its own
    assert np.array_equal(packed(q, "int4").reshape(expected.shape), expected)


@settings(max_examples=50)
@given(shapes, st.sampled_from(["int4", "int8"]), seeds)
def test_the_embedding_kernel_reads_integers_times_scales(shape: tuple[int, int], kind: Kind, seed: int) -> None:
    q, scale = integers(shape, kind, seed)
    weight, ids = torch.from_numpy(packed_embedding(q, kind)), torch.arange(shape[0]).flip(0)
    ops = torch.ops.quantized_decomposed
    kernel = ops.embedding_4bit.dtype if kind == "int4" else ops.embedding_byte.dtype
    read = kernel(weight, scale, None, *BOUNDS[kind], ids, dtype=torch.float32)
    expected = q.float() * (scale.repeat_interleave(32, 1) if kind == "int4" else scale[:, None])
    assert torch.equal(read, expected[ids])


@given(st.lists(st.integers(0, 2**15), min_size=2, max_size=6, unique=True), st.sampled_from([8, 40, 65]))
def test_a_stand_in_tells_its_number(numbers: list[int], width: int) -> None:
    for dtype in (torch.int8, torch.float16, torch.float32):
        seen = {stand_in(number, (3, width), dtype).numpy().tobytes() for number in numbers}
        assert len(seen) == len(numbers)


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from([16, 128])), max_size=12))
def test_segments_are_aligned_and_apart(blobs: list[tuple[int, int]]) -> None:
    segments, end = _Segments(), 0
    for size, alignment in blobs:
        offset = segments.put(_Blob(size, lambda: iter(())), alignment)
        assert offset % alignment == 0 and end <= offset < end + alignment
        end = offset + size
        number = segments.segment(offset, size)
        assert segments.table[number] == (offset, size)
    assert segments.end == end and len(segments.places) == len(blobs)
