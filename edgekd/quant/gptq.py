"""GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

Columns are rounded one after the other; the error of each is taken up by those that are still free, so that the outputs
on calibration text change least. Shapes: weights ``(O, I)`` as in ``torch.nn.Linear``; the Hessian is the sum of
``x x^T`` over the inputs ``x``, ``(I, I)``; ``G = I / GROUP``.

Four choices go beyond the paper:

- A group's scale is chosen when its turn comes, on the weights as they then stand, by rounding the group's columns with
  each candidate as GPTQ would and adding up what that costs.
- Groups go by falling activation energy, and so do the columns inside each (act-order that keeps groups whole). Where
  energies are very unequal the outputs change less; on an evenly trained small student it makes no difference.
- The target is what the full-precision student computes from its own inputs, not what its weights would make of the
  quantized layers' (GPTAQ, Li et al. 2025; here as the least-squares solution, then rounded).
- A tied int4 head goes first, by the full-precision student's inputs to it, so that the layers make up for what that
  does to the embedding. Its Hessian is damped more, because as an embedding every column counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..errors import EdgekdError
from .calibrate import Layer, Walk
from .grid import (
    GROUP,
    INT4_MAX,
    INT4_MIN,
    check_finite,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8_rows,
    snap_scale,
)
from .recipe import Kind

DAMP = 0.01
"""The paper's."""
_TIED_DAMP = 0.1
"""Of a tied head; 0.1 and 0.3 gave the least KL on the quickstart's student."""
_BLOCK = 128
_ROWS = 8192
_CANDIDATES = torch.linspace(0.6, 1.25, 24)
"""Scales tried for a group, relative to the smallest that clips nothing."""
_CANDIDATE_ROWS = 1024


