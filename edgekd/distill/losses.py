"""What the student is pulled towards: pure functions of log-probabilities, and the chunked sum that trains on them.

Shapes: ``B`` windows, ``T`` tokens, ``V`` vocabulary, ``N`` tokens in one flat row. A log-probability tensor is
``(..., V)``, float32 (float64 stays float64), natural logarithm; every loss gives nats per token, ``(...)``.

Adding a loss: one function here, one line in ``LOSSES``, one name in ``spec.LossName``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = -1e30
"""Stands for the log of zero: 0 · FLOOR is 0, where 0 · (-inf) is not a number."""

_CHUNK_ELEMENTS = 1 << 18
"""Logits worked on at a time: a chunk's few float32 copies stay in the cache, and none of size (B, T, V) exists."""


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), ``(..., V)``, in float32 or better.

    A logit of -inf (padding of the vocabulary) becomes a log-probability of ``FLOOR``, and passes no gradient.
    """
    return _log_softmax(logits.to(_wide(logits)).clamp_min(FLOOR), temperature)


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """-log q(label). ``student`` ``(..., V)`` log-probabilities at temperature 1, ``labels`` int64 ``(...)``."""
    return -student.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mean-seeking (Hinton et al. 2015). Infinite, here ~1e30, where q = 0 < p."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), mode-seeking (MiniLLM, Gu et al. 2023), exact over the vocabulary."""
    return (student.exp() * (student - teacher)).sum(-1)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """β KL(p || m) + (1 - β) KL(q || m) with m = β p + (1 - β) q, p the teacher (GKD, Agarwal et al. 2023, eq. 1).

    At most log 2 for β = ½. It vanishes as β goes to 0 or 1, while JSD / β goes to KL(p || q) and JSD / (1 - β) to
    KL(q || p); so β = 0 gives the forward and β = 1 the reverse KL itself.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], not {beta}")
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


@dataclass(frozen=True)
class Tokens:
    """What a loss in ``LOSSES`` may read of ``N`` tokens."""

    labels: Tensor
    """int64 ``(N,)``: the token that follows."""
    student_plain: Tensor
    """``(N, V)`` log-probabilities of the student at temperature 1."""
    student: Tensor
    """``(N, V)`` log-probabilities of the student at ``temperature``."""
    teacher: Tensor | None
    """The same of the teacher; None in a run on labels alone."""
    temperature: float
    jsd_beta: float


# A divergence at temperature T is multiplied by T², so that its gradient keeps its size as T grows (Hinton et al.
# 2015); cross-entropy sees the plain distribution.
LOSSES: dict[str, Callable[[Tokens], Tensor]] = {
    "cross_entropy": lambda t: cross_entropy(t.student_plain, t.labels),
    "forward_kl": lambda t: t.temperature**2 * forward_kl(t.student, _of_teacher(t)),
    "reverse_kl": lambda t: t.temperature**2 * reverse_kl(t.student, _of_teacher(t)),
    "jsd": lambda t: t.temperature**2 * generalized_jsd(t.student, _of_teacher(t), t.jsd_beta),
}


def needs_teacher(weights: Mapping[str, float]) -> bool:
    """Whether any of the losses reads the teacher."""
    return any(name != "cross_entropy" for name in weights)


def summed_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    mask: Tensor,
    weights: Mapping[str, float],
    *,
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The weighted losses, summed over the tokens that ``mask`` keeps. Divide by their number for the mean.

    Works chunk by chunk over tokens, and takes the gradient of each chunk at once: beside the logits themselves and
    their gradient, in their own dtype, nothing of size (B, T, V) is held. Not twice differentiable.

    Args:
        student: logits ``(B, T, V)``, any float dtype.
        teacher: logits ``(B, T, V)``, or None if no loss reads them; no gradient reaches them.
        labels: int64 ``(B, T)``, the token that follows each position.
        mask: ``(B, T)``, non-zero where the label is trained on.
        weights: weight of each name in ``LOSSES``.

    Returns:
        The weighted sum, a scalar to call backward on; and the unweighted sum of each loss, ``(len(weights),)`` in
        the order of ``weights``, without gradient. Both float32, or float64 for float64 logits.
    """
    if teacher is None and needs_teacher(weights):
        raise ValueError(f"{', '.join(weights)} need the teacher's logits")
    chosen = mask.flatten().nonzero().squeeze(-1)
    flat_teacher = None if teacher is None else teacher.flatten(0, 1)

    def parts_of(rows: Tensor, index: Tensor) -> Tensor:
        plain = _log_softmax(rows, 1.0)
        softened = plain if temperature == 1.0 else _log_softmax(rows, temperature)
        reference = None if flat_teacher is None else _log_softmax(_rows(flat_teacher, index), temperature)
        tokens = Tokens(labels.flatten()[index], plain, softened, reference, temperature, jsd_beta)
        return torch.stack([LOSSES[name](tokens).sum() for name in weights])

    total, parts = _ChunkedSum.apply(student.flatten(0, 1), chosen, parts_of, tuple(weights.values()))
    return total, parts


class _ChunkedSum(torch.autograd.Function):
    """Sums ``parts_of`` over chunks of rows; the gradient is computed in the forward pass while a chunk is warm."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        chosen: Tensor,
        parts_of: Callable[[Tensor, Tensor], Tensor],
        weights: tuple[float, ...],
    ) -> tuple[Tensor, Tensor]:
        scale = torch.tensor(weights, dtype=_wide(logits), device=logits.device)
        parts = torch.zeros_like(scale)
        wants_gradient = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        gradient = torch.zeros_like(logits) if wants_gradient else None
        for index in chosen.split(max(1, _CHUNK_ELEMENTS // logits.shape[-1])):
            chunk = _rows(logits, index)
            if gradient is None:
                parts += parts_of(chunk, index)
                continue
            with torch.enable_grad():
                chunk.requires_grad_()
                of_chunk = parts_of(chunk, index)
                (slope,) = torch.autograd.grad((of_chunk * scale).sum(), chunk)
            gradient.index_copy_(0, index, slope.to(gradient.dtype))
            parts += of_chunk.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(parts)
        return (parts * scale).sum(), parts

    @staticmethod
    def backward(ctx, grad_total, _grad_parts):  # type: ignore[no-untyped-def,override]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_total), None, None, None  # in place: a second backward raises, as it should


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _rows(logits: Tensor, index: Tensor) -> Tensor:
    """A wide copy of some rows, ``(len(index), V)``, without -inf."""
    return logits.index_select(0, index).to(_wide(logits)).clamp_min_(FLOOR)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def _of_teacher(tokens: Tokens) -> Tensor:
    if tokens.teacher is None:
        raise ValueError("this loss needs the teacher's logits")
    return tokens.teacher
