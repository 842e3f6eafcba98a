"""What an exporter reads a model's tensors from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .recipe import Kind

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """A student (``checkpoint.Checkpoint``) or a quantized student (``quant.store.reader.QuantizedStudent``), read
    lazily: one tensor in memory at a time. Names are Hugging Face parameter names."""

    @property
    def folder(self) -> Path: ...

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """How each parameter is stored; of a student, each as it is."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter in the dtype that it is stored in; of a quantized one ``scale * q``, float32."""
        ...

    def blocks(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A quantized matrix, some rows after the others: q int8 ``(rows, I)`` and scale float32, ``(rows, G)`` of int4
        and ``(rows,)`` of int8."""
        ...
