"""Benchmarks over time: a file of one JSON line each, to which lines are only ever added."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from ..errors import EdgekdError
from ..files import digest
from ..manifest import Artifact, first_complaint
from ..proof import Benchmark, BenchRecord

_MOST_BYTES = 2**28


def record_of(artifact: Artifact, benchmark: Benchmark) -> BenchRecord:
    """A benchmark with what it is of."""
    manifest = artifact.manifest
    return BenchRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artifact=artifact.folder.resolve().name,
        name=manifest.name,
        target=manifest.target,
        recipe=manifest.recipe,
        runtime=manifest.runtime,
        files_digest=digest(manifest.files),
        size_bytes=artifact.size_bytes,
        benchmark=benchmark,
    )


def append(path: Path, records: Sequence[BenchRecord]) -> None:
    """Add lines to a history, each whole or not at all, also where several programs add to it at once.

    Raises:
        EdgekdError: the file cannot be written.
    """
    lines = "".join(json.dumps(record.model_dump(), separators=(",", ":")) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            os.write(handle, lines.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise EdgekdError(f"--history {path}: cannot be written: {error.strerror}.", "Name another file.") from error


def read_history(path: Path) -> list[BenchRecord]:
    """Every record of a history, the oldest first.

    Raises:
        EdgekdError: the file is missing, or a line of it is no record: its number is named.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise EdgekdError(f"{path}: {path.stat().st_size:,} bytes are too many for a history.", "Split it.")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise EdgekdError(f"{path}: cannot be read: {reason}.", "Make one with: edgekd bench --history") from error
    return [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _record(path: Path, number: int, line: str) -> BenchRecord:
    try:
        return BenchRecord.model_validate(json.loads(line))
    except ValidationError as error:
        complaint = first_complaint(error)
    except (ValueError, RecursionError):
        complaint = "not JSON"
    raise EdgekdError(f"{path}: line {number}: {complaint}.", "Remove that line.")
