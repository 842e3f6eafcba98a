"""The one training loop, for the distilled student and for the baseline on labels alone, and the evaluation.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..errors import EdgekdError, SpecError
from .checkpoint import Event, Progress, RunLog, load_checkpoint, save_checkpoint, set_weights, weights_of
from .data import Windows
from .head import Outputs, with_head
from .losses import Settings, chunk_rows, cross_entropy, forward_kl, log_probs, needs_teacher, summed_losses
from .precision import Precision, choose_precision
from .signals import TeacherSignal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from ..spec import TrainingSpec

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

    Raises:
        SpecError: the windows are longer than the student's context.
        EdgekdError: ``work_dir`` holds another run, or the loss is not finite.
    """
    accelerator = _accelerator()
    weights: dict[str, float] = {"cross_entropy": 1.0}
    if signal is not None:
        weights = {str(name): weight for name, weight in spec.loss.items()}
    context = windows.ids.shape[1]
    longest = getattr(model.config, "max_position_embeddings", context)
    if context > longest:
        raise SpecError(f"data.context: {context} is longer than the student's {longest} positions.", "Lower it.")
    work_dir.mkdir(parents=True, exist_ok=True)
    key = _run_key(model, windows, spec, weights, signal.vocab_size if signal else None, seed)
    method = method or Descent(_adamw(model, spec), partial(learning_rate, spec))
    model, optimizer = accelerator.prepare(with_head(model), method.optimizer)
    run = _Run(accelerator, model, optimizer, method.rate, windows, spec, weights, signal, seed, "float32")
    precision = choose_precision(spec, partial(_pass, run), precision_file or work_dir / PRECISION)
    run = replace(run, precision=precision)
    validation = evenly_spaced(validation, max(1, VALIDATION_TOKENS // context))
    progress, best = load_checkpoint(work_dir, model, optimizer.optimizer, key)
    log = RunLog(work_dir, progress.step)

    def emit(event: Event) -> None:
        log.write(event)
        on_event(event)

    try:
        with _deterministic(accelerator.device), _deferred_interrupt() as interrupted:
            while progress.step < spec.steps and not progress.stopped:
                emit(_step(run, progress))
                if progress.step % spec.validate_every == 0 or progress.step == spec.steps:
                    emit(_validate(run, validation, progress))
                    if spec.patience and progress.best_step == progress.step:
                        best = weights_of(model)
                done = progress.stopped or progress.step == spec.steps
                if done or interrupted.is_set() or progress.step % spec.checkpoint_every == 0:
                    save_checkpoint(work_dir, model, optimizer.optimizer, progress, best, key)
                if interrupted.is_set():
                    raise KeyboardInterrupt
    finally:
        log.close()
    if best is not None:
        set_weights(model, best)
    model.eval()
    return {
        "steps": progress.step,
        "best_step": progress.best_step if spec.patience else progress.step,
        "stopped_early": progress.stopped,
        "tokens": progress.tokens,
        "train_s": progress.seconds,
        "tokens_per_s": progress.tokens / progress.seconds,
        "device": str(accelerator.device),
        "precision": run.precision,
        "validation": progress.best_validation if spec.patience else progress.validation,
    }


@torch.no_grad()  # not inference_mode: some rotary embeddings renew a buffer that training then needs
def evaluate(
    model: torch.nn.Module, windows: Windows, *, teacher: TeacherSignal | None = None, batch_size: int = 8
) -> dict[str, float]:
    """How well ``model`` predicts the tokens that ``windows`` masks in, in float32.

    Args:
        teacher: also compare with it; rows beyond its ``vocab_size`` are cut from both.
        batch_size: windows of one forward pass.

    Returns:
        ``perplexity``, ``next_token_accuracy``, ``loss`` (nats per token) and ``tokens``; with a teacher also
        ``kl_to_teacher`` (mean KL(teacher || model), nats per token) and ``top1_agreement_with_teacher``.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    student, vocab_size = with_head(model), teacher.vocab_size if teacher else None
    for start in range(0, len(windows), batch_size):
        ids, labels, mask = _batch(windows, slice(start, start + batch_size), device)
        with torch.autocast(device.type, enabled=False):
            ours = replace(student.outputs(ids), vocab_size=vocab_size)
            theirs = teacher.teach(ids, None) if teacher else None
            chosen = mask.flatten().nonzero().squeeze(-1)
            count += len(chosen)
            for index in chosen.split(chunk_rows(ours)):
                sums += _judged(ours.rows(index), theirs.rows(index) if theirs else None, labels.flatten()[index]).cpu()
    model.train(was_training)
    means = (sums / max(1, count)).tolist()
    figures = {
        "loss": means[0],
        "perplexity": math.exp(min(means[0], 700.0)),
        "next_token_accuracy": means[1],
        "tokens": count,
    }
    if teacher is not None:
        figures |= {"kl_to_teacher": means[2], "top1_agreement_with_teacher": means[3]}
    return figures


def _judged(logits: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """Sums over ``(n, V)`` logits: loss, correct tokens, KL to the teacher, agreement with it; float64 ``(4,)``."""
    ours = log_probs(logits)
    top = ours.argmax(-1)
    sums = [cross_entropy(ours, labels).nats.sum(), (top == labels).sum()]
    if teacher is not None:
        sums += [forward_kl(ours, log_probs(teacher)).nats.sum(), (top == teacher.argmax(-1)).sum()]
    return torch.stack([*map(Tensor.double, sums), *[torch.zeros_like(sums[0], dtype=torch.float64)] * (4 - len(sums))])


def batch_indices(seed: int, step: int, windows: int, size: int) -> Tensor:
    """The windows that step ``step`` (from 0) reads, int64 ``(size,)``: a function of its arguments alone.

    Every window is read once before any is read again.
    """
    places = range(step * size, (step + 1) * size)
    return torch.tensor([int(_permutation(seed, place // windows, windows)[place % windows]) for place in places])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def learning_rate(spec: TrainingSpec, step: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up to ``spec.learning_rate``, then a cosine to zero."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class _Run:
    """What stays the same from step to step."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    rate: Callable[[int], float]
    windows: Windows
    spec: TrainingSpec
    weights: dict[str, float]
    signal: TeacherSignal | None
    seed: int
    precision: Precision

    @property
    def settings(self) -> Settings:
        return Settings(self.spec.temperature, self.spec.jsd_beta, self.spec.skew)

    def losses(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """``summed_losses`` of some windows."""
        device = self.accelerator.device
        ids, labels, mask = _batch(self.windows, index, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            taught = self.signal.teach(ids, index) if self.signal and needs_teacher(self.weights) else None

            def judge(student: Outputs) -> tuple[Tensor, Tensor]:
                student = replace(student, vocab_size=self.signal.vocab_size if self.signal else None)
                return summed_losses(student, taught, labels, mask, self.weights, self.settings)

            return self.model(ids, judge)


def _step(run: _Run, progress: Progress) -> Event:
    """One optimizer step over ``batch_size × gradient_accumulation`` windows; the event that tells of it."""
    began = time.perf_counter()
    spec, step = run.spec, progress.step
    # Dropout, where a model has it, must not depend on how often the run was resumed.
    torch.manual_seed(int(np.random.SeedSequence([run.seed, step]).generate_state(1)[0]))
    run.model.train()
    rate = run.rate(step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    index = batch_indices(run.seed, step, len(run.windows), spec.batch_size * spec.gradient_accumulation)
    # One mean over all tokens of the step, so that accumulation changes nothing but memory.
    learned = max(1, int(run.windows.loss_mask[index, 1:].sum()))
    parts = torch.zeros(len(run.weights), dtype=torch.float64)
    for micro in index.split(spec.batch_size):
        total, sums = run.losses(micro)
        run.accelerator.backward(total / learned)
        parts += sums.cpu()
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), spec.max_grad_norm)
    means = (parts / learned).tolist()
    loss = sum(weight * mean for weight, mean in zip(run.weights.values(), means, strict=True))
    if not math.isfinite(loss) or not math.isfinite(float(norm)):
        raise EdgekdError(f"Step {step + 1}: the loss or its gradient is not finite.", "Lower distill.learning_rate.")
    run.optimizer.step()
    run.optimizer.zero_grad()
    seconds = time.perf_counter() - began
    tokens = len(index) * run.windows.ids.shape[1]
    progress.step, progress.tokens, progress.seconds = step + 1, progress.tokens + tokens, progress.seconds + seconds
    figures = {
        "loss": loss,
        **(dict(zip(run.weights, means, strict=True)) if len(means) > 1 else {}),
        "learning_rate": rate,
        "gradient_norm": float(norm),
        "tokens_per_s": tokens / seconds,
    }
    return Event("step", progress.step, spec.steps, figures)


def _pass(run: _Run, precision: Precision) -> None:
    """A forward and a backward pass over a few windows, of which nothing stays."""
    count = min(_TIMED_WINDOWS, run.spec.batch_size, len(run.windows))
    total, _ = replace(run, precision=precision).losses(torch.arange(count))
    run.accelerator.backward(total)
    run.optimizer.zero_grad()
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize(run.accelerator.device)


def _validate(run: _Run, validation: Windows, progress: Progress) -> Event:
    """Evaluate, and judge whether the run still gains; the event that tells of it."""
    figures = evaluate(run.model, validation, batch_size=run.spec.batch_size)
    progress.validation = figures
    if progress.best_loss is None or figures["loss"] < progress.best_loss:
        progress.best_loss, progress.best_step, progress.best_validation = figures["loss"], progress.step, figures
        progress.validations_without_gain = 0
    else:
        progress.validations_without_gain += 1
        progress.stopped = run.spec.patience is not None and progress.validations_without_gain >= run.spec.patience
    return Event("validation", progress.step, run.spec.steps, figures)


def _batch(windows: Windows, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``ids``, ``labels`` (the next token) int64 and ``mask`` uint8, each ``(B, T)``; the last position has no next."""
    ids = windows.ids[index].long().to(device)
    mask = torch.nn.functional.pad(windows.loss_mask[index][:, 1:], (0, 1)).to(device)
    return ids, ids.roll(-1, 1), mask


def evenly_spaced(windows: Windows, count: int) -> Windows:
    """At most ``count`` windows of a split, the same every time."""
    index = torch.arange(min(count, len(windows))) * len(windows) // min(count, len(windows))
    return Windows(windows.ids[index], windows.loss_mask[index])


def _accelerator() -> Accelerator:
    from accelerate import Accelerator

    # Precision is the loop's own autocast: accelerate's would copy all logits to float32.
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.num_processes > 1:
        raise EdgekdError("Distillation runs in one process.", "Start it without accelerate launch or torchrun.")
    return accelerator


def _adamw(model: torch.nn.Module, spec: TrainingSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); norms and biases do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)


def _run_key(
    model: torch.nn.Module,
    windows: Windows,
    spec: TrainingSpec,
    weights: dict[str, float],
    vocab_size: int | None,
    seed: int,
) -> str:
    """A digest of what the outcome depends on: spec, seed, first weights and data."""
    sample = evenly_spaced(windows, 256)
    of_teacher: set[str] = set() if needs_teacher(weights) else {"temperature", "jsd_beta", "skew"}
    settings = spec.model_dump(exclude={"baseline", "checkpoint_every", "loss"} | of_teacher)
    facts = [settings, weights, vocab_size, seed, len(windows)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for tensor in (sample.ids, sample.loss_mask, *(p.detach().cpu() for p in model.parameters())):
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
    """Ctrl-C sets the event, so that the step can end; a second one interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def on_interrupt(signum: int, frame: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signals.signal(signals.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signals.signal(signals.SIGINT, before)
