"""What the modules of the command line share: options of several verbs, and one way to print JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder with a manifest.json.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Default: the physical cores.")]
HistoryOption = Annotated[
    Path | None, typer.Option("--history", metavar="FILE", help="Append a line of JSON for each benchmark to it.")
]


def print_json(value: Any) -> None:
    """One line on stdout."""
    typer.echo(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
