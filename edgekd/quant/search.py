"""The int4 grid's best scales: every legal scale is tried.

Shapes: weights ``(O, I)`` as in ``torch.nn.Linear``, ``G = I / GROUP`` groups. Inside, a piece of a matrix is
``(GROUP, rows, G)``, so that sums over a group run along whole vectors.
"""

from __future__ import annotations

import torch

from ..errors import EdgekdError
from .grid import GROUP, INT4_MAX, INT4_MIN, SCALE_MAX, SCALE_MIN, quantize_int4, snap_scale

# A legal scale's bf16 bits, read as an integer, number the legal scales in order: 128 to an octave.
_FINER, _COARSER = 128, 64
"""Scales tried below and above the smallest that clips nothing: half of it to at least 4/3 of it."""
_PIECE_WEIGHTS = 2**16
"""Weights tried together: small enough for a processor's cache."""


def search_int4(w: torch.Tensor, moments: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Per group, the legal scale ``s`` of least ``sum_i m_i (w_i - s q_i)**2``, q rounded to nearest.

    All legal scales from half the smallest one that clips nothing to 4/3 of it are tried, and the one of
    ``quantize_int4``: the result is never worse than that.

    Args:
        w: ``(O, I)``, ``I`` divisible by ``GROUP``, any float dtype. Rows are independent.
        moments: mean square of each input, ``(I,)``, or None for equal weights. Groups whose moments are all zero
            take equal weights.

    Returns:
        ``q`` int8 ``(O, I)`` in [-8, 7] and ``scale`` float32 ``(O, G)``.

    Raises:
        EdgekdError: a weight or a moment is NaN or infinite; the caller names the tensor.
        ValueError: not a matrix, ``I`` is not divisible by ``GROUP``, or moments of another width or below zero.
    """
    _, start = quantize_int4(w)
    weight = _group_weights(moments, w.shape[1])
    q = torch.empty(w.shape, dtype=torch.int8)
    scale = torch.empty_like(start)
    step = max(1, _PIECE_WEIGHTS // w.shape[1])
    for at in range(0, w.shape[0], step):
        rows = slice(at, at + step)
        groups = w[rows].float().reshape(-1, w.shape[1] // GROUP, GROUP).permute(2, 0, 1).contiguous()
        scale[rows] = _search(groups, weight, start[rows])
        integers = torch.round(groups / scale[rows]).clamp_(INT4_MIN, INT4_MAX)
        q[rows] = integers.to(torch.int8).permute(1, 2, 0).reshape(w[rows].shape)
    return q, scale


def _group_weights(moments: torch.Tensor | None, width: int) -> torch.Tensor:
    """``(GROUP, 1, G)``, the largest of each group 1."""
    if moments is None:
        return torch.ones((GROUP, 1, width // GROUP))
    if moments.shape != (width,) or (moments < 0).any():
        raise ValueError(f"moments must be {width} numbers of at least zero")
    if not torch.isfinite(moments).all():
        raise EdgekdError("has NaN or infinite activations.", "Train or save the student again.")
    weight = moments.double().reshape(-1, GROUP).T.unsqueeze(1)
    largest = weight.amax(0)
    return torch.where(largest > 0, weight / largest.clamp_min(torch.finfo(torch.float64).tiny), 1.0).float()


def _search(groups: torch.Tensor, weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The best scale of each group ``(rows, G)``; groups ``(GROUP, rows, G)``, weight ``(GROUP, 1, G)``."""
    low, high = torch.aminmax(groups, dim=0)
    unclipped = snap_scale(torch.maximum(low / INT4_MIN, high / INT4_MAX))
    # Groups are brought near 1 by a power of two, which is exact, so that no square under- or overflows. Below
    # 2**-20 all integers are zero whatever the scale.
    unit = torch.exp2(torch.floor(torch.log2(torch.maximum(-low, high).clamp_min(2.0**-20))))
    groups = groups / unit
    first = unclipped.bfloat16().view(torch.int16).int()
    bounds = torch.tensor([SCALE_MIN, SCALE_MAX]).bfloat16().view(torch.int16).int().tolist()
    work = torch.empty_like(groups)
    best = start.clone()
    error = _error(groups, weight, start / unit, work)
    for offset in range(-_FINER, _COARSER + 1):
        candidate = (first + offset).clamp_(*bounds).to(torch.int16).view(torch.bfloat16).float()
        candidate_error = _error(groups, weight, candidate / unit, work)
        better = candidate_error < error
        best = torch.where(better, candidate, best)
        error = torch.where(better, candidate_error, error)
    return best


def _error(groups: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, work: torch.Tensor) -> torch.Tensor:
    torch.div(groups, scale, out=work)
    return work.round_().clamp_(INT4_MIN, INT4_MAX).mul_(scale).sub_(groups).square_().mul_(weight).sum(0)
