"""What the student is pulled towards: pure functions of log-probabilities, and the sum that trains on them.

Shapes: ``B`` windows, ``T`` tokens, ``V`` vocabulary, ``N`` tokens in one flat row, ``K`` ids of which a teacher tells.
A log-probability tensor is ``(N, V)``, float32 (float64 stays float64), natural logarithm. A loss gives its nats per
token, ``(N,)``, and its slope, the derivative of each by the student's log-probabilities, ``(N, V)`` or by ``K`` ids.

Adding a loss: one function here, one line in ``LOSSES``, one name in ``spec.LossName``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import CHUNK_BYTES, CHUNK_TOKENS
from .head import Head, Outputs, bent, product, wide, working_dtype

FLOOR = -1e30
"""Stands for the log of zero: 0 · FLOOR is 0, where 0 · (-inf) is not a number."""


class AtIds(NamedTuple):
    """Numbers at some ids of each token, zero at all others."""

    ids: Tensor
    """int64 ``(N, K)``; an id may stand more than once, and its numbers are added."""
    values: Tensor
    """``(N, K)``."""


class Loss(NamedTuple):
    """A loss of ``N`` tokens."""

    nats: Tensor
    """``(N,)``."""
    slope: Tensor | AtIds


@dataclass(frozen=True)
class Sparse:
    """What a teacher says of a batch by some of its ids: the sum of ``p f`` over the vocabulary is, in the mean over
    draws, that of ``weights · f(ids)``.

    For an id that is told for certain the weight is its probability, for a drawn one the probability of all that was
    not told, over the number of draws.
    """

    ids: Tensor
    """int64 ``(B, T, K)``."""
    log_probs: Tensor
    """``(B, T, K)``, at temperature 1."""
    weights: Tensor
    """``(B, T, K)``."""

    def rows(self, index: Tensor) -> Sparse:
        """Of some tokens, ``(len(index), K)``."""
        ids, log_probs, weights = (
            t.flatten(0, 1).index_select(0, index) for t in (self.ids, self.log_probs, self.weights)
        )
        return Sparse(ids, wide(log_probs), wide(weights))


@dataclass(frozen=True)
class Buckets:
    """What a teacher says of a batch by its likeliest ids, and of all others together: K + 1 outcomes.

    Whatever the divergence, that of the outcomes is no more than that of the whole vocabulary.
    """

    ids: Tensor
    """int64 ``(B, T, K)``, no two of a token the same."""
    log_probs: Tensor
    """``(B, T, K + 1)``, at temperature 1; the last is that of all other ids."""

    def rows(self, index: Tensor) -> Buckets:
        """Of some tokens, ``(len(index), K)``."""
        ids, log_probs = (t.flatten(0, 1).index_select(0, index) for t in (self.ids, self.log_probs))
        return Buckets(ids, wide(log_probs))


class Teaching(Protocol):
    """What a teacher says of a batch: ``head.Outputs``, ``Sparse`` or ``Buckets``."""

    def rows(self, index: Tensor) -> Any:
        """Of some tokens: logits ``(len(index), V)``, ``Sparse`` or ``Buckets``."""
        ...


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), ``(..., V)``, in float32 or better.

    A logit of -inf (padding of the vocabulary) becomes a log-probability of ``FLOOR``, and passes no gradient.
    """
    logits = wide(logits).clamp_min(FLOOR)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def cross_entropy(student: Tensor, labels: Tensor) -> Loss:
    """-log q(label). ``labels`` int64 ``(N,)``."""
    at = labels.unsqueeze(-1)
    return Loss(-student.gather(-1, at).squeeze(-1), AtIds(at, torch.full_like(at, -1, dtype=student.dtype)))


def forward_kl(student: Tensor, teacher: Tensor | Sparse) -> Loss:
    """KL(teacher || student), mean-seeking (Hinton et al. 2015). Infinite, here ~1e30, where q = 0 < p."""
    if isinstance(teacher, Sparse):
        told = teacher.log_probs - student.gather(-1, teacher.ids)
        return Loss((teacher.weights * told).sum(-1), AtIds(teacher.ids, -teacher.weights))
    p = teacher.exp()
    return Loss((teacher - student).mul_(p).sum(-1), p.neg_())


