"""How much of a difference is a runtime's arithmetic: the same rounding, done in torch to the model it should compute.

A fault of an exporter or a runtime changes the logits by more than that; a gate on it needs no constant that was fitted
to a model. Measured on SmolLM2-135M and on the quickstart's student, a sound runtime's KL to the model it packs was 0.5
to 1.4 times the KL of this rounding (llama.cpp, onnxruntime, ExecuTorch, and the stand-in for Core ML).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..session import Arithmetic
from .parity import NOISE_WINDOWS, Logits, compare
from .reference import logits_of, remembering

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear
    from transformers import PreTrainedModel

_LARGEST_INT8 = 127
_MOST_SUMS = 1024
"""Wider matrices are added up several products at a time, so that a large model's floor does not take hours."""


def noise_of(
    model: PreTrainedModel, arithmetic: Arithmetic, windows: np.ndarray, exact: Logits | None = None
) -> float | None:
    """KL(model || model in that arithmetic), nats per token, on the first windows; 0 for float32.

    Args:
        windows: int ``(N, T)``.
        exact: ``remembering`` the model's logits of the first windows; they are computed where it does not yet.
    """
    if arithmetic == "float32":
        return 0.0
    windows = windows[:NOISE_WINDOWS]
    logits = logits_of(model)
    exact = exact or remembering(logits, windows)
    for ids in windows:
        exact(ids)
    with _rounding(model, arithmetic):
        return compare(exact, logits, windows).kl_mean


@contextmanager
def _rounding(model: PreTrainedModel, arithmetic: Arithmetic) -> Iterator[None]:
    """Round the inputs of every matrix product, and in half precision the matrices too."""
    from torch.nn import Embedding, Linear

    def before(layer: Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_ROUND[arithmetic](inputs[0].float()), *inputs[1:])

    def after(layer: Linear | Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.half()

    linears = [module for module in model.modules() if isinstance(module, Linear)]
    hooks = [linear.register_forward_pre_hook(before) for linear in linears]
    if arithmetic == "float16 sums":
        hooks += [linear.register_forward_hook(_added_up_in_half) for linear in linears]
    kept: list[tuple[Any, Tensor]] = []
    if arithmetic.startswith("float16"):
        # The embedding that is also the head is one tensor, which must be put back once.
        kept = [(weight, weight.data) for weight in {id(linear.weight): linear.weight for linear in linears}.values()]
        for weight, exact in kept:
            weight.data = _halved(exact)
    if arithmetic == "float16 throughout":
        # Matrix products accumulate in float32, and what they give is half; then so is what every other operator gives.
        matrices = [*linears, *(module for module in model.modules() if isinstance(module, Embedding))]
        hooks += [matrix.register_forward_hook(after) for matrix in matrices]
        held = {id(weight) for matrix in matrices for weight in matrix.parameters(recurse=False)}
        others = [(weight, weight.data) for weight in model.parameters() if id(weight) not in held]
        for weight, exact in others:
            weight.data = exact.half()
        kept += others
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, exact in kept:
            weight.data = exact


def _added_up_in_half(layer: Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A matrix product, one input after the other, as a GPU's thread does it."""
    x, weight, total = inputs[0], layer.weight, output.new_zeros(output.shape)
    step = -(-x.shape[-1] // _MOST_SUMS)
    for start in range(0, x.shape[-1], step):
        chosen = slice(start, start + step)
        total = _halved(total + x[..., chosen] @ weight[:, chosen].T)
    return total if layer.bias is None else total + layer.bias


def _halved(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def _by_32(x: Tensor) -> Tensor:
    """Symmetric, a scale for 32 inputs; the last block may be shorter."""
    import torch

    width = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -width % 32)).unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / _LARGEST_INT8
    return ((blocks / step).round() * step).flatten(-2)[..., :width]


def _by_token(x: Tensor) -> Tensor:
    """Asymmetric, a scale and a zero point for all inputs of a token."""
    import torch

    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    step = (high - low).clamp_min(torch.finfo(x.dtype).tiny) / (2 * _LARGEST_INT8 + 1)
    return ((x - low) / step).round() * step + low


_ROUND: dict[Arithmetic, Callable[[Tensor], Tensor]] = {
    "float16": _halved,
    "float16 sums": _halved,
    "float16 throughout": _halved,
    "int8 by 32": _by_32,
    "int8 by token": _by_token,
}
