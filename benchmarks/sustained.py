"""Decoding for minutes without a pause: speed slice by slice, and where it changed for the worse."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from ..manifest import Artifact
from ..proof import Slice, Sustained
from .definitions import real_text
from .machine import hottest
from .measure import OpenSession

SLICES = 20
_LEAST_SLICES = 2  # on either side of a change
_LEAST_DROP = 0.05
_CLEAR = 3.0
_PROMPT_TOKENS = 16


def sustained(
    open_session: OpenSession, artifact: Artifact, threads: int, seconds: float, root: Path = Path("/")
) -> Sustained:
    """Decode for so long; prompts are read between slices' tokens and take no part in their speed."""
    session = open_session(artifact, threads=threads)
    try:
        context = artifact.manifest.contract.context_length
        ids = session.tokenize(real_text(session, min(_PROMPT_TOKENS, context // 2)))
        session.reset()
        token, used, slices = int(session.prefill(ids).argmax()), len(ids), []
        for _ in range(SLICES):
            began, busy, count = time.monotonic(), 0.0, 0
            while time.monotonic() - began < seconds / SLICES:
                if used == context:
                    session.reset()
                    token, used = int(session.prefill(ids).argmax()), len(ids)
                start = time.perf_counter()
                token = int(session.decode(token).argmax())
                busy += time.perf_counter() - start
                count, used = count + 1, used + 1
            slices.append(
                Slice(seconds=time.monotonic() - began, decode_tokens_per_s=count / busy, temperature_c=hottest(root))
            )
    finally:
        session.close()
    change, factor = change_point([one.decode_tokens_per_s for one in slices])
    return Sustained(slices=slices, change_slice=change, factor=factor)


def change_point(rates: Sequence[float]) -> tuple[int | None, float]:
    """The slice from which on it was slower, and the speed behind it over that before; None and 1 where none was.

    The split that leaves the least squared error of two levels is taken; it is a change where the drop is a twentieth
    or more and three times what the slices scatter about their levels.
    """
    splits = range(_LEAST_SLICES, len(rates) - _LEAST_SLICES + 1)
    if not splits:
        return None, 1.0
    split = min(splits, key=lambda at: _scatter(rates[:at]) + _scatter(rates[at:]))
    before, after = statistics.median(rates[:split]), statistics.median(rates[split:])
    noise = ((_scatter(rates[:split]) + _scatter(rates[split:])) / len(rates)) ** 0.5
    if before - after < max(_LEAST_DROP * before, _CLEAR * noise):
        return None, 1.0
    return split, after / before


def _scatter(rates: Sequence[float]) -> float:
    """Sum of squares about the mean."""
    mean = statistics.fmean(rates)
    return sum((rate - mean) ** 2 for rate in rates)
