"""The report's charts as plain plotly figures (dicts of ``data`` and ``layout``), drawn by plotly.js in the page.

A colour is the name of a CSS variable, ``var(--student)``: the page puts in the value for light, dark or print.
Every chart also stands as numbers in a table of the report, so nothing here is the only place of a figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from ... import formats as show
from ...proof import METRICS, Benchmark, Hop, Quality
from ...results import MadeArtifact, Training
from .pareto import Point

MODELS = {"teacher": "Teacher", "student": "Distilled student", "baseline": "Label-only student"}
Part = Mapping[str, object]
"""Of a chart, in plotly's words."""


class Chart(TypedDict):
    """What plotly.js draws."""

    data: Sequence[Part]
    layout: Part


class Choice(TypedDict):
    """An axis that the reader may choose, with the values of what is drawn, in its order."""

    key: str
    title: str
    logarithmic: bool
    values: Sequence[float | None]


def _layout(height: int, **more: object) -> Part:
    layout: dict[str, object] = {
        "height": height,
        "margin": {"l": 8, "r": 24, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {
            "size": 12,
            "color": "var(--text)",
            "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif",
        },
        "showlegend": False,
        "dragmode": False,
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--text)"}},
    }
    return layout | more


def _axis(title: str = "", **more: object) -> Part:
    axis: dict[str, object] = {
        "automargin": True,
        "fixedrange": True,
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "nticks": 5,
    }
    if title:
        axis["title"] = {"text": title, "standoff": 8, "font": {"size": 12, "color": "var(--muted)"}}
    return axis | more


def _log_axis(title: str, values: Sequence[float], share: float) -> Part:
    """A logarithmic axis whose ticks are whole decades, or 1, 2, 5 where the values span less than two."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(share * (high - low), 0.05 if share < 0.1 else 0.3)
    low, high = low - room, high + room
    steps = (1,) if high - low > 2 else (1, 2, 5) if high - low > 0.6 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    every = 2 if high - low > 7 else 1
    ticks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1, every) for m in steps]
    ticks = [x for x in ticks if low <= math.log10(x) <= high]
    plain = min(ticks, default=1) >= 1e-3 and max(ticks, default=1) < 1e4
    text = [f"{x:g}" if plain else _power(x) for x in ticks]
    return _axis(title, type="log", range=[low, high], tickvals=ticks, ticktext=text)


def _power(x: float) -> str:
    exponent = math.floor(math.log10(x) + 1e-9)
    mantissa = f"{x / 10.0**exponent:g}"
    return ("" if mantissa == "1" else f"{mantissa}×") + "10" + str(exponent).translate(show.SUPERSCRIPT)


def _padded(values: Sequence[float], share: float = 0.25) -> list[float]:
    """An axis range with room on both sides for labels."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.1 * abs(high) or 1.0
    return [low - room, high + room]


def quality(measured: Quality, seeds: Sequence[Quality], key: str, title: str) -> Chart | None:
    """One figure of teacher, student and baseline as dots; open dots are single seeds."""
    models = {name: getattr(model, key) for name, model in measured.models().items()}
    if len(models) < 2:
        return None
    data: list[Part] = []
    every = list(models.values())
    for name, x in models.items():
        by_seed = [getattr(model, key) for seed in seeds if (model := seed.models().get(name))]
        every += by_seed
        if len(by_seed) > 1:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": by_seed,
                    "y": [MODELS[name]] * len(by_seed),
                    "marker": {"symbol": "circle-open", "size": 9, "color": f"var(--{name})"},
                    "hoverinfo": "x",
                }
            )
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [x],
                "y": [MODELS[name]],
                "text": [METRICS[key].text(x)],
                "textposition": "top center",
                "marker": {"size": 12, "color": f"var(--{name})"},
                "hoverinfo": "skip",
            }
        )
    order = [MODELS[name] for name in reversed(models)]
    percent = {"tickformat": ".0%", "nticks": 4} if METRICS[key].unit == "share" else {}
    return {
        "data": data,
        "layout": _layout(
            62 * len(models) + 60,
            xaxis=_axis(title, range=_padded(every), **percent),
            yaxis=_axis(categoryorder="array", categoryarray=order, range=[-0.5, len(order) - 0.3]),
        ),
    }


def training(curves: Training) -> Chart | None:
    """Validation perplexity by step, student and baseline: the one figure of training that both share."""
    drawn = {name: points for name, points in (("student", curves.student), ("baseline", curves.baseline)) if points}
    every = [point.validation_perplexity for points in drawn.values() for point in points]
    last = max((point.step for points in drawn.values() for point in points), default=0)
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": MODELS[name],
            "x": [point.step for point in points],
            "y": [point.validation_perplexity for point in points],
            "line": {"color": f"var(--{name})", "width": 2},
            "hovertemplate": "step %{x}: %{y:.4g}",
        }
        for name, points in drawn.items()
        if len(points) > 1
    ]
    if not data:
        return None
    # A curve falls by orders of magnitude at first; the end, where the models differ, needs the room.
    axis = _log_axis("", every, 0.04) if min(every) > 0 else _axis()
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": "var(--text)"}}
    return {
        "data": data,
        "layout": _layout(
            300,
            xaxis=_axis("step", range=[0, last * 1.02]),
            yaxis=axis,
            legend=legend,
            showlegend=True,
            margin={"l": 8, "r": 16, "t": 36, "b": 8},
            hovermode="x unified",
        ),
    }


