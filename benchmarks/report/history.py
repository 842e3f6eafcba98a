"""A page of how benchmarks moved: a table for each artifact on each machine, the oldest first; no script in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ...errors import EdgekdError
from ...files import write_text
from ...formats import spread
from ...proof import METRICS, Benchmark, BenchRecord, Figure

_KEYS = ("decode_tokens_per_s", "itl_s", "load_s", "cold_ttft_s", "peak_rss_bytes", "decode_energy_j_per_token")
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color-scheme:light dark}"
    "table{border-collapse:collapse}td,th{padding:.3rem .7rem;border-bottom:1px solid #8884;text-align:right}"
    "td:first-child,th:first-child{text-align:left}small{opacity:.7;display:block}.worse{font-weight:bold}"
)


def build(records: Sequence[BenchRecord], out: Path) -> Path:
    """Write the page.

    Raises:
        EdgekdError: there is nothing in the history, or the file cannot be written.
    """
    if not records:
        raise EdgekdError("the history is empty.", "Fill it with: edgekd bench ARTIFACT --history FILE")
    try:
        write_text(out, render(records))
    except OSError as error:
        raise EdgekdError(f"{out}: cannot be written: {error.strerror}.", "Choose another file.") from error
    return out


def render(records: Sequence[BenchRecord]) -> str:
    """The page as HTML."""
    groups: dict[tuple[str, ...], list[BenchRecord]] = {}
    for record in records:
        groups.setdefault(key_of(record), []).append(record)
    sections = "".join(_section(key, found) for key, found in groups.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Benchmarks over time</title>'
        f"<style>{_STYLE}</style></head><body><h1>Benchmarks over time</h1>"
        "<p>Figures of one line are comparable: same artifact, machine, runtime build and threads. Bold: worse than "
        f"the line before by more than both intervals.</p>{sections}</body></html>\n"
    )


def key_of(record: BenchRecord) -> tuple[str, ...]:
    """What must be the same for figures to be held against each other."""
    b = record.benchmark
    host = b.machine
    parts = (record.artifact, record.target, host.device or host.cpu, host.gpu, host.runtime_build)
    return (
        *(str(part) for part in parts if part),
        f"{b.settings.threads} threads",
        f"TTFT from {b.settings.ttft_from}",
    )


def _section(key: Sequence[str], records: Sequence[BenchRecord]) -> str:
    lengths = sorted({n for r in records for n in r.benchmark.ttft_s}, key=int)
    titles = [METRICS[k].label() for k in _KEYS] + [METRICS["ttft_s"].label(n) for n in lengths]
    head = "".join(f"<th>{escape(title)}</th>" for title in ("when", *titles))
    rows, before = [], None
    for record in sorted(records, key=lambda r: r.created):
        rows.append(_row(record, before, lengths))
        before = record
    title = escape(", ".join(key))
    return f"<h2>{title}</h2><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(record: BenchRecord, before: BenchRecord | None, lengths: Sequence[str]) -> str:
    now, then = record.benchmark, before.benchmark if before else Benchmark()
    cells = [_cell(key, getattr(now, key), getattr(then, key)) for key in _KEYS]
    cells += [_cell("ttft_s", now.ttft_s.get(n), then.ttft_s.get(n)) for n in lengths]
    dirty = "".join(f"<small>{escape(words)}</small>" for words in record.benchmark.noise.dirty)
    return f"<tr><td>{escape(record.created)}{dirty}</td>{''.join(cells)}</tr>"


def _cell(key: str, figure: Figure | None, before: Figure | None) -> str:
    metric = METRICS[key]
    if figure is None or figure.value is None:
        reason = figure.reason if figure else "not measured"
        return f'<td title="{escape(str(reason))}">–</td>'
    interval = f"<small>{escape(spread(figure.ci95, metric.text))}</small>" if figure.ci95 else ""
    style = ' class="worse"' if is_worse(key, figure, before) else ""
    return f"<td{style}>{escape(metric.text(figure.value))}{interval}</td>"


def is_worse(key: str, figure: Figure, before: Figure | None) -> bool:
    """Whether a figure's whole interval is worse than the whole interval before."""
    if before is None or not figure.ci95 or not before.ci95:
        return False
    if METRICS[key].better == "higher":
        return figure.ci95[1] < before.ci95[0]
    return figure.ci95[0] > before.ci95[1]
