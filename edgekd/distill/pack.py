"""Documents packed into windows of equal length, and the windows' file.

Text is joined and cut wherever a window ends. A chat is cut between an answer and the next question, and chats are
fitted together: a window begins where a turn does, and what is left of it is padding.

Shapes: ``N`` windows of ``T`` tokens.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from ..errors import EdgekdError
from ..files import atomic_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MOST_OPEN = 64  # windows of chats that are filled at a time


class Batch(NamedTuple):
    """Some windows as a model reads them, each ``(B, T)``."""

    ids: Tensor
    """int64."""
    labels: Tensor
    """int64: the token that follows; behind the last stands the first."""
    mask: Tensor
    """uint8: 1 where the label is learned."""
    positions: Tensor | None
    """int64, from 0 in every document, which then do not see each other; None: each window is one text."""


def documents(ids: Tensor, positions: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Row, beginning and end of each document of a batch ``(B, T)``, in order; see ``Batch``."""
    rows, length = ids.shape
    for row in range(rows):
        begins = [] if positions is None else (positions[row] == 0).nonzero().flatten().tolist()
        edges = sorted({0, *begins, length})
        yield from ((row, start, end) for start, end in pairwise(edges))


@dataclass(frozen=True)
class Windows:
    """Windows of text, memory-mapped where they come from a file."""

    ids: Tensor
    """uint16 or int32 ``(N, T)``."""
    loss_mask: Tensor
    """uint8 ``(N, T)``, 1 where the token is one to learn: position t is trained on where ``loss_mask[t + 1]`` is 1."""
    begins: Tensor | None = None
    """uint8 ``(N, T)``, 1 where a document begins; None: documents of a window see each other."""
    sources: Tensor | None = None
    """uint8 ``(N,)``: the source of each, by its place in ``mixture``; None: there is but one."""
    mixture: Mapping[str, float] = field(default_factory=dict)
    """The weight of each source in training, by its name."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All that there is of them."""
        return [tensor for tensor in (self.ids, self.loss_mask, self.begins, self.sources) if tensor is not None]

    def at(self, index: Tensor) -> Self:
        """Some of them, in this order."""
        begins, sources = (None if tensor is None else tensor[index] for tensor in (self.begins, self.sources))
        return replace(self, ids=self.ids[index], loss_mask=self.loss_mask[index], begins=begins, sources=sources)

    def of_source(self, place: int) -> Tensor:
        """The numbers of those of a source, by its place in ``mixture``."""
        assert self.sources is not None
        return (self.sources == place).nonzero().squeeze(-1)

    def by_source(self) -> dict[str, Self]:
        """Those of each source, by its name; empty where there is but one."""
        if self.sources is None:
            return {}
        return {name: self.at(self.of_source(place)) for place, name in enumerate(self.mixture)}

    def batch(self, index: Tensor | slice, device: torch.device | None = None) -> Batch:
        """Some of them to read."""
        import torch

        ids = self.ids[index].long().to(device)
        mask = torch.nn.functional.pad(self.loss_mask[index][:, 1:], (0, 1)).to(device)
        return Batch(ids, ids.roll(-1, 1), mask, self._positions(index, device))

    def _positions(self, index: Tensor | slice, device: torch.device | None) -> Tensor | None:
        import torch

        if self.begins is None or not (begins := self.begins[index].to(device))[:, 1:].any():
            return None
        place = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)
        return place - (place * begins).cummax(1).values


class Encoded(NamedTuple):
    """A document as tokens, its end among them."""

    ids: np.ndarray
    """int32 ``(n,)``."""
    learned: np.ndarray
    """uint8 ``(n,)``."""
    turns: Sequence[int] | None
    """Where a chat may be cut: the first token behind each answer; None for a text."""
    bytes: int


