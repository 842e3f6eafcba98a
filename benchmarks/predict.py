"""What a device will do with an artifact, predicted from published speeds of it and its like, with an interval.

Decoding waits for memory: a token takes ``t = k · bytes ÷ bandwidth + c`` seconds, with k and c of the class of
devices, fitted to published points. Where speeds of the very chip were published, the rate at which it read weights
then takes the bandwidth's place, with k = 1 and c = 0. Prefill waits for arithmetic: tokens/s = share · operations/s ÷
(2 · parameters). Every error that is told is of points whose chip took no part in the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..errors import EdgekdError
from ..manifest import Artifact, Manifest
from ..proof import BenchRecord
from .anchors import Point, points
from .metrics import percentile
from .profiles import Profile, Quantity

_INTERVAL = 0.8
_LEAST_POINTS = 3
_NO_DATA = "no bandwidth of this device is sourced"


@dataclass(frozen=True)
class Fit:
    """Seconds of a token, and how far held-out points were from it."""

    k: float
    c: float
    spread: float
    """80 % of held-out points lie within a factor of exp(±spread)."""

    def tokens_per_s(self, read_bytes: float, bandwidth_bytes_per_s: float) -> float:
        """Decode speed."""
        return 1 / (self.k * read_bytes / bandwidth_bytes_per_s + self.c)


def fit(known: Sequence[Point]) -> Fit:
    """The line of least relative error through points, and the spread of each group about the others' line."""
    k, c = _line(known)
    residuals = [
        abs(math.log(p.tokens_per_s / line.tokens_per_s(p.read_bytes, _bandwidth(p)))) for p, line in _held_out(known)
    ]
    return Fit(k, c, _conformal(residuals))


def _bandwidth(point: Point) -> float:
    assert point.bandwidth_bytes_per_s is not None
    return point.bandwidth_bytes_per_s


def _line(known: Sequence[Point]) -> tuple[float, float]:
    """k and c of least absolute relative error, neither below zero (iteratively reweighted least squares)."""
    seconds = np.array([1 / p.tokens_per_s for p in known])
    streamed = np.array([p.read_bytes / _bandwidth(p) for p in known])
    terms = np.stack([streamed / seconds, 1 / seconds], axis=1)
    weights = np.ones(len(known))
    for _ in range(60):
        weighted = terms * weights[:, None]
        k, c = np.linalg.solve(weighted.T @ terms + 1e-9 * np.eye(2), weighted.sum(0))
        alone = weighted.sum(0) / (weighted * terms).sum(0)  # of each, where the other is none
        k, c = (alone[0], 0.0) if c < 0 else (0.0, alone[1]) if k < 0 else (k, c)
        weights = 1 / np.maximum(np.abs(terms @ [k, c] - 1), 0.02)
    return float(k), float(c)


def _held_out(known: Sequence[Point]) -> Iterable[tuple[Point, Fit]]:
    """Every point with the line of the points of other chips."""
    for chip in dict.fromkeys(p.chip for p in known):
        rest = [p for p in known if p.chip != chip]
        if len(rest) >= _LEAST_POINTS:
            line = Fit(*_line(rest), 0.0)
            yield from ((p, line) for p in known if p.chip == chip)


def _conformal(residuals: Sequence[float]) -> float:
    """Half width that holds the wanted share of points yet to come."""
    if not residuals:
        return math.inf
    return percentile(residuals, 100 * min(1.0, _INTERVAL * (1 + 1 / len(residuals))))


def _usable(device_class: str) -> list[Point]:
    return [p for p in points() if p.device_class == device_class and p.bandwidth_bytes_per_s]


@cache
def fit_of(device_class: str) -> Fit:
    """The fit of a class of devices."""
    return fit(_usable(device_class))


# --- devices of which speeds were published ---------------------------------------------------------------------------


@cache
def anchored_spread() -> float:
    """How far a chip's read rates of single points are from the median of its others."""
    return _anchored_spread(points())


def _anchored_spread(known: Sequence[Point]) -> float:
    return _conformal([abs(math.log(p.tokens_per_s / speed)) for p, speed in _anchored(known)])


