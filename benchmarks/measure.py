"""What a child process does with an artifact while the harness waits: one repetition, a cold start, the curves."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil

from ..manifest import Artifact
from ..session import Session
from .children import now
from .definitions import Request, first_text, real_text, serve
from .gpu import vram_bytes
from .memory import Phase, begin_phase, disk_read_bytes, end_phase, peak_rss_bytes

WARM_UP_TOKENS = 8
CURVE_TOKENS = 16
"""Decoded at each point of a curve."""


class OpenSession(Protocol):
    """A function at the head of a module, so that a fresh process can import it."""

    def __call__(self, artifact: Artifact, *, threads: int | None = None) -> Session: ...


@dataclass(frozen=True)
class Repetition:
    """What one process measured."""

    load_s: float
    first: Request
    """The first request of the process, with the shortest prompt."""
    warm: Mapping[int, Request]
    """Up to the first text, by the prompt's length."""
    decode: Request
    """Behind the longest prompt."""
    memory: Mapping[str, Phase | None]
    rss_before_load: int
    peak_rss: int
    vram: Mapping[str, int]
    """On all GPUs, at the end of each phase."""
    torch_in_process: bool
    shortest_text: str
    """What the first request read."""


def repetition(
    open_session: OpenSession, artifact: Artifact, lengths: Sequence[int], decode_tokens: int, threads: int
) -> Repetition:
    """Load, serve a first request, warm up, serve one of each length, and decode behind the longest."""
    context = artifact.manifest.contract.context_length
    memory: dict[str, Phase | None] = {}
    vram: dict[str, int] = {}
    peaks = [peak_rss_bytes()]

    def end(phase: str) -> None:
        memory[phase] = end_phase()
        vram[phase] = sum(vram_bytes().values())
        peaks.append(peak_rss_bytes())

    before = psutil.Process().memory_info().rss
    begin_phase()
    start = now()
    session = open_session(artifact, threads=threads)
    load = now() - start
    try:
        end("load")
        texts = {length: real_text(session, length) for length in lengths}
        shortest, longest = lengths[0], lengths[-1]
        begin_phase()
        first = first_text(session, texts[shortest], context - shortest)
        serve(session, texts[longest], min(WARM_UP_TOKENS, decode_tokens))
        warm = {length: first_text(session, texts[length], context - length) for length in lengths}
        end("prefill")
        session.reset()
        begin_phase()
        decode = serve(session, texts[longest], decode_tokens)
        end("decode")
    finally:
        session.close()
    return Repetition(
        load, first, warm, decode, memory, before, max(peaks), vram, "torch" in sys.modules, texts[shortest]
    )


@dataclass(frozen=True)
class ColdStart:
    """A process that began with nothing in memory, up to its first text."""

    ttft_s: float | None
    major_faults: int | None
    read_bytes: int | None


def cold_start(
    open_session: OpenSession, artifact: Artifact, text: str, room: int, threads: int, started: float
) -> ColdStart:
    """Open the artifact and serve one request.

    Args:
        started: the shared clock when the parent started this process.
    """
    session = open_session(artifact, threads=threads)
    try:
        request = first_text(session, text, room)
    finally:
        session.close()
    ttft = request.chunks[0] - started if request.chunks else None
    return ColdStart(ttft, _major_faults(), disk_read_bytes())


def _major_faults() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


@dataclass(frozen=True)
class CurvePoint:
    """One request at one length."""

    ttft_s: float | None
    decode_tokens_per_s: float


def curves(
    open_session: OpenSession, artifact: Artifact, lengths: Sequence[int], threads: int, seconds: float
) -> dict[int, CurvePoint]:
    """A request of each length, the shortest first, as long as the next one is likely to end within ``seconds``."""
    session = open_session(artifact, threads=threads)
    try:
        serve(session, real_text(session, lengths[0]), WARM_UP_TOKENS)
        began, points = time.monotonic(), dict[int, CurvePoint]()
        for length in lengths:
            request = serve(session, real_text(session, length), CURVE_TOKENS)
            points[length] = CurvePoint(request.ttft_s, request.decode_tokens / request.decode_s)
            following = next((n for n in lengths if n > length), length)
            if time.monotonic() - began + request.latency_s * following / length > seconds:
                break
        return points
    finally:
        session.close()


def curve_lengths(context: int) -> list[int]:
    """Prompts from 32 tokens to what leaves room for a curve's tokens, each four times the one before."""
    last = context - CURVE_TOKENS
    return [*(n for n in (32 * 4**i for i in range(12)) if n < last), last] if last > 0 else []
