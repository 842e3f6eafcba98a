"""Walk a decoder over calibration text, one layer in memory at a time, and measure what its Linears see.

Shapes: ``N`` windows of ``T`` tokens, ``B`` of them in a batch; ``H`` hidden channels; a Linear has ``I`` inputs.
Hidden states are float32 ``(N, T, H)`` and stay in memory for all windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import EdgekdError
from ..matmul import fast_float32, fast_products

BATCH_TOKENS = 2048
_LOGITS = 2**25  # that are in memory together
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """Ends a layer's forward pass at the Linear whose input was wanted."""


class _Catcher(nn.Module):
    """Stands for a layer and keeps what the model passes to it beside the hidden states."""

    call: _Call

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.call = (args, kwargs)
        return hidden


@dataclass(frozen=True)
class _Part:
    """A module of a layer that gives what its last Linear gives: alone, or before some Nones."""

    module: nn.Module
    nones: int | None
    """None: alone, not in a tuple."""

    def shaped(self, out: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """The Linear's output in the shape of the module's."""
        return out if self.nones is None else (out, *[None] * self.nones)


@dataclass
class Layer:
    """One decoder layer in float32, with the hidden states that enter it."""

    linears: dict[str, nn.Linear]
    """By HF parameter name of the weight; those that the layer runs, in order of execution."""
    groups: list[list[str]]
    """Names of the Linears that share one input, in order of execution."""
    _name: str
    _module: nn.Module
    _call: _Call
    _hidden: torch.Tensor
    _ends: Mapping[str, _Part]
    """Parts of the layer by the Linear whose output is theirs."""
    _kept: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """What entered those Linears, batch by batch."""
    _batch: int = 0
    _passed: bool = False

    @property
    def entering(self) -> torch.Tensor:
        """The hidden states that enter it; a copy."""
        return self._hidden.clone()

    def inputs(self, name: str) -> Iterator[torch.Tensor]:
        """What enters a Linear, float32 ``(B * T, I)`` for each batch, as the layer's weights stand now."""
        kept: list[torch.Tensor] = []
        for number, windows in enumerate(batches(self._hidden)):
            self._batch = number
            kept.append(self._input(name, self._hidden[windows]))
            yield kept[-1].flatten(0, -2).float()
            if name not in self._ends:
                kept.clear()
        self._kept[name] = kept

    def settle(self, name: str) -> None:
        """Hold what a Linear gives, whose inputs were all seen and whose weights stay from now on, as do those of all
        before it: where it is the end of a part of the layer, that part is not computed again."""
        if name in self._ends and self._kept.get(name):
            part, linear, kept = self._ends[name], self.linears[name], self._kept[name]
            # A function of the instance: it stands before the class's.
            part.module.forward = lambda *_, **__: part.shaped(linear(kept[self._batch]))  # type: ignore[method-assign]

    def _input(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            caught.append(args[0])
            raise _Reached

        handle = self.linears[name].register_forward_pre_hook(catch)
        try:
            self._run(hidden)
        except _Reached:
            pass
        finally:
            handle.remove()
        return caught[0]

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._call
        with torch.no_grad(), fast_products():
            return self._module(hidden, *args, **kwargs)

    def advance(self, record: Iterable[str] = ()) -> dict[str, list[torch.Tensor]]:
        """Put the layer's outputs in place of the hidden states, which its hooks see pass, and drop its weights. A walk
        does so by itself when its loop goes on.

        Args:
            record: Linears whose inputs are wanted.

        Returns:
            For each of them, what ``inputs`` gives, in bfloat16.
        """
        recorded: dict[str, list[torch.Tensor]] = {name: [] for name in record}
        handles = [self.linears[n].register_forward_pre_hook(_keeper(kept)) for n, kept in recorded.items()]
        for number, windows in enumerate([] if self._passed else batches(self._hidden)):
            self._batch = number
            out = self._run(self._hidden[windows])
            if not torch.isfinite(out).all():
                raise EdgekdError(
                    f"{self._name}: its outputs on the calibration text are NaN or infinite.",
                    "Train or save the student again.",
                )
            self._hidden[windows] = out
        for handle in handles:
            handle.remove()
        self._module.to("meta")
        self._passed = True
        return recorded


class Walk:
    """A decoder over ``ids``, which are int ``(N, T)``.

    Raises:
        EdgekdError: ids are no window or lie beyond the vocabulary, or the architecture cannot be walked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: torch.Tensor,
        embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """``embed`` changes the embedding's rows on their way in: ids ``(rows,)`` and float32 ``(rows, H)`` to the
        latter's like."""
        self._checkpoint = checkpoint
        model, self._base, self.embedding_name, self.head_name = _skeleton(checkpoint)
        _check_ids(ids, model.get_input_embeddings().num_embeddings)
        self._names = {module: name for name, module in model.named_modules()}
        self._calls = _calls(checkpoint, self._base, ids.shape[1])
        # safetensors maps the file: only the rows that are gathered are read.
        rows = _tensor(checkpoint, self.embedding_name)
        self._hidden = torch.empty((*ids.shape, rows.shape[1]))
        for windows in batches(self._hidden):
            index = ids[windows].flatten().long()
            gathered = rows[index].float()
            entering = (embed(index, gathered) if embed else gathered) * checkpoint.architecture.embedding_scale
            self._hidden[windows] = entering.view(self._hidden[windows].shape)

    def __len__(self) -> int:
        """Number of decoder layers."""
        return len(self._base.layers)

    def __iter__(self) -> Iterator[Layer]:
        """The layers in order. When the loop goes on, the hidden states pass through the layer as it then stands.

        Raises:
            EdgekdError: a layer's outputs are not finite, or a weight is missing.
        """
        for module, call in zip(self._base.layers, self._calls, strict=True):
            name = self._names[module]
            _materialise(self._checkpoint, module, name)
            groups, ends = _probe(module, name, call, self._hidden[:1])
            linears = {n: module.get_submodule(n[len(name) + 1 :].removesuffix(".weight")) for g in groups for n in g}
            layer = Layer(linears, groups, name, module, call, self._hidden, ends)  # type: ignore[arg-type]
            yield layer
            layer.advance()

    @contextmanager
    def opened(self, number: int) -> Iterator[tuple[dict[str, nn.Linear], Callable[[torch.Tensor], torch.Tensor]]]:
        """A layer's Linears by name, and what it makes of hidden states; its weights are in memory meanwhile."""
        module, (args, kwargs) = self._base.layers[number], self._calls[number]
        name = self._names[module]
        _materialise(self._checkpoint, module, name)
        parts = {f"{name}.{path}.weight": part for path, part in module.named_modules()}
        linears = {key: part for key, part in parts.items() if isinstance(part, nn.Linear)}
        yield linears, lambda hidden: module(hidden, *args, **kwargs)
        module.to("meta")

    def sampled_gradient(self, generator: torch.Generator) -> torch.Tensor:
        """Once the layers have been walked: how the log-likelihoods of tokens that are drawn from the model change with
        the hidden states that leave the last one, float32 ``(N, T, H)``."""
        norm, arch = self._base.norm, self._checkpoint.architecture
        _materialise(self._checkpoint, norm, self._names[norm])
        head = _tensor(self._checkpoint, self.head_name).float()
        leaving = self._hidden.flatten(0, 1)
        gradient = torch.empty_like(leaving)
        for rows in torch.arange(len(leaving)).split(max(1, _LOGITS // len(head))):
            hidden = leaving[rows].requires_grad_()
            with torch.enable_grad(), fast_products():
                logits = (norm(hidden) @ head.T).float() * arch.logit_scale
                if arch.logit_cap is not None:
                    logits = torch.tanh(logits / arch.logit_cap) * arch.logit_cap
                likelihoods = logits.log_softmax(-1)
            drawn = torch.multinomial(likelihoods.detach().exp(), 1, generator=generator)
            (gradient[rows],) = torch.autograd.grad(likelihoods.gather(1, drawn).sum(), hidden)
        return gradient.view(self._hidden.shape)

    def head_inputs(self) -> Iterator[torch.Tensor]:
        """What enters the head, float32 ``(B * T, H)`` for each batch, once the layers have been walked."""
        norm = self._base.norm
        _materialise(self._checkpoint, norm, self._names[norm])
        for windows in batches(self._hidden):
            with torch.no_grad():  # ends before the yield: the caller's code has its own
                inputs = norm(self._hidden[windows]).flatten(0, -2)
            yield inputs


@fast_float32()
def second_moments(
    folder: Path, ids: torch.Tensor, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Mean square of every input channel of every Linear, as llama.cpp's importance matrix defines it.

    Args:
        folder: a model folder.
        ids: calibration windows, int ``(N, T)``.
        on_progress: called with the layers done and their number.

    Returns:
        float32 ``(I,)`` by HF parameter name; the head's under ``lm_head.weight``, or under the embedding's name when
        the head is tied.

    Raises:
        EdgekdError: no window, ids beyond the vocabulary, an architecture that cannot be walked, or activations that
            are not finite.
    """
    walk = Walk(Checkpoint(folder), ids)
    moments: dict[str, torch.Tensor] = {}
    for done, layer in enumerate(walk):
        if on_progress:
            on_progress(done, len(walk))
        for group in layer.groups:
            sums = torch.zeros(layer.linears[group[0]].in_features, dtype=torch.float64)
            layer.linears[group[0]].register_forward_pre_hook(_adder(sums))
            moments |= dict.fromkeys(group, sums)
    head = sum((x.square().sum(0, dtype=torch.float64) for x in walk.head_inputs()), torch.zeros(()))
    if on_progress:
        on_progress(len(walk), len(walk))
    return {name: (sums / ids.numel()).float() for name, sums in (moments | {walk.head_name: head}).items()}


def _adder(sums: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sums.add_(args[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64))

    return add


def _keeper(kept: list[torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        # Half the memory; what it rounds off is far below what quantization does to these inputs.
        kept.append(args[0].flatten(0, -2).bfloat16())

    return keep


def batches(hidden: torch.Tensor) -> list[slice]:
    """Windows of ``hidden (N, T, H)`` that are computed together."""
    step = max(1, BATCH_TOKENS // hidden.shape[1])
    return [slice(start, start + step) for start in range(0, hidden.shape[0], step)]


def _check_ids(ids: torch.Tensor, vocab_size: int) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise EdgekdError(
            "quantize.calibration_windows: the calibration text is shorter than a window.",
            "Give more text, or a smaller data.context.",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise EdgekdError(
            f"the calibration text has token id {low if low < 0 else high}, beyond the student's {vocab_size}.",
            "Tokenize it with the student's own tokenizer.",
        )


def _skeleton(checkpoint: Checkpoint) -> tuple[Any, Any, str, str]:
    """The whole model without weights, its decoder, and the names of embedding and head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _cannot_walk(checkpoint) from error
    model.eval()
    base = model.base_model
    embedding = model.get_input_embeddings()
    scales = checkpoint.architecture.embedding_scale != 1  # then the embedding is of a kind of its own
    plain = type(embedding) is nn.Embedding or scales
    if not plain or not all(hasattr(base, part) for part in ("layers", "norm", "rotary_emb")):
        raise _cannot_walk(checkpoint)
    # Its frequencies are no weights of the file.
    base.rotary_emb = type(base.rotary_emb)(config=config)
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
    return model, base, name, name if checkpoint.tied else "lm_head.weight"


def _cannot_walk(checkpoint: Checkpoint) -> EdgekdError:
    kind = checkpoint.config.get("model_type")
    return EdgekdError(
        f"{checkpoint.folder}: model_type {kind!r}: no decoder layers are found that calibration can walk.",
        "Use a model of docs/architectures.md, or quantize by round to nearest.",
    )


def _calls(checkpoint: Checkpoint, base: Any, context: int) -> list[_Call]:
    """What the model passes to each layer beside hidden states: rotary embedding and mask, as transformers makes them.

    The mask depends on the layer's type (full or sliding attention), so the model itself is asked.
    """
    layers, norm = base.layers, base.norm
    catchers = [_Catcher() for _ in layers]
    base.layers, base.norm = nn.ModuleList(catchers), nn.Identity()
    ones = torch.ones((1, context, checkpoint.architecture.hidden))
    try:
        with torch.no_grad():
            out = base(inputs_embeds=ones, use_cache=False).last_hidden_state
        calls = [catcher.call for catcher in catchers]
    except (RuntimeError, AttributeError, TypeError) as error:
        raise _cannot_walk(checkpoint) from error
    finally:
        base.layers, base.norm = layers, norm
    # Some architectures scale the embedding between it and the layers, others in it; of neither more than is known.
    if not any(torch.equal(out, ones * factor) for factor in (1, checkpoint.architecture.embedding_scale)):
        raise _cannot_walk(checkpoint)
    return calls


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    if name not in checkpoint.tensors:
        raise EdgekdError(f"{checkpoint.folder}: tensor {name!r} is missing.", "Save the student again.")
    return checkpoint.tensor(name)


def _materialise(checkpoint: Checkpoint, module: nn.Module, name: str) -> None:
    """Give a module on the meta device its weights in float32."""
    weights = {key: _tensor(checkpoint, f"{name}.{key}").float() for key in module.state_dict()}
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise EdgekdError(f"{checkpoint.folder}: {name}: {reason}", "Check config.json against the weights.") from error
    module.requires_grad_(False)


def _probe(module: nn.Module, name: str, call: _Call, hidden: torch.Tensor) -> tuple[list[list[str]], dict[str, _Part]]:
    """The Linears that a layer runs, by shared input, in order of execution; and its parts, by the Linear that ends
    them."""
    seen: list[tuple[torch.Tensor, list[str]]] = []
    given: dict[str, torch.Tensor] = {}
    ends: dict[str, _Part] = {}

    def recorder(linear: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def record(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            given[linear] = out
            for x, names in seen:
                if x is args[0]:
                    names.append(linear)
                    return
            seen.append((args[0], [linear]))

        return record

    def end(part: nn.Module, _: object, out: Any) -> None:
        first, *others = out if isinstance(out, tuple) else (out,)
        last = [linear for linear, its in given.items() if its is first]
        if last and not any(other is not None for other in others):
            ends[last[0]] = _Part(part, len(others) if isinstance(out, tuple) else None)

    handles = [
        part.register_forward_hook(recorder(f"{name}.{path}.weight"))
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    handles += [part.register_forward_hook(end) for part in module.children()]
    with torch.no_grad():
        module(hidden, *call[0], **call[1])
    for handle in handles:
        handle.remove()
    return [names for _, names in seen], ends
