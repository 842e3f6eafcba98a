"""The machine that figures belong to: what it is, how fast its memory is read, and what else it was doing."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ..proof import Host, Noise

_BANDWIDTH_SECONDS = 0.7
_LEAST_PASSES = 5
_LEAST_BUFFER_BYTES = 512 * 2**20
_MOST_STEAL = 0.02
_MOST_OTHERS = 0.1  # of one core
_MOST_MEMORY_PRESSURE = 0.05


def describe_machine(runtime_build: str | None = None, gpu: str | None = None) -> Host:
    """The machine the figures belong to, and how busy it was."""
    return Host(
        cpu=_cpu_name(),
        cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        gpu=gpu,
        last_level_cache_bytes=last_level_cache_bytes(),
        ram_bytes=psutil.virtual_memory().total,
        os=platform.platform(),
        architecture=platform.machine(),
        python=platform.python_version(),
        runtime_build=runtime_build,
        load_average_1min=psutil.getloadavg()[0],
    )


def physical_cores() -> int:
    """How many threads run where nobody asked for a number."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _cpu_name() -> str | None:
    if sys.platform == "darwin":
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return answer.stdout.strip() or None
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return platform.processor() or None
    names = {key.strip(): value.strip() for key, _, value in lines}
    return names.get("model name") or names.get("Model") or names.get("Hardware") or platform.processor() or None


# --- bandwidth --------------------------------------------------------------------------------------------------------


def last_level_cache_bytes() -> int | None:
    """Size of the last-level cache that Linux reports; None elsewhere. A virtual machine may report its host's."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=None)


def bandwidth_buffer_bytes() -> int:
    """Eight times the last-level cache where a quarter of the free memory allows it, else that quarter."""
    wanted = max(_LEAST_BUFFER_BYTES, 8 * (last_level_cache_bytes() or 0))
    return min(wanted, psutil.virtual_memory().available // 4) // 8 * 8


def bandwidth_samples(threads: int, buffer_bytes: int) -> list[float]:
    """Bytes read per second, one sample a pass of ``threads`` threads over a buffer.

    Each thread looks for a byte that is not there: the C library's ``memchr`` reads 32 or 64 bytes an instruction and
    adds nothing up, so that it waits for memory alone. ctypes lets go of the interpreter's lock meanwhile.
    """
    buffer = np.zeros(buffer_bytes, np.uint8)
    buffer[::4096] = 2  # every page is written: a page that never was is the one page of zeros, and in cache
    parts = np.array_split(buffer, threads)
    memchr = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).memchr
    memchr.restype, memchr.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) <= _LEAST_PASSES or time.perf_counter() - began < _BANDWIDTH_SECONDS:
        workers = [threading.Thread(target=memchr, args=(part.ctypes.data, 1, part.size)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        samples.append(buffer_bytes / (time.perf_counter() - start))
    return samples[1:]


# --- noise ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counters:
    """What the system has counted since it began."""

    at: float
    cpu_s: tuple[float, float] | None
    """Busy and stolen, of all cores."""
    own_cpu_s: float
    switches: int
    cpu_waited_s: float | None
    memory_waited_s: float | None
    throttled: int | None
    frequencies: list[float]
    temperature: float | None


class NoiseWatch:
    """From when it is made to ``noise``: what the machine did beside this process and its children that have ended.

    Args:
        root: of the file system, for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before = self._read()

    def noise(self) -> Noise:
        """What was seen, and what of it disturbs a measurement."""
        one, two = self._before, self._read()
        wall = max(two.at - one.at, 1e-9)
        steal = others = None
        if one.cpu_s and two.cpu_s:
            cores = psutil.cpu_count() or 1
            busy, stolen = (after - before for before, after in zip(one.cpu_s, two.cpu_s, strict=True))
            steal = min(1.0, max(0.0, stolen / (wall * cores)))
            others = max(0.0, (busy - (two.own_cpu_s - one.own_cpu_s)) / wall)
        throttled = None if one.throttled is None or two.throttled is None else two.throttled - one.throttled
        memory = _share(one.memory_waited_s, two.memory_waited_s, wall)
        frequencies = [*one.frequencies, *two.frequencies]
        hot = [one.temperature, two.temperature]
        return Noise(
            steal_share=steal,
            others_cpu_share=others,
            cpu_pressure_share=_share(one.cpu_waited_s, two.cpu_waited_s, wall),
            memory_pressure_share=memory,
            involuntary_switches_per_s=(two.switches - one.switches) / wall,
            frequency_mhz=[min(frequencies), max(frequencies)] if frequencies else None,
            throttled=throttled,
            temperature_c=[t for t in hot if t is not None] if None not in hot else None,
            dirty=list(_complaints(steal, others, memory, throttled)),
        )

    def _read(self) -> _Counters:
        own, cpu = _own_usage(), self._root / "sys/devices/system/cpu"
        throttles = _numbers(cpu, "cpu[0-9]*/thermal_throttle/core_throttle_count")
        return _Counters(
            time.monotonic(),
            _cpu_seconds(self._root / "proc/stat"),
            own[0],
            own[1],
            _waited_s(self._root / "proc/pressure/cpu"),
            _waited_s(self._root / "proc/pressure/memory"),
            sum(throttles) if throttles else None,
            [khz / 1000 for khz in _numbers(cpu, "cpu[0-9]*/cpufreq/scaling_cur_freq")],
            hottest(self._root),
        )


def hottest(root: Path = Path("/")) -> float | None:
    """Degrees of the hottest place that the system measures."""
    millidegrees = _numbers(root / "sys/class/thermal", "thermal_zone*/temp")
    return max(millidegrees) / 1000 if millidegrees else None


def _complaints(
    steal: float | None, others: float | None, memory: float | None, throttled: int | None
) -> Iterator[str]:
    """Why a measurement was disturbed."""
    if steal is not None and steal > _MOST_STEAL:
        yield f"the host took {steal:.0%} of the CPUs' time"
    if others is not None and others > _MOST_OTHERS:
        yield f"other processes took {others:.0%} of a core"
    if memory is not None and memory > _MOST_MEMORY_PRESSURE:
        yield f"tasks waited for memory {memory:.0%} of the time"
    if throttled:
        yield f"the CPU slowed itself for its heat {throttled} times"


def _share(before: float | None, after: float | None, wall: float) -> float | None:
    return None if before is None or after is None else (after - before) / wall


def _own_usage() -> tuple[float, int]:
    """CPU seconds and involuntary switches of this process and its children that have ended."""
    if sys.platform == "win32":
        times = os.times()
        return times.user + times.system, 0
    import resource

    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in both), sum(r.ru_nivcsw for r in both)


def _cpu_seconds(path: Path) -> tuple[float, float] | None:
    """Busy and stolen seconds of all cores, by ``/proc/stat``."""
    if sys.platform == "win32":
        return None
    try:
        ticks = [int(word) for word in path.read_text("ascii").split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, irq, soft, steal = ticks[:8]
    hertz = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft) / hertz, steal / hertz


def _waited_s(path: Path) -> float | None:
    """Seconds in which some task waited, by a file of ``/proc/pressure``."""
    try:
        line = path.read_text("ascii").split("\n", 1)[0]
    except OSError:
        return None
    return int(line.rpartition("total=")[2]) / 1e6


def _numbers(folder: Path, pattern: str) -> list[int]:
    """The number in each file of a pattern; files that cannot be read are left out."""
    found = []
    for path in folder.glob(pattern):
        with suppress(OSError, ValueError):
            found.append(int(path.read_text()))
    return found
