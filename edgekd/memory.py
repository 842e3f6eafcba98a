"""The peak memory of a training, computed from the architecture: what lies there all the time, and the most that comes
on top of it.

The activations of a layer are what transformers' layers keep for the backward pass, tensor by tensor; the tests walk
real models and compare. Bytes are of one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from .architecture import Architecture
from .spec import MemorySpec, TeacherWeights

Device = Literal["cpu", "cuda"]
CONTEXT_BYTES: dict[Device, int] = {"cpu": 680 * 2**20, "cuda": 512 * 2**20}
"""Interpreter, torch and transformers in RAM; CUDA's own context on a GPU, which torch does not count."""
CHUNK_BYTES: dict[str, int] = {"cpu": 1 << 22, "cuda": 1 << 28}
"""float32 logits made at a time."""
CHUNK_TOKENS = 64
"""At least: each chunk reads the whole head, and with a few tokens that would be all it does."""
_CHUNK_TENSORS = 5  # logits and their derivative, the teacher's, and two on the way
_STEP_BYTES = 28  # of torchao's step on a CPU, for each weight of the largest tensor: float32 copies
_INT4_BYTES = 0.5 + 2 / 32


@dataclass(frozen=True)
class Training:
    """A training, as far as its memory goes."""

    batch_size: int
    """Windows of one forward pass."""
    context: int
    spared: MemorySpec = field(default_factory=MemorySpec)
    autocast: bool = False
    """Whether float32 weights are multiplied in bfloat16."""
    accumulates: bool = False
    masked: bool = True
    """Whether documents share windows, and do not see each other."""
    teacher: TeacherWeights | None = None
    """The teachers' weights; None: none is in memory."""
    keeps_best: bool = False
    processes: int = 1

    @property
    def tokens(self) -> int:
        """Of one forward pass."""
        return self.batch_size * self.context


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment when most of them are taken."""

    weights: int
    gradients: int
    moments: int
    teacher: int
    activations: int
    """And what else comes and goes."""
    base: int
    """What the process has before any model."""

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.allocated + self.base

    @property
    def allocated(self) -> int:
        """As ``torch.cuda.max_memory_allocated`` counts."""
        return self.weights + self.gradients + self.moments + self.teacher + self.activations


def training_peak(student: Architecture, teachers: Sequence[Architecture], training: Training, device: Device) -> Peak:
    """The peak of a training step, from the second on, when the moments are there."""
    spared, count = training.spared, student.parameters()
    learned = adapter_parameters(student, spared) if spared.lora else count
    wide = 2 if spared.weights == "bfloat16" else 4
    of_gradient = 4 if spared.lora else wide
    of_moments = 2 * (1 + 4 / 256) if spared.optimizer == "adamw8bit" else 8
    weights = wide * count + (4 * learned if spared.lora else 0)
    best = 4 * learned if training.keeps_best and (device == "cpu" or training.processes > 1) else 0
    of_pass, of_step = _pass_bytes(student, training, device), _step_bytes(student, training, device)
    first = of_pass + (of_gradient * learned // training.processes if training.accumulates else 0)
    last = of_gradient * learned // training.processes + max(of_step, _layer_bytes(student, training))
    shared = _unshared_bytes(student, wide) if training.processes > 1 else 0
    gradients = of_gradient * learned // training.processes if last >= first or training.accumulates else 0
    return Peak(
        weights=(weights + best) // training.processes + shared,
        gradients=gradients,
        moments=int(of_moments * learned) // training.processes,
        teacher=sum(teacher_bytes(one, training.teacher) for one in teachers) if training.teacher else 0,
        activations=max(first, last) - gradients,
        base=CONTEXT_BYTES[device],
    )


def teacher_bytes(teacher: Architecture, weights: TeacherWeights) -> int:
    """Of a teacher's weights; in int4 the layers' matrices are, and the rest is bfloat16."""
    count = teacher.parameters()
    if weights == "int4":
        matrices = sum(math.prod(shape) for shape in _matrices(teacher)) * teacher.layers
        return int(_INT4_BYTES * matrices) + 2 * (count - matrices)
    return (4 if weights == "float32" else 2) * count


def adapter_parameters(student: Architecture, spared: MemorySpec) -> int:
    """Number of the weights that adapters have."""
    assert spared.lora is not None
    named = spared.lora.targets or student.layer_matrices()
    shapes = zip(student.layer_matrices(), _matrices(student), strict=True)
    return student.layers * spared.lora.r * sum(sum(shape) for name, shape in shapes if name in named)


def _matrices(arch: Architecture) -> list[tuple[int, ...]]:
    """Shapes of a decoder layer's matrices."""
    return [w.shape for w in arch.weights().values() if w.layer == 0 and len(w.shape) == 2]


def _pass_bytes(student: Architecture, training: Training, device: Device) -> int:
    """What the end of a forward pass holds: all layers' activations, and what the head makes of them."""
    spared, tokens = training.spared, training.tokens
    of_layer = saved_bytes(student, training)
    stream = 2 if spared.weights == "bfloat16" else 4
    kept = student.layers * of_layer
    if spared.checkpoint_activations:
        kept = student.layers * stream * student.hidden * tokens + of_layer
    # Autocast keeps what it made narrow until the backward pass has used it.
    kept += 2 * student.layers * sum(map(math.prod, _matrices(student))) if training.autocast else 0
    return kept + tokens * student.hidden * (8 + 2 * stream) + _head_bytes(student, training, device)


