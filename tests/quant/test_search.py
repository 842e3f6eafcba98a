"""The exhaustive scale search against brute force over every legal scale."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekd.errors import EdgekdError
from edgekd.quant.grid import GROUP, SCALE_MAX, SCALE_MIN, dequantize_int4, quantize_int4
from edgekd.quant.search import search_int4

LEGAL = np.array([m * 2.0 ** (e - 7) for e in range(-14, 16) for m in range(128, 256)])
matrices = st.integers(-40, 100).flatmap(
    lambda exponent: hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([GROUP, 3 * GROUP])),
        elements=st.floats(-1, 1, width=32) | st.just(0.0),
    ).map(lambda a: torch.from_numpy(a * np.float32(2.0**exponent)))
)


def errors(w: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, moments: torch.Tensor | None) -> np.ndarray:
    """Weighted squared error of each group ``(O, G)`` in float64."""
    weight = np.ones(w.shape[1]) if moments is None else moments.double().numpy()
    off = w.double().numpy() - dequantize_int4(q, scale).double().numpy()
    return (weight * off**2).reshape(w.shape[0], -1, GROUP).sum(-1)


def near(unclipped: float) -> np.ndarray:
    """The legal scales that the search promises to try, but for rounding at the ends."""
    ratio = LEGAL / unclipped
    return LEGAL[(ratio >= 0.505) & (ratio <= 1.32)]


def brute(group: np.ndarray, weight: np.ndarray, scales: np.ndarray = LEGAL) -> float:
    q = np.clip(np.round(group / scales[:, None]), -8, 7)
    return float((weight * (group - q * scales[:, None]) ** 2).sum(-1).min())


@given(matrices, st.integers(0, 2**32 - 1), st.booleans())
def test_never_worse_than_round_to_nearest_and_on_the_grid(w: torch.Tensor, seed: int, weighted: bool) -> None:
    moments = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(seed)) ** 4 if weighted else None
    q, scale = search_int4(w, moments)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (
        torch.int8,
        w.shape,
        torch.float32,
        (w.shape[0], w.shape[1] // GROUP),
    )
    assert q.min() >= -8 and q.max() <= 7
    assert np.isin(scale.double().numpy(), LEGAL).all()
    best, nearest = errors(w, q, scale, moments), errors(w, *quantize_int4(w), moments)
    # The search compares float32 sums of 32 terms.
    assert (best <= nearest * (1 + 1e-5)).all()


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 300.0])
def test_finds_what_brute_force_finds(magnitude: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 4 * GROUP, generator=generator) * magnitude
    for moments in (None, torch.rand(4 * GROUP, generator=generator)):
        weight = np.ones(w.shape[1]) if moments is None else moments.double().numpy()
        found = errors(w, *search_int4(w, moments), moments)
        for row in range(8):
            for group in range(4):
                at = slice(group * GROUP, (group + 1) * GROUP)
                best = brute(w[row, at].double().numpy(), weight[at])
                assert found[row, group] <= best * (1 + 1e-5)


@given(st.integers(0, 2**32 - 1))
def test_finds_the_best_of_its_range_under_skewed_moments(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(1, GROUP, generator=generator)
    moments = torch.rand(GROUP, generator=generator) ** 8
    unclipped = max(float(w.min()) / -8, float(w.max()) / 7)
    best = brute(w[0].double().numpy(), moments.double().numpy(), near(unclipped))
    assert errors(w, *search_int4(w, moments), moments)[0, 0] <= best * (1 + 1e-5)


def test_rows_are_independent_and_pieces_join(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(37, 2 * GROUP, generator=torch.Generator().manual_seed(1))
    whole = search_int4(w)
    monkeypatch.setattr("edgekd.quant.search._PIECE_WEIGHTS", 5 * 2 * GROUP)
    for pieces, expected in zip(search_int4(w), whole, strict=True):
        assert torch.equal(pieces, expected)
    assert torch.equal(search_int4(w[11:12])[0], whole[0][11:12])


def test_degenerate_groups() -> None:
    zero = torch.zeros(2, GROUP)
    q, scale = search_int4(zero, torch.rand(GROUP))
    assert not q.any() and (scale == SCALE_MIN).all()
    huge = torch.full((1, GROUP), 3e38)
    q, scale = search_int4(huge)
    assert (q == 7).all() and scale.item() == SCALE_MAX
    assert not search_int4(torch.full((1, GROUP), 1e-40))[0].any()


def test_groups_without_moments_fall_back_to_equal_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(4, 2 * GROUP, generator=generator)
    moments = torch.rand(2 * GROUP, generator=generator)
    moments[:GROUP] = 0
    weighted, equal = search_int4(w, moments), search_int4(w)
    assert torch.equal(weighted[1][:, 0], equal[1][:, 0]) and torch.equal(weighted[0][:, :GROUP], equal[0][:, :GROUP])
    assert not torch.equal(weighted[1][:, 1], equal[1][:, 1])


def test_moments_count_by_proportion_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    w, moments = torch.randn(4, GROUP, generator=generator), torch.rand(GROUP, generator=generator)
    expected = search_int4(w, moments)[1]
    for factor in (2.0**-100, 2.0**100):
        assert torch.equal(search_int4(w, moments * factor)[1], expected)


def test_bad_input() -> None:
    w = torch.zeros(1, GROUP)
    with pytest.raises(EdgekdError, match="NaN or infinite weights"):
        search_int4(torch.full((1, GROUP), torch.nan))
    with pytest.raises(EdgekdError, match="NaN or infinite activations"):
        search_int4(w, torch.full((GROUP,), torch.inf))
    with pytest.raises(ValueError, match="not divisible"):
        search_int4(torch.zeros(1, GROUP + 1))
    with pytest.raises(ValueError, match="moments must be"):
        search_int4(w, torch.ones(GROUP + 1))
    with pytest.raises(ValueError, match="moments must be"):
        search_int4(w, -torch.ones(GROUP))
