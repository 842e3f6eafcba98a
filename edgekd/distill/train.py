"""The one training loop, for the distilled student and for the baseline on labels alone.

Shapes: ``B`` windows, ``T`` tokens, ``V`` vocabulary; ``N`` windows in a split.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal as signals
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..errors import Agreed, SpecError
from ..spec import OF_TEACHER, MatchSpec
from . import versions
from .checkpoint import Event, Progress, RunLog, copy_of_weights, load_checkpoint, save_checkpoint, set_weights
from .compiled import COMPILED, perhaps_compiled
from .data import Windows
from .evaluate import evaluate, evenly_spaced
from .head import Outputs, WithHead
from .learner import PLAIN, adamw, clip, learning, set_rate
from .losses import Settings, needs_teacher, summed_losses
from .matching import Matching
from .mixture import mixed_indices
from .on_policy import Writing
from .pack import Batch
from .precision import Precision, choose_precision
from .ranks import ALONE, Ranks
from .signals import OnlineTeacher, TeacherSignal
from .speed import peak_flops_per_s

if TYPE_CHECKING:
    from ..spec import MemorySpec, TrainingSpec

VALIDATION_TOKENS = 16_384
"""Read at each validation while training: evenly spaced windows, the same every time."""

_TIMED_WINDOWS = 4

PRECISION = "precision.json"
"""Remembers in a folder what ``choose_precision`` chose."""


class Trained(TypedDict):
    """What a training came to."""

    steps: int
    best_step: int
    stopped_early: bool
    tokens: int
    train_s: float
    tokens_per_s: float
    device: str
    precision: str
    validation: dict[str, float]
    """Of the weights that were kept: the best with ``spec.patience``, else the last."""


@dataclass(frozen=True)
class Descent:
    """How weights follow their gradients."""

    optimizer: torch.optim.Optimizer
    """Of all parameters; its groups' rates are set before each step."""
    rate: Callable[[int], float]
    """The learning rate of a step, from 0."""


