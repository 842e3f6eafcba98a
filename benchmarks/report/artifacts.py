"""What the report says of the artifacts: their table, the sources of its figures, and the points of the Pareto plot.

An artifact here is the plain JSON of the results: ``manifest``, ``folder``, ``size_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import figures as show
from .charts import Point
from .figures import NOT_MEASURED, number

Artifact = Mapping[str, Any]


def parity(artifact: Artifact) -> Mapping[str, Any]:
    """What verification measured; empty when it has not run."""
    return (artifact.get("manifest") or {}).get("parity") or {}


def benchmark(artifact: Artifact) -> Mapping[str, Any]:
    """What the benchmark measured; empty when it has not run."""
    return (artifact.get("manifest") or {}).get("benchmark") or {}


def column(artifact: Artifact) -> tuple[str, str]:
    """Target, as its makers write it, and recipe without the target's name."""
    manifest = artifact.get("manifest") or {}
    target = str(manifest.get("target") or "?")
    recipe = str(manifest.get("recipe") or "?").removeprefix(f"{target}-")
    return str(manifest.get("target_title") or target), recipe


def label(artifact: Artifact) -> str:
    """Target and recipe: ``GGUF portable-int4``, ``GGUF q4_k_m``."""
    return " ".join(column(artifact))


def size_bytes(artifact: Artifact) -> float | None:
    """Bytes on disk."""
    return number(artifact.get("size_bytes"))


def decode_speed(artifact: Artifact) -> float | None:
    """Tokens per second."""
    return number(benchmark(artifact).get("decode_tokens_per_s"))


def failures(artifact: Artifact) -> list[str]:
    """What missed its gate, a sentence each."""
    return [str(text) for text in parity(artifact).get("failures") or ()]


def was_judged(artifact: Artifact) -> bool:
    """Whether verification has held the artifact against its gate."""
    return parity(artifact).get("failures") is not None


def by_prompt(artifact: Artifact, key: str) -> dict[int, Any]:
    """Figures by prompt length in tokens, shortest first."""
    value = benchmark(artifact).get(key)
    if not isinstance(value, Mapping):
        return {}
    return {int(length): value[length] for length in sorted((k for k in value if str(k).isdigit()), key=int)}


