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

import torch

from ..errors import EdgekdError

GROUP = 32
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


class _StraightThrough(torch.autograd.Function):
    """The grid's value forward, the identity backward (Bengio et al. 2013).

    Not ``w + (grid(w) - w).detach()``: that sum rounds, and the student would train beside the grid, not on it.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, w: torch.Tensor) -> torch.Tensor:
        return dequantize_int4(*quantize_int4(w)).to(w.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def fake_quant_int4(w: torch.Tensor) -> torch.Tensor:
    """``w`` as the int4 grid holds it, ``(O, I)``, in w's dtype (exact in float32), with gradient one to ``w``."""
    return _StraightThrough.apply(w)


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Two to a byte: int8 ``(..., I)`` in [-8, 7], ``I`` even, to uint8 ``(..., I/2)``, q + 8, the first one low."""
    nibbles = (q + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_int4``: uint8 ``(..., I/2)`` to int8 ``(..., I)``."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    return nibbles.flatten(-2).to(torch.int8) - 8
