"""What int4 costs each Linear of a student, in nats of KL a token: which of them a budget should keep in int8.

To second order, a small change ``e`` of a Linear's output moves the model's distribution by ``KL = (g . e)^2 / 2`` in
expectation, where ``g`` is the gradient of the log-likelihood of a token drawn from the model itself (Fisher
information; tokens are taken to be independent). ``e`` is the very change that rounding the matrix makes. Two passes
over a few windows, a layer in memory at a time: forwards, keeping what enters each layer, and back.

Shapes: hidden states ``(N, T, H)``; a Linear's inputs ``(B * T, I)``, outputs ``(B * T, O)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architecture import HEAD
from ..checkpoint import Checkpoint
from ..errors import EdgekdError
from ..matmul import fast_products
from .calibrate import Walk, batches
from .grid import GROUP, dequantize_int4, quantize_int4
from .recipe import Recipe, Rule, stored_bits

WINDOWS = 8
"""Of the calibration text."""


def sensitivities(folder: Path, ids: torch.Tensor) -> dict[str, float]:
    """The KL of each Linear of the layers, rounded to int4 alone, by HF parameter name; those whose width is no
    multiple of the group are left out.

    Args:
        folder: a model folder.
        ids: text, int ``(N, T)``; of many windows, ``WINDOWS`` evenly spaced ones are read.

    Raises:
        EdgekdError: as ``calibrate.second_moments``.
    """
    ids = ids[torch.linspace(0, len(ids) - 1, min(WINDOWS, len(ids))).round().long()]
    walk = Walk(Checkpoint(folder), ids)
    entered = [layer.entering for layer in walk]
    gradient = walk.sampled_gradient(torch.Generator().manual_seed(0))
    sums: dict[str, float] = {}
    for number in reversed(range(len(walk))):
        with walk.opened(number) as (linears, layer):
            _watch(linears, sums)
            hidden = entered.pop()
            for windows in batches(hidden):
                entering = hidden[windows].requires_grad_()
                with torch.enable_grad(), fast_products():
                    out = layer(entering)
                (gradient[windows],) = torch.autograd.grad(out, entering, gradient[windows])
    return {name: total / 2 / ids.numel() for name, total in sums.items()}


def _watch(linears: Mapping[str, nn.Linear], sums: dict[str, float]) -> None:
    """Add up what rounding each matrix does to the likelihoods, as gradients pass."""
    for name, linear in linears.items():
        if linear.in_features % GROUP == 0:
            error = dequantize_int4(*quantize_int4(linear.weight)) - linear.weight
            linear.register_forward_hook(partial(_add_when_it_comes, sums, name, error))


def _add_when_it_comes(
    sums: dict[str, float],
    name: str,
    error: torch.Tensor,
    _: nn.Module,
    args: tuple[torch.Tensor, ...],
    out: torch.Tensor,
) -> None:
    inputs = args[0].detach().flatten(0, -2).float()

    def add(gradient: torch.Tensor) -> None:
        change = ((inputs @ error.T) * gradient.flatten(0, -2).float()).sum(-1)
        sums[name] = sums.get(name, 0.0) + float(change.square().sum())

    out.register_hook(add)


def with_most_sensitive_in_int8(recipe: Recipe, folder: Path, ids: torch.Tensor | None) -> Recipe:
    """A recipe with a budget of bits, as one without: a rule for each matrix that the budget keeps in int8. Others are
    as they were.

    Those come first that save most KL for a bit; what does not fit is passed over for what does.

    Args:
        folder: a model folder.
        ids: text, int ``(N, T)``.

    Raises:
        EdgekdError: no text, too small a budget, or as ``sensitivities``.
    """
    if recipe.bits is None:
        return recipe
    source = Checkpoint(folder)
    shapes = {name: source.shape(name) for name in source if not (source.tied and name == HEAD)}
    weights = sum(map(math.prod, shapes.values()))
    room = recipe.bits * weights - sum(stored_bits(recipe.kind_of(n, s), s) for n, s in shapes.items())
    if room < 0:
        least = recipe.bits - room / weights
        raise EdgekdError(
            f"quantize.bits: {recipe.name} of {recipe.bits:g} bits per weight: with all that may be int4 in int4, this "
            f"student has {least:.2f}.",
            f"Give at least {math.ceil(100 * least) / 100:.2f}.",
        )
    if ids is None:
        remedy = "Quantize the student first, with text."
        raise EdgekdError(f"{recipe.name} needs calibration text to choose what is int8.", remedy)
    costs = {n: cost for n, cost in sensitivities(folder, ids).items() if recipe.kind_of(n, shapes[n]) == "int4"}
    extra = {name: stored_bits("int8", shapes[name]) - stored_bits("int4", shapes[name]) for name in costs}
    kept = []
    for name in sorted(costs, key=lambda name: -costs[name] / extra[name]):
        if extra[name] <= room:
            room -= extra[name]
            kept.append(Rule(match=name, kind="int8"))
    return recipe.model_copy(update={"rules": (*kept, *recipe.rules)})