class Packer:
    """One split on its way to a file: windows are written as they fill, so that memory holds a few of them.

    Args:
        ids_below: one more than the largest id.
        isolate: whether documents of a window are not to see each other; then nobody learns how one begins, either.
        pad: the id that fills what is left of a window of chats.
        beside: a folder on the disk that the file will lie on.
    """

    def __init__(self, context: int, ids_below: int, *, isolate: bool, pad: int, beside: Path) -> None:
        self.documents = self.tokens = self.bytes = self.windows = self.padding = self.cut_exchanges = 0
        self._context, self._isolate, self._pad = context, isolate, pad
        self._types = {"ids": np.dtype("<u2" if ids_below <= 2**16 else "<i4"), "loss_mask": np.dtype("u1")}
        if isolate:
            self._types["begins"] = np.dtype("u1")
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile(dir=beside) for _ in self._types]  # noqa: SIM115
        self._rest = np.zeros((0, 3), np.int32)
        self._open: list[np.ndarray] = []

    def close(self) -> None:
        """Forget what was packed."""
        for file in self._files:
            file.close()

    def add(self, document: Encoded) -> None:
        """Pack a document behind the others."""
        self.documents += 1
        self.tokens += len(document.ids)
        self.bytes += document.bytes
        # (n, 3): id, to learn, begins a document
        rows = np.stack([document.ids, document.learned, np.zeros_like(document.ids)], 1)
        if document.turns is not None:
            for chunk in self._chunks(rows, document.turns):
                if chunk[1:, 1].any():
                    self._fit(self._begun(chunk))
            return
        rows = np.concatenate([self._rest, self._begun(rows)])
        whole = len(rows) // self._context * self._context
        self._write(rows[:whole].reshape(-1, self._context, 3))
        self._rest = rows[whole:].copy()

    def _begun(self, rows: np.ndarray) -> np.ndarray:
        rows[0, 2] = 1
        if self._isolate:
            rows[0, 1] = 0
        return rows

    def _chunks(self, rows: np.ndarray, turns: Sequence[int]) -> list[np.ndarray]:
        """A chat in pieces that fit a window, cut where it may be; an exchange that is longer than a window, where each
        window ends."""
        chunks: list[list[np.ndarray]] = []
        for start, end in pairwise([0, *turns, len(rows)]):
            parts = [rows[at : min(at + self._context, end)] for at in range(start, end, self._context)]
            self.cut_exchanges += len(parts) > 1
            for part in parts:
                if len(parts) == 1 and chunks and sum(map(len, chunks[-1])) + len(part) <= self._context:
                    chunks[-1].append(part)
                else:
                    chunks.append([part])
        return [np.concatenate(chunk) for chunk in chunks]

    def _fit(self, chunk: np.ndarray) -> None:
        """Into the open window that it fills best, or a new one."""
        room = [self._context - len(window) - len(chunk) for window in self._open]
        fitting = [i for i, left in enumerate(room) if left >= 0]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            self._open[best] = np.concatenate([self._open[best], chunk])
            return
        if len(self._open) == _MOST_OPEN:
            self._pad_and_write(self._open.pop(max(range(_MOST_OPEN), key=lambda i: len(self._open[i]))))
        self._open.append(chunk)

    def _pad_and_write(self, window: np.ndarray) -> None:
        left = self._context - len(window)
        padding = np.zeros((left, 3), np.int32)
        padding[:, 0] = self._pad
        padding[:1, 2] = 1
        self.padding += left
        self._write(np.concatenate([window, padding])[None])

    def _write(self, windows: np.ndarray) -> None:
        """Those of ``(n, T, 3)`` that hold something to learn; the first token of a window follows nothing."""
        useful = windows[windows[:, 1:, 1].any(1)]
        self.windows += len(useful)
        for i, (file, kind) in enumerate(zip(self._files, self._types.values(), strict=True)):
            file.write(useful[:, :, i].astype(kind).tobytes())

    def finish(self) -> None:
        """Write the windows of chats that are still open; a rest of text that fills none is dropped."""
        for window in self._open:
            self._pad_and_write(window)
        self._open = []

    def _header(self, windows: int) -> dict[str, tuple[np.dtype[Any], list[int]]]:
        """Type and shape of each tensor of so many windows."""
        return {name: (kind, [windows, self._context]) for name, kind in self._types.items()}


def save_windows(path: Path, packers: Sequence[Packer], mixture: Mapping[str, float]) -> None:
    """Write the file that ``load_windows`` reads: safetensors, its tensors copied from disk to disk.

    Args:
        packers: of one split, one for each source.
        mixture: weight of each source by its name; empty where there is but one.
    """
    counts = [packer.windows for packer in packers]
    tensors = packers[0]._header(sum(counts))
    if mixture:
        tensors["sources"] = np.dtype("u1"), [sum(counts)]
    header: dict[str, object] = {"__metadata__": {_MIXTURE: json.dumps(mixture)}} if mixture else {}
    at = 0
    for name, (kind, shape) in tensors.items():
        size = math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _SAFETENSORS_TYPES[kind], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic_file(path) as temporary, temporary.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for files in zip(*(packer._files for packer in packers), strict=True):
            for file in files:
                file.seek(0)
                shutil.copyfileobj(file, out, 2**20)
        if mixture:
            out.write(np.repeat(np.arange(len(counts), dtype=np.uint8), counts).tobytes())


_MIXTURE = "mixture"
_SAFETENSORS_TYPES = {np.dtype("<u2"): "U16", np.dtype("<i4"): "I32", np.dtype("u1"): "U8"}


def load_windows(folder: Path, split: str) -> Windows:
    """The windows that ``prepare`` wrote for ``split`` ("train", "validation" or "test").

    Raises:
        EdgekdError: the file is missing or truncated.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / f"{split}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return Windows(**tensors, mixture=json.loads((file.metadata() or {}).get(_MIXTURE, "{}")))
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise EdgekdError(f"{path}: not readable ({error}).", "Prepare the data again.") from error
