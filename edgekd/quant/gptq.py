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
_SQUARE = 512
SWEEPS = 2


def gptq_int4(
    w: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    shift: torch.Tensor | None = None,
    damp: float = DAMP,
    sweeps: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers, and scales unless they are given, that change ``w x`` least over the inputs behind ``hessian``.

    Inputs that are always zero (a zero on the diagonal) take no part: their weights are rounded to nearest.

    Args:
        w: ``(O, I)``, ``I`` divisible by ``GROUP``, any float dtype. Rows are independent.
        hessian: float32 ``(I, I)``, symmetric and positive semi-definite; its magnitude does not matter.
        scale: legal scales ``(O, G)`` to keep.
        shift: sum of ``(y - x) x^T``, float32 ``(I, I)``: aim at ``w y``, not at ``w x``.
        damp: added to the Hessian's diagonal, relative to its mean.
        sweeps: how often all scales and integers are gone through again afterwards.

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
    damped, factor, mean = _factorised(hessian[order][:, order], damp)
    w = w.float()
    if shift is not None:
        w = _retarget(w, shift / mean, factor, order)
    pieces = []
    for start in range(0, w.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        q, s = _round_columns(w[rows], factor, order, None if scale is None else scale[rows])
        pieces.append(_refine(w[rows], q, s, damped, order, sweeps))
    return torch.cat([q for q, _ in pieces]), torch.cat([scales for _, scales in pieces])


def _retarget(w: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Weights that make of the quantized student's inputs x what ``w`` makes of the full-precision ones y.

    The least-squares solution ``w + w sum((y - x) x^T) (hessian + damping)^-1``, damped towards ``w``.
    """
    change = torch.empty_like(w)
    change[:, order] = (w @ shift)[:, order] @ factor.T @ factor
    return w + change


def _refine(
    w: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, sweeps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate descent on ``tr(E hessian E^T)``, ``E = scale q - w``: each scale, then each integer, takes the best
    value that it has while all others stay. The Hessian's columns are in the order of their turns."""
    integers = q.T[order].float()
    scales = scale.T[order[::GROUP] // GROUP].contiguous()
    error = integers * scales.repeat_interleave(GROUP, 0) - w.T[order]
    for _ in range(sweeps):
        _refit_scales(integers, scales, error, hessian)
        _turn_integers(integers, scales, error, hessian)
    refined, rescaled = torch.empty_like(q), torch.empty_like(scale)
    refined[:, order], rescaled[:, order[::GROUP] // GROUP] = integers.T.to(torch.int8), scales.T
    return refined, rescaled


def _refit_scales(integers: torch.Tensor, scales: torch.Tensor, error: torch.Tensor, hessian: torch.Tensor) -> None:
    """All in place: integers and error ``(I, O)``, scales ``(G, O)``."""
    slope = hessian @ error
    for group, at in enumerate(range(0, len(integers), GROUP)):
        here = slice(at, at + GROUP)
        steps = integers[here]
        along = (steps * slope[here]).sum(0)
        curve = (steps * (hessian[here, here] @ steps)).sum(0)
        wanted = scales[group] - along / curve.clamp_min(torch.finfo(torch.float32).tiny)
        change = snap_scale(wanted) - scales[group]
        # Snapped, it may be worse than what there was.
        gain = change * (2 * along + change * curve)
        change = torch.where(gain < 0, change, 0.0)
        scales[group] += change
        error[here] += steps * change
        slope.addmm_(hessian[:, here], steps * change)


def _turn_integers(integers: torch.Tensor, scales: torch.Tensor, error: torch.Tensor, hessian: torch.Tensor) -> None:
    """All in place: integers and error ``(I, O)``, scales ``(G, O)``."""
    for start in range(0, len(integers), _BLOCK):
        block = slice(start, start + _BLOCK)
        inside = hessian[block, block]
        slope = hessian[block] @ error
        for j in range(len(inside)):
            at = start + j
            step = scales[at // GROUP]
            best = torch.round(integers[at] - slope[j] / (inside[j, j] * step)).clamp_(INT4_MIN, INT4_MAX)
            change = (best - integers[at]) * step
            integers[at] = best
            error[at] += change
            slope[j + 1 :].addr_(inside[j + 1 :, j], change)


def _order(diagonal: torch.Tensor) -> torch.Tensor:
    """The columns' turns: groups by falling energy, columns by falling energy inside each."""
    energy = diagonal.reshape(-1, GROUP)
    within = torch.argsort(energy, dim=1, descending=True, stable=True)
    groups = torch.argsort(energy.sum(1), descending=True, stable=True)
    return (within + GROUP * torch.arange(len(energy)).unsqueeze(1))[groups].flatten()


def _factorised(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The Hessian with a positive diagonal, raised until it has a factor, the mean of its diagonal 1; the upper
    triangular U with ``hessian^-1 = U^T U``; and what the mean was."""
    if not torch.isfinite(hessian).all():
        raise EdgekdError("has NaN or infinite activations.", "Train or save the student again.")
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    if not alive.any():
        return torch.eye(len(hessian)), torch.eye(len(hessian)), 1.0
    mean = float(diagonal[alive].mean())
    # With the order reversed, Cholesky's lower factor is an upper one M, hessian = M M^T, and U = M^-1: no inverse of
    # the whole Hessian, which would cost digits.
    damped = hessian.flip(0, 1) / mean
    damped.diagonal()[~alive.flip(0)] = 1.0
    added = 0.0
    while damp <= 1.0:
        damped.diagonal().add_(damp - added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = lower.flip(0, 1)
            return damped.flip(0, 1), torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True), mean
        added, damp = damp, damp * 10
    raise EdgekdError("has activations whose second moments cannot be factorised.", "Give more calibration text.")


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

    One layer is in memory at a time, as trained and then as quantized, with two sums of the inputs' products, both sets
    of hidden states, and what enters a layer's Linears.

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
    layers = iter(walk)
    for full in target:
        chosen = [group[0] for group in full.groups if any(kinds[name] == "int4" for name in group)]
        recorded = full.advance(chosen)
        layer = next(layers)
        for group in layer.groups:
            yield from _quantize_group(source, layer, group, kinds, recorded.pop(group[0], []))
            layer.settle(group[0])
    next(layers, None)  # the last layer passes its outputs on
    if head != name and kinds[head] == "int4":
        weight = source.tensor(head)
        moments = _moments(weight.shape[1], zip(target.head_inputs(), walk.head_inputs(), strict=True))
        with source.naming(head):
            yield (head, *gptq_int4(weight, moments[0], shift=moments[1], sweeps=SWEEPS))


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
    source: Checkpoint, layer: Layer, group: list[str], kinds: Mapping[str, Kind], wanted: list[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Linears of one input, quantized in place in ``layer``.

    Args:
        wanted: the full-precision student's inputs.
    """
    chosen = [name for name in group if kinds[name] == "int4"]
    for name in group:
        weight = layer.linears[name].weight
        if name not in chosen:
            weight.copy_(_as_stored(name, weight, kinds))
    if not chosen:
        return
    width = layer.linears[group[0]].in_features
    hessian, shift = _moments(width, zip(wanted, layer.inputs(group[0]), strict=True))
    weights = [layer.linears[name].weight for name in chosen]
    # As one matrix: rows are independent, and the columns' turns are the same.
    with source.naming(chosen[0]):
        q, scale = gptq_int4(torch.cat(weights), hessian, shift=shift, sweeps=SWEEPS)
    counts = [len(weight) for weight in weights]
    for name, weight, *block in zip(chosen, weights, q.split(counts), scale.split(counts), strict=True):
        weight.copy_(dequantize_int4(*block))
        yield (name, *block)


def _moments(width: int, inputs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of ``x x^T`` and ``(y - x) x^T`` over inputs x of the quantized and y of the full-precision student."""
    hessian, shift = torch.zeros(width, width), torch.zeros(width, width)
    for y, x in inputs:
        _add_squares(hessian, x)
        shift.addmm_((y - x).T, x)
    return hessian.triu_().add_(hessian.triu(1).T), shift


def _add_squares(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """The upper triangle of ``x^T x``, and some of the lower."""
    for start in range(0, len(hessian), _SQUARE):
        columns = slice(start, start + _SQUARE)
        hessian[columns, start:].addmm_(x[:, columns].T, x[:, start:])