def _head_bytes(student: Architecture, training: Training, device: Device) -> int:
    """Logits of a chunk, the head's gradient in float32, and the head as it is multiplied by."""
    matrix = student.vocab_size * student.hidden
    rows = min(training.tokens, max(CHUNK_TOKENS, CHUNK_BYTES[device] // (4 * student.vocab_size)))
    logits = _CHUNK_TENSORS * 4 * rows * student.vocab_size
    if training.spared.lora:
        return logits + 2 * matrix * training.autocast
    narrow = training.spared.weights == "bfloat16"
    return logits + matrix * (4 + 2 * (narrow or training.autocast))


def _layer_bytes(student: Architecture, training: Training) -> int:
    """What the end of the backward pass holds beside the gradients: one layer, and the embedding's gradient, which is
    made apart from a tied head's."""
    stream = 2 if training.spared.weights == "bfloat16" else 4
    apart = student.vocab_size * student.hidden * stream if student.tied and not training.spared.lora else 0
    return max(saved_bytes(student, training), apart)


def _step_bytes(student: Architecture, training: Training, device: Device) -> int:
    """What the optimizer makes on its way."""
    if training.spared.optimizer != "adamw8bit" or device == "cuda":
        return 0
    largest = max(math.prod(w.shape) for w in student.weights().values())
    return _STEP_BYTES * largest


def _unshared_bytes(student: Architecture, wide: int) -> int:
    """What sharding gathers: embedding and head with their gradient, and two layers on the way."""
    root = student.parameters() - student.layers * student.layer_parameters()
    return 2 * wide * root + 3 * wide * student.layer_parameters()


def saved_bytes(arch: Architecture, training: Training) -> int:
    """What a decoder layer keeps of a forward pass for the backward pass."""
    narrow, autocast = training.spared.weights == "bfloat16", training.autocast
    size = 2 if narrow or autocast else 4
    hidden, query, key = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    # A norm computes in float32 and keeps what it read and what it made of it, before its weight.
    normed = 2 if narrow and not arch.norm_offset else 4
    norms = 4 if arch.norms == "around" else 2
    stream = norms * (4 + normed) * hidden
    # What matrices read: autocast makes a copy for each of them.
    readers = (1 if "qkv" in arch.fused else 3) + (1 if "gate_up" in arch.fused or not arch.gated else 2)
    stream += (2 * readers if autocast else 2 * size) * hidden
    if arch.qk_norm != "none":
        stream += (4 + 2 if narrow or autocast else 8) * (query + key)
    repeated = key if arch.heads == arch.kv_heads or not (training.masked or arch.attention_cap) else query
    attention = size * (2 * query + 2 * repeated) + 4 * arch.heads
    if arch.attention_cap is not None:  # softmax and cap one after the other, over every pair of positions
        attention += 8 * arch.heads * training.context
    elif training.masked:
        attention += size * training.context
    mlp = size * (4 if arch.gated else 2) * arch.intermediate
    return training.tokens * (stream + attention + mlp)


@dataclass(frozen=True)
class Proposal:
    """A way to train, what it takes, and whether there is so much."""

    setting: str
    bytes: int
    fits: bool


_SPARING = MemorySpec(weights="bfloat16", optimizer="adamw8bit", checkpoint_activations=True)


def proposals(
    student: Architecture,
    teachers: Sequence[Architecture],
    written: Training,
    device: Device,
    budget: int,
    *,
    cacheable: bool = True,
    shareable: bool = True,
) -> list[Proposal]:
    """As the spec says, and what else there is to choose, each with its peak against a budget in bytes.

    Args:
        cacheable: whether the teacher may be a cached one.
        shareable: whether two processes may train together.
    """
    return [
        Proposal(name, peak, peak <= budget)
        for name, training in _ways(written, cacheable, shareable)
        for peak in [training_peak(student, teachers, training, device).bytes]
    ]


def _ways(written: Training, cacheable: bool, shareable: bool) -> Iterator[tuple[str, Training]]:
    spared = written.spared
    yield "as written", written
    if written.teacher and cacheable:
        yield "teacher.signal: cached", replace(written, teacher=None)
    if written.teacher:
        yield "teacher.weights: int4", replace(written, teacher="int4")
    yield "memory.checkpoint_activations", replace(written, spared=_with(spared, checkpoint_activations=True))
    yield "memory.lora", replace(written, spared=_with(spared, lora={"r": 16}))
    sparing = replace(written, spared=_SPARING, autocast=False)
    yield "memory: bfloat16, adamw8bit, checkpointed", sparing
    if written.teacher and cacheable:
        yield "… and teacher.signal: cached", replace(sparing, teacher=None)
    if written.teacher:
        yield "… and teacher.weights: int4", replace(sparing, teacher="int4")
    if shareable:
        yield "torchrun, two processes", replace(written, processes=2)


def _with(spared: MemorySpec, **more: object) -> MemorySpec:
    return MemorySpec.model_validate({**spared.model_dump(), **more})