def _anchored(known: Sequence[Point]) -> Iterable[tuple[Point, float]]:
    """Every point of a device with others, and its speed by the median read rate of those."""
    for point in known:
        others = [p.read_bytes * p.tokens_per_s for p in known if p.device == point.device and p is not point]
        if others:
            yield point, percentile(others, 50) / point.read_bytes


# --- errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """How predictions met held-out points."""

    what: str
    points: int
    devices: int
    median: float
    p90: float
    covered: float
    """Share of points within their 80 % interval."""


def validate() -> list[Errors]:
    """The errors of every class, of all together, and of devices of which speeds were published."""
    rows = {name: list(_by_chip(_usable(name))) for name in ("gpu", "apple", "cpu")}
    every = [row for of_class in rows.values() for row in of_class]
    known = points()
    devices = {p.device for p in known}
    spread = {device: _anchored_spread([p for p in known if p.device != device]) for device in devices}
    anchored = [(p, speed, spread[p.device]) for p, speed in _anchored(known)]
    named = {f"class {name}": found for name, found in rows.items()} | {"all classes": every, "same chip": anchored}
    return [_errors(what, found) for what, found in named.items()]


def _by_chip(known: Sequence[Point]) -> Iterable[tuple[Point, float, float]]:
    """Every point, its speed predicted without its chip, and the spread of that prediction."""
    for chip in dict.fromkeys(p.chip for p in known):
        rest = [p for p in known if p.chip != chip]
        if len({p.chip for p in rest}) < _LEAST_POINTS:
            continue
        fitted = fit(rest)
        for p in known:
            if p.chip == chip:
                yield p, fitted.tokens_per_s(p.read_bytes, _bandwidth(p)), fitted.spread


def _errors(what: str, found: Sequence[tuple[Point, float, float]]) -> Errors:
    relative = [abs(speed / p.tokens_per_s - 1) for p, speed, _ in found]
    inside = [abs(math.log(p.tokens_per_s / speed)) <= spread for p, speed, spread in found]
    devices = len({p.chip for p, _, _ in found})
    covered = sum(inside) / len(inside)
    return Errors(what, len(found), devices, percentile(relative, 50), percentile(relative, 90), covered)


def validate_here(records: Sequence[BenchRecord]) -> list[Errors]:
    """The errors on every machine of a history: each artifact by the others of its target.

    Raises:
        EdgekdError: no machine has enough artifacts of one target.
    """
    machines = dict.fromkeys((record.target, record.benchmark.machine.cpu) for record in records)
    by_machine = {key: list(_by_chip(local_points(records, *key))) for key in machines}
    rows = [_errors(f"{target}, {cpu or 'unknown'}", found) for (target, cpu), found in by_machine.items() if found]
    if not rows:
        raise EdgekdError(
            f"the history has no {_LEAST_POINTS + 1} artifacts of one target that one machine has measured.",
            "Fill it with: edgekd bench ARTIFACT... --history FILE",
        )
    return rows


def errors_table(rows: Sequence[Errors]) -> str:
    """The errors as Markdown."""
    lines = [
        "| held out | points | chips or artifacts | median error | p90 error | inside the 80 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * x:.1f} %" for x in (row.median, row.p90, row.covered))
        lines.append(f"| {row.what} | {row.points} | {row.devices} | {shares} |")
    return "\n".join(lines)


# --- an artifact on a device ------------------------------------------------------------------------------------------


class Estimate(BaseModel):
    """A figure that nobody measured, with its interval; or why there is none."""

    model_config = ConfigDict(frozen=True)

    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    """Of the 80 % interval."""
    source: str | None = None
    reason: str | None = None


class Prediction(BaseModel):
    """What a device will do with an artifact."""

    model_config = ConfigDict(frozen=True)

    artifact: str
    profile: str
    prompt_tokens: int
    decode_tokens_per_s: Estimate
    sustained_decode_tokens_per_s: Estimate
    prefill_tokens_per_s: Estimate
    ttft_s: Estimate
    memory_bytes: Estimate
    app_memory_bytes: Estimate
    fits: bool | None
    """None: not known."""
    estimated_decode_energy_j_per_token: Estimate
    remarks: list[str]


