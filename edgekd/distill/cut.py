"""Which layers, channels and MLP units of the teacher a cut student keeps: chosen by what the teacher does on a little
text, before any training.

Layers go one at a time, each time the one without which the outputs stay nearest to the teacher's (greedy backward
elimination by KL). Widths are cut by the activations behind the layers that stay (Minitron, Muralidharan et al. 2024).

Shapes: ``B`` windows, ``T`` tokens, ``V`` vocabulary, ``H`` channels, ``U`` MLP units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import EdgekdError, SpecError
from ..files import read_json, write_json
from ..spec import CUT_TOKENS
from ..student import Kept, largest
from .losses import forward_kl, log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..spec import CutStudent
    from .data import Windows

_TEMPERATURES = (0.6, 0.75, 0.9, 1.0, 1.2, 1.5, 2.0)
"""A cut shifts the scale of the logits, which the first steps of training mend; so candidates are compared at the best
of these, or the choice would be of scales."""

_CHUNK = 64
"""Positions compared at a time: a vocabulary of 152k makes 40 MB of them."""

Tell = Callable[[float, str], None]
LAYERS, WIDTHS = "kept.json", "kept.safetensors"


def sample(windows: Windows) -> Tensor:
    """int64 ``(B, T)``: some ``CUT_TOKENS`` tokens of a split, evenly spaced, the same every time."""
    length = min(CUT_TOKENS, windows.ids.shape[1])
    count = min(CUT_TOKENS // length, len(windows))
    index = (2 * torch.arange(count) + 1) * len(windows) // (2 * count)
    return windows.ids[index, :length].long()


def choose(spec: CutStudent, teacher: PreTrainedModel, ids: Tensor, tell: Tell | None = None) -> Kept:
    """What to keep of ``teacher`` for the student that ``spec`` describes.

    Args:
        ids: int64 ``(B, T)``, text like that of the training.
        tell: told of the share of the work that is done, and a note.
    """
    *_, (layers, _) = road(teacher, ids, spec.depth, tell)
    return with_widths(spec, teacher, ids, layers)


def road(
    teacher: PreTrainedModel, ids: Tensor, fewest: int, tell: Tell | None = None
) -> Iterator[tuple[list[int], float]]:
    """The layers that are kept, from all of them down to ``fewest``, each with its distance from the teacher: KL in
    nats per token at the best of a few temperatures."""
    with _skipping(teacher) as chain:
        kept = list(range(len(chain.layers)))
        reference = log_probs(chain.logits(ids)).flatten(0, 1)
        yield kept, 0.0
        steps = len(kept) - fewest
        for step in range(steps):
            distances = {}
            for i, without in enumerate(chain.without_each(ids, kept)):
                distances[kept[i]] = _distance(without, reference)
                if tell:
                    tell((step + (i + 1) / len(kept)) / steps, f"{len(kept) - 1} layers")
            gone = min(distances, key=distances.__getitem__)
            kept = [layer for layer in kept if layer != gone]
            yield kept, distances[gone]


def _distance(logits: Tensor, reference: Tensor) -> float:
    """KL(reference || softmax(logits / t)), the mean over positions, at the t of ``_TEMPERATURES`` that makes it least.

    Args:
        logits: ``(B, T, V)``.
        reference: log-probabilities ``(B · T, V)``.
    """
    sums = torch.zeros(len(_TEMPERATURES), dtype=torch.float64)
    for ours, theirs in zip(logits.flatten(0, 1).split(_CHUNK), reference.split(_CHUNK), strict=True):
        for i, temperature in enumerate(_TEMPERATURES):
            sums[i] += forward_kl(log_probs(ours, temperature), theirs).nats.sum().cpu()
    return float(sums.min()) / len(reference)


class _Chain:
    """A model whose decoder layers can be left out, each by a switch of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = list(decoder_layers(model))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """``(B, T, V)`` of the layers that are not switched off."""
        return self.model(input_ids=ids.to(self.model.device), use_cache=False).logits

    def without_each(self, ids: Tensor, kept: Sequence[int]) -> Iterator[Tensor]:
        """The logits of ``kept`` without its first, without its second, and so on. What lies before a layer is computed
        once: half the work."""
        entering: dict[int, Tensor] = {}
        for layer in range(len(self.layers)):
            self.switch(layer, None if layer in kept else _pass)
        hooks = [
            self.layers[i].register_forward_pre_hook(_remember(entering, i), with_kwargs=True)  # type: ignore[arg-type]
            for i in kept
        ]
        try:
            self.logits(ids)
        finally:
            for hook in hooks:
                hook.remove()
        for layer in kept:
            self.switch(layer, _give(entering[layer]))
            yield self.logits(ids)
            self.switch(layer, _pass)  # those behind start from what enters them

    def switch(self, layer: int, instead: Callable[..., Tensor] | None) -> None:
        """Have a layer do something else; None: its own work."""
        vars(self.layers[layer]).pop("forward", None)
        if instead:
            self.layers[layer].forward = instead


