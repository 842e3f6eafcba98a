"""What the student's layers give, pulled towards what the teacher's give by a learned projection (FitNets, Romero et
al. 2014): a loss that reads the inside of both, beside those that read their distributions.

Adding a place to compare: one line in ``POINTS``, its name in ``spec.MatchName``.

Shapes: ``n`` tokens, ``S`` channels of the student, ``H`` of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .head import layers_of

if TYPE_CHECKING:
    from ..spec import MatchSpec

POINTS: dict[str, Callable[[Any], nn.Module]] = {
    "hidden": lambda layer: layer,
    "attention": lambda layer: layer.self_attn,
}
"""The module of a decoder layer whose output is compared: the layer's own, or what its attention adds."""
Pair = tuple[int, int]


def layer_pairs(student: int, teacher: int, given: Sequence[Sequence[int]] = ()) -> list[Pair]:
    """Which layer of the teacher each of the student's is compared with, from 0.

    Default: each stands for as many of the teacher's as any other, and gives what the last of them does.
    """
    if given:
        return [(ours, theirs) for ours, theirs in given]
    return [(layer, max(0, round((layer + 1) * teacher / student) - 1)) for layer in range(student)]


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``|s - t|² / |t|²`` of each token, ``(n,)``: no layer, and no token of huge activations, outweighs the others.

    Args:
        student: projected, ``(n, H)``.
        teacher: ``(n, H)``.
    """
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


class Matching(nn.Module):
    """The comparison of two models' layers; its parameters are the projections, which learn along and are forgotten.

    Args:
        student: of transformers.
        teacher: the same; no gradient reaches it.
        seed: of the projections, where widths differ; else they begin as they are.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: MatchSpec, seed: int) -> None:
        super().__init__()
        self.weights = dict(spec.weights)
        self._models = (student, teacher)  # in a tuple, so that they are no part of this module
        self._heard: dict[tuple[int, str, int], Tensor] = {}
        ours, theirs = (layers_of(model) for model in self._models)
        self.pairs = layer_pairs(len(ours), len(theirs), spec.layers)
        width, wanted = (_width(model) for model in self._models)
        generator = torch.Generator().manual_seed(seed)
        self.projections = nn.ParameterDict(
            {
                f"{name}-{layer}": nn.Parameter(_projection(width, wanted, generator))
                for name in self.weights
                for layer, _ in self.pairs
            }
        )
        self.to(next(student.parameters()).device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While both models run: what ``loss`` compares."""
        handles = []
        for side, model in enumerate(self._models):
            for layer in sorted({pair[side] for pair in self.pairs}):
                for name in self.weights:
                    hook = partial(self._hear, (side, name, layer))
                    handles.append(POINTS[name](layers_of(model)[layer]).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._heard.clear()

    def _hear(self, key: tuple[int, str, int], module: nn.Module, given: object, out: Any) -> None:
        self._heard[key] = out[0] if isinstance(out, tuple) else out

    def loss(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum over the tokens that ``mask`` ``(B, T)`` keeps, a scalar with gradient; and each place's own
        sum, without weight or gradient, in the order of ``weights``. Of the pairs of layers, the mean."""
        chosen = mask.flatten().nonzero().squeeze(-1)
        sums = []
        for name in self.weights:
            errors = [self._error(name, pair, chosen) for pair in self.pairs]
            sums.append(torch.stack(errors).mean())
        parts = torch.stack(sums)
        return (parts * parts.new_tensor([*self.weights.values()])).sum(), parts.detach()

    def _error(self, name: str, pair: Pair, chosen: Tensor) -> Tensor:
        ours, theirs = (
            self._heard[side, name, layer].flatten(0, 1).index_select(0, chosen) for side, layer in enumerate(pair)
        )
        with torch.autocast(ours.device.type, enabled=False):
            weight = self.projections[f"{name}-{pair[0]}"]
            return relative_error(ours.to(weight.dtype) @ weight, theirs.to(weight.dtype)).sum()


def _width(model: Any) -> int:
    width: int = model.config.hidden_size
    return width


def _projection(student: int, teacher: int, generator: torch.Generator) -> Tensor:
    """``(S, H)``."""
    if student == teacher:
        return torch.eye(student)
    return torch.randn(student, teacher, generator=generator) / student**0.5