def ledger(rows: Sequence[Hop]) -> Chart | None:
    """Mean KL of every hop on a logarithmic axis, with its 95 % interval."""
    known = [(row, row.kl_mean) for row in rows if row.kl_mean is not None and row.kl_mean > 0]
    if not known:
        return None
    above, below = [], []
    for row, x in known:
        low, high = row.kl_ci95 or (x, x)
        above.append(max(0.0, high - x))
        below.append(max(0.0, min(x - low, x * 0.95)))
    labels = [f"{row.start} →<br>{row.end}" for row, _ in known]  # two lines: a phone is narrow
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [x for _, x in known],
                "y": labels,
                "text": [show.significant(x) for _, x in known],
                "textposition": "top center",
                "cliponaxis": False,
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": above,
                    "arrayminus": below,
                    "thickness": 1.5,
                    "width": 4,
                    "color": "var(--student)",
                },
                "marker": {"size": 11, "color": "var(--student)"},
                "hoverinfo": "skip",
            }
        ],
        "layout": _layout(
            44 * len(known) + 70,
            xaxis=_log_axis("mean KL, nats per token", [x for _, x in known], 0.12),
            yaxis=_axis(autorange="reversed", type="category", dtick=1),  # a label for every hop
        ),
    }


PARETO_AXES = ("kl_mean", "decode_tokens_per_s", "ttft_s", "size_bytes", "peak_rss_bytes", "decode_energy_j_per_token")
"""What a reader may choose for either axis of the chart of artifacts."""


def pareto_choices(artifacts: Sequence[MadeArtifact]) -> list[Choice]:
    """The axes of the chart, each with a value of every artifact that the chart shows, or null; not those of none."""
    shown = [a for a in artifacts if a.kl_mean is not None and a.kl_mean > 0 and a.decode_tokens_per_s is not None]
    choices = []
    for key in PARETO_AXES:
        metric, values = METRICS[key], [_on_axis(key, artifact) for artifact in shown]
        if any(value is not None for value in values):
            better = {"lower": "← better: ", "higher": "→ better: "}[metric.better or "lower"]
            title = f"{better}{metric.title}, {metric.unit}" if metric.unit else f"{better}{metric.title}"
            choices.append(Choice(key=key, title=title, logarithmic=key == "kl_mean", values=values))
    return choices


def _on_axis(key: str, artifact: MadeArtifact) -> float | None:
    """An artifact's value of a figure; TTFT that of the longest prompt."""
    benchmark = artifact.manifest.benchmark or Benchmark()
    if key == "kl_mean":
        return artifact.kl_mean
    if key == "size_bytes":
        return artifact.size_bytes
    if key == "ttft_s":
        return benchmark.ttft_s[max(benchmark.ttft_s, key=int)].value if benchmark.ttft_s else None
    value: float | None = getattr(benchmark, key).value
    return value


def pareto(points: Sequence[Point]) -> Chart | None:
    """Decode speed against KL, area by size, numbered in the order of ``points``; filled: on the front, open: beaten,
    red cross: failed its gate."""
    known = [
        (p, p.decode_tokens_per_s, p.kl)
        for p in points
        if p.kl is not None and p.kl > 0 and p.decode_tokens_per_s is not None
    ]
    if not known:
        return None
    x_axis = _axis("decode, tokens per second → faster", range=_padded([x for _, x, _ in known]))
    y_axis = _log_axis("← closer: mean KL, nats per token", [y for _, _, y in known], 0.15)
    largest = max(p.size_bytes or 0 for p, _, _ in known) or 1.0
    diameters = [max(18.0, 40 * ((p.size_bytes or 0) / largest) ** 0.5) for p, _, _ in known]
    data = []
    for (p, x, y), diameter in zip(known, diameters, strict=True):
        colour = "var(--bad)" if p.failed else "var(--student)" if p.on_front else "var(--teacher)"
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [x],
                "y": [y],
                "text": [str(points.index(p) + 1)],
                "textposition": "middle center",
                "cliponaxis": False,
                "textfont": {"color": "var(--inverse)" if p.on_front and not p.failed else "var(--text)"},
                "marker": {
                    "size": diameter,
                    "color": colour,
                    "opacity": 0.85,
                    "line": {"width": 2, "color": colour},
                    "symbol": "x-open" if p.failed else "circle" if p.on_front else "circle-open",
                },
                "hovertemplate": f"{p.name}: {show.size(p.size_bytes)}, {show.significant(x)} tok/s, "
                f"KL {show.significant(y)}<extra></extra>",
            }
        )
    return {
        "data": data,
        "layout": _layout(400, margin={"l": 8, "r": 16, "t": 16, "b": 8}, xaxis=x_axis, yaxis=y_axis),
    }
