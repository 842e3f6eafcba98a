"""Joules of a process's machine, from counters alone: powercap (RAPL), NVML, a battery that is not being charged.

A meter polls its counters in a thread, so that one that wraps around is followed and how often it moved is known: a
window in which a counter moved fewer than 20 times is refused. What the machine draws when idle is measured before and
after, and figures are net of it; gross stands beside. Nothing here estimates.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..manifest import Artifact
from .definitions import real_text
from .gpu import NoCounter, nvml, vram_bytes
from .measure import OpenSession

LEAST_UPDATES = 20
APART = 0.1
"""Share by which the two ways to measure decoding may differ."""
_POLL_S = 0.005
_IDLE_SHARE = 0.2  # of the seconds of a window


class Counter(Protocol):
    """Something that counts joules."""

    name: str

    def joules_since_last(self) -> float:
        """What was drawn since the last call, or since the counter was made."""
        ...


# --- counters ---------------------------------------------------------------------------------------------------------


class PowercapDomain:
    """One domain of Linux's powercap: microjoules that begin again at 0 behind ``max_energy_range_uj``."""

    def __init__(self, folder: Path) -> None:
        self.name = (folder / "name").read_text("ascii").strip()
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text("ascii"))
        self._last = int(self._file.read_text("ascii"))

    def joules_since_last(self) -> float:
        """Across a wrap-around, of which there may be one between two calls."""
        try:
            now = int(self._file.read_text("ascii"))
        except (OSError, ValueError):  # read again at the next poll
            return 0.0
        step = now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return step / 1e6


def powercap_domains(root: Path) -> list[PowercapDomain]:
    """Packages and memory; ``psys`` holds both and is taken where there is no package alone. The same package seen a
    second time, as through ``intel-rapl-mmio``, is left out.

    Raises:
        NoCounter: there is none, or root alone may read it.
    """
    base = root / "sys/class/powercap"
    found: dict[str, Path] = {}
    for folder in sorted(base.glob("*rapl*:*"), key=lambda path: ("mmio" in path.name, path.name)):
        with contextlib.suppress(OSError):
            name = (folder / "name").read_text("ascii").strip()
            parent = folder.name.rpartition(":")[0] if folder.name.count(":") > 1 else ""
            # Memory of two packages has one name: it counts by the package it belongs to.
            found.setdefault(f"{parent.partition(':')[2]}{name}" if name == "dram" else name, folder)
    packages = [folder for name, folder in found.items() if name.startswith("package") or name.endswith("dram")]
    if not any(name.startswith("package") for name in found):
        packages = [folder for name, folder in found.items() if name == "psys"]
    if not packages:
        raise NoCounter(f"no counter: {base} has no package")
    try:
        return [PowercapDomain(folder) for folder in packages]
    except PermissionError as error:
        raise NoCounter(f"{error.filename} is for root alone; grant it: sudo chmod a+r {base}/*/energy_uj") from error
    except (OSError, ValueError) as error:
        raise NoCounter(f"{base}: a counter is not readable: {error}") from error


class Battery:
    """A battery's power, summed up over time."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = folder.name
        self._folder, self._clock = folder, clock
        self._last, self._watts, self._untold = clock(), self._read(), 0.0

    def _read(self) -> float:
        try:
            return int((self._folder / "power_now").read_text("ascii")) / 1e6
        except FileNotFoundError:
            amperes, volts = (
                int((self._folder / f"{name}_now").read_text("ascii")) / 1e6 for name in ("current", "voltage")
            )
            return abs(amperes) * volts

    def joules_since_last(self) -> float:
        """By the power at both ends of each poll."""
        now, watts = self._clock(), self._read()
        self._untold += (now - self._last) * (watts + self._watts) / 2
        moved = watts != self._watts
        self._last, self._watts = now, watts
        if not moved:  # the driver has not looked again: what is drawn meanwhile is told with its next word
            return 0.0
        told, self._untold = self._untold, 0.0
        return told


def batteries(root: Path) -> list[Battery]:
    """Those that are being discharged.

    Raises:
        NoCounter: there is none, or it is being charged.
    """
    folders = sorted((root / "sys/class/power_supply").glob("BAT*"))
    found = []
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            if (folder / "status").read_text("ascii").strip() == "Discharging":
                found.append(Battery(folder))
    if not found:
        raise NoCounter("the battery is being charged: unplug it" if folders else "no battery")
    return found


class Gpu:
    """NVML's counter of one GPU, millijoules since the driver was loaded."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.name = f"gpu-{index}"
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(index)
        self._last: int = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def joules_since_last(self) -> float:
        """A GPU since Volta."""
        now: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        step, self._last = now - self._last, now
        return step / 1000


def counters(root: Path = Path("/"), gpus: Sequence[int] = ()) -> list[Counter]:
    """What can be read here: a machine's packages and memory, else its battery, and the GPUs that are used.

    Raises:
        NoCounter: nothing can; every reason is in it.
    """
    reasons, found = [], list[Counter]()
    for source in (powercap_domains, batteries):
        try:
            found += source(root)
            break
        except NoCounter as reason:
            reasons.append(str(reason))
    if gpus:
        module = nvml()
        found += [Gpu(module, index) for index in gpus]
    if not found:
        raise NoCounter("; ".join(reasons))
    return found


