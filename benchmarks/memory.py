"""Memory of this process by phase, as Linux counts it, and what the system would count against a budget."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

NOT_LINUX = "only Linux tells"


@dataclass(frozen=True)
class Usage:
    """Memory at one moment, in bytes."""

    rss: int
    anonymous: int
    file_backed: int
    """Resident, and backed by a file: it can be dropped and read again."""
    swap: int
    pss: int
    """Pages that several processes share count by their part."""


@dataclass(frozen=True)
class Phase:
    """A phase's peak, and what stood at its end."""

    peak_rss: int
    end: Usage


def usage(pid: int | str = "self", proc: Path = Path("/proc")) -> Usage:
    """What ``smaps_rollup`` says of a process.

    Raises:
        OSError: there is no such process, or this system has no such file.
    """
    lines = (line.split() for line in (proc / str(pid) / "smaps_rollup").read_text("ascii").splitlines()[1:])
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    rss, anonymous = 1024 * kib["Rss"], 1024 * kib["Anonymous"]
    return Usage(rss, anonymous, rss - anonymous, 1024 * kib["Swap"], 1024 * kib["Pss"])


def peak_rss_bytes() -> int:
    """Most memory that this process has had resident, since the last ``begin_phase`` on Linux."""
    if sys.platform == "linux":
        # ru_maxrss survives exec: a child starts with its parent's peak.
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def begin_phase() -> None:
    """Let the peak begin again at what is resident now, where the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def end_phase() -> Phase | None:
    """The phase that ends here; None where the system does not tell."""
    try:
        return Phase(peak_rss_bytes(), usage())
    except OSError:
        return None


def drop_from_page_cache(files: Iterable[Path]) -> bool:
    """Have the system forget the files' pages, so that they come from the disk again; False where it cannot be asked.

    Pages that another process has mapped stay. The count of major faults and of bytes read tells what was dropped.
    """
    if sys.platform == "win32" or not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # a dirty page is not dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return True


def disk_read_bytes() -> int | None:
    """Bytes that this process had read from a disk; None where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), None)