def predict(artifact: Artifact, profile: Profile, prompt_tokens: int = 256) -> Prediction:
    """Predict decoding behind a prompt, prefill and memory."""
    manifest = artifact.manifest
    read, decode, prefill = speeds(manifest, profile, prompt_tokens)
    memory, budget = _memory(artifact, profile), _budget(profile)
    fits = None if memory.value is None or budget.value is None else memory.value <= budget.value
    return Prediction(
        artifact=artifact.folder.name,
        profile=profile.name,
        prompt_tokens=prompt_tokens,
        decode_tokens_per_s=decode,
        sustained_decode_tokens_per_s=_sustained(decode, profile),
        prefill_tokens_per_s=prefill,
        ttft_s=_inverse(prefill, prompt_tokens, "s", "predicted:prefill"),
        memory_bytes=memory,
        app_memory_bytes=budget,
        fits=fits,
        estimated_decode_energy_j_per_token=_energy(decode, profile.power),
        remarks=list(_remarks(read, profile, manifest.traffic is None)),
    )


def speeds(manifest: Manifest, profile: Profile, prompt_tokens: int) -> tuple[float, Estimate, Estimate]:
    """Bytes that a token reads behind a prompt, tokens/s of decoding there, and of prefill."""
    traffic = manifest.traffic
    read = traffic.bytes_per_token(prompt_tokens) if traffic else manifest.parameters * manifest.bits_per_weight / 8
    return read, _decode(read, profile), _prefill(manifest.parameters, profile)


def _unknown(unit: str, reason: str) -> Estimate:
    return Estimate(value=None, unit=unit, reason=reason)


def _decode(read: float, profile: Profile) -> Estimate:
    if rate := profile.decode_read_rate:
        spread, source = anchored_spread(), "predicted:published speeds of the chip"
        return _between(lambda x: 1e9 * x / read, rate, spread, "tok/s", source)
    if profile.bandwidth is None:
        return _unknown("tok/s", _NO_DATA)
    fitted, source = fit_of(profile.device_class), f"predicted:class {profile.device_class}"
    return _between(lambda x: fitted.tokens_per_s(read, 1e9 * x), profile.bandwidth, fitted.spread, "tok/s", source)


def _between(of: Callable[[float], float], quantity: Quantity, spread: float, unit: str, source: str) -> Estimate:
    """A figure of a quantity, its interval wide enough for the quantity's own range too."""
    low, high = quantity.ends
    factor = math.exp(spread)
    return Estimate(value=of(quantity.value), unit=unit, low=of(low) / factor, high=of(high) * factor, source=source)


@cache
def prefill_shares() -> tuple[float, ...]:
    """Share of the published arithmetic that published prefills reached, least first."""
    return tuple(
        sorted(
            2 * p.parameters * p.prefill_tokens_per_s / p.flops_per_s
            for p in points()
            if p.parameters and p.prefill_tokens_per_s and p.flops_per_s
        )
    )


def _prefill(parameters: int, profile: Profile) -> Estimate:
    if profile.compute is None:
        return _unknown("tok/s", "no arithmetic speed of this device is sourced")
    if profile.device_class != "gpu":
        return _unknown("tok/s", "published prefills with a sourced arithmetic speed are of graphics cards alone")
    shares, peak = prefill_shares(), 1e12 * profile.compute.value / (2 * parameters)
    return Estimate(
        value=percentile(shares, 50) * peak,
        unit="tok/s",
        low=shares[0] * peak,
        high=shares[-1] * peak,
        source=f"predicted:arithmetic, by {len(shares)} published prefills, not validated",
    )


def _inverse(rate: Estimate, amount: float, unit: str, source: str) -> Estimate:
    """What an amount takes at a rate."""
    if rate.value is None or rate.low is None or rate.high is None:
        return _unknown(unit, rate.reason or _NO_DATA)
    return Estimate(value=amount / rate.value, unit=unit, low=amount / rate.high, high=amount / rate.low, source=source)


