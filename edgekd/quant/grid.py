"""The portable grid: integers and scales that every target's runtime executes as they are.

Shapes: weights ``w`` are ``(O, I)``, ``O`` outputs by ``I`` inputs, as in ``torch.nn.Linear``; a *group* is ``GROUP``
neighbouring inputs of one output; ``G = I / GROUP``.

- int4: ``w = scale * q``, q in [-8, 7], one scale per group. Native as GGUF ``Q4_0``, ONNX ``MatMulNBits``,
  XNNPACK ``qb4w`` and Core ML blockwise int4.
- int8: the same with q in [-127, 127] and one scale per output row, for embeddings and heads.

A scale is a positive number that fp16 and bf16 both hold exactly (XNNPACK stores bf16 and refuses a scale that is not
normal and positive; the other runtimes store fp16): a significand of 8 bits in fp16's normal range. All arithmetic is
float32, in which ``scale * q`` is exact too.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import EdgekdError
from .recipe import GROUP

INT4_MIN, INT4_MAX = -8, 7
INT8_MAX = 127
SCALE_MIN = 2.0**-14
"""The smallest normal fp16 number."""
SCALE_MAX = 65280.0
"""The largest number of an 8-bit significand that fp16 holds: 255 * 2**8."""
_SHRINK = (1.0, 0.95, 0.9, 0.85)


def snap_scale(x: torch.Tensor) -> torch.Tensor:
    """The legal scale nearest to each element, ties to the even significand; float32, of the same shape.

    What lies below ``SCALE_MIN`` (zero and negatives included) or above ``SCALE_MAX`` becomes that bound, so the result
    is never zero nor infinite.
    """
    # bf16 has exactly the 8-bit significand, and torch rounds to it to nearest, ties to even.
    return x.float().clamp(SCALE_MIN, SCALE_MAX).to(torch.bfloat16).float()


def check_finite(w: torch.Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        EdgekdError: whose cause lacks its subject; the caller names the tensor.
    """
    if not torch.isfinite(w).all():
        raise EdgekdError("holds NaN or infinite weights.", "Train or save the model again.")


def _matrix(w: torch.Tensor) -> torch.Tensor:
    """``w`` in float32, checked."""
    if w.ndim != 2:
        raise ValueError(f"the grid holds matrices, not shape {tuple(w.shape)}")
    check_finite(w)
    return w.float()


def quantize_int4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest on the int4 grid.

    Each group takes, of four candidate scales, the one of least squared error: the smallest that clips nothing,
    ``max(-min(w) / 8, max(w) / 7)``, and that times 0.95, 0.9 and 0.85. Squared error on Gaussian weights, relative to
    their energy: ``max|w| / 7`` 0.94 %, the unclipped one 0.85 %, the best of four 0.76 %, an exhaustive search 0.74 %.
    llama.cpp's Q4_0 reaches 0.74 % because its scale ``max / -8`` takes the sign that puts the extreme on -8; XNNPACK
    refuses a negative scale, so the grid cannot.

    Quantizing a dequantized matrix gives the same integers and scales again: the extreme of every group stands on
    -8 or 7, so the unclipped candidate is the old scale and has no error; a scale held at ``SCALE_MIN`` stays there.

    Args:
        w: ``(O, I)``, ``I`` divisible by ``GROUP``, any float dtype. Rows are independent: a matrix may be given in
            pieces of whole rows.

    Returns:
        ``q`` int8 ``(O, I)`` in [-8, 7] and ``scale`` float32 ``(O, G)``. An all-zero group has q = 0 and
        ``SCALE_MIN``.

    Raises:
        EdgekdError: a weight is NaN or infinite; the caller names the tensor.
        ValueError: not a matrix, or ``I`` is not divisible by ``GROUP``.
    """
    w = _matrix(w)
    if w.shape[1] % GROUP:
        raise ValueError(f"input width {w.shape[1]} is not divisible by {GROUP}")
    groups = w.reshape(w.shape[0], -1, GROUP)
    low, high = torch.aminmax(groups, dim=-1)
    unclipped = torch.maximum(low / INT4_MIN, high / INT4_MAX)
    scale = snap_scale(unclipped)
    error = _int4_error(groups, scale)
    for factor in _SHRINK[1:]:
        candidate = snap_scale(unclipped * factor)
        candidate_error = _int4_error(groups, candidate)
        better = candidate_error < error
        scale = torch.where(better, candidate, scale)
        error = torch.where(better, candidate_error, error)
    return _round_int4(groups, scale).to(torch.int8).reshape(w.shape), scale


def round_int4(w: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``w`` ``(O, I)`` to nearest with given scales ``(O, G)``: q int8 ``(O, I)``, and the scales snapped."""
    legal = snap_scale(scale)
    return _round_int4(w.float().reshape(*legal.shape, GROUP), legal).to(torch.int8).reshape(w.shape), legal


