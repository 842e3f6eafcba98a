"""Whole runs that die anywhere: by SIGKILL, by Ctrl-C, by a full disk; each is started again until it is done.

``python tests/crash/faults.py --kills 100 --interrupts 20 --full-disks 20`` prints what happened as JSON and exits with
1 when a run ended with other bytes than one that was left alone, left something behind, or said more than a sentence.

The run is a tiny one with every kind of stage. Each try is a fork of this process, which has imported the libraries
already, so that a try costs what its work costs. A fault strikes at the n-th operation on the run's files (as Python's
audit events name them: what lies between two is training, or one library's writing of one file), or, for half of the
kills, after a random time. Filling the disk needs root: the run's folder is a tmpfs, shrunk to what it holds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SPEC = """
name: tiny
teacher: {model: teacher}
student: {init: cut, layers: 2}
data: {source: text, paths: [text/*.txt], context: 32, validation_share: 0.2, test_share: 0.2}
distill: {steps: 12, batch_size: 4, warmup_steps: 1, validate_every: 4, checkpoint_every: 3}
quantize:
  method: qad
  compare: [rtn, gptq]
  calibration_windows: 8
  qad: {steps: 8, batch_size: 4, warmup_steps: 1, validate_every: 4, checkpoint_every: 3}
targets:
  - {target: gguf, recipes: [fp16, portable-int4, gguf-q4_k_m], context: 96}
  - {target: onnx, recipes: [portable-int4], context: 96}
verify: {windows: 2, context: 32, greedy_tokens: 4, thresholds: {default: {kl_mean_max: 100, top1_min: 0}}}
bench: {prompt_tokens: [8], decode_tokens: 4, runs: 1, cold_runs: 0, curve_seconds: 0}
"""

Kind = Literal["kill", "interrupt", "full disk"]
OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MS_REMOUNT = 32
ROOMY_BYTES = 4 * 2**30  # more than `edgekd plan` asks for; a tmpfs takes only what it holds


@dataclass
class Tally:
    """What was done to runs, at which stages, and what went wrong."""

    struck: dict[Kind, Counter[str]]
    whole_runs: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Try:
    """How one process ended."""

    code: int
    """Exit code; negative for the signal that ended it."""
    said: str
    """On stderr."""
    operations: int
    seconds: float

    @property
    def stage(self) -> str:
        """The one it was at."""
        begun = re.findall(r"^(.+) \.\.\.$", self.said, re.M)
        return str(begun[-1]) if begun else "before the first stage"


def main() -> int:
    """Strike as often as asked; print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, count in (("--kills", 100), ("--interrupts", 20), ("--full-disks", 20)):
        parser.add_argument(name, type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    counts: dict[Kind, int] = {"kill": asked.kills, "interrupt": asked.interrupts, "full disk": asked.full_disks}
    faults = [kind for kind, count in counts.items() for _ in range(count)]
    chance = random.Random(asked.seed)
    chance.shuffle(faults)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(Path(folder))
        undisturbed = attempt(Path(folder, "undisturbed"))
        assert undisturbed.code == 0, undisturbed.said
        wanted = outcome(Path(folder, "undisturbed"))
        tally = strike(faults, wanted, undisturbed, chance)
    told = {"operations_of_a_run": undisturbed.operations, "files": len(wanted)}
    print(json.dumps(told | vars(tally), indent=2))
    return int(bool(tally.wrong))


def prepare(folder: Path) -> None:
    """A teacher, some text and a spec; and the libraries in this process, without a thread of theirs."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from conftest import make_tiny_teacher

    torch.set_num_threads(1)
    make_tiny_teacher(folder / "teacher")
    (folder / "text").mkdir()
    for i in range(60):
        lines = (f"def f{i}_{j}(x, y={j}):\n    return x * {i + j} + y\n" for j in range(12))
        (folder / "text" / f"{i}.txt").write_text("".join(lines))
    (folder / "spec.yaml").write_text(SPEC)


def strike(faults: list[Kind], wanted: dict[str, str], undisturbed: Try, chance: random.Random) -> Tally:
    """Whole runs, struck by one fault after the other, until none is left.

    Args:
        wanted: the outcome of a run left alone.
        undisturbed: how that went.
    """
    tally = Tally({kind: Counter() for kind in faults})
    while faults and not tally.wrong:
        with disk(can_be_filled="full disk" in faults) as folder:
            _until_done(folder / "run", faults, undisturbed, chance, tally)
            tally.wrong += differences(wanted, folder / "run") if not tally.wrong else []
    return tally


@contextlib.contextmanager
def disk(*, can_be_filled: bool) -> Iterator[Path]:
    """A folder; a tmpfs where it shall be filled."""
    with tempfile.TemporaryDirectory() as folder:
        if can_be_filled:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOMY_BYTES}", "edgekd", folder], check=True)
        try:
            yield Path(folder)
        finally:
            if can_be_filled:
                subprocess.run(["umount", "--lazy", folder], check=True)


def _until_done(run: Path, faults: list[Kind], undisturbed: Try, chance: random.Random, tally: Tally) -> None:
    while not tally.wrong:
        kind = faults[-1] if faults else None
        # Most often soon, so that one run is struck many times; now and then late, so that it comes to an end.
        at = 1 + int(chance.expovariate(8 / undisturbed.operations)) if kind else None
        timed = kind == "kill" and chance.random() < 0.5
        after_s = chance.expovariate(4 / undisturbed.seconds) if timed else None
        done = attempt(run, kind, None if timed else at, after_s)
        if kind == "full disk":
            resize(run.parent, ROOMY_BYTES)
        if kind is None or done.code == 0:
            tally.whole_runs += 1
            tally.wrong += [done.said] if done.code else []
            return
        tally.struck[faults.pop()][done.stage] += 1
        tally.wrong += complaints(kind, done)


def complaints(kind: Kind, done: Try) -> list[str]:
    """What is not as it should be about how a struck run ended."""
    code, sentence = {
        "kill": (-signal.SIGKILL, ""),
        "interrupt": (130, r"Interrupted\. .+"),
        "full disk": (2, r"error: .*(No space left|no space left|are free).*"),
    }[kind]
    last = (done.said.strip().splitlines() or [""])[-1]
    if done.code == code and (kind == "kill" or re.fullmatch(sentence, last)) and "Traceback" not in done.said:
        return []
    return [f"{kind} at {done.stage}: exit {done.code}: {done.said[-3000:]}"]


def differences(wanted: dict[str, str], run: Path) -> list[str]:
    """What a run that came to its end has other than one that was left alone."""
    found = outcome(run)
    wrong = [f"{name} differs" for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    left = [path for path in run.rglob("*") if path.name.endswith(".tmp") or path.name.startswith("checkpoint-")]
    return wrong + [f"{path.relative_to(run)} was left behind" for path in left]


def outcome(run: Path) -> dict[str, str]:
    """sha256 of every file of a run that does not hold times; of the manifests, without what does."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and "/" in name and not name.startswith((".edgekd/", "bench/", "audit/")):
            data = path.read_bytes()
            if path.name == "manifest.json":
                data = json.dumps(json.loads(data) | {"benchmark": None, "audit": None}).encode()
            found[name] = hashlib.sha256(data).hexdigest()
    return found


# --- one try ----------------------------------------------------------------------------------------------------------


def attempt(run: Path, kind: Kind | None = None, at: int | None = None, after_s: float | None = None) -> Try:
    """``edgekd run`` in a fork, struck at its ``at``-th operation on the run's files, or after a time."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as said, tempfile.NamedTemporaryFile() as counted:
        pid = os.fork()
        if pid == 0:
            _child(run, kind, at, said.fileno(), Path(counted.name))
        if after_s is not None:
            time.sleep(after_s)
            with_group(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with_group(pid, signal.SIGKILL)  # what a benchmark of a killed run left running
        said.seek(0)
        operations = int(Path(counted.name).read_text() or 0)
        return Try(os.waitstatus_to_exitcode(status), said.read().decode(), operations, time.monotonic() - began)


def with_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and those it started, if any is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _child(run: Path, kind: Kind | None, at: int | None, said: int, counted: Path) -> None:
    from edgekd import cli

    code: Any = 1
    try:
        os.setpgid(0, 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        operations = _watch(run, kind, at)
        sys.argv = ["edgekd", "run", "spec.yaml", "--out", str(run)]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        counted.write_text(str(operations[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(run: Path, kind: Kind | None, at: int | None) -> list[int]:
    """Count this process's operations on the run's files, and strike before the ``at``-th of them."""
    count, folder = [0], str(run)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            concerns = isinstance(path, str) and path.startswith(folder) and flags & WRITING
        else:
            # shutil.rmtree names files relative to an open folder.
            concerns = event in OPERATIONS and (str(arguments[0]).startswith(folder) or "/" not in str(arguments[0]))
        if not concerns:
            return
        count[0] += 1
        if count[0] != at:
            return
        if kind == "full disk":
            resize(run.parent, None)
        else:
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGINT)

    sys.addaudithook(on_event)
    return count


def resize(disk: Path, size_bytes: int | None) -> None:
    """Give a tmpfs another size; None leaves it none but what it holds."""
    stat = os.statvfs(disk)
    used = max(1, stat.f_blocks - stat.f_bfree) * stat.f_frsize  # size=0 means without end
    options = f"size={size_bytes or used}".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"edgekd", str(disk).encode(), b"tmpfs", MS_REMOUNT, options):
        raise OSError(ctypes.get_errno(), "mount")


if __name__ == "__main__":
    sys.exit(main())
