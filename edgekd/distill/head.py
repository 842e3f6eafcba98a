"""A decoder's hidden states and its head apart, so that logits exist only a few tokens at a time.

With a vocabulary of 152k, the logits of one window of 4,096 tokens are 2.5 GB in float32, and a loss over them holds
several such tensors. Whoever reads ``Outputs`` makes the rows that it needs and drops them.

Shapes: ``B`` windows, ``T`` tokens, ``N`` tokens in one flat row, ``H`` channels, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ..architecture import read_architecture
from ..errors import EdgekdError

R = TypeVar("R")
_PROBE_TOKENS = 8
_MOST_DIFFERENCE = 1e-2  # of the largest logit: bfloat16 rounds by 0.4 %


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: ``cap · tanh(scale · (h Wᵀ + b) / cap)``."""

    weight: Tensor
    """``(V, H)``."""
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch."""

    hidden: Tensor
    """``(B, T, H)``; without a head, the logits themselves, ``(B, T, V)``."""
    head: Head | None = None
    vocab_size: int | None = None
    """Ids that count, if not all rows of the head do."""

    def rows(self, index: Tensor) -> Tensor:
        """Logits of some tokens, ``(len(index), V)``, in float32 or better, without gradient."""
        with torch.no_grad():
            hidden = self.hidden.flatten(0, 1).index_select(0, index)
            if self.head is None:
                return wide(hidden[:, : self.vocab_size])
            return bent(self.head, product(self.head, hidden, self.vocab_size))


def product(head: Head, hidden: Tensor, vocab_size: int | None) -> Tensor:
    """``h Wᵀ + b`` of ``(n, H)``: multiplied as autocast or the weights say, given in float32 or better."""
    dtype = working_dtype(hidden, head.weight)
    with torch.autocast(hidden.device.type, enabled=False):
        made = wide(hidden.to(dtype) @ head.weight[:vocab_size].to(dtype).T)
        return made if head.bias is None else made.add_(head.bias[:vocab_size])


def bent(head: Head, logits: Tensor) -> Tensor:
    """Scale and soft cap, in place."""
    if head.scale != 1.0:
        logits.mul_(head.scale)
    return logits if head.cap is None else logits.div_(head.cap).tanh_().mul_(head.cap)


def working_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What a matrix product of the two is done in: autocast's choice, or the narrower of theirs."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype if hidden.dtype.itemsize < weight.dtype.itemsize else weight.dtype


def wide(tensor: Tensor) -> Tensor:
    """float32; float64 stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@runtime_checkable
class GivesOutputs(Protocol):
    """A model that knows its hidden states and its head itself."""

    def outputs(self, ids: Tensor, positions: Tensor | None = None) -> Outputs:
        """Of int64 ids ``(B, T)``; see ``WithHead.outputs``."""
        ...


class WithHead(nn.Module):
    """A causal language model whose forward pass hands hidden states and head to whoever judges them.

    The judge is called inside ``forward``: where parameters are sharded over processes, they are whole only there.

    Args:
        model: of transformers, or one that gives ``outputs``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._scale_and_cap = None if isinstance(model, GivesOutputs) else _scale_and_cap(model)

    def forward(self, ids: Tensor, judge: Callable[[Outputs], R], positions: Tensor | None = None) -> R:
        """``judge`` of what the model says of int64 ids ``(B, T)``; see ``outputs``."""
        return judge(self.outputs(ids, positions))

    def outputs(self, ids: Tensor, positions: Tensor | None = None) -> Outputs:
        """Of int64 ids ``(B, T)``; logits where the model's head is not one that is known.

        Args:
            positions: int64 ``(B, T)``; where they do not go on by one, another document begins, and transformers'
                masks keep the two apart. None: each window is one text.
        """
        model: Any = self.model
        if isinstance(model, GivesOutputs):
            return model.outputs(ids, positions)
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        if self._scale_and_cap is None:
            return Outputs(model(**given).logits)
        linear = model.get_output_embeddings()
        hidden = model.get_decoder()(**given).last_hidden_state
        return Outputs(hidden, Head(linear.weight, linear.bias, *self._scale_and_cap))


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers of a model of transformers."""
    layers: nn.ModuleList = model.get_decoder().layers
    return layers


def with_head(model: nn.Module) -> WithHead:
    """``model`` as ``WithHead``, which it may be already."""
    return model if isinstance(model, WithHead) else WithHead(model)


def _scale_and_cap(model: Any) -> tuple[float, float | None] | None:
    """Scale and soft cap of a model's head, proved on a few tokens; None where the head is another."""
    try:
        arch = read_architecture(model.config.to_dict())
        linear, body = model.get_output_embeddings(), model.get_decoder()
    except (EdgekdError, AttributeError, NotImplementedError):
        return None
    if not isinstance(linear, nn.Linear) or body is None or body is model:
        return None
    ids = torch.arange(_PROBE_TOKENS, device=linear.weight.device).remainder(linear.weight.shape[0])[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        head = Head(linear.weight, linear.bias, arch.logit_scale, arch.logit_cap)
        found = Outputs(hidden, head).rows(torch.arange(_PROBE_TOKENS, device=ids.device))
    model.train(was_training)
    if (found - expected).abs().max() <= _MOST_DIFFERENCE * expected.abs().max():
        return head.scale, head.cap
    return None
