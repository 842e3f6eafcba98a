"""The arithmetic behind a benchmark's figures. Time is in seconds, memory in bytes, rates per second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
    bandwidth. Above 1 the roofline is wrong: the weights stay in cache, or the bandwidth was measured too low."""
    return decode_tokens_per_s * bytes_per_token / bandwidth_bytes_per_s


def bootstrap_median(samples: Sequence[float], *, draws: int = 2000, seed: int = 0) -> list[float] | None:
    """95 % interval of the median; None for fewer than three samples."""
    return bootstrap(samples, draws=draws, seed=seed, confidence=95) if len(samples) >= 3 else None


def bootstrap(samples: Sequence[float] | np.ndarray, *, draws: int, seed: int, confidence: float) -> list[float]:
    """Interval of the median, by drawing the samples again with replacement.

    Args:
        confidence: percent that the interval holds.
    """
    values = np.asarray(samples, np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    tail = (100 - confidence) / 2
    return [float(q) for q in np.percentile(np.median(values[drawn], axis=1), [tail, 100 - tail])]
