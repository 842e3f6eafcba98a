"""What a stage will need, before any work: RAM, disk and time, and whether the machine has them.

Every figure here is an estimate from the model's shape. The peak of a training is computed (``memory``), right within
15 %; the other constants were fitted to runs of the quickstart and are meant to be right within a factor of two, high
rather than low for memory.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from .architecture import Architecture, read_architecture
from .errors import DoesNotFit
from .memory import CONTEXT_BYTES, Device, Training, teacher_bytes, training_peak
from .spec import DataSpec, DistillSpec, MemorySpec, TeacherWeights, TrainingSpec

GIB = 2**30
_PROCESS_RAM = int(0.6 * GIB)  # interpreter, torch and transformers before any model
_TRAINING_SHARE = 0.18  # of the matmul peak that a training step of a small model reaches
_INFERENCE_SHARE = 0.5
_RECENT_STEPS = 20


@dataclass(frozen=True)
class Cost:
    """Estimated needs of a stage."""

    ram_bytes: int
    disk_bytes: int
    seconds: float
    source: str = "estimated:shape"
    """Of the seconds."""
    gpu_bytes: int = 0


@dataclass(frozen=True)
class PlannedStage:
    """A stage, whether it is done, and what it will need."""

    stage: str
    done: bool
    ram_bytes: int
    disk_bytes: int
    seconds: float
    source: str
    """Of the seconds."""

    @classmethod
    def of(cls, stage: str, done: bool, cost: Cost) -> PlannedStage:
        """The row of a stage."""
        return cls(stage, done, cost.ram_bytes, cost.disk_bytes, round(cost.seconds, 1), cost.source)


@dataclass(frozen=True)
class PlannedCache:
    """What the key-value cache of a target's artifacts will hold."""

    target: str
    context: int
    bytes_per_1000_tokens: int
    bytes_at_context: int

    @classmethod
    def of(cls, target: str, config: Mapping[str, object], context: int, value_bytes: int) -> PlannedCache:
        """The row of a target, whose cache keeps numbers of so many bytes."""
        position = read_architecture(config).kv_bytes(1, value_bytes)
        return cls(target, context, 1000 * position, context * position)


@dataclass(frozen=True)
class PlannedCapture:
    """What a cached teacher will write before the training, at most."""

    tokens: int
    disk_bytes: int
    seconds: float
    ram_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Machine:
    """What there is."""

    ram_bytes: int
    disk_free_bytes: int
    flops_per_s: float
    """Matrix products in float32, measured for a moment."""
    training_flops_per_s: float
    """The faster of float32 and bfloat16, which is what training takes."""
    gpu_bytes: int = 0
    """Memory of the GPU that trains; 0: the CPU does."""

    @property
    def device(self) -> Device:
        """What trains."""
        return "cuda" if self.gpu_bytes else "cpu"


def measure_machine(folder: Path) -> Machine:
    """RAM of the machine, free disk where ``folder`` lies or will lie, and its speed at matrix products."""
    while not folder.exists():
        folder = folder.absolute().parent
    single, half = flops_per_s("float32"), flops_per_s("bfloat16")
    ram, disk = psutil.virtual_memory().total, shutil.disk_usage(folder).free
    return Machine(ram, disk, single, max(single, half), _gpu_bytes())


def _gpu_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def flops_per_s(dtype: str) -> float:
    """Of this machine's processor: the best of a few matrix products."""
    import torch

    size = 1024
    a = torch.ones(size, size, dtype=getattr(torch, dtype))
    samples = []
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        samples.append(time.perf_counter() - began)
    return 2 * size**3 / min(samples)


def training_of(spec: TrainingSpec, data: DataSpec, heard: TeacherWeights | None, machine: Machine) -> Training:
    """A training as the spec says it.

    Args:
        heard: the weights of the teachers beside the student; None: there are none.
    """
    spared = spec.memory if isinstance(spec, DistillSpec) else MemorySpec()
    # Where the spec leaves it open, it is measured when training begins; GPUs have units for it.
    faster = machine.device == "cuda" or machine.training_flops_per_s > 4 / 3 * machine.flops_per_s
    half = spec.precision == "bfloat16" or (spec.precision == "auto" and faster)
    return Training(
        batch_size=spec.batch_size,
        context=data.context,
        spared=spared,
        autocast=half and spared.weights == "float32",
        accumulates=spec.gradient_accumulation > 1,
        masked=data.isolate,
        teacher=heard,
        keeps_best=spec.patience is not None,
    )


