"""The report: one self-contained HTML file that says how good, how large and how fast the student is.

``sections`` is the page from top to bottom; its ``tables``, ``charts`` and ``words`` are each a module, and ``pareto``
is what the last three tell of artifacts beside each other. A figure that is null is shown as "not measured"; nothing
here turns it into a zero.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import EdgekdError
from ...files import write_text
from ...results import Results
from .sections import page


def build(results: Results, out: Path) -> Path:
    """Write the report of a run.

    Args:
        out: the HTML file; its folder is made. Written under a temporary name and renamed.

    Returns:
        ``out``.

    Raises:
        EdgekdError: the file cannot be written.
    """
    html = render(results)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, html)
    except OSError as error:
        raise EdgekdError(
            f"{out}: the report cannot be written: {error.strerror}.", "Choose another folder."
        ) from error
    return out


def render(results: Results) -> str:
    """The report as HTML that needs no network."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("edgekd.benchmarks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = page(results)
    return environment.get_template("report.html").render(
        page=shown,
        figures=_script_json(shown.charts.drawn()),
        choices=_script_json(shown.choices),
        plotlyjs=get_plotlyjs(),
    )


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element: no ``</script>``, no comment, no entity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