def reverse_kl(student: Tensor, teacher: Tensor) -> Loss:
    """KL(student || teacher), mode-seeking (MiniLLM, Gu et al. 2023), exact over the vocabulary."""
    q, gap = student.exp(), student - teacher
    return Loss((q * gap).sum(-1), gap.add_(1).mul_(q))


def skewed_kl(student: Tensor, teacher: Tensor | Sparse, skew: float) -> Loss:
    """KL(teacher || m) with m = α p + (1 - α) q: bounded where q = 0 < p (DistiLLM, Ko et al. 2024)."""
    if isinstance(teacher, Sparse):
        at = student.gather(-1, teacher.ids)
        mixture = _mixture(teacher.log_probs, at, skew)
        share = (at - mixture).exp_().mul_(1 - skew)
        return Loss(
            (teacher.weights * (teacher.log_probs - mixture)).sum(-1), AtIds(teacher.ids, -teacher.weights * share)
        )
    mixture, p = _mixture(teacher, student, skew), teacher.exp()
    share = (student - mixture).exp_().mul_(skew - 1)
    return Loss((teacher - mixture).mul_(p).sum(-1), share.mul_(p))


def skewed_reverse_kl(student: Tensor, teacher: Tensor, skew: float) -> Loss:
    """KL(student || m) with m = (1 - α) p + α q (DistiLLM)."""
    mixture, q = _mixture(student, teacher, skew), student.exp()
    gap = student - mixture
    share = gap.exp().mul_(-skew)
    return Loss((q * gap).sum(-1), share.add_(1).add_(gap).mul_(q))


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Loss:
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
    mixture, q = _mixture(teacher, student, beta), student.exp()
    gap = student - mixture
    nats = beta * (teacher - mixture).mul_(teacher.exp()).sum(-1) + (1 - beta) * (q * gap).sum(-1)
    # The slopes by way of the mixture add up to the q that is the slope of q itself, and cancel.
    return Loss(nats, gap.mul_(q).mul_(1 - beta))


def total_variation(student: Tensor, teacher: Tensor) -> Loss:
    """½ Σ |p - q|, at most 1 (f-distill, Wen et al. 2023)."""
    q = student.exp()
    gap = q - teacher.exp()
    return Loss(gap.abs().sum(-1).mul_(0.5), gap.sign_().mul_(q).mul_(0.5))


def _mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """log(share · e^a + (1 - share) · e^b)."""
    return torch.logaddexp(a + math.log(share), b + math.log1p(-share))


class Settings(NamedTuple):
    """What of the spec the losses read."""

    temperature: float = 1.0
    jsd_beta: float = 0.5
    skew: float = 0.1


PLAIN = Settings()


@dataclass(frozen=True)
class Tokens:
    """What a loss in ``LOSSES`` may read of ``N`` tokens, at the temperature that it is for."""

    labels: Tensor
    """int64 ``(N,)``: the token that follows."""
    student: Tensor
    """``(N, V)`` log-probabilities."""
    teacher: Any
    """The same of the teacher, ``Sparse`` or ``Buckets``; None for cross-entropy."""
    settings: Settings


LOSSES: dict[str, Callable[[Tokens], Loss]] = {
    "cross_entropy": lambda t: cross_entropy(t.student, t.labels),
    "forward_kl": lambda t: forward_kl(t.student, t.teacher),
    "reverse_kl": lambda t: reverse_kl(t.student, t.teacher),
    "skewed_kl": lambda t: skewed_kl(t.student, t.teacher, t.settings.skew),
    "skewed_reverse_kl": lambda t: skewed_reverse_kl(t.student, t.teacher, t.settings.skew),
    "jsd": lambda t: generalized_jsd(t.student, t.teacher, t.settings.jsd_beta),
    "total_variation": lambda t: total_variation(t.student, t.teacher),
}


def _loss(name: str, tokens: Tokens) -> Loss:
    """A loss of ``LOSSES``; of a teacher who tells of ``Buckets``, that of the outcomes."""
    told = tokens.teacher
    if not isinstance(told, Buckets) or name == "cross_entropy":
        return LOSSES[name](tokens)
    at = tokens.student.gather(-1, told.ids)
    others = (1 - at.exp().sum(-1, keepdim=True)).clamp_min(1e-6)
    outcomes = torch.cat([at, others.log()], -1)
    nats, slope = LOSSES[name](replace(tokens, student=outcomes, teacher=told.log_probs.to(at.dtype)))
    assert isinstance(slope, Tensor)
    # The probability of the others is what the ids leave: it falls with each of theirs.
    return Loss(nats, AtIds(told.ids, slope[:, :-1] - slope[:, -1:] * (at.exp() / others)))


