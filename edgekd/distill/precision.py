"""Which precision a training takes where the spec leaves it open: bfloat16 where it is clearly faster on this machine.

What a CPU's flags promise is not what its kernels hold: with AVX512-BF16 and without AMX, bfloat16 costs more.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import EdgekdError
from ..files import read_json, write_json
from .losses import needs_teacher, summed_losses

if TYPE_CHECKING:
    from ..spec import TrainingSpec
    from .data import Windows
    from .signals import TeacherSignal

Precision = Literal["float32", "bfloat16"]
_WINDOWS = 4
_STEPS = 3
# bfloat16 rounds more, and two runs of one spec should choose alike: it must be faster by more than the clock's noise.
# Where a CPU or a GPU has units for it, it is twice as fast; where it has not, it was 0.7 to 1.1 times as fast.
_GAIN = 0.75


def choose_precision(
    model: torch.nn.Module, windows: Windows, spec: TrainingSpec, signal: TeacherSignal | None, file: Path
) -> Precision:
    """``spec.precision``, or for "auto" bfloat16 where its forward and backward pass take clearly less time here.

    Args:
        model: on the device that trains; its gradients are cleared.
        file: remembers the choice and what was measured, so that a training that goes on takes the same.
    """
    if spec.precision != "auto":
        return spec.precision
    try:
        chosen: Precision = "bfloat16" if read_json(file)["precision"] == "bfloat16" else "float32"
        return chosen
    except (EdgekdError, KeyError, TypeError):
        pass
    seconds = {name: _seconds(model, windows, spec, signal, name) for name in ("float32", "bfloat16")}
    chosen = "bfloat16" if seconds["bfloat16"] < _GAIN * seconds["float32"] else "float32"
    write_json(file, {"precision": chosen, "seconds": seconds, "source": "measured:training-pass"})
    return chosen


def _seconds(
    model: torch.nn.Module, windows: Windows, spec: TrainingSpec, signal: TeacherSignal | None, precision: str
) -> float:
    """The fastest of a few passes; the first of them also warms up."""
    device = next(model.parameters()).device
    ids = windows.ids[: min(_WINDOWS, spec.batch_size)].long().to(device)
    mask = torch.ones_like(ids)
    weights: dict[str, float] = {"cross_entropy": 1.0} if signal is None else {str(k): v for k, v in spec.loss.items()}
    samples = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            student = model(input_ids=ids, use_cache=False).logits[..., : signal.vocab_size if signal else None]
            teacher = signal.logits(ids) if signal and needs_teacher(weights) else None
        total, _ = summed_losses(
            student,
            teacher,
            ids.roll(-1, 1),
            mask,
            weights,
            temperature=spec.temperature,
            jsd_beta=spec.jsd_beta,
        )
        total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return min(samples)
