"""A teacher that takes less memory: it is never trained, so its weights may be narrow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..quant.grid import pack_int4, quantize_int4, unpack_int4
from ..quant.recipe import GROUP

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Int4Linear(nn.Module):
    """A frozen matrix on the int4 grid, rounded to nearest: half a byte a weight, and one scale a group. It is wide for
    the moment in which it is multiplied by.

    Args:
        linear: whose weight is ``(O, I)``, ``I`` divisible by ``GROUP``.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        q, scale = quantize_int4(linear.weight.detach())
        self.register_buffer("packed", pack_int4(q))
        self.register_buffer("scale", scale.bfloat16())  # which holds the grid's scales exactly
        self.bias = linear.bias

    def weight(self, dtype: torch.dtype) -> Tensor:
        """``(O, I)``."""
        groups = unpack_int4(self.packed).to(dtype).unflatten(1, (-1, GROUP))
        return (groups * self.scale.to(dtype).unsqueeze(-1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b``."""
        return functional.linear(x, self.weight(x.dtype), self.bias)


def narrowed(teacher: PreTrainedModel, layers: nn.ModuleList) -> PreTrainedModel:
    """``teacher`` with the matrices of its decoder layers as ``Int4Linear``, in place, one at a time; those whose width
    is no multiple of ``GROUP`` stay as they are."""
    for layer in layers:
        linears = [(name, part) for name, part in layer.named_modules() if isinstance(part, nn.Linear)]
        for name, linear in linears:
            if linear.in_features % GROUP == 0:
                layer.set_submodule(name, Int4Linear(linear))
    return teacher