def needs_teacher(weights: Mapping[str, float]) -> bool:
    """Whether any of the losses reads the teacher."""
    return any(name != "cross_entropy" for name in weights)


def summed_losses(
    student: Outputs,
    teacher: Teaching | None,
    labels: Tensor,
    mask: Tensor,
    weights: Mapping[str, float],
    settings: Settings = PLAIN,
) -> tuple[Tensor, Tensor]:
    """The weighted losses, summed over the tokens that ``mask`` keeps. Divide by their number for the mean.

    Logits are made a chunk of tokens at a time, and each chunk's gradient, by hidden states and head, at once: nothing
    of size (B, T, V) is held. Not twice differentiable.

    Args:
        student: what it says of the batch; its ``vocab_size`` counts, the teacher gives as many.
        teacher: None if no loss reads it; no gradient reaches it.
        labels: int64 ``(B, T)``, the token that follows each position.
        mask: ``(B, T)``, non-zero where the label is trained on.
        weights: weight of each name in ``LOSSES``.

    Returns:
        The weighted sum, a scalar to call backward on; and the unweighted sum of each loss, ``(len(weights),)`` in
        the order of ``weights``, without gradient. Both float32, or float64 for float64 hidden states.
    """
    if teacher is None and needs_teacher(weights):
        raise ValueError(f"{', '.join(weights)} need a teacher")
    chosen, labels = mask.flatten().nonzero().squeeze(-1), labels.flatten()

    def judge(logits: Tensor, index: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
        told = teacher.rows(index) if teacher is not None and needs_teacher(weights) else None
        return _judge(logits, told, labels[index], weights, settings, slopes)

    head = student.head or Head(torch.empty(0))
    total, parts = _Fused.apply(
        student.hidden.flatten(0, 1), head.weight, head.bias, student, chosen, judge, tuple(weights.values())
    )
    return total, parts


def _judge(
    logits: Tensor,
    teacher: Tensor | Sparse | Buckets | None,
    labels: Tensor,
    weights: Mapping[str, float],
    settings: Settings,
    slopes: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums of each loss over ``(n, V)`` logits, which are lost; and the weighted sum's derivative by them, in their
    place.

    A divergence at temperature T is multiplied by T², so that its gradient keeps its size as T grows (Hinton et al.
    2015); cross-entropy sees the plain distribution.
    """
    by_temperature: dict[float, list[str]] = {}
    for name in weights:
        by_temperature.setdefault(1.0 if name == "cross_entropy" else settings.temperature, []).append(name)
    sums, derivative = {}, None
    for left, (temperature, names) in enumerate(by_temperature.items(), 1 - len(by_temperature)):
        told = teacher if temperature == settings.temperature else None
        if isinstance(told, Tensor):
            told = _log_probs_(told, temperature)
        # The last may have the logits' place.
        tokens = Tokens(labels, _log_probs_(logits.clone() if left else logits, temperature), told, settings)
        slope = _Slope(tokens.student)
        for name in names:
            nats, by_log_probs = _loss(name, tokens)
            sums[name] = temperature**2 * nats.sum()
            if slopes:
                slope.add(by_log_probs, weights[name] * temperature)
            del by_log_probs
        if slopes:
            by_logits = slope.by_logits()
            derivative = by_logits if derivative is None else derivative.add_(by_logits)
    return torch.stack([sums[name] for name in weights]), derivative


def _log_probs_(logits: Tensor, temperature: float) -> Tensor:
    """``log_probs`` in the place of the logits."""
    logits.clamp_min_(FLOOR)
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


class _Slope:
    """Adds up slopes by log-probabilities, ``(n, V)``, with few copies of that size."""

    def __init__(self, log_probs: Tensor) -> None:
        self._log_probs = log_probs
        self._dense: Tensor | None = None
        self._at: list[AtIds] = []

    def add(self, slope: Tensor | AtIds, weight: float) -> None:
        if isinstance(slope, AtIds):
            self._at.append(AtIds(slope.ids, slope.values * weight))
        elif self._dense is None:
            self._dense = slope.mul_(weight)
        else:
            self._dense.add_(slope, alpha=weight)

    def by_logits(self) -> Tensor:
        """The derivative by logits: the slope less q times its sum. The log-probabilities are lost."""
        total = torch.zeros_like(self._log_probs[:, 0])
        if self._dense is not None:
            total += self._dense.sum(-1)
        for at in self._at:
            total += at.values.sum(-1)
        found = self._log_probs.exp_().mul_(-total.unsqueeze(-1))
        for at in self._at:
            found.scatter_add_(1, at.ids, at.values)
        return found if self._dense is None else found.add_(self._dense)


class _Fused(torch.autograd.Function):
    """Head and losses over chunks of tokens; the gradient is computed in the forward pass, while a chunk is there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: Outputs,
        chosen: Tensor,
        judge: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]],
        weights: tuple[float, ...],
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        exact, dtype = wide(hidden[:0]).dtype, working_dtype(hidden, weight)
        scale = torch.tensor(weights, dtype=exact, device=hidden.device)
        parts = torch.zeros_like(scale)
        gradients = _Gradients(
            torch.zeros_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=exact) if wanted[1] else None,
            torch.zeros_like(bias, dtype=exact) if bias is not None and wanted[2] else None,
        )
        for index in chosen.split(chunk_rows(student)):
            chunk = hidden.index_select(0, index)
            logits, bend = _logits(student, chunk)
            sums, slope = judge(logits, index, any(wanted))
            parts += sums
            if slope is not None:
                with torch.autocast(hidden.device.type, enabled=False):
                    gradients.add(student.head, dtype, chunk, slope if bend is None else slope.mul_(bend), index)
        by_hidden, by_weight, by_bias = gradients
        # Not saved for backward: what is held nowhere else becomes the parameter's gradient without a copy.
        ctx.gradients = [
            by_hidden,
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None or bias is None else by_bias.to(bias.dtype),
        ]
        ctx.mark_non_differentiable(parts)
        return (parts * scale).sum(), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _of_parts: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of summed_losses was taken before, and is gone")
        return (*(None if g is None else g.mul_(of_total) for g in gradients), None, None, None, None)