def artifact_tables(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """One table, a column an artifact: groups of rows, each cell its text and the range of its samples."""
    groups = []
    for title, rows in _row_groups(artifacts):
        lines = []
        for name, text, pick in rows:
            figures = [pick(artifact) for artifact in artifacts]
            cells = [{"text": text(f), "range": show.spread(show.samples(f), text)} for f in figures]
            lines.append({"title": name, "cells": cells})
        groups.append({"title": title, "rows": lines})
    gates = [
        {"state": "unknown" if not was_judged(a) else "failed" if failures(a) else "passed", "failures": failures(a)}
        for a in artifacts
    ]
    return {
        "columns": [column(a) for a in artifacts],
        "groups": groups,
        "gates": gates,
    }


Row = tuple[str, Callable[[Any], str], Callable[[Artifact], Any]]


def _row_groups(artifacts: Sequence[Artifact]) -> list[tuple[str, list[Row]]]:
    def of_parity(key: str) -> Callable[[Artifact], Any]:
        return lambda artifact: parity(artifact).get(key)

    def of_benchmark(key: str) -> Callable[[Artifact], Any]:
        return lambda artifact: benchmark(artifact).get(key)

    def of_length(key: str, length: int) -> Callable[[Artifact], Any]:
        return lambda artifact: by_prompt(artifact, key).get(length)

    lengths = sorted({n for a in artifacts for key in ("ttft_s", "prefill_tokens_per_s") for n in by_prompt(a, key)})
    ttft: list[Row] = [(f"TTFT, {n} tokens", show.duration, of_length("ttft_s", n)) for n in lengths]
    prefill: list[Row] = [
        (f"Prefill {n}, tok/s", show.significant, of_length("prefill_tokens_per_s", n)) for n in lengths
    ]
    return [
        (
            "Size",
            [
                ("On disk", show.size, size_bytes),
                ("Bits per weight", show.significant, lambda a: (a.get("manifest") or {}).get("bits_per_weight")),
            ],
        ),
        (
            "Against the fp32 student",
            [
                ("Run by", str, _run_by),
                ("KL mean, nats", show.significant, of_parity("kl_mean")),
                ("KL p99, nats", show.significant, of_parity("kl_p99")),
                ("Same top token", lambda x: show.percent(x, 2), of_parity("top1_agreement")),
                ("Perplexity", lambda x: show.significant(x, 4), of_parity("perplexity_artifact")),
                ("Perplexity ratio", lambda x: show.significant(x, 5), of_parity("perplexity_ratio")),
                ("Token ids identical", str, _identical("strings")),
                ("Chats identical", str, _identical("chats")),
            ],
        ),
        ("Privacy", [("Audit", str, _audit)]),
        (
            "Speed",
            [
                ("Load", show.duration, of_benchmark("load_s")),
                *(ttft or [("TTFT", show.duration, lambda a: None)]),
                *(prefill or [("Prefill, tok/s", show.significant, lambda a: None)]),
                ("Decode, tok/s", show.significant, of_benchmark("decode_tokens_per_s")),
                ("Inter-token p50", show.duration, of_benchmark("inter_token_p50_s")),
                ("Inter-token p95", show.duration, of_benchmark("inter_token_p95_s")),
                ("Decode of roofline", lambda x: show.percent(x, 0), of_benchmark("decode_roofline_fraction")),
            ],
        ),
        (
            "Memory and energy",
            [
                ("Peak RSS", show.size, of_benchmark("peak_rss_bytes")),
                ("Read per token", show.size, of_benchmark("bytes_per_token")),
                ("Energy, J per token", show.significant, of_benchmark("energy_j_per_token")),
            ],
        ),
    ]


def _run_by(artifact: Artifact) -> str:
    """Its own runtime, or the module that stood in."""
    if not parity(artifact):
        return NOT_MEASURED
    instead = str(parity(artifact).get("stand_in") or "")
    return instead.partition(",")[0] or str((artifact.get("manifest") or {}).get("runtime") or NOT_MEASURED)


def _audit(artifact: Artifact) -> str:
    """The verdict of the privacy audit, and the first thing behind it."""
    audit = (artifact.get("manifest") or {}).get("audit") or {}
    reasons = audit.get("failures") or audit.get("not_checked") or ()
    return ": ".join([str(audit.get("status") or NOT_MEASURED), *map(str, reasons[:1])])


def _identical(kind: str) -> Callable[[Artifact], str]:
    def pick(artifact: Artifact) -> str:
        tokens = parity(artifact).get("tokens") or {}
        same, total = number(tokens.get(f"{kind}_identical")), number(tokens.get(kind))
        return NOT_MEASURED if same is None or not total else f"{same:.0f} of {total:.0f}"

    return pick


def sources(artifacts: Sequence[Artifact]) -> list[dict[str, str]]:
    """Where each benchmark figure comes from: its key, sources, and raw samples behind one value."""
    found: dict[str, tuple[set[str], set[int]]] = {}
    for artifact in artifacts:
        for key, value in benchmark(artifact).items():
            figures = list(by_prompt(artifact, key).values()) or [value]
            for figure in figures:
                if isinstance(figure, Mapping) and "value" in figure:
                    named, counts = found.setdefault(key, (set(), set()))
                    if number(figure) is not None:
                        named.add(str(figure.get("source") or "not named"))
                        counts.add(len(show.samples(figure)))
    return [
        {"key": key, "source": ", ".join(sorted(named)) or NOT_MEASURED, "samples": _counts(counts)}
        for key, (named, counts) in found.items()
    ]


def _counts(counts: set[int]) -> str:
    if not counts:
        return "–"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}–{high}"


def points(artifacts: Sequence[Artifact]) -> list[Point]:
    """The artifacts as quality, speed and size, with those marked that no other beats in all three.

    An artifact that failed its gate, or whose three figures are not all measured, is never on the front.
    """
    found = [
        Point(label(a), number(parity(a).get("kl_mean")), decode_speed(a), size_bytes(a), bool(failures(a)))
        for a in artifacts
    ]
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
