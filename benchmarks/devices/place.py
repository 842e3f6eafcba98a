"""A temporary folder on a device and what runs in it; it is gone when the work ends, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import resources
from pathlib import Path
from shlex import join, quote
from typing import ParamSpec, TypeVar

from ...errors import EdgekdError
from ...files import file_sha256
from ...formats import plain, size
from .device import Device, Lost, ask, lease, run
from .readings import STATE, State, Tick, state_of, tick_of

_SPARE_BYTES = 32 * 2**20
_LOADER = 3  # PT_INTERP
_MACHINES = {
    3: ("x86", {"i386", "i586", "i686", "x86_64"}),
    40: ("32-bit Arm", {"armv6l", "armv7l", "armv8l"}),
    62: ("x86-64", {"x86_64"}),
    183: ("64-bit Arm", {"aarch64", "arm64"}),
    243: ("RISC-V", {"riscv64"}),
}
"""ELF's number of a machine → its name, and what ``uname -m`` says where such programs run."""
_DIED = {
    126: "cannot be run there",
    127: "cannot be run there: it, or a library that it needs, is missing",
    132: "was ended by SIGILL: it is built for instructions that the device's CPU lacks",
    134: "was ended by SIGABRT",
    135: "was ended by SIGBUS",
    137: "was ended by SIGKILL: the device's memory may have run out",
    139: "was ended by SIGSEGV",
}


@dataclass(frozen=True)
class Ran:
    """What a command said on the device, and what the system told meanwhile."""

    output: str
    ticks: Sequence[Tick]


@dataclass(frozen=True)
class Place:
    """A folder on a device."""

    device: Device
    folder: str

    def path(self, name: str) -> str:
        """Of a file in it."""
        return f"{self.folder}/{name}"

    def state(self) -> State:
        """What the device says of itself now."""
        return state_of(ask(self.device, STATE))

    def check_room(self, needed: int) -> None:
        """Refuse what the device has no space for.

        Raises:
            EdgekdError: says how much is missing.
        """
        words = ask(self.device, f"df -Pk {quote(self.folder)}").strip().splitlines()[-1].split()
        free = 1024 * int(words[3]) if len(words) > 3 and words[3].isdigit() else None
        if free is not None and free < needed + _SPARE_BYTES:
            raise EdgekdError(
                f"{self.device.name}: {plain(size(needed))} are to be sent, and {plain(size(free))} are free there.",
                "Free some space on the device.",
            )

    def push(self, local: Path, name: str, sha256: str | None = None) -> str:
        """Send a file and compare it there.

        Args:
            sha256: what it must be; None: what it is here.

        Returns:
            Its path there.

        Raises:
            EdgekdError: it did not arrive, or arrived as something else.
        """
        there = self.path(name)
        self.device.send(local, there)
        found = ask(self.device, f"sha256sum {quote(there)}").split(" ", 1)[0].lstrip("\\")
        if found != (sha256 or file_sha256(local)):
            raise EdgekdError(f"{self.device.name}: {local.name} arrived as another file.", "Send it again.")
        return there

    def write(self, text: str, name: str, scratch: Path) -> str:
        """A file of some text there; its path."""
        local = scratch / name
        local.write_text(text, "utf-8", newline="")
        return self.push(local, name)

    def run(self, what: str, command: Sequence[str], *, every_s: float = 0.5, battery: str | None = None) -> Ran:
        """Run a program there and watch it.

        Args:
            what: the work, for messages.
            every_s: how often the system is asked.
            battery: folder of the battery to read.

        Raises:
            Lost: the device went away; it ends the program itself.
            EdgekdError: the program failed or died.
        """
        words = ["sh", self.path("watch.sh"), self.folder, f"{every_s:g}", battery or "-", *command]
        try:
            said, _, _ = run(self.device, join(words))
        except Lost as lost:
            raise Lost(f"{what}: {lost.cause}", lost.remedy) from lost
        head, _, output = said.partition("\noutput\n")
        lines = head.splitlines()
        code = next((int(line.split()[1]) for line in lines if line.startswith("exit ")), None)
        if code != 0:
            raise _failure(what, code, [line[5:] for line in lines if line.startswith("said ")])
        return Ran(output, [tick_of(line) for line in lines if line.startswith("tick ")])


