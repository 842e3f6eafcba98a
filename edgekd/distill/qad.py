"""Quantization-aware distillation: the training loop of ``train`` with the grid in the student's weights.

Every forward pass sees the weights as the grid holds them; the gradient goes to float32 weights behind them and to the
int4 scales (LSQ, Esser et al. 2020; distilled as in LLM-QAT, Liu et al. 2023). What was trained is what is written:
no rounding is left to do afterwards, though under bf16 autocast the matrix products see the weights in bf16. Norms and
biases learn along.

Shapes: weights ``(O, I)``, scales ``(O, G)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..architecture import EMBEDDING, HEAD, read_architecture
from ..matmul import fast_float32
from ..quant.gptq import gptq_student
from ..quant.grid import GROUP, fake_quant_int4, fake_quant_int8_rows, quantize_int4, quantize_int8_rows, round_int4
from ..quant.recipe import Kind, Recipe
from ..quant.sensitivity import with_most_sensitive_in_int8
from ..quant.store.reader import describe
from ..quant.store.writer import new_quantized
from ..spec import QadSpec
from ..student import load_model
from .checkpoint import Event
from .data import Windows
from .head import Head, Outputs
from .signals import TeacherSignal
from .train import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INSIDE = 0.49
"""Of a step, from the integer to where a weight still rounds to it."""


class FakeQuantized(nn.Module):
    """A model whose matrices are what the grid makes of them. A tied head follows its embedding.

    Args:
        model: float32; its parameters are the weights behind the grid.
        kinds: of every parameter.
        scales: first int4 scales ``(O, G)`` by parameter name.
    """

    def __init__(self, model: PreTrainedModel, kinds: Mapping[str, Kind], scales: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.kinds = dict(kinds)
        self._shapes = {name: scale.shape for name, scale in scales.items()}
        # Flat, because the optimizer lets matrices decay; and parameter names must not hold dots.
        self.log_scales = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(scale.log().flatten()) for name, scale in scales.items()}
        )

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def log_scale(self, name: str) -> Tensor:
        """``(O, G)``."""
        return self.log_scales[name.replace(".", "/")].view(self._shapes[name])

    def forward(self, **inputs: Any) -> Any:
        """The model's own output, computed from its weights on the grid."""
        return torch.func.functional_call(self.model, self._all_on_grid(), kwargs=inputs)

    def outputs(self, ids: Tensor, positions: Tensor | None = None) -> Outputs:
        """Hidden states and head of int64 ids ``(B, T)``, from the weights on the grid."""
        weights = self._all_on_grid()
        body = self.model.get_decoder()
        (prefix,) = (f"{name}." for name, module in self.model.named_modules() if module is body)
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        hidden = torch.func.functional_call(body, own, kwargs=given).last_hidden_state
        arch = read_architecture(self.config.to_dict())
        head = weights.get(HEAD, weights[EMBEDDING])
        return Outputs(hidden, Head(head, None, arch.logit_scale, arch.logit_cap))

    def _all_on_grid(self) -> dict[str, Tensor]:
        return {name: self._on_grid(name, weight) for name, weight in self.model.named_parameters()}

    def _on_grid(self, name: str, weight: Tensor) -> Tensor:
        kind = self.kinds[name]
        if kind == "int4":
            return fake_quant_int4(weight, self.log_scale(name))
        return fake_quant_int8_rows(weight) if kind == "int8" else weight

    @torch.no_grad()
    def integers(self, name: str) -> tuple[Tensor, Tensor]:
        """q int8 ``(O, I)`` and scales ``(O, G)`` or ``(O,)`` of a quantized matrix."""
        weight = self.model.get_parameter(name)
        if self.kinds[name] == "int8":
            return quantize_int8_rows(weight)
        return round_int4(weight, self.log_scale(name).exp())


@torch.no_grad()
@fast_float32()
def start_from_gptq(model: nn.Module, student: Path, ids: Tensor, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
    """Move ``model``'s int4 weights so that they round to GPTQ's integers, and return its scales ``(O, G)`` by name.

    Args:
        model: the student, loaded.
        student: its folder.
        ids: calibration text ``(N, T)``.
    """
    scales = {}
    for name, q, scale in gptq_student(student, ids, kinds):
        weight, steps = model.get_parameter(name), scale.repeat_interleave(GROUP, 1)
        weight.copy_(torch.clamp(weight, (q - _INSIDE) * steps, (q + _INSIDE) * steps))
        scales[name] = scale
    for name, kind in kinds.items():
        if kind == "int4" and name not in scales:
            scales[name] = quantize_int4(model.get_parameter(name))[1]
    return scales


def quantize_aware_distill(
    student: Path,
    out: Path,
    recipe: Recipe,
    windows: Windows,
    validation: Windows,
    spec: QadSpec,
    *,
    calibration: Tensor,
    signal: TeacherSignal,
    seed: int,
    work_dir: Path,
    on_event: Callable[[Event], None],
    precision_file: Path | None = None,
) -> Mapping[str, object]:
    """Train a quantized student and write it as a folder; see ``train.train`` for what is common to both.

    It starts from GPTQ's integers and scales: each weight is the student's own, moved no further than to the edge of
    the interval that rounds to GPTQ's integer, so that a small step can still turn the choice. A run that was killed
    goes on from its last checkpoint and ends with the same integers.

    Args:
        out: the folder to make; it must not exist.
        windows: training text.
        calibration: ids that GPTQ reads first, ``(N, T)``.
        signal: the teacher, or the student before quantization.

    Returns:
        ``train``'s figures and ``describe``'s.

    Raises:
        EdgekdError: as ``train`` and ``new_quantized``.
    """
    recipe = with_most_sensitive_in_int8(recipe, student, calibration)
    with new_quantized(student, out, recipe, "qad") as writer:
        plain = load_model(student)
        scales = start_from_gptq(plain, student, calibration, writer.kinds)
        model = FakeQuantized(plain, writer.kinds, scales)
        figures = train(
            model,
            windows,
            validation,
            spec,
            signal=signal,
            seed=seed,
            work_dir=work_dir,
            on_event=on_event,
            precision_file=precision_file,
        )
        for name, kind in writer.kinds.items():
            if kind == "plain":
                writer.put_plain(name, plain.get_parameter(name).detach())
            else:
                writer.put(name, *model.integers(name))
    return {**figures, **describe(out)}
