"""Which artifact to take: hard limits first, then the front over what is left, and what was given up.

What is unknown never satisfies a limit. What was predicted for another device is marked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..errors import EdgekdError
from ..formats import Format, duration, percent, plain, significant, size
from ..manifest import Artifact
from ..proof import Benchmark, Figure
from .predict import Estimate, Prediction, predict
from .profiles import Profile


class Axis(BaseModel):
    """Something that artifacts are chosen by."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    key: str
    title: str
    higher: bool
    """Whether more of it is better."""
    text: Format


AXES = {
    axis.key: axis
    for axis in (
        Axis(key="quality", title="quality", higher=True, text=percent),
        Axis(key="ttft", title="TTFT", higher=False, text=duration),
        Axis(key="decode", title="decode in tok/s", higher=True, text=significant),
        Axis(key="memory", title="memory", higher=False, text=size),
        Axis(key="energy", title="energy in J per token", higher=False, text=significant),
        Axis(key="size", title="size", higher=False, text=size),
    )
}


class Value(BaseModel):
    """What is known of an artifact on one axis."""

    model_config = ConfigDict(frozen=True)

    value: float | None
    kind: Literal["measured", "computed", "estimated", "predicted"] | None = None
    reason: str | None = None


class Candidate(BaseModel):
    """An artifact on every axis."""

    model_config = ConfigDict(frozen=True)

    name: str
    values: Mapping[str, Value]
    failures: list[str] = []
    """What missed its gate."""


class Refusal(BaseModel):
    """Why an artifact is out."""

    model_config = ConfigDict(frozen=True)

    name: str
    reasons: list[str]
    overshoot: float | None
    """Sum of the logarithms by which limits are missed; None where something is unknown, or a gate failed."""


class Choice(BaseModel):
    """What to take, and why."""

    model_config = ConfigDict(frozen=True)

    taken: Candidate | None
    front: list[str]
    given_up: list[str]
    refused: list[Refusal]
    nearest: str | None
    """Where nothing fits: the one that misses least."""


def candidate(artifact: Artifact, profile: Profile | None = None) -> Candidate:
    """An artifact as it was measured here, or as predicted for a device."""
    manifest = artifact.manifest
    parity, benchmark = manifest.parity, manifest.benchmark or Benchmark()
    values = _measured(benchmark) if profile is None else _predicted(predict(artifact, profile, _longest(benchmark)))
    top1 = parity.figure("top1_agreement") if parity else None
    values["quality"] = _of_figure(top1) if top1 else Value(value=None, reason="not verified")
    values["size"] = Value(value=artifact.size_bytes, kind="measured")
    failures = (parity.failures if parity else None) or []
    return Candidate(name=artifact.folder.name, values={key: values[key] for key in AXES}, failures=failures)


def _longest(benchmark: Benchmark) -> int:
    return max(map(int, benchmark.ttft_s), default=256)


def _measured(benchmark: Benchmark) -> dict[str, Value]:
    ttft = benchmark.ttft_s.get(str(_longest(benchmark)))
    return {
        "ttft": _of_figure(ttft) if ttft else Value(value=None, reason="not timed"),
        "decode": _of_figure(benchmark.decode_tokens_per_s),
        "memory": _of_figure(benchmark.peak_rss_bytes),
        "energy": _of_figure(benchmark.decode_energy_j_per_token),
    }


def _predicted(found: Prediction) -> dict[str, Value]:
    return {
        "ttft": _of_estimate(found.ttft_s),
        "decode": _of_estimate(found.decode_tokens_per_s),
        "memory": _of_estimate(found.memory_bytes),
        "energy": _of_estimate(found.estimated_decode_energy_j_per_token),
    }


def _of_figure(figure: Figure) -> Value:
    return _value(figure.value, figure.source, figure.reason)


def _of_estimate(estimate: Estimate) -> Value:
    return _value(estimate.value, estimate.source, estimate.reason)


def _value(value: float | None, source: str | None, reason: str | None) -> Value:
    kind = (source or "").partition(":")[0]
    return Value.model_validate({"value": value, "kind": kind if value is not None else None, "reason": reason})


def pick(candidates: Sequence[Candidate], limits: Mapping[str, float]) -> Choice:
    """Choose.

    Args:
        limits: by axis, the least or the most that is allowed.
    """
    refused, fit = [], []
    for one in candidates:
        refusal = _refusal(one, limits)
        if refusal:
            refused.append(refusal)
        else:
            fit.append(one)
    front = [one for one in fit if not any(dominates(other, one) for other in fit)]
    taken = max(front, key=_rank, default=None)
    known = [r for r in refused if r.overshoot is not None]
    nearest = None if taken else min(known, key=lambda r: r.overshoot or 0.0, default=None)
    return Choice(
        taken=taken,
        front=[one.name for one in front],
        given_up=list(_given_up(taken, front)) if taken else [],
        refused=refused,
        nearest=nearest.name if nearest else None,
    )


