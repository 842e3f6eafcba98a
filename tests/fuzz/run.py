"""Feed damaged inputs to edgekd, by the million, and count what comes of them.

    python tests/fuzz/run.py --kind spec --count 1000000
    python tests/fuzz/run.py --hours 8               every kind, the hours shared out evenly

An input is known by its kind, the seed and its number, so that a run goes on where it was stopped, and gives the same
inputs on every machine. Each kind is fed in a process of its own: one that dies, hangs, grows by more than 1 GiB,
writes outside its folder or opens a socket costs one input and a line in the log, as an exception that is not
edgekd's does. Exit code 1 when there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent))

import psutil

from edgekd.errors import Fault, as_error
from harnesses import HARNESSES, Harness
from mutate import Pick, mutate

SLOW_CPU_S = 2.0
HANG_CPU_S, HANG_S = 20.0, 180.0
GROWTH_KIB = 2**20
ADDRESS_SPACE = 16 * 2**30
FIELDS = ("next", "inputs", "accepted", "refused", "faults", "slow", "grown", "outside", "died", "hung", "peak_rss_kib")
BAD = ("faults", "slow", "grown", "outside", "died", "hung")


@dataclass(frozen=True)
class Job:
    """What a worker is to do: the inputs ``next``, ``next + step``, … below ``count``."""

    kind: str
    seed: int
    step: int
    count: int
    log: Path
    parent: int
    """Process that counts; without it there is no use in going on."""


def picker(*parts: object) -> Pick:
    """Choices that follow from ``parts`` alone."""
    draw = random.Random("/".join(map(str, parts))).random
    return lambda n: int(draw() * n)


def feed(check: Callable[[bytes], Any], data: bytes) -> BaseException | None:
    """Give an input to a harness; the exception if it refused, also one that is a fault."""
    try:
        check(data)
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return error
    return None


def place(error: BaseException) -> str:
    """Exception and innermost line of edgekd, by which faults are told apart."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/fuzz/" not in frame.filename]
    where = ours[-1] if ours else frames[-1]
    return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno} {where.name}"


class Watch:
    """What the interpreter does outside ``folder``, or over the network, while an input is fed."""

    CHANGING: ClassVar = {
        **dict.fromkeys(("os.remove", "os.mkdir", "os.rmdir", "os.truncate"), 1),
        **dict.fromkeys(("os.rename", "os.symlink", "os.link"), 2),
    }
    TALKING = ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto")
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def __init__(self, folder: Path) -> None:
        self._home, self._seen, self._active = os.path.realpath(folder) + os.sep, [], False
        sys.addaudithook(self._hook)  # cannot be taken off again

    @contextlib.contextmanager
    def __call__(self) -> Iterator[list[str]]:
        """What was seen, filled while the block runs."""
        self._seen, self._active = [], True
        try:
            yield self._seen
        finally:
            self._active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event in self.TALKING:
            self._seen.append(f"{event} {arguments[1:]!r:.200}")
        is_write = event == "open" and not isinstance(arguments[0], int) and bool(arguments[2] & self.WRITING)
        for path in arguments[: 1 if is_write else self.CHANGING.get(event, 0)]:
            name = os.fsdecode(path)
            nameless = is_write and os.path.isdir(name)  # a file without a name is opened by its folder's
            folder = os.path.realpath(name if nameless else os.path.dirname(name) or ".") + os.sep
            if name != os.devnull and not folder.startswith(self._home):
                self._seen.append(f"{event} {name!r:.200}")


