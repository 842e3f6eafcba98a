"""The student as it is while it learns: where its weights lie, how wide they are, and what follows their gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .head import WithHead, with_head
from .ranks import Ranks, sharded, whole

if TYPE_CHECKING:
    from ..spec import TrainingSpec


@contextmanager
def learning(model: nn.Module, ranks: Ranks) -> Iterator[WithHead]:
    """``model`` as it is trained, on the training device; what it has learned is in ``model`` afterwards.

    Several processes train a copy that is sharded over them.
    """
    if ranks.count == 1:
        student = with_head(model.to(ranks.device))
        yield student
        return
    student = copy.deepcopy(with_head(model))
    trained: Any = student.model
    sharded(student, trained.get_decoder().layers, ranks)
    yield student
    with torch.no_grad():
        for mine, parameter in zip(model.parameters(), trained.parameters(), strict=True):
            mine.copy_(whole(parameter))


def adamw(model: nn.Module, spec: TrainingSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); norms and biases do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)


def clip(model: nn.Module, most: float) -> float:
    """Scale the gradients down to a norm of ``most``; the norm that they had, over all processes."""
    norm: Tensor = nn.utils.clip_grad_norm_(model.parameters(), most)
    return float(whole(norm))
