"""A command as a user types it, in this process: torch is imported once, not once a test."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from edgekd import cli


class Told(NamedTuple):
    """What came of it."""

    returncode: int
    stdout: str
    stderr: str


def edgekd(*words: object, cwd: str | Path = ".") -> Told:
    """The entry point, with ``words`` behind ``edgekd``."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["edgekd", *map(str, words)]),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return Told(code, out.getvalue(), err.getvalue())
