"""The arithmetic behind a benchmark's figures. Time is in seconds, memory in bytes, rates per second."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_BANDWIDTH_REPEATS = 7
_MIN_BUFFER_BYTES = 256 * 2**20


def median(samples: Sequence[float]) -> float:
    """Median; the mean of the middle two of an even number."""
    return percentile(samples, 50)


def percentile(samples: Sequence[float], q: float) -> float:
    """The ``q``-th percentile (0 to 100), linear between samples.

    Raises:
        ValueError: no samples.
    """
    if not len(samples):
        raise ValueError("no samples")
    return float(np.percentile(np.asarray(samples, np.float64), q))


def tokens_per_s(tokens: int, seconds: float) -> float:
    """Rate of ``tokens`` in ``seconds``.

    Raises:
        ValueError: no time has passed.
    """
    if seconds <= 0:
        raise ValueError(f"{tokens} tokens in {seconds} s: the clock is too coarse")
    return tokens / seconds


def decode_roofline_fraction(decode_tokens_per_s: float, bytes_per_token: float, bandwidth_bytes_per_s: float) -> float:
    """Share of the memory roofline that decoding reaches (Williams et al. 2009): bytes read per second over the
    bandwidth. It may exceed 1 for a model whose weights stay in cache."""
    return decode_tokens_per_s * bytes_per_token / bandwidth_bytes_per_s


def last_level_cache_bytes() -> int | None:
    """Size of the last-level cache that Linux reports; None elsewhere. A virtual machine may report its host's."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=None)


def bandwidth_buffer_bytes() -> int:
    """Twice the last-level cache where a quarter of the free memory allows it, else that quarter."""
    import psutil

    wanted = max(_MIN_BUFFER_BYTES, 2 * (last_level_cache_bytes() or 0))
    return min(wanted, psutil.virtual_memory().available // 4) // 8 * 8


def bandwidth_samples(threads: int, buffer_bytes: int) -> list[float]:
    """Bytes read per second, one sample a pass over a buffer summed by ``threads`` threads.

    Integers are summed because NumPy vectorises that (a float sum is bound by the adders on some CPUs) and releases
    the GIL. The first pass, which warms up, is left out.
    """
    parts = np.array_split(np.ones(buffer_bytes // 8, np.int64), threads)
    samples = []
    for _ in range(_BANDWIDTH_REPEATS + 1):
        workers = [threading.Thread(target=part.sum) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        samples.append(buffer_bytes / (time.perf_counter() - start))
    return samples[1:]