def work(job: Job, state: Any, folder: Path) -> None:
    """One worker: runs in a process of its own."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.dont_write_bytecode = True
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.register(signal.SIGUSR1, file=(job.log / "hung-at.txt").open("a"), all_threads=False)
    harness = HARNESSES[job.kind](folder)
    for seed in harness.seeds:
        feed(harness.check, seed)  # imports what it needs
    watch = Watch(folder)
    for number in range(state[0], job.count, job.step):
        if os.getppid() != job.parent:
            return
        one(job, state, harness, number, watch)


def one(job: Job, state: Any, harness: Harness, number: int, watch: Watch) -> None:
    """Feed one input and count what came of it."""
    data = mutate(harness.seeds, harness.form, picker(job.seed, job.kind, number))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with watch() as outside:
        error = feed(harness.check, data)
    spent, after = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    is_fault = error is not None and isinstance(as_error(error), Fault)
    found = {
        "faults": place(error) if is_fault and error else "",
        "slow": f"{spent:.1f} s of CPU" if spent > SLOW_CPU_S else "",
        "grown": f"{(after - before) / 2**20:.1f} GiB" if after - before > GROWTH_KIB else "",
        "outside": "; ".join(outside),
    }
    for field, what in found.items():
        if what:
            state[FIELDS.index(field)] += 1
            record(job, number, field, what, data, error)
    state[FIELDS.index("accepted" if error is None else "faults" if is_fault else "refused")] += not is_fault
    state[FIELDS.index("peak_rss_kib")] = after
    state[1] += 1
    state[0] = number + job.step


def record(job: Job, number: int, field: str, what: str, data: bytes, error: BaseException | None = None) -> None:
    """A line in the log; the input and its traceback where it is the first of its place."""
    what = re.sub("[0-9a-f]{16,}", "…", what)  # names that are digests tell nothing apart
    name = f"{field}-{hashlib.sha256(what.encode(errors='replace')).hexdigest()[:10]}"
    with (job.log / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"{number}\t{field}\t{what}\t{name}\n".encode(errors="backslashreplace").decode())
    if not (job.log / f"{name}.bin").exists():
        (job.log / f"{name}.bin").write_bytes(data)
        text = "".join(traceback.format_exception(error)) if error else what
        (job.log / f"{name}.txt").write_bytes(f"{number}: {text[-20000:]}".encode(errors="backslashreplace"))


class Worker:
    """A worker's process, started again after it died or hung."""

    def __init__(self, job: Job, first: int, saved: list[int] | None) -> None:
        self.job = job
        self.state = multiprocessing.Array("q", saved or [first, *[0] * (len(FIELDS) - 1)], lock=False)
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.scratch = tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory)
        self.start()

    def start(self) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.scratch.name))
        self.process = multiprocessing.get_context("fork").Process(target=work, args=(self.job, self.state, folder))
        self.process.start()
        self.seen, self.since = -1, self.spent()

    def spent(self) -> tuple[float, float]:
        """Seconds of the process's CPUs, and of the clock."""
        with contextlib.suppress(psutil.Error):
            return sum(psutil.Process(self.process.pid).cpu_times()[:2]), time.monotonic()
        return 0.0, time.monotonic()

    def look(self) -> bool:
        """Whether there is more to do; a worker that ended too early is counted and started again behind its input."""
        number, alive = self.state[0], self.process.is_alive()
        if number != self.seen:
            self.seen, self.since = number, self.spent()
        cpu_s, wall_s = (now - then for now, then in zip(self.spent(), self.since, strict=True))
        if alive and cpu_s < HANG_CPU_S and wall_s < HANG_S:
            return True
        if number >= self.job.count:
            return False
        if alive:
            os.kill(self.process.pid or 0, signal.SIGUSR1)  # it writes where it hangs
            time.sleep(0.5)
            self.process.kill()
        self.process.join()
        field, what = ("hung", "does not end") if alive else ("died", f"exit code {self.process.exitcode}")
        if not self.state[1] and not alive:
            raise SystemExit(f"{self.job.kind}: the harness does not start ({what}).")
        self.state[FIELDS.index(field)] += 1
        self.state[1] += 1
        record(self.job, number, field, what, b"")
        self.state[0] = number + self.job.step
        self.start()
        return True

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.scratch.cleanup()


def run(
    kind: str, count: int, seed: int = 0, jobs: int = 1, out: Path | None = None, seconds: float = 1e9
) -> dict[str, int]:
    """Feed inputs of one kind.

    Args:
        out: folder of the log, the failing inputs and the state to go on from; default: a new temporary one.
        seconds: stop after these.

    Returns:
        Counts by ``FIELDS``, earlier runs' among them.
    """
    log = (out or Path(tempfile.mkdtemp(prefix="fuzz-log-"))) / f"{kind}-{seed}"
    log.mkdir(parents=True, exist_ok=True)
    path, until = log / "state.json", time.monotonic() + seconds
    saved = json.loads(path.read_text()) if path.exists() else [None] * jobs
    if len(saved) != jobs:
        raise SystemExit(f"{path}: begun with --jobs {len(saved)}; go on with as many, or remove it.")
    workers = [Worker(Job(kind, seed, jobs, count, log, os.getpid()), i, saved[i]) for i in range(jobs)]
    try:
        busy = True
        while busy and time.monotonic() < until:
            busy = sum(worker.look() for worker in workers) > 0
            time.sleep(0.2)
            path.write_text(json.dumps([list(worker.state) for worker in workers]))
    finally:
        for worker in workers:
            worker.stop()
        path.write_text(json.dumps([list(worker.state) for worker in workers]))
    totals = {field: sum(worker.state[i] for worker in workers) for i, field in enumerate(FIELDS)}
    totals["peak_rss_kib"] = max(worker.state[-1] for worker in workers)
    del totals["next"]
    return totals


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=sorted(HARNESSES), help="repeatable; default: every kind")
    parser.add_argument("--count", type=int, default=10**12, help="inputs of each kind")
    parser.add_argument("--hours", type=float, default=1e6, help="time for all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes for a kind")
    parser.add_argument("--show", type=int, help="write the input of this number to stdout, and feed nothing")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    if options.show is not None:
        (kind,) = options.kind
        with tempfile.TemporaryDirectory() as folder:
            harness = HARNESSES[kind](Path(folder))
        sys.stdout.buffer.write(mutate(harness.seeds, harness.form, picker(options.seed, kind, options.show)))
        return
    if options.count == 10**12 and options.hours == 1e6:
        parser.error("give --count or --hours")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the state is written on the way out
    kinds, bad = options.kind or list(HARNESSES), 0
    for kind in kinds:
        began = time.monotonic()
        seconds = options.hours * 3600 / len(kinds)
        totals = run(kind, options.count, options.seed, options.jobs, options.out.absolute(), seconds)
        bad += sum(totals[field] for field in BAD)
        told = ", ".join(f"{name} {number:,}" for name, number in totals.items())
        print(f"{kind}: {told}; {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
