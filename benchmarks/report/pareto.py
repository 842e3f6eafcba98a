"""The artifacts as quality, speed and size, and which of them no other beats in all three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...results import MadeArtifact


@dataclass(frozen=True)
class Point:
    """One artifact, any of its figures None when not measured."""

    name: str
    kl: float | None
    decode_tokens_per_s: float | None
    size_bytes: float | None
    failed: bool
    on_front: bool = False


def points(artifacts: Sequence[MadeArtifact]) -> list[Point]:
    """The artifacts in their order, with those marked that no other beats in all three.

    An artifact that failed its gate, or whose three figures are not all measured, is never on the front.
    """
    found = [Point(a.label, a.kl_mean, a.decode_tokens_per_s, a.size_bytes, bool(a.failures)) for a in artifacts]
    return [replace(p, on_front=is_whole(p) and not any(beats(q, p) for q in found)) for p in found]


def is_whole(point: Point) -> bool:
    """Whether the point can take part: all measured, no gate failed."""
    measured = None not in (point.kl, point.decode_tokens_per_s, point.size_bytes)
    return measured and not point.failed


def beats(one: Point, other: Point) -> bool:
    """Pareto dominance: at least as close, fast and small, and better in one of them."""
    if not (is_whole(one) and is_whole(other)):
        return False
    a = (one.kl or 0.0, -(one.decode_tokens_per_s or 0.0), one.size_bytes or 0.0)
    b = (other.kl or 0.0, -(other.decode_tokens_per_s or 0.0), other.size_bytes or 0.0)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
