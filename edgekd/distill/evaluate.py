"""How well a student predicts text, and how near its teacher it is.

Shapes: ``B`` windows, ``T`` tokens, ``V`` vocabulary, ``n`` tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..memory import CHUNK_TOKENS
from .data import Windows
from .head import Outputs, with_head
from .losses import Teaching, chunk_rows, cross_entropy, forward_kl, log_probs
from .ranks import ALONE, Ranks
from .signals import TeacherSignal


def evaluate(
    model: nn.Module,
    windows: Windows,
    *,
    teacher: TeacherSignal | None = None,
    batch_size: int = 8,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """How well ``model`` predicts the tokens that ``windows`` masks in, in float32, on the model's device.

    Args:
        teacher: also compare with it; rows beyond its ``vocab_size`` are cut from both.
        batch_size: windows of one forward pass.
        ranks: the processes that share the windows, and a model that is sharded over them.

    Returns:
        ``perplexity``, ``next_token_accuracy``, ``loss`` (nats per token) and ``tokens``; with a teacher also
        ``kl_to_teacher`` (mean KL(teacher || model), nats per token) and ``top1_agreement_with_teacher``.
    """
    return evaluate_all({"model": model}, windows, teacher=teacher, batch_size=batch_size, ranks=ranks)["model"]


@torch.no_grad()  # not inference_mode: some rotary embeddings renew a buffer that training then needs
def evaluate_all(
    models: Mapping[str, nn.Module],
    windows: Windows,
    *,
    teacher: TeacherSignal | None = None,
    batch_size: int = 8,
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, float]]:
    """``evaluate`` of several models that lie on one device; the teacher runs once for all of them."""
    students = {name: with_head(model) for name, model in models.items()}
    training = {name: student.training for name, student in students.items()}
    device = next(next(iter(students.values())).parameters()).device
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in students}
    for student in students.values():
        student.eval()
    for index, counts in _shared(len(windows), batch_size, ranks):
        ids, labels, mask, positions = windows.batch(index, device)
        mask = mask * counts
        with torch.autocast(device.type, enabled=False):
            told = teacher.teach(ids, None, positions) if teacher else None
            vocab_size = teacher.vocab_size if teacher else None
            judge = partial(_judged, teacher=told, vocab_size=vocab_size, labels=labels.flatten(), mask=mask.flatten())
            for name, student in students.items():
                sums[name] += student(ids, judge, positions)
    for name, student in students.items():
        student.train(training[name])
    return {name: _figures(ranks.sum(total), teacher is not None) for name, total in sums.items()}


def _shared(windows: int, batch_size: int, ranks: Ranks) -> list[tuple[Tensor, int]]:
    """This process's batches: numbers of windows, and 1 where they count, 0 where they only keep it with the others."""
    starts = list(range(0, windows, batch_size))
    rounds = math.ceil(len(starts) / ranks.count)
    mine = [
        starts[place] if place < len(starts) else None for place in range(ranks.rank, rounds * ranks.count, ranks.count)
    ]
    return [
        (torch.arange(start or 0, min(windows, (start or 0) + batch_size)), int(start is not None)) for start in mine
    ]


def _judged(student: Outputs, teacher: Teaching | None, vocab_size: int | None, labels: Tensor, mask: Tensor) -> Tensor:
    student = replace(student, vocab_size=vocab_size)
    return _summed(student, teacher, labels, mask, chunk_rows(student))


def _summed(model: Teaching, teacher: Teaching | None, labels: Tensor, mask: Tensor, at_a_time: int) -> Tensor:
    """Sums over the tokens that ``mask`` keeps: their number, loss, correct ones, KL to the teacher, agreement with
    it; float64 ``(5,)`` on the CPU."""
    sums = torch.zeros(5, dtype=torch.float64)
    for index in mask.nonzero().squeeze(-1).split(at_a_time):
        ours, label = log_probs(model.rows(index)), labels[index]
        top = ours.argmax(-1)
        found = [torch.tensor(len(index)), cross_entropy(ours, label).nats.sum(), (top == label).sum()]
        if teacher is not None:
            theirs = log_probs(teacher.rows(index))
            found += [forward_kl(ours, theirs).nats.sum(), (top == theirs.argmax(-1)).sum()]
        sums[: len(found)] += torch.stack([value.cpu().double() for value in found])  # Apple's GPUs have no float64
    return sums


def _figures(sums: Tensor, taught: bool) -> dict[str, float]:
    count = int(sums[0])
    loss, accuracy, kl, agreement = (sums[1:] / max(1, count)).tolist()
    figures = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "next_token_accuracy": accuracy,
        "tokens": count,
    }
    return figures | ({"kl_to_teacher": kl, "top1_agreement_with_teacher": agreement} if taught else {})


@torch.no_grad()
def evaluate_signal(signal: TeacherSignal, windows: Windows, *, batch_size: int = 8) -> dict[str, float]:
    """``evaluate`` of what a teacher says of text that it was not asked of in training."""
    sums = torch.zeros(5, dtype=torch.float64)
    for index in torch.arange(len(windows)).split(batch_size):
        ids, labels, mask, positions = windows.batch(index)
        told = signal.teach(ids, None, positions)
        sums += _summed(told, None, labels.flatten(), mask.flatten(), CHUNK_TOKENS)
    return _figures(sums, False)


def pooled(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of all texts, from those of each: means over all their tokens."""
    tokens = sum(part["tokens"] for part in parts)
    means = {name: sum(part[name] * part["tokens"] for part in parts) / max(1, tokens) for name in parts[0]}
    return means | {"perplexity": math.exp(min(means["loss"], 700.0)), "tokens": tokens}


def evenly_spaced(windows: Windows, count: int) -> Windows:
    """At most ``count`` windows of a split, the same every time; of a mixture as many of each source, or one."""
    if windows.sources is None:
        return windows.at(_spread(len(windows), count))
    members = [windows.of_source(place) for place in range(len(windows.mixture))]
    each = max(1, count // len(members))
    return windows.at(torch.cat([of[_spread(len(of), each)] for of in members]))


def _spread(total: int, count: int) -> Tensor:
    """At most ``count`` of ``total`` places, evenly spaced."""
    return torch.arange(min(count, total)) * total // min(count, total)