def _sustained(decode: Estimate, profile: Profile) -> Estimate:
    factor = profile.sustained_factor
    if factor is None:
        return _unknown("tok/s", "how far heat slows this device is not sourced")
    if decode.value is None or decode.low is None or decode.high is None:
        return decode
    value, low, high = (x * factor.value for x in (decode.value, decode.low, decode.high))
    return Estimate(value=value, unit="tok/s", low=low, high=high, source=f"{decode.source}; {factor.basis}")


def _energy(decode: Estimate, power: Quantity | None) -> Estimate:
    if power is None:
        return _unknown("J per token", "no power of this device is sourced")
    return _inverse(decode, power.value, "J per token", f"estimated:{power.basis}")


def _memory(artifact: Artifact, profile: Profile) -> Estimate:
    """What the device's system will count: as here where it was measured, else weights and cache."""
    manifest = artifact.manifest
    phase = (manifest.benchmark.memory if manifest.benchmark else {}).get("decode")
    key = "anonymous_bytes" if profile.memory_counts == "anonymous" else "peak_rss_bytes"
    if phase and (measured := getattr(phase, key)).value is not None:
        return Estimate(value=measured.value, unit="bytes", source=f"estimated:{key} on the machine that measured it")
    cache = manifest.traffic.kv_bytes_per_position * manifest.contract.context_length if manifest.traffic else 0
    return Estimate(value=artifact.size_bytes + cache, unit="bytes", source="estimated:files and cache")


def _budget(profile: Profile) -> Estimate:
    if profile.app_memory is None:
        return _unknown("bytes", "what this device gives an app is not sourced")
    amount = profile.app_memory
    return Estimate(value=1e9 * amount.value, unit="bytes", source=f"estimated:{amount.basis}")


def _remarks(read: float, profile: Profile, weights_alone: bool) -> Iterable[str]:
    smallest = min(p.read_bytes for p in points())
    if read < smallest:
        yield (
            f"a token reads {read / 1e9:.3g} GB, and no published model less than {smallest / 1e9:.3g} GB: what the "
            "runtime itself takes for a token is not known so far down, and the true speed is lower"
        )
    if weights_alone:
        yield "the exporter did not say what a token reads: all weights were taken, and no cache"
    if profile.decode_read_rate is None and profile.bandwidth and profile.bandwidth.range:
        yield f"sources disagree on the bandwidth: {profile.bandwidth.basis}"


# --- this machine -----------------------------------------------------------------------------------------------------


def local_points(records: Iterable[BenchRecord], target: str, cpu: str | None) -> list[Point]:
    """What a history says of one target on one machine; the last record of each artifact."""
    found: dict[str, Point] = {}
    for record in records:
        b = record.benchmark
        known = (b.decode_tokens_per_s.value, b.bytes_per_token.value, b.bandwidth_bytes_per_s.value)
        if record.target != target or b.machine.cpu != cpu or None in known:
            continue
        speed, read, bandwidth = (float(x or 0) for x in known)
        found[record.files_digest] = Point(
            record.artifact, record.files_digest, target, record.name, read, bandwidth, speed
        )
    return list(found.values())


def predict_here(artifact: Artifact, known: Sequence[Point]) -> Estimate:
    """Decode speed on the machine of some measured artifacts of the same target, this one left out."""
    from ..files import digest

    own = digest(artifact.manifest.files)
    rest = [p for p in known if p.chip != own]
    if len(rest) < _LEAST_POINTS:
        return _unknown(
            "tok/s", f"the history has {len(rest)} other artifacts of this target here, {_LEAST_POINTS} are needed"
        )
    fitted = fit(rest)
    traffic = artifact.manifest.traffic
    if traffic is None:
        return _unknown("tok/s", "the exporter did not say what a token reads")
    speed = fitted.tokens_per_s(traffic.bytes_per_token(256), percentile([_bandwidth(p) for p in rest], 50))
    factor = math.exp(fitted.spread)
    return Estimate(
        value=speed, unit="tok/s", low=speed / factor, high=speed * factor, source="predicted:history of this machine"
    )