def gptq_int4(
    w: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor | None = None, *, damp: float = DAMP
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers, and scales unless they are given, that change ``w x`` least over the inputs behind ``hessian``.

    Inputs that are always zero (a zero on the diagonal) take no part: their weights are rounded to nearest.

    Args:
        w: ``(O, I)``, ``I`` divisible by ``GROUP``, any float dtype. Rows are independent.
        hessian: float32 ``(I, I)``, symmetric and positive semi-definite; its magnitude does not matter.
        scale: legal scales ``(O, G)`` to keep.
        damp: added to the Hessian's diagonal, relative to its mean.

    Returns:
        ``q`` int8 ``(O, I)`` in [-8, 7] and ``scale`` float32 ``(O, G)``.

    Raises:
        EdgekdError: weights or Hessian are NaN or infinite, or it cannot be factorised; the caller names the tensor.
        ValueError: not a matrix, ``I`` is not divisible by ``GROUP``, or a Hessian of another shape.
    """
    check_finite(w)
    if w.ndim != 2 or w.shape[1] % GROUP or hessian.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"weights {tuple(w.shape)} and Hessian {tuple(hessian.shape)} do not fit groups of {GROUP}")
    order = _order(hessian.diagonal())
    factor = _factor(_damped(hessian, damp)[order][:, order])
    pieces = []
    for start in range(0, w.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        pieces.append(_round_columns(w[rows].float(), factor, order, None if scale is None else scale[rows]))
    q, scales = zip(*pieces, strict=True)
    return torch.cat(q), torch.cat(scales)


def _order(diagonal: torch.Tensor) -> torch.Tensor:
    """The columns' turns: groups by falling energy, columns by falling energy inside each."""
    energy = diagonal.reshape(-1, GROUP)
    within = torch.argsort(energy, dim=1, descending=True, stable=True)
    groups = torch.argsort(energy.sum(1), descending=True, stable=True)
    return (within + GROUP * torch.arange(len(energy)).unsqueeze(1))[groups].flatten()


def _damped(hessian: torch.Tensor, damp: float = DAMP) -> torch.Tensor:
    """The Hessian with a positive diagonal, raised until it has a Cholesky factor; mean of the diagonal 1."""
    if not torch.isfinite(hessian).all():
        raise EdgekdError("has NaN or infinite activations.", "Train or save the student again.")
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    if not alive.any():
        return torch.eye(len(hessian))
    damped = hessian / diagonal[alive].mean()
    damped.diagonal()[~alive] = 1.0
    added = 0.0
    while damp <= 1.0:
        damped.diagonal().add_(damp - added)
        if not torch.linalg.cholesky_ex(damped).info:
            return damped
        added, damp = damp, damp * 10
    raise EdgekdError("has activations whose second moments cannot be factorised.", "Give more calibration text.")


def _factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with ``hessian^-1 = U^T U``."""
    # With the order reversed, Cholesky's lower factor is an upper one M, hessian = M M^T, and U = M^-1: no inverse of
    # the whole Hessian, which would cost digits.
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)


def _round_columns(
    w: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frantar et al.'s algorithm 1 on some rows; columns lie as rows of ``free``, in the order of their turns."""
    q = torch.empty((w.shape[1], w.shape[0]), dtype=torch.int8)
    scales = torch.empty((w.shape[1] // GROUP, w.shape[0])) if scale is None else scale.T.contiguous()
    free = w.T[order].contiguous()
    for start in range(0, len(free), _BLOCK):
        block, upper = free[start : start + _BLOCK], factor[start : start + _BLOCK, start : start + _BLOCK]
        errors = torch.empty_like(block)
        for j, column in enumerate(block):
            at = int(order[start + j])
            if scale is None and j % GROUP == 0:
                group = slice(j, j + GROUP)
                scales[at // GROUP] = _group_scale(block[group], upper[group, group])
            s = scales[at // GROUP]
            integers = torch.round(column / s).clamp_(INT4_MIN, INT4_MAX)
            q[at] = integers.to(torch.int8)
            errors[j] = (column - integers * s) / upper[j, j]
            block[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        free[start + _BLOCK :].addmm_(factor[start : start + _BLOCK, start + _BLOCK :].T, errors, alpha=-1)
    return q.T.contiguous(), scales.T.contiguous()


def _group_scale(columns: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """The candidate scale with which a group's columns ``(GROUP, O)`` are rounded at the least cost, ``(O,)``.

    A column's error costs its square over the squared diagonal of ``upper``: what the columns after it cannot take up.
    """
    unclipped = torch.maximum(columns.amin(0) / INT4_MIN, columns.amax(0) / INT4_MAX)
    best = torch.empty_like(unclipped)
    for start in range(0, len(best), _CANDIDATE_ROWS):
        rows = slice(start, start + _CANDIDATE_ROWS)
        scale = snap_scale(_CANDIDATES.unsqueeze(1) * unclipped[rows])
        free = columns[:, None, rows].expand(-1, *scale.shape).contiguous()
        cost = torch.zeros_like(scale)
        for j in range(GROUP):
            integers = torch.round(free[j] / scale).clamp_(INT4_MIN, INT4_MAX)
            error = (free[j] - integers * scale) / upper[j, j]
            cost.addcmul_(error, error)
            free[j + 1 :].addcmul_(upper[j, j + 1 :, None, None], error, value=-1)
        best[rows] = scale.gather(0, cost.argmin(0, keepdim=True))[0]
    return best


def gptq_student(
    folder: Path, ids: torch.Tensor, kinds: Mapping[str, Kind]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The int4 Linears of a student, layer by layer; each sees its inputs as the quantized student makes them.

    Two layers (as trained, and as quantized) and two Hessians are in memory, and both sets of hidden states.

    Args:
        folder: a model folder.
        ids: calibration windows, int ``(N, T)``.
        kinds: by HF parameter name. What is not int4 is not returned, nor are untied embeddings or Linears that the
            model does not run: ``quantize_int8_rows`` and ``quantize_int4`` do them.

    Yields:
        HF parameter name, ``q`` int8 ``(O, I)`` and ``scale`` float32 ``(O, G)``.

    Raises:
        EdgekdError: as ``second_moments``, or a tensor, which is named, cannot be quantized.
    """
    source = Checkpoint(folder)
    target = Walk(source, ids)
    name, head = target.embedding_name, target.head_name
    tied = _tied_head(source, ids, name) if head == name and kinds[name] == "int4" else None
    if tied:
        yield (name, *tied)

    def embed(index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if tied:
            return dequantize_int4(tied[0][index], tied[1][index])
        return _as_stored(name, rows, kinds)

    walk = Walk(source, ids, embed)
    # strict: when the first ends, zip asks the second once more, and its last layer passes its outputs on.
    for full, layer in zip(target, walk, strict=True):
        for group in layer.groups:
            yield from _quantize_group(source, full, layer, group, kinds)
    if head != name and kinds[head] == "int4":
        weight = source.tensor(head)
        moments = _moments(weight.shape[1], zip(target.head_inputs(), walk.head_inputs(), strict=True))
        yield (head, *_named(source, head, weight, *moments))


def _tied_head(source: Checkpoint, ids: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding that is also the head, by the full-precision student's inputs to the head."""
    walk = Walk(source, ids)
    for _ in walk:
        pass
    weight = source.tensor(name)
    hessian = torch.zeros(weight.shape[1], weight.shape[1])
    for x in walk.head_inputs():
        hessian.addmm_(x.T, x)
    with source.naming(name):
        return gptq_int4(weight, hessian, damp=_TIED_DAMP)


def _as_stored(name: str, w: torch.Tensor, kinds: Mapping[str, Kind]) -> torch.Tensor:
    """Rows of a matrix as the grid will hold them by round to nearest, float32."""
    if kinds[name] == "int4":
        return dequantize_int4(*quantize_int4(w))
    return dequantize_int8(*quantize_int8_rows(w)) if kinds[name] == "int8" else w


def _quantize_group(
    source: Checkpoint, full: Layer, layer: Layer, group: list[str], kinds: Mapping[str, Kind]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Linears of one input, quantized in place in ``layer``."""
    chosen = [name for name in group if kinds[name] == "int4"]
    if chosen:
        inputs = zip(full.inputs(group[0]), layer.inputs(group[0]), strict=True)
        hessian, shift = _moments(layer.linears[group[0]].in_features, inputs)
    for name in group:
        weight = layer.linears[name].weight
        if name in chosen:
            q, scale = _named(source, name, weight, hessian, shift)
            weight.copy_(dequantize_int4(q, scale))
            yield name, q, scale
        else:
            weight.copy_(_as_stored(name, weight, kinds))


def _moments(width: int, inputs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of ``x x^T`` and ``(y - x) x^T`` over inputs x of the quantized and y of the full-precision student."""
    hessian, shift = torch.zeros(width, width), torch.zeros(width, width)
    for y, x in inputs:
        hessian.addmm_(x.T, x)
        shift.addmm_((y - x).T, x)
    return hessian, shift


def _named(
    source: Checkpoint, name: str, w: torch.Tensor, hessian: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with source.naming(name):
        return gptq_int4(_retarget(w.float(), hessian, shift), hessian)


def _retarget(w: torch.Tensor, hessian: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Weights that make of the quantized student's inputs x what ``w`` makes of the full-precision ones y.

    The least-squares solution ``w + w sum((y - x) x^T) (hessian + damping)^-1``, damped towards ``w``.
    """
    damped = _damped(hessian)
    alive = hessian.diagonal() > 0
    mean = hessian.diagonal()[alive].mean() if alive.any() else 1.0
    return w + torch.cholesky_solve((w @ (shift / mean)).T, torch.linalg.cholesky(damped)).T