def _round_int4(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.round(groups / scale.unsqueeze(-1)).clamp_(INT4_MIN, INT4_MAX)


def _int4_error(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Squared error of each group ``(O, G)``, in units of the group's squared extreme, lest it underflow."""
    unit = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return ((_round_int4(groups, scale).mul_(scale.unsqueeze(-1)) - groups) / unit).square_().sum(-1)


def dequantize_int4(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale * q`` in float32: q int8 ``(O, I)``, scale ``(O, G)``."""
    groups = q.reshape(q.shape[0], -1, GROUP).float()
    return (groups * scale.float().unsqueeze(-1)).reshape(q.shape)


def quantize_int8_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest on the int8 grid, one scale per row: ``max|w| / 127``, snapped.

    Idempotent on dequantized matrices, as the extreme of every row stands on -127 or 127.

    Args:
        w: ``(O, I)``, any float dtype and any width.

    Returns:
        ``q`` int8 ``(O, I)`` in [-127, 127] and ``scale`` float32 ``(O,)``.

    Raises:
        EdgekdError: a weight is NaN or infinite; the caller names the tensor.
    """
    w = _matrix(w)
    scale = snap_scale(w.abs().amax(-1) / INT8_MAX)
    return torch.round(w / scale.unsqueeze(-1)).clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize_int8(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale * q`` in float32: q int8 ``(O, I)``, scale ``(O,)``."""
    return q.float() * scale.float().unsqueeze(-1)


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        scale = snap_scale(log_scale.exp())
        steps = w.float().reshape(*scale.shape, GROUP) / scale.unsqueeze(-1)
        q = torch.round(steps).clamp_(INT4_MIN, INT4_MAX)
        ctx.save_for_backward(steps, q, scale)
        return (q * scale.unsqueeze(-1)).reshape(w.shape).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps, q, scale = ctx.saved_tensors
        slope = grads[0].float().reshape(steps.shape)
        inside = (steps >= INT4_MIN - 0.5) & (steps <= INT4_MAX + 0.5)
        of_scale = (slope * torch.where(inside, q - steps, q)).sum(-1)
        return (slope * inside).reshape(grads[0].shape).to(grads[0].dtype), of_scale * scale


def fake_quant_int4(w: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """``w`` as the int4 grid holds it, with scales that learn (LSQ, Esser et al. 2020).

    Forward is the grid's very value, not ``w + (grid(w) - w).detach()``: that sum rounds, and the student would train
    beside the grid. Backward passes the gradient straight through to what is not clipped (Bengio et al. 2013), and to
    ``log_scale`` that of ``scale * q`` as if ``scale`` were not snapped and rounding were the identity.

    Args:
        w: ``(O, I)``.
        log_scale: natural logarithm of the scales ``(O, G)``, float32.

    Returns:
        ``(O, I)`` in w's dtype, exact in float32: ``dequantize_int4(*round_int4(w, log_scale.exp()))``.
    """
    return _LearnedScale.apply(w, log_scale)


class _StraightThrough8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
        return dequantize_int8(*quantize_int8_rows(w)).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def fake_quant_int8_rows(w: torch.Tensor) -> torch.Tensor:
    """``w`` ``(O, I)`` as the int8 grid holds it, rounded to nearest, with gradient one to ``w``."""
    return _StraightThrough8.apply(w)


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Two to a byte: int8 ``(..., I)`` in [-8, 7], ``I`` even, to uint8 ``(..., I/2)``, q + 8, the first one low."""
    nibbles = (q + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_int4``: uint8 ``(..., I/2)`` to int8 ``(..., I)``."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    return nibbles.flatten(-2).to(torch.int8) - 8