def no_counter(root: Path = Path("/")) -> str | None:
    """Why no energy can be read on this machine, found without opening anything; None where it may be."""
    try:
        counters(root)
    except NoCounter as reason:
        try:
            nvml()
        except NoCounter as no_gpu:
            return f"{reason}; {no_gpu}"
    return None


# --- windows ----------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """What was drawn in one stretch of time, or in several of the same kind."""

    joules: float = 0.0
    seconds: float = 0.0
    updates: int = 0
    """Of the counter that moved least often."""
    granularity: float | None = None
    """The least step of any counter."""
    tokens: int = 0

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds


@dataclass
class _Tally:
    joules: float = 0.0
    updates: int = 0
    least: float | None = None


class Meter:
    """Reads counters all the time while a window is open."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self.names = [counter.name for counter in counters]
        self._counters = counters

    @contextmanager
    def window(self, into: Window) -> Iterator[None]:
        """Count what is drawn while the body runs, and add it to a window."""
        self._poll([_Tally() for _ in self._counters])  # what was before does not count
        tallies, stop = [_Tally() for _ in self._counters], threading.Event()
        poller = threading.Thread(target=self._watch, args=(tallies, stop), daemon=True)
        began = time.monotonic()
        poller.start()
        try:
            yield
        finally:
            stop.set()
            poller.join()
            self._poll(tallies)
            into.seconds += time.monotonic() - began
            into.joules += sum(tally.joules for tally in tallies)
            into.updates += min(tally.updates for tally in tallies)
            steps = [tally.least for tally in tallies if tally.least is not None]
            into.granularity = min([*steps, *([into.granularity] if into.granularity else [])], default=None)

    def _watch(self, tallies: Sequence[_Tally], stop: threading.Event) -> None:
        while not stop.wait(_POLL_S):
            self._poll(tallies)

    def _poll(self, tallies: Sequence[_Tally]) -> None:
        for counter, tally in zip(self._counters, tallies, strict=True):
            if (step := counter.joules_since_last()) > 0:
                tally.joules += step
                tally.updates += 1
                tally.least = step if tally.least is None else min(step, tally.least)


# --- an artifact ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyRun:
    """Windows of one artifact."""

    counters: list[str]
    prompt_tokens: int
    decode_tokens: int
    idle: tuple[Window, Window]
    """Before and after, the model loaded."""
    prefill: Window
    decode: Window
    requests: Window
    """Of whole requests; its tokens are their number."""

    @property
    def idle_w(self) -> list[float]:
        """Before and after."""
        return [window.watts for window in self.idle]

    def net(self, window: Window) -> float:
        """Joules beyond what idling would have drawn."""
        return window.joules - window.seconds * sum(self.idle_w) / 2

    def per_token(self, window: Window) -> tuple[float, float]:
        """Net and gross joules of a token, or of a request."""
        return self.net(window) / window.tokens, window.joules / window.tokens

    def decode_by_differences(self) -> float:
        """Net joules of a decoded token, from whole requests less their prompts."""
        request, prompt = self.per_token(self.requests)[0], self.per_token(self.prefill)[0]
        return (request - prompt * self.prompt_tokens) / self.decode_tokens


def refusal(window: Window) -> str | None:
    """Why a window tells nothing, or None."""
    if window.updates >= LEAST_UPDATES:
        return None
    return f"the counter moved {window.updates} times in {window.seconds:.1f} s, {LEAST_UPDATES} are needed"


def energy_run(
    open_session: OpenSession,
    artifact: Artifact,
    prompt_tokens: int,
    decode_tokens: int,
    threads: int,
    seconds: float,
    root: Path = Path("/"),
) -> EnergyRun | str:
    """Fill windows of at least ``seconds`` each with prefill alone, decode alone, and whole requests.

    Returns:
        The windows, or why there are none.
    """
    session = open_session(artifact, threads=threads)
    try:
        try:
            meter = Meter(counters(root, list(vram_bytes())))
        except NoCounter as reason:
            return str(reason)
        ids = session.tokenize(real_text(session, prompt_tokens))
        context = artifact.manifest.contract.context_length

        def prompt() -> int:
            session.reset()
            return int(session.prefill(ids).argmax())

        def decode(token: int, count: int) -> None:
            for _ in range(count):
                token = int(session.decode(token).argmax())

        def idle() -> Window:
            window = Window()
            with meter.window(window):
                time.sleep(max(0.5, _IDLE_SHARE * seconds))
            return window

        decode(prompt(), min(8, decode_tokens))
        before = idle()
        prefill, decoding, requests = Window(), Window(), Window()
        with meter.window(prefill):
            for _ in _until(seconds):
                prompt()
                prefill.tokens += prompt_tokens
        room = min(context - prompt_tokens, max(decode_tokens, 256))
        for _ in _until(lambda: seconds - decoding.seconds):
            token = prompt()
            with meter.window(decoding):
                decode(token, room)
            decoding.tokens += room
        with meter.window(requests):
            for _ in _until(seconds):
                decode(prompt(), decode_tokens)
                requests.tokens += 1
        return EnergyRun(meter.names, prompt_tokens, decode_tokens, (before, idle()), prefill, decoding, requests)
    finally:
        session.close()


def _until(seconds: float | Callable[[], float]) -> Iterator[None]:
    """Once, and again as long as there is time; of a function, as long as it gives more than nothing."""
    began = time.monotonic()
    yield
    while (seconds() if callable(seconds) else seconds - (time.monotonic() - began)) > 0:
        yield
