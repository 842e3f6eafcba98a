"""In which order the windows of several sources are read, each as often as its weight says.

Shapes: ``N`` windows, ``S`` sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .pack import Windows

BLOCK = 1000
"""Places in which every source stands as often as its weight says, to one place; at least once."""


def mixed_indices(seed: int, step: int, windows: Windows, size: int) -> Tensor:
    """The windows that step ``step`` (from 0) reads of a mixture, int64 ``(size,)``: a function of its arguments alone.

    Every window of a source is read once before any of that source is read again.
    """
    places = np.arange(step * size, (step + 1) * size)
    plan, ranks, counts = _block(tuple(windows.mixture.values()))
    sources = plan[places % BLOCK]
    ordinals = places // BLOCK * counts[sources] + ranks[places % BLOCK]
    found = np.empty(size, np.int64)
    for source in np.unique(sources):
        members = windows.of_source(int(source)).numpy()
        mine = sources == source
        epochs, at = np.divmod(ordinals[mine], len(members))
        orders = {epoch: _permutation(seed, epoch, int(source), len(members)) for epoch in np.unique(epochs).tolist()}
        found[mine] = [members[orders[epoch][place]] for epoch, place in zip(epochs.tolist(), at, strict=True)]
    return torch.from_numpy(found)


@lru_cache(maxsize=4)
def _block(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source of each place of a block, evenly interleaved ``(BLOCK,)``; how many of that source stand before it
    ``(BLOCK,)``; and how many each has ``(S,)``."""
    shares = BLOCK * np.array(weights) / sum(weights)
    counts = np.maximum(1, np.floor(shares).astype(np.int64))
    while (short := BLOCK - int(counts.sum())) > 0:  # to those that lost most by rounding
        counts[np.argsort(counts - shares, kind="stable")[:short]] += 1
    while (over := int(counts.sum()) - BLOCK) > 0:  # what the rarest got, the most frequent give
        counts[np.argmax(counts)] -= min(over, 1)
    ranks = np.concatenate([np.arange(count) for count in counts])
    plan = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort((ranks + 0.5) / counts[plan], kind="stable")
    return plan[order], ranks[order], counts


@lru_cache(maxsize=512)
def _permutation(seed: int, epoch: int, source: int, windows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, source]).permutation(windows)
