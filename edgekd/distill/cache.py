"""A teacher's knowledge on disk: captured once, read by every training on the same windows.

Of each learned position it holds the likeliest ids with their probabilities, and draws from all the others, each of
which counts for its share of their probability. Nothing is renormalised, so that in the mean over draws a sum over the
vocabulary is what it is with the teacher beside the student: the loss has no bias, and its gradient's error falls as
one over the root of the tokens. A cache of the likeliest ids alone pulls the student to another distribution.

Shapes: ``B`` windows, ``T`` tokens, ``V`` vocabulary, ``R`` learned positions, ``K`` = ``TOP`` + ``DRAWS`` ids.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import EdgekdError
from ..files import atomic_file, digest, file_sha256, read_sealed, remove, write_sealed
from . import versions
from .losses import Sparse, log_probs
from .pack import Windows
from .ranks import ALONE
from .signals import TeacherSignal

TOP, DRAWS = 8, 24
INDEX = "cache.json"
_LOG = logging.getLogger(__name__)
_SHARD_BYTES = 2**25
_CHUNK = 64  # positions drawn at a time
_STEP = 0.125  # nats, to which the log-probability of a draw is rounded; its weight is exact
_NAMES = {
    "teacher": "another teacher, or another revision of it",
    "tokenizer": "another tokenizer",
    "data": "other data",
    "order": "another order of windows",
    "temperature": "another distill.temperature",
    "version": "another version of edgekd",
}


def bytes_per_token(vocab_size: int) -> int:
    """Of each learned position: its ids in as few bits as they need, probabilities, and a byte for each draw."""
    return (TOP + DRAWS) * _bits(vocab_size) // 8 + 2 * TOP + DRAWS


def _bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def key_of(
    teacher: str, tokenizer: str, windows: Windows, order: Sequence[int], temperature: float, vocab_size: int
) -> dict[str, object]:
    """What a cache hangs on; each part is compared before one is read.

    Args:
        teacher: digest of its folder.
        tokenizer: digest of its tokenizer.
        order: the windows that are captured, as they will be read.
    """
    data = hashlib.sha256()
    for tensor in windows.tensors:
        data.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return {
        "teacher": teacher,
        "tokenizer": tokenizer,
        "data": data.hexdigest(),
        "order": digest(list(order)),
        "temperature": temperature,
        "vocab_size": vocab_size,
        "version": versions.CACHE,
    }


def encode(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """What the cache holds of some positions, uint8 ``(n, bytes_per_token(V))``.

    Draws are systematic: one number places all of them along the distribution, each as often as its probability says.

    Args:
        logits: ``(n, V)``.
        uniform: float64 ``(n,)`` in [0, 1), one for each position.
    """
    logs = log_probs(logits, temperature)
    if logs.device.type == "mps":  # Apple's GPUs have no float64
        logs = logs.cpu()
    top = logs.topk(TOP, -1)
    tail = logs.double().exp().scatter_(1, top.indices, 0.0).cumsum(-1)
    mass = tail[:, -1:]
    places = (uniform[:, None].to(mass) + torch.arange(DRAWS, device=mass.device)) / DRAWS * mass
    drawn = torch.searchsorted(tail, places, right=True).clamp_max_(logits.shape[-1] - 1)
    # The likeliest's probability is what the others leave, so that rounding never makes a sum of more or less than one.
    values = torch.cat([mass, top.values[:, 1:].double().exp()], 1).half()
    rounded = (-logs.gather(1, drawn) / _STEP).round().clamp_(0, 255).byte()
    ids = torch.cat([top.indices, drawn], 1).cpu().numpy()
    bits = (ids[:, :, None] >> np.arange(_bits(logits.shape[-1])) & 1).astype(np.uint8)
    packed = torch.from_numpy(np.packbits(bits.reshape(len(ids), -1), axis=1))
    return torch.cat([packed, values.cpu().view(torch.uint8), rounded.cpu()], 1)


def decode(rows: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ids``, ``log_probs`` and ``weights``, each ``(n, K)``, of ``encode``'s rows."""
    width = _bits(vocab_size)
    at = (TOP + DRAWS) * width // 8
    bits = np.unpackbits(rows[:, :at].numpy(), axis=1).reshape(len(rows), TOP + DRAWS, width)
    ids = torch.from_numpy(bits.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64)))
    values = rows[:, at : at + 2 * TOP].contiguous().view(torch.float16).float()
    likeliest = (1 - values.sum(-1, keepdim=True)).clamp_min(0)
    top = torch.cat([likeliest, values[:, 1:]], 1)
    logs = torch.cat([top.clamp_min(1e-12).log(), -_STEP * rows[:, at + 2 * TOP :].float()], 1)
    return ids, logs, torch.cat([top, (values[:, :1] / DRAWS).expand(-1, DRAWS)], 1)