def _failure(what: str, code: int | None, said: Sequence[str]) -> EdgekdError:
    words = _DIED.get(code or 0, f"failed with exit code {code}")
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    return EdgekdError(
        f"{what}: the runner {words}{': ' if last else ''}{last.rstrip('.')}.", "See docs/benchmarking.md."
    )


@contextmanager
def place_on(device: Device, scratch: Path) -> Iterator[Place]:
    """A new folder on a device, removed at the end, or when this process or the connection ends before.

    Args:
        scratch: a folder here, for small files on their way.

    Raises:
        EdgekdError: none can be made.
    """
    with lease(device) as folder:
        place = Place(device, folder)
        try:
            place.write(resources.files(__package__).joinpath("watch.sh").read_text("utf-8"), "watch.sh", scratch)
            yield place
        except Lost as lost:
            raise Lost(lost.cause, f"{lost.remedy} If {folder} is still there, remove it.") from lost


P = ParamSpec("P")
R = TypeVar("R")


def reads_answers(work: Callable[P, R]) -> Callable[P, R]:
    """Work that takes a runner's answers for what they should be; where they are not, an ``EdgekdError`` says so."""

    @wraps(work)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            words = f"the runner's answer is not one ({type(error).__name__}: {error!s:.200})."
            raise EdgekdError(words, "Build it again, as docs/benchmarking.md says.") from error

    return checked


# --- programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What a file says of the machine it runs on."""

    machine: int
    loader: str | None
    """The program that loads its libraries; None where it has none."""


def read_program(path: Path) -> Program:
    """The head of an ELF file.

    Raises:
        EdgekdError: it is missing, or is no program of Linux or Android.
    """
    remedy = "docs/benchmarking.md says how to build one."
    try:
        with path.open("rb") as file:
            head = file.read(2**16)
    except OSError as error:
        raise EdgekdError(f"--runner {path}: cannot be read: {error.strerror}.", remedy) from error
    if head[:4] != b"\x7fELF" or len(head) < 64 or head[4] not in (1, 2) or head[5] != 1:
        raise EdgekdError(f"--runner {path} is no program of Linux or Android.", remedy)

    def number(at: int, width: int) -> int:
        return int.from_bytes(head[at : at + width], "little")

    wide = head[4] == 2
    table, each, count = (
        (number(32, 8), number(54, 2), number(56, 2)) if wide else (number(28, 4), number(42, 2), number(44, 2))
    )
    for at in range(table, table + each * count, each or 1):
        if number(at, 4) == _LOADER:
            start, length = (number(at + 8, 8), number(at + 32, 8)) if wide else (number(at + 4, 4), number(at + 16, 4))
            return Program(number(18, 2), head[start : start + length].rstrip(b"\0").decode("utf-8", "replace"))
    return Program(number(18, 2), None)


def check_program(path: Path, program: Program, facts: Mapping[str, str], exists: Callable[[str], bool]) -> None:
    """Refuse a program that the device cannot run.

    Args:
        facts: of ``readings.FACTS``.
        exists: whether a file is on the device.

    Raises:
        EdgekdError: it is for another CPU, or for another system.
    """
    title, runs_on = _MACHINES.get(program.machine, (f"machine {program.machine} of ELF", set()))
    machine = facts.get("machine", "")
    if machine not in runs_on:
        raise EdgekdError(
            f"--runner {path} is for {title}, and the device is {machine or 'unknown'}.", "Build it for that."
        )
    if program.loader and not exists(program.loader):
        raise EdgekdError(
            f"--runner {path} needs {program.loader}, which the device does not have: it is built for another system.",
            "Build it with Android's NDK for a phone, with the board's own compiler for a board.",
        )
