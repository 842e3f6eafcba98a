"""Reading a quantized student: its integers and scales, or the weights that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from ...checkpoint import Checkpoint
from ...errors import EdgekdError
from ...manifest import first_complaint
from ..grid import GROUP, dequantize_int4, dequantize_int8, unpack_int4
from ..recipe import Kind
from .layout import (
    RECORD_FILE,
    SCALES_FILE,
    Block,
    Record,
    block_rows,
    digest_of_integers,
    digest_of_plain,
    is_embedding,
    storage,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QuantizedStudent:
    """A quantized student, read lazily: one tensor in memory at a time. It is a collection of HF parameter names,
    sorted; a tied head is not among them."""

    folder: Path
    record: Record
    _files: Checkpoint = field(repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The student's ``config.json``, without the quantization."""
        return {key: value for key, value in self._files.config.items() if key != "quantization_config"}

    @property
    def digest(self) -> str:
        """Of integers and scales."""
        return self.record.grid_digest

    @property
    def kinds(self) -> dict[str, Kind]:
        """How each parameter is stored."""
        return self.record.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.kinds))

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "lm_head.weight" not in self.kinds

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        if self.kinds[name] == "plain" or is_embedding(name):
            return self._files.shape(name)
        rows, width = self._files.tensor(f"{name.removesuffix('.weight')}.weight_shape").tolist()
        return rows, width

    @property
    def int8_by_width(self) -> list[str]:
        """int8 matrices whose input width is not divisible by 32."""
        return [name for name in self if self.kinds[name] == "int8" and self.shape(name)[1] % GROUP]

    def blocks(self, name: str) -> Iterator[Block]:
        """The integers and scales of a quantized matrix, a few rows at a time."""
        kind, module = self.kinds[name], name.removesuffix(".weight")
        width = self.shape(name)[1]
        stored = name if is_embedding(name) else f"{module}.weight_packed"
        scales = self._files.tensor(f"{module}.weight_scale").float()
        start = 0
        for rows in self._files.rows(stored, block_rows(width)):
            scale = scales[start : start + rows.shape[0]]
            start += rows.shape[0]
            if is_embedding(name):
                q = torch.round(rows.float().view(*scale.shape, -1) / scale.unsqueeze(-1)).to(torch.int8).flatten(1)
            elif kind == "int4":
                q = unpack_int4(rows.view(torch.uint8))
            else:
                q = (rows.view(torch.uint8)[:, :width] ^ 0x80).view(torch.int8)
            yield q, scale if kind == "int4" else scale[:, 0]

    def integers(self, name: str) -> Block:
        """The whole of a quantized matrix: q int8 ``(O, I)``, in [-8, 7] or [-127, 127], and scale float32,
        ``(O, I/32)`` of int4 and ``(O,)`` of int8."""
        q, scale = zip(*self.blocks(name), strict=True)
        return torch.cat(q), torch.cat(scale)

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter: in the student's dtype where it is not quantized, ``scale * q`` in float32 where it is."""
        if self.kinds[name] == "plain":
            return self._files.tensor(name)
        return dequantize(*self.integers(name))

    def digests(self) -> Iterator[tuple[str, str]]:
        """Each digest of the record by its key, as the tensors are."""
        plain = [name for name in self if self.kinds[name] == "plain"]
        quantized = [name for name in self if self.kinds[name] != "plain"]
        yield "grid_digest", digest_of_integers((name, self.blocks(name)) for name in quantized)
        yield "plain_digest", digest_of_plain((name, self.tensor(name)) for name in plain)


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale * q`` of int4 or int8, float32 ``(O, I)``."""
    return dequantize_int4(q, scale) if scale.ndim == 2 else dequantize_int8(q, scale)


def load_dequantized(quantized: QuantizedStudent) -> PreTrainedModel:
    """The Hugging Face model whose weights are the quantized student's, float32, in evaluation mode."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[quantized.config["model_type"]].from_dict(quantized.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(quantized.tensor(name))
    return model.eval()


def _read(folder: Path) -> QuantizedStudent:
    """A quantized student whose tensors are all there, but not compared with their digests."""
    path = folder / RECORD_FILE
    if not path.is_file():
        raise EdgekdError(f"{folder} is not a quantized student: it has no {RECORD_FILE}.", "Make one: edgekd quantize")
    try:
        record = Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise EdgekdError(f"{path}: {first_complaint(error)}.", "Quantize the student again.") from error
    files = Checkpoint(folder, beside=SCALES_FILE)
    for name, kind in record.tensors.items():
        stored = [name] if kind == "plain" else [s.name for s in storage(name, kind, (1, GROUP))]
        if missing := [key for key in stored if key not in files.tensors]:
            raise EdgekdError(f"{folder}: tensor {missing[0]!r} is missing.", "Quantize the student again.")
    return QuantizedStudent(folder, record, files)


def open_quantized(folder: Path) -> QuantizedStudent:
    """Open a quantized student and check that it is what was written.

    Raises:
        EdgekdError: no quantized student, a missing or truncated file, or integers, scales or other tensors that do
            not match the recorded digests.
    """
    quantized = _read(folder)
    for key, digest in quantized.digests():
        if digest != getattr(quantized.record, key):
            raise EdgekdError(
                f"{folder / RECORD_FILE}: {key} does not match the tensors of the folder.",
                "It was changed: quantize again.",
            )
    return quantized


def describe(folder: Path) -> dict[str, Any]:
    """What a quantized student is: ``digest``, ``recipe``, ``method``, ``bits_per_weight``, ``tensors`` (count by kind)
    and ``int8_by_width``."""
    quantized = _read(folder)
    record, kinds = quantized.record, list(quantized.kinds.values())
    return {
        "digest": quantized.digest,
        "recipe": record.recipe,
        "method": record.method,
        "bits_per_weight": record.bits_per_weight,
        "tensors": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "int8_by_width": quantized.int8_by_width,
    }
