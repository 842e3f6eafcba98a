"""Which library multiplies float32 matrices.

torch takes MKL, whose AVX-512 kernels run on Intel's processors alone: on AMD's, oneDNN takes half the time. torch asks
oneDNN for float32 products only where bfloat16 inside them is allowed; oneDNN makes use of that where the processor has
AMX, and elsewhere keeps every digit. So it is tried which of the two this one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_FLOAT32_ERROR = 1e-5  # relative to the largest; bfloat16's is 1e-3 and more


@contextmanager
def fast_float32() -> Iterator[None]:
    """Float32 products by oneDNN where it computes them as exactly as MKL; else all stays as it is."""
    import torch

    mkldnn: Any = torch.backends.mkldnn
    flags = mkldnn.matmul
    before = flags.fp32_precision
    if _onednn_is_exact():
        flags.fp32_precision = "bf16"
    try:
        yield
    finally:
        flags.fp32_precision = before


@contextmanager
def fast_products() -> Iterator[None]:
    """Products by bfloat16 where the processor has instructions for it, for statistics that take its rounding: two to
    six times float32's speed. By what it has, not by the clock: the same machine gives the same integers again."""
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
        yield


@cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself (AVX512-BF16 or AMX)."""
    import torch

    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


@cache
def _onednn_is_exact() -> bool:
    import torch

    mkldnn: Any = torch.backends.mkldnn
    flags = mkldnn.matmul
    # Numbers that bfloat16 does not hold, and no use of the generator that trainings count on.
    a = torch.linspace(0.1, 1, 256 * 256).reshape(256, 256).cos()
    before, flags.fp32_precision = flags.fp32_precision, "bf16"
    try:
        product = a @ a.T
    finally:
        flags.fp32_precision = before
    exact = a.double() @ a.double().T
    return bool((product - exact).abs().max() < _FLOAT32_ERROR * exact.abs().max())