def _pass(hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
    return hidden_states


def _give(hidden: Tensor) -> Callable[..., Tensor]:
    return lambda *others, **named: hidden


def _remember(entering: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def hook(module: torch.nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        entering[layer] = given[0] if given else named["hidden_states"]

    return hook


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers of a causal language model.

    Raises:
        SpecError: they do not stand where they do in every family that can be cut.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise SpecError(f"student.choose: {type(model).__name__} has no model.layers to try.", "Set it to even.")
    return layers


@contextmanager
def _skipping(model: PreTrainedModel) -> Iterator[_Chain]:
    """The model as a chain, whole again afterwards."""
    chain = _Chain(model)
    try:
        yield chain
    finally:
        for layer in range(len(chain.layers)):
            chain.switch(layer, None)


@torch.no_grad()
def with_widths(spec: CutStudent, teacher: PreTrainedModel, ids: Tensor, layers: Sequence[int]) -> Kept:
    """``layers``, and where the student is narrower the channels and units of largest activations behind them.

    A channel counts by its share of the energy of the hidden states that enter the kept layers and the last norm; a
    unit by the root mean square of its activation times the norm of the column that it writes with.
    """
    decoder = decoder_layers(teacher)
    width = spec.intermediate_size
    energy: list[Tensor] = []
    units: dict[int, Tensor] = {}

    def enters(module: torch.nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        hidden = (given[0] if given else named["hidden_states"]).double().flatten(0, -2).square()
        energy.append((hidden / hidden.mean(-1, keepdim=True)).mean(0))

    def works(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Linear, given: tuple[Tensor, ...]) -> None:
            active = given[0].double().flatten(0, -2).square().mean(0).sqrt()
            units[layer] = active * module.weight.double().norm(dim=0)

        return hook

    watched = [decoder[i] for i in layers] + [teacher.model.norm]
    hooks = [module.register_forward_pre_hook(enters, with_kwargs=True) for module in watched]  # type: ignore[arg-type]
    blocks: Any = decoder
    downs = {i: blocks[i].mlp.down_proj for i in layers if width}
    hooks += [down.register_forward_pre_hook(works(i)) for i, down in downs.items()]
    try:
        with _skipping(teacher) as chain:
            for layer in set(range(len(decoder))) - set(layers):
                chain.switch(layer, _pass)
            chain.logits(ids)
    finally:
        for hook in hooks:
            hook.remove()
    channels = None
    if spec.hidden_size is not None and spec.hidden_size < len(energy[0]):
        channels = largest(torch.stack(energy).sum(0), spec.hidden_size)
    return Kept(tuple(layers), channels, {i: largest(of, width) for i, of in units.items()} if width else {})


def write_kept(folder: Path, kept: Kept) -> None:
    """Write what ``read_kept`` reads."""
    write_json(folder / LAYERS, {"layers": list(kept.layers)})
    widths = {f"units.{layer}": units for layer, units in kept.units.items()}
    if kept.channels is not None:
        widths["channels"] = kept.channels
    if widths:
        save_file(widths, folder / WIDTHS)


def read_kept(folder: Path) -> Kept:
    """What ``write_kept`` wrote.

    Raises:
        EdgekdError: it cannot be read.
    """
    layers = read_json(folder / LAYERS)["layers"]
    try:
        widths = load_file(folder / WIDTHS) if (folder / WIDTHS).is_file() else {}
    except (OSError, SafetensorError) as error:
        raise EdgekdError(f"{folder / WIDTHS}: not readable ({error}).", "Remove it.") from error
    units = {int(name.removeprefix("units.")): of for name, of in widths.items() if name.startswith("units.")}
    assert isinstance(layers, list)
    return Kept(tuple(layers), widths.get("channels"), units)
