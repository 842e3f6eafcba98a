import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekd.errors import EdgekdError
from edgekd.quant.grid import (
    GROUP,
    SCALE_MAX,
    SCALE_MIN,
    dequantize_int4,
    dequantize_int8,
    fake_quant_int4,
    fake_quant_int8_rows,
    pack_int4,
    quantize_int4,
    quantize_int8_rows,
    round_int4,
    snap_scale,
    unpack_int4,
)

# Beyond this a float32 group could overflow in the test's own arithmetic, not in the grid's.
finite = st.floats(-(2.0**100), 2.0**100, width=32)
weights = st.integers(-40, 25).flatmap(
    lambda exponent: hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([GROUP, 3 * GROUP])),
        elements=st.floats(-1, 1, width=32) | st.just(0.0),
    ).map(lambda a: torch.from_numpy(a * np.float32(2.0**exponent)))
)


def legal_scales() -> np.ndarray:
    """Every scale of the grid, from its definition: 128..255 times a power of two in fp16's normal range."""
    return np.array([m * 2.0 ** (e - 7) for e in range(-14, 16) for m in range(128, 256)])


def test_the_legal_scales_are_what_fp16_and_bf16_share() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    normal = every[np.isfinite(every) & (every >= SCALE_MIN)]
    in_both = [x for x in normal if float(torch.tensor(x).bfloat16()) == x]
    assert np.array_equal(np.sort(in_both), legal_scales())
    assert legal_scales()[0] == SCALE_MIN and legal_scales()[-1] == SCALE_MAX


@given(st.floats(-1.0, 2e5, width=32) | st.floats(0.0, 2.0**-10, width=32) | finite)
def test_snap_finds_the_nearest_legal_scale(x: float) -> None:
    snapped = snap_scale(torch.tensor([x])).item()
    legal = legal_scales()
    assert snapped in legal
    assert abs(snapped - x) <= np.abs(legal - x).min()


def test_snap_breaks_ties_to_the_even_significand() -> None:
    ties = torch.tensor([128.5, 129.5, 130.5, 254.5]) / 128
    assert (snap_scale(ties) * 128).tolist() == [128, 130, 130, 254]
    assert snap_scale(torch.tensor([0.0, -1.0, math.inf])).tolist() == [SCALE_MIN, SCALE_MIN, SCALE_MAX]