def train(
    model: torch.nn.Module,
    windows: Windows,
    validation: Windows,
    spec: TrainingSpec,
    *,
    signal: TeacherSignal | None,
    seed: int,
    work_dir: Path,
    on_event: Callable[[Event], None],
    method: Descent | None = None,
    precision_file: Path | None = None,
    writing: Writing | None = None,
    match: MatchSpec | None = None,
    memory: MemorySpec = PLAIN,
    flops_per_token: float | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train ``model`` in place, going on from the newest checkpoint in ``work_dir``.

    Which windows a step reads follows from ``seed`` and the step alone,
    so student and baseline read the same, and a run that was killed ends with the same weights, bit for bit, as one
    that was not (same machine, same number of threads). Ctrl-C finishes the step, writes a checkpoint, and raises.

    Args:
        signal: the teacher; None trains on labels alone, whatever ``spec.loss`` says.
        work_dir: holds ``log.jsonl``, ``tensorboard/`` and the checkpoint.
        on_event: told of each step (``loss``, ``learning_rate``, ``tokens_per_s``, ...) and of each validation
            (``loss``, ``perplexity``, ``next_token_accuracy``). Losses are in nats per token; the validation loss is
            the cross-entropy.
        method: default: AdamW, linear warm-up and cosine to zero.
        precision_file: of ``choose_precision``, for trainings that are to take the same; default: one in ``work_dir``.
        writing: how the student writes text that it learns from too.
        match: what its layers are compared with, of a teacher that is an ``OnlineTeacher``.
        flops_per_token: operations of student and teacher, of which ``mfu`` is told; None: it is unknown.
        memory: what is spared while it learns. Without adapters, ``method`` must follow it.
        ranks: the processes that train it together, each of which calls this with the same arguments. The first one
            alone writes and tells. Their number changes rounding and nothing else, and may change between two goes.

    Raises:
        SpecError: the windows are longer than the student's context.
        EdgekdError: ``work_dir`` holds another run, the loss is not finite, or the processes disagree.
    """
    weights: dict[str, float] = {"cross_entropy": 1.0}
    if signal is not None:
        weights = {str(name): weight for name, weight in spec.loss.items()}
    context = windows.ids.shape[1]
    longest = getattr(model.config, "max_position_embeddings", context)
    if context > longest:
        raise SpecError(f"data.context: {context} is longer than the student's {longest} positions.", "Lower it.")
    ranks.share(spec.windows_a_step)
    if ranks.count > 1 and (writing or match):
        raise Agreed("distill.on_policy and distill.match: they train in one process.", "Leave torchrun out.")
    work_dir.mkdir(parents=True, exist_ok=True)
    taught = needs_teacher(weights) or bool(writing or match)
    key = _run_key(model, windows, spec, weights, signal.vocab_size if signal else None, taught, seed)
    ranks.check_alike(key)
    validation = evenly_spaced(validation, max(1, VALIDATION_TOKENS // context))
    with learning(model, ranks, memory, seed) as student, _deterministic(ranks.device):
        if match:
            assert isinstance(signal, OnlineTeacher)
            student.add_module("matching", Matching(student.model, signal.model, match, seed))
        method = method or Descent(adamw(student, spec, memory), partial(learning_rate, spec))
        run = _Run(
            ranks, student, method.optimizer, method.rate, windows, spec, weights, signal, seed, "float32", writing
        )
        precision: Precision = "bfloat16"
        if memory.weights == "float32":
            precision = choose_precision(spec, partial(_pass, run), precision_file or work_dir / PRECISION, ranks)
        peak = peak_flops_per_s(ranks.device, precision) if flops_per_token else None
        share = flops_per_token / (peak * ranks.count) if flops_per_token and peak else None
        run = replace(run, precision=precision, share_per_token=share)
        passes = (spec.steps * spec.windows_a_step) // (ranks.count * spec.batch_size)
        one_pass = partial(_pass, run, precision, spec.batch_size)
        # Text that is written has another length each time, and layers that are listened to do not stand alone.
        layers = [] if writing or match else _layers(student, ranks)
        with perhaps_compiled(layers, one_pass, passes, work_dir / COMPILED, precision):
            progress = _go_on(run, validation, work_dir, key, on_event)
    model.eval()
    return {
        "steps": progress.step,
        "best_step": progress.best_step if spec.patience else progress.step,
        "stopped_early": progress.stopped,
        "tokens": progress.tokens,
        "train_s": progress.seconds,
        "tokens_per_s": progress.tokens / progress.seconds,
        "device": str(ranks.device),
        "precision": precision,
        "validation": progress.best_validation if spec.patience else progress.validation,
    }


def _go_on(run: _Run, validation: Windows, work_dir: Path, key: str, on_event: Callable[[Event], None]) -> Progress:
    """From the newest checkpoint to the end; the weights to keep are in the model."""
    spec, ranks = run.spec, run.ranks
    progress, best = load_checkpoint(work_dir, run.model, run.optimizer, key, ranks)
    log = RunLog(work_dir, progress.step) if ranks.first else None

    def emit(event: Event) -> None:
        if log:
            log.write(event)
            on_event(event)

    try:
        with _deferred_interrupt() as interrupted:
            while progress.step < spec.steps and not progress.stopped:
                event, stopping = _step(run, progress, interrupted.is_set())
                emit(event)
                if progress.step % spec.validate_every == 0 or progress.step == spec.steps:
                    emit(_validate(run, validation, progress))
                    if spec.patience and progress.best_step == progress.step:
                        best = copy_of_weights(run.model)
                done = progress.stopped or progress.step == spec.steps
                if done or stopping or progress.step % spec.checkpoint_every == 0:
                    save_checkpoint(work_dir, run.model, run.optimizer, progress, best, key, ranks)
                if stopping:
                    raise KeyboardInterrupt
    finally:
        if log:
            log.close()
    if best is not None:
        set_weights(run.model, best)
    return progress


def batch_indices(seed: int, step: int, windows: int, size: int) -> Tensor:
    """The windows that step ``step`` (from 0) reads, int64 ``(size,)``: a function of its arguments alone.

    Every window is read once before any is read again.
    """
    places = range(step * size, (step + 1) * size)
    return torch.tensor([int(_permutation(seed, place // windows, windows)[place % windows]) for place in places])


def windows_of_step(seed: int, step: int, windows: Windows, size: int) -> Tensor:
    """``batch_indices`` of a split, or of its mixture."""
    if windows.sources is None:
        return batch_indices(seed, step, len(windows), size)
    return mixed_indices(seed, step, windows, size)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def learning_rate(spec: TrainingSpec, step: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up to ``spec.learning_rate``, then a cosine to zero."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class _Texts(NamedTuple):
    """What a step learns from."""

    batches: Iterable[tuple[Tensor, Batch]]
    """Of this process, each with the windows that it lies or begins in."""
    weights: dict[str, float]
    """Of each loss there."""
    learned: int
    """Tokens that all processes learn."""
    tokens: int
    """That they read."""
    told: dict[str, float]
    """Figures for the log."""


@dataclass(frozen=True)
class _Run:
    """What stays the same from step to step."""

    ranks: Ranks
    model: WithHead
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    windows: Windows
    spec: TrainingSpec
    weights: dict[str, float]
    signal: TeacherSignal | None
    seed: int
    precision: Precision
    writing: Writing | None = None
    share_per_token: float | None = None
    """Seconds of the processors' whole work for a token: what a second's tokens are multiplied by for ``mfu``."""

    @property
    def vocab_size(self) -> int | None:
        """Ids that count; None: all."""
        return self.signal.vocab_size if self.signal else None

    @property
    def matching(self) -> Matching | None:
        """The comparison of layers, where there is one."""
        return getattr(self.model, "matching", None)

    def autocast(self) -> torch.autocast:
        """The precision of the products."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def losses(self, batch: Batch, index: Tensor, weights: dict[str, float]) -> tuple[Tensor, Tensor]:
        """``summed_losses`` of some text, which lies or begins in the windows ``index``, and those of its layers."""
        spec, matching = self.spec, self.matching
        settings = Settings(spec.temperature, spec.jsd_beta, spec.skew)
        ids, labels, mask, positions = batch
        with self.autocast(), matching.listening() if matching else nullcontext():
            taught = None
            if self.signal and (needs_teacher(weights) or matching):
                taught = self.signal.teach(ids, index, positions)

            def judge(student: Outputs) -> tuple[Tensor, Tensor]:
                student = replace(student, vocab_size=self.vocab_size)
                total, parts = summed_losses(student, taught, labels, mask, weights, settings)
                if matching is None:
                    return total, parts
                of_layers, sums = matching.loss(mask)
                return total + of_layers, torch.cat([parts, sums])

            found: tuple[Tensor, Tensor] = self.model(ids, judge, positions)
            return found

    def texts(self, step: int) -> _Texts:
        """What this process learns from in a step: windows, or what the student writes behind their beginnings."""
        index = windows_of_step(self.seed, step, self.windows, self.spec.windows_a_step)
        micros = index[self.ranks.rank :: self.ranks.count].split(self.spec.batch_size)
        if self.writing and self.writing.turn(self.seed, step):
            return self._written(self.writing, step, micros)
        batches = ((micro, self.windows.batch(micro, self.ranks.device)) for micro in micros)
        learned = int(self.windows.loss_mask[index, 1:].sum())
        return _Texts(batches, self.weights, learned, len(index) * self.windows.ids.shape[1], {})

    def _written(self, writing: Writing, step: int, micros: Sequence[Tensor]) -> _Texts:
        given = (self.vocab_size, self.seed, step)
        with self.autocast():
            texts = [writing.write(self.model.model, self.windows, micro, *given) for micro in micros]
        learned = sum(int(text.batch.mask.sum()) for text in texts)
        told: dict[str, float] = {"written_tokens": learned, "texts_dropped": sum(text.dropped for text in texts)}
        weights = {str(name): weight for name, weight in writing.spec.loss.items()}
        batches = zip(micros, (text.batch for text in texts), strict=True)
        return _Texts(batches, weights, learned, sum(text.batch.ids.numel() for text in texts), told)


def _step(run: _Run, progress: Progress, interrupted: bool) -> tuple[Event, bool]:
    """One optimizer step over ``spec.windows_a_step`` windows, shared by the processes.

    Args:
        interrupted: this process was.

    Returns:
        The event that tells of it; whether any process was interrupted.
    """
    began = time.perf_counter()
    spec, step, ranks = run.spec, progress.step, run.ranks
    # Dropout, where a model has it, must not depend on how often the run was resumed.
    draw = [run.seed, step, *([ranks.rank] if ranks.rank else [])]
    torch.manual_seed(int(np.random.SeedSequence(draw).generate_state(1)[0]))
    run.model.train()
    rate = run.rate(step)
    set_rate(run.optimizer, rate)
    texts = run.texts(step)
    weights = texts.weights | (run.matching.weights if run.matching else {})
    # One mean over all tokens of the step, so that neither accumulation nor the number of processes changes it.
    learned = max(1, texts.learned)
    sums = torch.zeros(len(weights) + 1, dtype=torch.float64)
    sums[-1] = interrupted
    for micro, batch in texts.batches:
        total, parts = run.losses(batch, micro, texts.weights)
        (total * (ranks.count / learned)).backward()  # the processes' gradients are averaged
        sums[:-1] += parts.cpu()
    norm = clip(run.model, spec.max_grad_norm)
    *means, stopping = (ranks.sum(sums) / torch.tensor([learned] * len(weights) + [1])).tolist()
    loss = sum(weight * mean for weight, mean in zip(weights.values(), means, strict=True))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise Agreed(f"Step {step + 1}: the loss or its gradient is not finite.", "Lower distill.learning_rate.")
    run.optimizer.step()
    run.optimizer.zero_grad()
    seconds = time.perf_counter() - began
    tokens = texts.tokens
    progress.step, progress.tokens, progress.seconds = step + 1, progress.tokens + tokens, progress.seconds + seconds
    figures = {
        "loss": loss,
        **(dict(zip(weights, means, strict=True)) if len(means) > 1 else {}),
        **texts.told,
        "learning_rate": rate,
        "gradient_norm": norm,
        "tokens_per_s": tokens / seconds,
    }
    if run.share_per_token is not None:
        figures["mfu"] = run.share_per_token * tokens / seconds
    unknown = ["mfu"] * (run.share_per_token is None)
    return Event("step", progress.step, spec.steps, figures, unknown), bool(stopping)


def _layers(student: WithHead, ranks: Ranks) -> list[torch.nn.Module]:
    """What may be compiled: the decoder layers; none where they are sharded, or weights are put into them (``qad``)."""
    body = getattr(student.model, "get_decoder", None)
    return [*body().layers] if body and ranks.count == 1 and hasattr(body(), "layers") else []


def _pass(run: _Run, precision: Precision, windows: int = _TIMED_WINDOWS) -> None:
    """A forward and a backward pass over a few windows, of which nothing stays."""
    count = min(windows, run.spec.batch_size, len(run.windows))
    index = windows_of_step(run.seed, 0, run.windows, count)
    batch = run.windows.batch(index, run.ranks.device)
    total, _ = replace(run, precision=precision).losses(batch, index, run.weights)
    total.backward()
    run.optimizer.zero_grad()
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize(run.ranks.device)


def _validate(run: _Run, validation: Windows, progress: Progress) -> Event:
    """Evaluate, and judge whether the run still gains; the event that tells of it."""
    figures = evaluate(run.model, validation, batch_size=run.spec.batch_size, ranks=run.ranks)
    progress.validation = figures
    if progress.best_loss is None or figures["loss"] < progress.best_loss:
        progress.best_loss, progress.best_step, progress.best_validation = figures["loss"], progress.step, figures
        progress.validations_without_gain = 0
    else:
        progress.validations_without_gain += 1
        progress.stopped = run.spec.patience is not None and progress.validations_without_gain >= run.spec.patience
    return Event("validation", progress.step, run.spec.steps, figures)


def _run_key(
    model: torch.nn.Module,
    windows: Windows,
    spec: TrainingSpec,
    weights: dict[str, float],
    vocab_size: int | None,
    taught: bool,
    seed: int,
) -> str:
    """A digest of what the outcome depends on: spec, seed, first weights and data."""
    sample = evenly_spaced(windows, 256)
    settings = spec.outcome("loss") if taught else spec.outcome(*OF_TEACHER)
    sums = [int(windows.ids.sum()), int(windows.loss_mask.sum())]
    facts = [versions.TRAINING, settings, weights, vocab_size, seed, len(windows), sums]
    facts += [list(windows.mixture.items())] if windows.mixture else []
    digest = hashlib.sha256(json.dumps(facts).encode())
    for tensor in (*sample.tensors, *(p.detach().cpu() for p in model.parameters())):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, choose kernels that give the same bits each time; a CPU's do for one number of threads."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the step can end; a second one interrupts at once.

    torchrun passes on the Ctrl-C that the process got from the terminal already: for a second, the two are one.
    """
    interrupted, at = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def on_interrupt(signum: int, frame: object) -> None:
        nonlocal at
        if interrupted.is_set() and time.monotonic() > at + 1:
            raise KeyboardInterrupt
        at = at if interrupted.is_set() else time.monotonic()
        interrupted.set()

    before = signals.signal(signals.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signals.signal(signals.SIGINT, before)