def training_flops(student: Mapping[str, object], teachers: Sequence[Mapping[str, object]], context: int) -> int:
    """Operations of a token: backward costs twice forward; a token attends to half the window on average."""
    return sum(read_architecture(config).flops_per_token(context // 2) for config in (*[student] * 3, *teachers))


def training_cost(
    student: Mapping[str, object],
    teachers: Sequence[Mapping[str, object]],
    spec: TrainingSpec,
    training: Training,
    machine: Machine,
) -> Cost:
    """Cost of a training, its checkpoints and the log."""
    arch = read_architecture(student)
    heard = teachers if training.teacher else []
    taught = [read_architecture(config) for config in heard]
    peak = training_peak(arch, taught, training, machine.device).bytes
    tokens = spec.steps * spec.windows_a_step * training.context
    operations = tokens * training_flops(student, heard, training.context)
    return Cost(
        ram_bytes=peak if machine.device == "cpu" else _loaded_bytes(arch, taught, training.teacher or "float32"),
        disk_bytes=4 * 5 * arch.parameters(),
        seconds=5 + operations / (machine.training_flops_per_s * _TRAINING_SHARE),
        gpu_bytes=peak if machine.device == "cuda" else 0,
    )


def capture_of(
    student: Mapping[str, object],
    teachers: Sequence[Mapping[str, object]],
    weights: TeacherWeights,
    tokens: int,
    disk_bytes: int,
    machine: Machine,
) -> PlannedCapture:
    """What capturing the teachers takes, while the student waits for it in RAM."""
    taught = [read_architecture(config) for config in teachers]
    on_gpu = CONTEXT_BYTES["cuda"] + sum(teacher_bytes(one, weights) for one in taught)
    return PlannedCapture(
        tokens,
        disk_bytes,
        inference_cost(teachers, tokens, machine).seconds,
        ram_bytes=_loaded_bytes(read_architecture(student), taught, weights),
        gpu_bytes=on_gpu if machine.device == "cuda" else 0,
    )


def _loaded_bytes(student: Architecture, teachers: Sequence[Architecture], weights: TeacherWeights) -> int:
    """RAM of models that have been read, before a GPU has them."""
    read: TeacherWeights = "float32" if weights == "float32" else "bfloat16"
    return CONTEXT_BYTES["cpu"] + 4 * student.parameters() + sum(teacher_bytes(one, read) for one in teachers)


def with_measured_time(cost: Cost, speeds: Sequence[float], tokens_left: int) -> Cost:
    """The cost of a training that has begun: the time left by what its steps took.

    Args:
        speeds: tokens per second of each step that is done.
    """
    if not speeds:
        return cost
    return replace(cost, seconds=tokens_left / statistics.median(speeds[-_RECENT_STEPS:]), source="measured:steps")


def inference_cost(configs: Sequence[Mapping[str, object]], tokens: int, machine: Machine) -> Cost:
    """Cost of running models in fp32 over ``tokens`` tokens each, in windows too short for attention to count."""
    archs = [read_architecture(config) for config in configs]
    logits = 2 * 2048 * max(arch.vocab_size for arch in archs)
    operations = tokens * sum(arch.flops_per_token(0) for arch in archs)
    return Cost(
        ram_bytes=_PROCESS_RAM + 4 * (sum(arch.parameters() for arch in archs) + logits),
        disk_bytes=2**16,
        seconds=3 + operations / (machine.flops_per_s * _INFERENCE_SHARE),
    )


def calibration_cost(config: Mapping[str, object], tokens: int, machine: Machine) -> Cost:
    """Cost of walking a model over calibration text one decoder layer at a time, some six passes over each, and of
    GPTQ's Hessians: the widest is square in the MLP's width."""
    arch = read_architecture(config)
    hessians = 4 * arch.intermediate**2 + 3 * arch.hidden**2
    passes = inference_cost([config], 6 * tokens, machine)
    products = 2 * arch.layers * arch.intermediate**2 * (tokens + arch.hidden)
    return Cost(
        ram_bytes=_PROCESS_RAM + 4 * (arch.layer_parameters() + 2 * tokens * arch.hidden + hessians),
        disk_bytes=export_cost(config, 5).disk_bytes,
        seconds=passes.seconds + products / (machine.flops_per_s * _INFERENCE_SHARE),
    )


def export_cost(config: Mapping[str, object], bits_per_weight: float) -> Cost:
    """Cost of packing, one tensor in memory at a time; the largest is the embedding."""
    arch = read_architecture(config)
    size = int(arch.parameters() * bits_per_weight / 8)
    return Cost(_PROCESS_RAM + 4 * 4 * arch.vocab_size * arch.hidden, 2 * size + 2**22, 2 + size / 100e6)


def refuse_what_cannot_fit(costs: Mapping[str, Cost], machine: Machine, folder: Path) -> None:
    """Check the stages still to do.

    Raises:
        DoesNotFit: one needs more RAM than the machine has, or together they need more disk than is free.
    """
    for name, cost in costs.items():
        if cost.ram_bytes > machine.ram_bytes:
            raise DoesNotFit(
                f"stage {name} needs about {cost.ram_bytes / GIB:.1f} GiB of RAM, the machine has "
                f"{machine.ram_bytes / GIB:.1f} GiB.",
                "Lower distill.batch_size or data.context, or choose a smaller teacher or student.",
            )
        if machine.gpu_bytes and cost.gpu_bytes > machine.gpu_bytes:
            raise DoesNotFit(
                f"stage {name} needs about {cost.gpu_bytes / GIB:.1f} GiB on the GPU, which has "
                f"{machine.gpu_bytes / GIB:.1f} GiB.",
                "See what would fit with: edgekd plan SPEC",
            )
    disk = sum(cost.disk_bytes for cost in costs.values())
    if disk > machine.disk_free_bytes:
        raise DoesNotFit(
            f"the run needs about {disk / GIB:.2f} GiB of disk in {folder}, {machine.disk_free_bytes / GIB:.2f} GiB "
            "are free.",
            "Free some, or choose another folder with --out.",
        )
