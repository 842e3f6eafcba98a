"""The student as it is while it learns: where its weights lie, how wide they are, and what follows their gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import Agreed
from ..spec import MemorySpec
from .head import WithHead, layers_of, with_head
from .ranks import Ranks, sharded, whole

if TYPE_CHECKING:
    from ..spec import LoraSpec, TrainingSpec

PLAIN = MemorySpec()


@contextmanager
def learning(model: nn.Module, ranks: Ranks, memory: MemorySpec = PLAIN, seed: int = 0) -> Iterator[WithHead]:
    """``model`` as it is trained, on the training device; what it has learned is in ``model`` afterwards, in float32.

    Several processes train a copy that is sharded over them.

    Args:
        seed: of the adapters' first weights.

    Raises:
        Agreed: several processes cannot spare memory so.
    """
    if ranks.count > 1 and memory.optimizer == "adamw8bit":
        raise Agreed(
            "distill.memory.optimizer: adamw8bit keeps its moments on one process.",
            "Use adamw, whose moments the processes share, or one process.",
        )
    _spare(model, memory, seed)
    if ranks.count == 1:
        yield with_head(model.to(ranks.device))
    else:
        student = copy.deepcopy(with_head(model))
        trained = student.model
        sharded(student, layers_of(trained), ranks)
        yield student
        with torch.no_grad():
            for mine, parameter in zip(model.parameters(), trained.parameters(), strict=True):
                mine.copy_(whole(parameter))
    _spend(model, memory)


def _spare(model: Any, memory: MemorySpec, seed: int) -> None:
    """Adapters, narrow weights, and layers that are computed twice, as the spec says."""
    if memory.lora:
        _add_adapters(model, memory.lora, seed)
    if memory.weights == "bfloat16":
        for parameter in model.parameters():
            # Adapters stay wide: they are few, and learn in small steps.
            if not (memory.lora and parameter.requires_grad):
                parameter.data = parameter.data.bfloat16()
    if memory.checkpoint_activations:
        model.activation_checkpointing_enable({"use_reentrant": False})


def _spend(model: Any, memory: MemorySpec) -> None:
    """The inverse of ``_spare``: a model like any other, in float32."""
    if memory.weights == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    if memory.checkpoint_activations:
        model.activation_checkpointing_disable()
    if memory.lora:
        merge_adapters(model)


def _add_adapters(model: nn.Module, lora: LoraSpec, seed: int) -> None:
    """Adapters at every matrix that the spec names; all else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    from ..architecture import read_architecture

    config: Any = model.config
    names = lora.targets or read_architecture(config.to_dict()).layer_matrices()
    adapters = LoraConfig(r=lora.r, lora_alpha=lora.alpha or 2 * lora.r, target_modules=list(names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapters, model)


@torch.no_grad()
def merge_adapters(model: Any) -> None:
    """Add every adapter to its matrix, and take it away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def adamw(model: nn.Module, spec: TrainingSpec, memory: MemorySpec = PLAIN) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); norms and biases do not decay."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in learned if p.ndim >= 2], [p for p in learned if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": spec.learning_rate, "betas": (0.9, 0.95)}
    if memory.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    kind = _adamw8bit(compiled=learned[0].device.type == "cuda")
    return kind(groups, **settings, bf16_stochastic_round=memory.weights == "bfloat16")


def _adamw8bit(*, compiled: bool) -> Any:
    """AdamW with moments of a byte each (Dettmers et al. 2022), as torchao has it, which compiles each step: on a CPU
    that needs a compiler, and gains nothing."""
    from torchao.optim import AdamW8bit

    class Eager(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return AdamW8bit if compiled else Eager


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip(model: nn.Module, most: float) -> float:
    """Scale the gradients down to a norm of ``most``; the norm that they had, over all processes."""
    norm: Tensor = nn.utils.clip_grad_norm_(model.parameters(), most)
    return float(whole(norm))