@given(weights)
def test_int4_is_on_the_grid_and_near(w: torch.Tensor) -> None:
    q, scale = quantize_int4(w)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (
        torch.int8,
        w.shape,
        torch.float32,
        (w.shape[0], w.shape[1] // GROUP),
    )
    assert q.min() >= -8 and q.max() <= 7
    assert torch.equal(scale.half().float(), scale) and torch.equal(scale.bfloat16().float(), scale)
    spread = scale.repeat_interleave(GROUP, 1)
    error = (dequantize_int4(q, scale) - w).double().abs()
    inside = (w >= -8.5 * spread) & (w <= 7.5 * spread)
    assert (error[inside] <= spread[inside].double() * 0.5 * (1 + 1e-6)).all()
    assert torch.equal(q[w > 7.5 * spread], torch.full_like(q[w > 7.5 * spread], 7))
    assert torch.equal(q[w < -8.5 * spread], torch.full_like(q[w < -8.5 * spread], -8))


@given(weights)
def test_int4_is_idempotent(w: torch.Tensor) -> None:
    q, scale = quantize_int4(w)
    again, scale_again = quantize_int4(dequantize_int4(q, scale))
    assert torch.equal(again, q) and torch.equal(scale_again, scale)


@given(weights)
def test_int8_is_on_the_grid_near_and_idempotent(w: torch.Tensor) -> None:
    q, scale = quantize_int8_rows(w)
    assert (q.dtype, q.shape, scale.shape) == (torch.int8, w.shape, (w.shape[0],))
    assert q.min() >= -127 and q.max() <= 127
    assert torch.equal(scale.half().float(), scale) and torch.equal(scale.bfloat16().float(), scale)
    restored = dequantize_int8(q, scale)
    clipped = (w.abs().amax(1) / 127) > SCALE_MAX
    error = (restored - w).double().abs().amax(1)
    assert (error[~clipped] <= scale[~clipped].double() * 0.5 * (1 + 1e-6)).all()
    again, scale_again = quantize_int8_rows(restored)
    assert torch.equal(again, q) and torch.equal(scale_again, scale)


@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(0, 4), st.integers(0, 40).map(lambda n: 2 * n)), elements=st.integers(-8, 7)
    )
)
def test_packing_is_exact_and_in_the_stated_order(values: np.ndarray) -> None:
    q = torch.from_numpy(values)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (values.shape[0], values.shape[1] // 2)
    assert torch.equal(unpack_int4(packed), q)
    by_hand = (values[:, 0::2].astype(int) + 8) + 16 * (values[:, 1::2].astype(int) + 8)
    assert np.array_equal(packed.numpy(), by_hand)


def test_rows_are_independent() -> None:
    w = torch.randn(7, 4 * GROUP, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_int4(w)
    parts = [quantize_int4(piece) for piece in w.split(2)]
    assert torch.equal(torch.cat([p[0] for p in parts]), q) and torch.equal(torch.cat([p[1] for p in parts]), scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_quantized_in_float32(dtype: torch.dtype) -> None:
    w = torch.randn(4, GROUP, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(quantize_int4(w)[0], quantize_int4(w.float())[0])


def test_gaussian_error_is_near_an_exhaustive_search() -> None:
    w = torch.randn(4000, GROUP, generator=torch.Generator().manual_seed(0)) * 0.02
    chosen = (dequantize_int4(*quantize_int4(w)) - w).double().square().sum(1)
    by_max = snap_scale(w.abs().amax(1, keepdim=True) / 7)
    plain = (torch.round(w / by_max).clamp(-8, 7) * by_max - w).double().square().sum(1)
    unit = w.abs().amax(1, keepdim=True) / 8
    best = torch.full_like(chosen, math.inf)
    for factor in torch.linspace(0.6, 1.25, 131):
        scale = snap_scale(unit * factor)
        best = torch.minimum(best, (torch.round(w / scale).clamp(-8, 7) * scale - w).double().square().sum(1))
    energy = w.double().square().sum()
    assert chosen.sum() / energy < 0.0078
    assert plain.sum() / energy > 0.0090
    assert chosen.sum() < 1.04 * best.sum()


def test_an_all_zero_group_has_the_smallest_scale() -> None:
    q, scale = quantize_int4(torch.zeros(2, GROUP))
    assert not q.any() and (scale == SCALE_MIN).all()
    q, scale = quantize_int8_rows(torch.zeros(2, 5))
    assert not q.any() and (scale == SCALE_MIN).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8_rows])
def test_non_finite_weights_are_refused(quantize, bad: float) -> None:
    w = torch.zeros(2, GROUP)
    w[1, 3] = bad
    with pytest.raises(EdgekdError, match="NaN or infinite"):
        quantize(w)


@pytest.mark.parametrize("shape", [(2, GROUP + 1), (GROUP,), (1, 2, GROUP)])
def test_shapes_off_the_grid_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape|divisible"):
        quantize_int4(torch.zeros(shape))


@settings(max_examples=25)
@given(weights)
def test_fake_quant_is_the_grid(w: torch.Tensor) -> None:
    q, scale = quantize_int4(w)
    assert torch.equal(fake_quant_int4(w, scale.log()), dequantize_int4(q, scale))
    again, legal = round_int4(w, scale.log().exp())
    assert torch.equal(again, q) and torch.equal(legal, scale)
    assert torch.equal(fake_quant_int8_rows(w), dequantize_int8(*quantize_int8_rows(w)))


def test_fake_quant_passes_gradients_to_weights_and_scales() -> None:
    """Against autograd on the formula, rounding as the identity and clipping as a constant; in log scale."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 2 * GROUP, generator=generator).requires_grad_()
    log_scale = torch.full((3, 2), 0.25).log().requires_grad_()  # about one weight in twenty is clipped
    gradient = torch.randn(w.shape, generator=generator)
    fake_quant_int4(w, log_scale).backward(gradient)

    v, s = w.detach().clone().requires_grad_(), log_scale.detach().clone().requires_grad_()
    scale = s.exp().repeat_interleave(GROUP, 1)
    steps = v / scale
    clipped = (steps > 7.5) | (steps < -8.5)
    assert 0 < clipped.sum() < w.numel() / 4
    rounded = steps + (steps.round() - steps).detach()
    (scale * torch.where(clipped, steps.detach().sign() * 7.5 - 0.5, rounded)).backward(gradient)
    assert torch.allclose(w.grad, v.grad) and (w.grad[clipped] == 0).all()
    assert torch.allclose(log_scale.grad, s.grad, rtol=1e-5, atol=1e-5)


def test_int8_fake_quant_passes_the_gradient_straight_through() -> None:
    w = torch.randn(3, 5).requires_grad_()
    fake_quant_int8_rows(w).backward(gradient := torch.randn(3, 5))
    assert torch.equal(w.grad, gradient)