def _refusal(one: Candidate, limits: Mapping[str, float]) -> Refusal | None:
    """Why an artifact is out; None where it is not."""
    reasons = [f"failed its gate: {text}" for text in one.failures]
    overshoot, unknown = 0.0, bool(one.failures)
    for key, limit in limits.items():
        axis, value = AXES[key], one.values[key]
        if value.value is None:
            reasons.append(f"{axis.title} is unknown: {value.reason}")
            unknown = True
        elif (value.value < limit) if axis.higher else (value.value > limit):
            reasons.append(f"{axis.title} {_text(axis, value)} is not {_asked(axis, limit)}")
            overshoot += abs(math.log(max(value.value, 1e-12) / limit))
    return Refusal(name=one.name, reasons=reasons, overshoot=None if unknown else overshoot) if reasons else None


def _asked(axis: Axis, limit: float) -> str:
    return f"{plain(axis.text(limit))} or {'more' if axis.higher else 'less'}"


def _text(axis: Axis, value: Value) -> str:
    """A value, marked unless it was measured."""
    shown = plain(axis.text(value.value))
    return shown if value.kind in ("measured", "computed") else f"{shown} ({value.kind})"


def dominates(one: Candidate, other: Candidate) -> bool:
    """Whether one is at least as good on every axis that is known of both, and better on one; what is known of the
    other alone is on no scale, and keeps it from being beaten."""
    better = False
    for key, axis in AXES.items():
        x, y = one.values[key].value, other.values[key].value
        if y is None:
            continue
        if x is None or ((x < y) if axis.higher else (x > y)):
            return False
        better |= x != y
    return better


def _rank(one: Candidate) -> tuple[float, float, float]:
    """Within the limits the closest to the student is best, then the faster, then the smaller."""
    quality, decode, weight = (one.values[key].value for key in ("quality", "decode", "size"))
    return (quality or 0.0, decode or 0.0, -(weight or 0.0))


def _given_up(taken: Candidate, front: Sequence[Candidate]) -> Iterable[str]:
    """What each other one of the front is better at."""
    for other in front:
        if other.name == taken.name:
            continue
        words = []
        for key, axis in AXES.items():
            x, y = taken.values[key], other.values[key]
            if x.value is None or y.value is None or x.value == y.value or (y.value > x.value) != axis.higher:
                continue
            words.append(f"{axis.title} {_text(axis, y)} instead of {_text(axis, x)}")
        if words:
            yield f"{other.name} has {', '.join(words)}"


# --- limits as people write them --------------------------------------------------------------------------------------

_SIZES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TIMES = {"ms": 1e-3, "s": 1}


def limit_of(option: str, text: str) -> float:
    """The number that an option such as ``--memory 1.5GB`` means.

    Raises:
        EdgekdError: it is no such number, or one that nothing can meet.
    """
    units: Mapping[str, float] = {"memory": _SIZES, "size": _SIZES, "ttft": _TIMES}.get(option, {"": 1})
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2] not in units:
        written = " or ".join(f"1{unit}" for unit in list(units)[-2:]) if "" not in units else "0.95"
        raise EdgekdError(f"--{option} {text:.80}: not a number with a unit.", f"Write it as {written}.")
    value = float(match[1]) * units[match[2]]
    if not 0 < value < 1e18 or (option == "quality" and value > 1):
        most = "above 0 and at most 1" if option == "quality" else "above 0"
        raise EdgekdError(f"--{option} {text:.80}: nothing can meet it, it must be {most}.", "Correct it.")
    return value


def lines(choice: Choice) -> Iterable[str]:
    """A choice for the console."""
    if choice.taken:
        known = [
            f"{axis.title} {_text(axis, value)}"
            for key, axis in AXES.items()
            if (value := choice.taken.values[key]).value is not None
        ]
        yield f"take {choice.taken.name}: {', '.join(known)}"
        unknown = [AXES[key].title for key, value in choice.taken.values.items() if value.value is None]
        if unknown:
            yield f"unknown of it: {', '.join(unknown)}"
        yield from (f"given up: {words}" for words in choice.given_up)
    else:
        nearest = f"; {choice.nearest} misses least" if choice.nearest else ""
        yield f"nothing fits{nearest}"
    for refusal in choice.refused:
        yield f"out: {refusal.name}: {'; '.join(refusal.reasons)}"
