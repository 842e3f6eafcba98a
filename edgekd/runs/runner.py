"""Doing stages, each of which can die anywhere.

A stage fills a temporary folder, which is renamed into place when whole; then its record is written. The next time, a
stage is skipped that has a record of the same key, whose files are as the record says, and which was made from the
content that the stages before it still have.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock, Timeout

from ..errors import Agreed, EdgekdError
from ..files import atomic_folder, check_writable, remove, sweep
from ..results import StageFigures
from .chain import Stage
from .records import Record, damage, outputs_of, read_record, write_record
from .run import Run

if TYPE_CHECKING:
    from ..distill.ranks import Ranks

_LOG = logging.getLogger(__name__)


class Watcher(Protocol):
    """Who is told how the work goes."""

    def begin(self, stage: str) -> None:
        """A stage starts."""

    def progress(self, stage: str, fraction: float, note: str) -> None:
        """A stage has done ``fraction`` of its work."""

    def end(self, stage: str, seconds: float, skipped: bool) -> None:
        """A stage is done, or was done before."""


def to_do(run: Run, chain: Sequence[Stage], *, check: bool = False) -> dict[str, str]:
    """Why each stage that is not done is not, by its name; empty words where nothing of its key was made before.

    A file is compared with its sha256 where a stage that is to be done will read it, where its size or time of change
    differ, and where it is small.

    Args:
        check: compare every file.
    """
    faults: dict[str, str] = {}
    used: set[str] = set()
    # From the last: whether a stage's files will be read is known once all that might read them are judged.
    for stage in reversed(chain):
        fault = _fault(run, stage, every=check or stage.folder in used)
        if fault is not None:
            faults[stage.name] = fault
            used |= set(stage.reads)
    return faults


def _fault(run: Run, stage: Stage, *, every: bool) -> str | None:
    """Why a stage is to be done; None where it is done."""
    path = _record_path(run, stage.folder)
    if not os.path.lexists(path):
        return ""
    try:
        record = read_record(path)
    except EdgekdError as error:
        return error.cause
    if record.key != stage.key:
        return ""
    return damage(run.path(stage.folder), record.outputs, every=every) or _changed_input(run, record)


def _changed_input(run: Run, record: Record) -> str | None:
    """Names a stage that has other files now than those that the recorded stage read."""
    for folder, made_from in record.inputs.items():
        try:
            now = read_record(_record_path(run, folder)).digest
        except EdgekdError:  # that stage is to be done: its files will tell
            continue
        if now != made_from:
            return f"{run.path(folder)} is not what it was made from"
    return None


def _record_path(run: Run, stage_folder: str) -> Path:
    return run.state / f"{stage_folder.replace('/', '-')}.json"


@contextmanager
def held(run: Run, chain: Sequence[Stage]) -> Iterator[None]:
    """Hold the run's folder: two processes must not work in it at once. What killed ones left in it is removed.

    Raises:
        EdgekdError: another holds it, a link lies in it, or a folder that stages will write to cannot be written.
    """
    for folder in sorted({run.path(stage.folder).parent for stage in chain}):
        check_writable(folder)
    if run.state.is_symlink():
        raise EdgekdError(f"{run.state} is a link.", "Remove it, or choose --out.")
    run.state.mkdir(parents=True, exist_ok=True)
    check_writable(run.state)
    if links := [entry for entry in run.state.iterdir() if entry.is_symlink()]:
        raise EdgekdError(f"{links[0]} is a link.", "Remove it, or choose --out.")
    try:
        with FileLock(run.state / "lock", timeout=0):
            sweep(run.folder)
            yield
    except Timeout as error:
        raise EdgekdError(f"{run.folder}: another edgekd is at work in it.", "Wait, or choose --out.") from error


def do_stages(
    run: Run, chain: Sequence[Stage], faults: Mapping[str, str], watcher: Watcher, ranks: Ranks
) -> dict[str, Record]:
    """Do what is to be done of stages, the others' records read; by the folder of each.

    Args:
        faults: ``to_do``'s.
        ranks: the processes of which this is the first.
    """
    return {stage.folder: _do(run, stage, faults, watcher, ranks) for stage in chain}


def take_part(run: Run, chain: Sequence[Stage], ranks: Ranks, trainings: str) -> None:
    """Do the stages that the first process names, with it, until it names none.

    Args:
        trainings: digest of what they do, which must be the first process's too.

    Raises:
        SystemExit: it has ended, or all of them stop; then it has said why.
    """
    stages = {stage.name: stage for stage in chain}
    try:
        ranks.check_alike(trainings)
        while name := ranks.follow():
            stages[name].work(run.path(stages[name].folder), lambda share, note: None)
    except (Agreed, KeyboardInterrupt):
        ranks.follow()
        raise


def _do(run: Run, stage: Stage, faults: Mapping[str, str], watcher: Watcher, ranks: Ranks) -> Record:
    """The record of a stage, which is done now if it was not."""
    path = _record_path(run, stage.folder)
    fault = faults[stage.name] if stage.name in faults else _changed_input(run, read_record(path))
    if fault:
        _LOG.warning("%s. Doing again: %s.", fault.removesuffix("."), stage.name)
    record = read_record(path) if fault is None else _make(run, stage, watcher, ranks)
    watcher.end(stage.name, record.seconds, skipped=fault is None)
    if stage.state:
        from ..distill.checkpoint import drop_checkpoints

        drop_checkpoints(stage.state)
    return record


def _make(run: Run, stage: Stage, watcher: Watcher, ranks: Ranks) -> Record:
    """Temporary folder, rename, record: killed between any two, the stage is not done."""
    path = _record_path(run, stage.folder)
    watcher.begin(stage.name)
    began = time.monotonic()
    with atomic_folder(run.path(stage.folder), replace=True) as folder:
        if stage.together:
            ranks.tell(stage.name)
        figures = stage.work(folder, partial(watcher.progress, stage.name))
        outputs = outputs_of(folder)
        remove(path)
    record = Record(
        key=stage.key,
        name=stage.name,
        seconds=time.monotonic() - began,
        figures=figures,
        inputs={folder: read_record(_record_path(run, folder)).digest for folder in stage.reads},
        outputs=outputs,
    )
    write_record(path, record)
    for words in StageFigures.model_validate(figures).warnings:
        _LOG.warning("%s: %s", stage.name, words)
    return record
