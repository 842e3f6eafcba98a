"""The report: one self-contained HTML file that says how good, how large and how fast the student is.

``build`` turns the results of a run (plain JSON) into a page that needs no network. A figure that is null or absent is
shown as "not measured"; nothing here turns it into a zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import EdgekdError
from ...files import write_text
from . import charts
from . import figures as show
from .artifacts import (
    artifact_tables,
    benchmark,
    decode_speed,
    failures,
    label,
    points,
    size_bytes,
    sources,
    was_judged,
)
from .charts import MODELS
from .figures import NOT_MEASURED, number, ratio
from .words import kept_share, limits, pareto_words, seed_words, summary

_COLUMNS = 6
"""Most artifacts side by side: what a printed page holds."""


def build(results: Mapping[str, Any], out: Path) -> Path:
    """Write the report of a run.

    Args:
        results: what the run measured; every key may be missing or null.
        out: the HTML file; its folder is made. Written under a temporary name and renamed.

    Returns:
        ``out``.

    Raises:
        EdgekdError: the file cannot be written.
    """
    page = render(results)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise EdgekdError(
            f"{out}: the report cannot be written: {error.strerror}.", "Choose another folder."
        ) from error
    return out


def render(results: Mapping[str, Any]) -> str:
    """The report as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("edgekd.benchmarks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = view(results)
    return environment.get_template("report.html").render(
        found, figures=_script_json(found["charts"]), plotlyjs=get_plotlyjs()
    )


def view(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows, as finished text, and the charts as plotly figures."""
    artifacts = [a for a in results.get("artifacts") or () if isinstance(a, Mapping)]
    quality = {name: row for name in MODELS if (row := (results.get("quality") or {}).get(name))}
    seeds = seed_rows(results.get("seeds"))
    curves = {name: rows for name, rows in (results.get("training") or {}).items() if rows}
    ledger = [row for row in results.get("ledger") or () if isinstance(row, Mapping)]
    marked = points(artifacts)
    found = {
        "accuracy": charts.quality(quality, seeds, "next_token_accuracy", "next-token accuracy → better"),
        "perplexity": charts.quality(quality, seeds, "perplexity", "← better: perplexity"),
        "validation": charts.training(curves),
        "ledger": charts.ledger(ledger),
        "pareto": charts.pareto(marked),
    }
    return {
        "name": results.get("name") or "Unnamed run",
        "created": str(results.get("created") or "").replace("T", " ").replace("+00:00", " UTC"),
        "summary": summary(quality, artifacts),
        "failed": [(label(a), text) for a in artifacts for text in failures(a)],
        "cards": cards(quality, artifacts),
        "models": model_table(quality, seeds),
        "seeds": seed_words(seeds),
        "ledger": ledger_table(ledger),
        "pareto": pareto_words(marked),
        "artifacts": [artifact_tables(part) for part in in_columns(artifacts)],
        "sources": sources(artifacts),
        "samples": [(label(a), f"{a.get('folder', '')}/manifest.json") for a in artifacts],
        "machine": machine_rows(results, artifacts),
        "stages": stage_rows(results.get("stages")),
        "commands": [str(line) for line in results.get("commands") or ()],
        "versions": {str(k): str(v) for k, v in (results.get("versions") or {}).items()},
        "spec": spec_text(results),
        "limits": limits(results, quality, artifacts, len(seeds["student"])),
        "charts": {key: chart for key, chart in found.items() if chart},
    }


def in_columns(artifacts: Sequence[Any]) -> list[Sequence[Any]]:
    """Parts of nearly equal length, each a table that fits a printed page."""
    parts = -(-len(artifacts) // _COLUMNS)
    width = -(-len(artifacts) // max(1, parts))
    return [artifacts[i : i + width] for i in range(0, len(artifacts), max(1, width))]


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no ``</script>``, no comment, no entity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def seed_rows(seeds: Any) -> dict[str, list[Mapping[str, Any]]]:
    """Figures of every seed, by model."""
    rows = [row for row in seeds or () if isinstance(row, Mapping)]
    return {name: [row[name] for row in rows if row.get(name)] for name in ("student", "baseline")}


def cards(quality: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The few figures to see first: title, value, and what it is measured against."""
    teacher, student, baseline = (quality.get(name) or {} for name in MODELS)
    kept = kept_share(student, teacher)
    without = kept_share(baseline, teacher)
    gain = None if kept is None or without is None else 100 * (kept - without)
    share = ratio(student.get("parameters"), teacher.get("parameters"))
    of_teacher = f"of {show.parameters(teacher.get('parameters'))}, {show.percent(share, 0)}" if share else ""
    judged = [a for a in artifacts if was_judged(a)]
    passed = sum(not failures(a) for a in judged)
    standing = [a for a in artifacts if not failures(a)]
    small = min(standing, key=lambda a: size_bytes(a) or float("inf"), default={})
    quick = max(standing, key=lambda a: decode_speed(a) or 0.0, default={})
    speed = decode_speed(quick)
    gates = f"{passed} of {len(judged)}" if judged else NOT_MEASURED
    points = NOT_MEASURED if gain is None else f"{gain:+.1f}{show.NBSP}points".replace("-", "−")
    decode = NOT_MEASURED if speed is None else f"{show.significant(speed)}{show.NBSP}tok/s"
    found = [
        ("Parameters", show.parameters(student.get("parameters")), of_teacher),
        ("Accuracy kept", show.percent(kept), "of the teacher's next-token accuracy"),
        ("Given by distilling", points, "of accuracy kept, against labels alone"),
        ("Gates passed", gates, "artifacts held against the fp32 student"),
        ("Smallest", show.size(size_bytes(small)), label(small) if size_bytes(small) else ""),
        ("Fastest decode", decode, label(quick) if speed else ""),
    ]
    return [{"title": title, "value": value, "note": note} for title, value, note in found]


_MODEL_ROWS = (
    ("Parameters", "parameters", show.parameters),
    ("Next-token accuracy", "next_token_accuracy", show.percent),
    ("Perplexity", "perplexity", lambda x: show.significant(x, 4)),
    ("KL to the teacher, nats", "kl_to_teacher", show.significant),
    ("Same top token as the teacher", "top1_agreement_with_teacher", show.percent),
    ("Test tokens", "tokens", show.count),
)


def model_table(quality: Mapping[str, Any], seeds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Teacher, student and baseline side by side; the small line below a figure is its range over seeds."""
    names = [name for name in MODELS if name in quality]
    rows = []
    for title, key, text in _MODEL_ROWS:
        cells = []
        for name in names:
            own = name == "teacher" and key in ("kl_to_teacher", "top1_agreement_with_teacher")
            by_seed = [x for row in seeds.get(name, ()) if (x := number(row.get(key))) is not None]
            span = show.spread(by_seed, text) if key not in ("parameters", "tokens") else ""
            cells.append({"text": "–" if own else text(quality[name].get(key)), "range": span})
        rows.append({"title": title, "cells": cells})
        if key == "next_token_accuracy":
            kept = [show.percent(kept_share(quality[name], quality.get("teacher") or {})) for name in names]
            rows.append({"title": "… of the teacher's", "cells": [{"text": text, "range": ""} for text in kept]})
    return {"columns": [MODELS[name] for name in names], "rows": rows}


def ledger_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a hop."""
    found = []
    for row in rows:
        found.append(
            {
                "hop": f"{row.get('from') or '?'} → {row.get('to') or '?'}",
                "cells": [
                    _cell(row, "bits_per_weight", "", lambda x: show.significant(x, 3) if x else "–"),
                    _cell(row, "kl_mean", "kl_ci95", show.significant),
                    _cell(row, "top1", "top1_ci95", lambda x: show.percent(x, 2)),
                    _cell(row, "perplexity_from", "", lambda x: show.significant(x, 5)),
                    _cell(row, "perplexity_to", "perplexity_to_ci95", lambda x: show.significant(x, 5)),
                ],
            }
        )
    return found


def _cell(row: Mapping[str, Any], key: str, interval: str, text: Callable[[Any], str]) -> dict[str, str]:
    """A figure and, small below it, its interval."""
    span = charts.interval(row.get(interval))
    return {"text": text(row.get(key)), "range": show.spread(list(span), text) if span else ""}


_MACHINE = {
    "cpu": "CPU",
    "cores": "Cores",
    "logical_cores": "Logical cores",
    "ram_bytes": "RAM",
    "os": "System",
    "last_level_cache_bytes": "Last-level cache",
    "load_average_1min": "Load average before",
}
_SETTINGS = {
    "threads": "Threads",
    "decode_tokens": "Tokens decoded",
    "runs": "Runs, a process each",
    "warm_up": "Warm-up",
}


def machine_rows(results: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The machine and the settings of the first benchmark; a machine that the run itself names goes first."""
    timed = next((b for a in artifacts if (b := benchmark(a))), {})
    machine = results.get("machine") or timed.get("machine") or {}
    settings = timed.get("settings") or {}

    def text(key: str, value: Any) -> str:
        if value is None:
            return NOT_MEASURED
        return (
            show.size(value)
            if key.endswith("_bytes")
            else show.significant(value)
            if isinstance(value, float)
            else str(value)
        )

    rows = [(words, text(key, machine[key])) for key, words in _MACHINE.items() if key in machine]
    return rows + [(words, text(key, settings[key])) for key, words in _SETTINGS.items() if key in settings]


def stage_rows(stages: Any) -> dict[str, Any]:
    """Stages with the seconds that each took when it was done, and the sum."""
    rows = [row for row in stages or () if isinstance(row, Mapping)]
    known = [x for row in rows if (x := number(row.get("seconds"))) is not None]
    return {
        "rows": [(str(row.get("name", "?")), show.duration(row.get("seconds"))) for row in rows],
        "total": show.duration(sum(known)) if known else NOT_MEASURED,
    }


def spec_text(results: Mapping[str, Any]) -> str:
    """The spec as YAML."""
    if results.get("spec"):
        import yaml

        return yaml.safe_dump(results["spec"], sort_keys=False, allow_unicode=True).strip()
    return ""