@dataclass(frozen=True)
class Cache:
    """A folder of shards, some of which may still be to capture."""

    folder: Path
    key: Mapping[str, object]
    windows: Windows
    order: Sequence[int]
    """The windows it holds, as they are read."""

    @property
    def vocab_size(self) -> int:
        """``V``."""
        size = self.key["vocab_size"]
        assert isinstance(size, int)
        return size

    @property
    def per_shard(self) -> int:
        """Windows of a shard."""
        return max(1, _SHARD_BYTES // (self.windows.ids.shape[1] * bytes_per_token(self.vocab_size)))

    @property
    def shards(self) -> int:
        """How many there are when it is whole."""
        return -(-len(self.order) // self.per_shard)

    @property
    def size_bytes(self) -> int:
        """When it is whole."""
        learned = self.windows.loss_mask[torch.tensor(self.order), 1:].sum(dtype=torch.int64)
        return int(learned) * bytes_per_token(self.vocab_size)

    @property
    def digest(self) -> str:
        """Of what its shards hold, once it is whole."""
        return digest([read_sealed(self.path(shard).with_suffix(".json")) for shard in range(self.shards)])

    def of(self, shard: int) -> Sequence[int]:
        """The windows of a shard."""
        return self.order[shard * self.per_shard : (shard + 1) * self.per_shard]

    def path(self, shard: int) -> Path:
        """Its file."""
        return self.folder / f"shard-{shard:05}.safetensors"

    def claim(self) -> None:
        """Make the folder, or see that it is one of the same key.

        Raises:
            EdgekdError: it was captured from something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / INDEX).is_file():
            write_sealed(self.folder / INDEX, self.key)
        found = read_sealed(self.folder / INDEX, remedy=f"Remove {self.folder}.")
        for name, value in self.key.items():
            if found.get(name) != value:
                what = _NAMES.get(name, f"another {name}")
                raise EdgekdError(f"{self.folder}: was captured with {what}.", "Remove it, or name another folder.")

    def damage(self, shard: int) -> str | None:
        """Why a shard cannot be used; empty where nothing was captured, None where it is whole."""
        told = self.path(shard).with_suffix(".json")
        if not told.is_file():
            return ""
        try:
            sealed = read_sealed(told)
            return None if file_sha256(self.path(shard)) == sealed["file"] else f"{self.path(shard)}: is damaged"
        except (EdgekdError, OSError, KeyError) as error:
            return f"{self.path(shard)}: is damaged ({error})"


def capture(cache: Cache, teacher: TeacherSignal, tell: Callable[[float, str], None] | None = None) -> None:
    """Capture every shard that is missing or damaged.

    Several processes, on one machine or on several that share the folder, may capture the same cache at once: each
    takes the next shard that nobody works on. One that was killed leaves whole shards behind, and the next goes on.

    Raises:
        EdgekdError: the folder is of another key.
    """
    cache.claim()
    others: list[int] = []
    for shard in range(cache.shards):
        lock = FileLock(cache.folder / f"shard-{shard:05}.lock")
        try:
            with lock.acquire(timeout=0):
                if (damage := cache.damage(shard)) is None:
                    continue
                if damage:
                    _LOG.warning("%s. Captured again.", damage)
                _write(cache, shard, teacher)
        except Timeout:
            others.append(shard)
            continue
        if tell:
            tell((shard + 1) / cache.shards, f"teacher: shard {shard + 1} of {cache.shards}")
    for shard in others:  # they work on it, and may be killed
        with FileLock(cache.folder / f"shard-{shard:05}.lock"):
            if cache.damage(shard) is not None:
                _write(cache, shard, teacher)


def _write(cache: Cache, shard: int, teacher: TeacherSignal) -> None:
    told = cache.path(shard).with_suffix(".json")
    remove(told)
    parts = [_of_window(cache, window, teacher) for window in cache.of(shard)]
    offsets = torch.tensor([0, *np.cumsum([len(part) for part in parts])])
    with atomic_file(cache.path(shard)) as temporary:
        save_file({"told": torch.cat(parts), "offsets": offsets}, temporary)
    write_sealed(told, {"file": file_sha256(cache.path(shard))})


@torch.no_grad()
def _of_window(cache: Cache, window: int, teacher: TeacherSignal) -> Tensor:
    """uint8 ``(R, bytes)`` of one window; the draws hang on the cache's key and the window alone."""
    index = torch.tensor([window])
    ids, _, mask, positions = cache.windows.batch(index, ALONE.device)
    said = teacher.teach(ids, index, positions)
    seed = int(digest([cache.key["data"], window])[:15], 16)
    uniform = torch.rand(ids.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    temperature = cache.key["temperature"]
    assert isinstance(temperature, float)
    chosen = mask.flatten().nonzero().squeeze(-1)
    rows = [encode(said.rows(part), temperature, uniform[part.cpu()]) for part in chosen.split(_CHUNK)]
    return torch.cat(rows) if len(chosen) else torch.zeros(0, bytes_per_token(cache.vocab_size), dtype=torch.uint8)


class CachedTeacher:
    """A teacher signal that reads a whole cache.

    Raises:
        EdgekdError: the cache is of another key, or a shard is missing or damaged.
    """

    def __init__(self, cache: Cache) -> None:
        cache.claim()
        for shard in range(cache.shards):
            if (damage := cache.damage(shard)) is not None:
                raise EdgekdError(f"{damage or f'{cache.path(shard)}: is missing'}.", "Capture it again.")
        self._cache = cache
        self._place = {window: place for place, window in enumerate(cache.order)}
        self._opened = lru_cache(maxsize=8)(_open)

    @property
    def vocab_size(self) -> int:
        """``V``; see ``TeacherSignal``."""
        return self._cache.vocab_size

    def teach(self, ids: Tensor, index: Tensor | None, positions: Tensor | None = None) -> Sparse:
        """What was captured of the windows ``index``; see ``TeacherSignal``.

        Raises:
            EdgekdError: a window was not captured.
        """
        if index is None:
            raise EdgekdError("A cached teacher knows the windows of its cache alone.", "Evaluate with the teacher.")
        shape = (*ids.shape, TOP + DRAWS)
        told = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape)
        learned = self._cache.windows.batch(index).mask.bool()
        for row, window in enumerate(index.tolist()):
            for tensor, values in zip(told, decode(self._rows(window), self.vocab_size), strict=True):
                tensor[row, learned[row]] = values
        return Sparse(*(tensor.to(ids.device) for tensor in told))

    def _rows(self, window: int) -> Tensor:
        if window not in self._place:
            raise EdgekdError(f"{self._cache.folder}: holds no window {window}.", "Capture it again.")
        shard, at = divmod(self._place[window], self._cache.per_shard)
        told, offsets = self._opened(self._cache.path(shard))
        return told[offsets[at] : offsets[at + 1]]


def _open(path: Path) -> tuple[Tensor, list[int]]:
    """Memory-mapped."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("told"), file.get_tensor("offsets").tolist()
    except (OSError, SafetensorError) as error:
        raise EdgekdError(f"{path}: not readable ({error}).", "Capture it again.") from error