class _Gradients(NamedTuple):
    """By hidden states ``(N, H)``, head ``(V, H)`` and its bias; None where nobody wants one."""

    by_hidden: Tensor | None
    by_weight: Tensor | None
    by_bias: Tensor | None

    def add(self, head: Head | None, dtype: torch.dtype, chunk: Tensor, slope: Tensor, index: Tensor) -> None:
        """Of a chunk ``(n, H)``, from the derivative ``(n, V)`` by the head's products."""
        count = slope.shape[1]
        if self.by_bias is not None:
            self.by_bias[:count] += slope.sum(0)
        if head is not None:
            chunk, slope = chunk.to(dtype), slope.to(dtype)
        if self.by_hidden is not None:
            by_chunk = slope if head is None else slope @ head.weight[:count].to(dtype)
            self.by_hidden[:, : by_chunk.shape[1]].index_copy_(0, index, by_chunk.to(self.by_hidden.dtype))
        if self.by_weight is None:
            return
        if dtype == self.by_weight.dtype:
            self.by_weight[:count].addmm_(slope.T, chunk)
        else:
            self.by_weight[:count] += slope.T @ chunk


def chunk_rows(student: Outputs) -> int:
    """Tokens whose logits are made at a time."""
    hidden, head = student.hidden, student.head
    width = student.vocab_size or (head.weight.shape[0] if head else hidden.shape[-1])
    return max(CHUNK_TOKENS, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (4 * width))


def _logits(student: Outputs, chunk: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits ``(n, V)`` of some tokens, and their derivative by the head's product where it is not one."""
    head = student.head
    if head is None:
        return wide(chunk[:, : student.vocab_size]), None
    logits = bent(head, product(head, chunk, student.vocab_size))
    if head.cap is None:
        return logits, None if head.scale == 1.0 else torch.full_like(logits[:, :1], head.scale)
    return logits, (logits / head.cap).square_().neg_().add_(1).mul_(head.scale)
