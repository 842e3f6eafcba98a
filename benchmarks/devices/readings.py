"""What a device's system tells of it: who it is, how warm, what its battery gives, what a process held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ...proof import Host, Noise
from ..energy import Window

FACTS = """
{
tell() { [ -n "$2" ] && echo "$1=$2"; }
first() { for f in "$@"; do [ -r "$f" ] && { tr -d '\\0' <"$f" | head -n 1; return; }; done; }
tell system "$(uname -s)"; tell kernel "$(uname -r)"; tell machine "$(uname -m)"
tell maker "$(getprop ro.product.manufacturer)"; tell model "$(getprop ro.product.model)"
tell soc "$(getprop ro.soc.model)"; tell android "$(getprop ro.build.version.release)"
tell board "$(first /proc/device-tree/model /sys/class/dmi/id/product_name)"
tell cpu "$(sed -n 's/^\\(model name\\|Hardware\\|Model\\)[[:space:]]*: //p' /proc/cpuinfo | head -n 1)"
tell cpus "$(ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l)"
tell cores "$(cat /sys/devices/system/cpu/cpu[0-9]*/topology/core_cpus_list | sort -u | wc -l)"
tell ram "$(sed -n 's/^MemTotal:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/meminfo)"
tell load "$(cut -d ' ' -f 1 /proc/loadavg)"
} 2>/dev/null
""".strip()
"""A script: ``key=value``, a line for each that the device tells."""

STATE = """
{
for z in /sys/class/thermal/thermal_zone*; do read -r t <"$z/temp" && echo "zone $t"; done
for f in /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq; do read -r k <"$f" && echo "clock $k"; done
for s in /sys/class/power_supply/*; do
    type=- online=- status=- current=-
    read -r type <"$s/type"; read -r online <"$s/online"; read -r status <"$s/status"; read -r current <"$s/current_now"
    echo "supply $s $type $online $current ${status%% *}"
done
dumpsys battery | sed 's/^ */battery /'
:
} 2>/dev/null
""".strip()
"""A script: temperatures, clocks, power supplies, and what Android says of its battery."""

_PLAUSIBLE_C = (0.0, 150.0)
"""Phones have zones that tell 0, or no temperature at all."""


@dataclass(frozen=True)
class Tick:
    """One look at a process and the battery; None: not told."""

    uptime_s: float
    peak_rss: int | None
    anonymous: int | None
    file_backed: int | None
    swap: int | None
    watts: float | None
    discharging: bool


def tick_of(line: str) -> Tick:
    """A line of ``watch.sh``."""
    _, up, *words, status = line.split()
    peak, anonymous, file, swap, current, voltage = (_integer(word) for word in words)
    watts = None if current is None or voltage is None else abs(current) * voltage / 1e12
    rss, held, mapped, out = (None if kib is None else 1024 * kib for kib in (peak, anonymous, file, swap))
    return Tick(float(up), rss, held, mapped, out, watts, status == "Discharging")


def _integer(word: str) -> int | None:
    return int(word) if word.lstrip("-").isdigit() else None


@dataclass(frozen=True)
class State:
    """What a device says of itself at one moment."""

    hottest_c: float | None
    clocks_mhz: Sequence[float]
    supplies: Sequence[tuple[str, ...]]
    """Folder, type, online, current, status."""
    android: Mapping[str, str] = field(default_factory=dict)
    """``dumpsys battery``."""


def state_of(said: str) -> State:
    """What ``STATE`` told."""
    lines = [line.split(" ", 1) for line in said.splitlines() if " " in line]
    values = {kind: [rest for k, rest in lines if k == kind] for kind in ("zone", "clock", "supply", "battery")}
    android = dict(line.split(": ", 1) for line in values["battery"] if ": " in line)
    degrees = [n / 1000 for n in map(_integer, values["zone"]) if n is not None]
    if (tenths := _integer(android.get("temperature", "-"))) is not None:
        degrees.append(tenths / 10)
    low, high = _PLAUSIBLE_C
    clocks = [n / 1000 for n in map(_integer, values["clock"]) if n is not None]
    supplies = [tuple(line.split(" ", 4)) for line in values["supply"]]
    return State(max((d for d in degrees if low < d < high), default=None), clocks, supplies, android)


def battery_of(state: State) -> tuple[str | None, str]:
    """Folder of the battery whose current is what the device draws; or None, and why not."""
    powered = [key.split()[0] for key, value in state.android.items() if key.endswith("powered") and value == "true"]
    powered += [s[1] for s in state.supplies if len(s) > 2 and s[1] != "Battery" and s[2] == "1"]
    cells = [s for s in state.supplies if len(s) == 5 and s[1] == "Battery"]
    if not cells and not state.android:
        return None, "no counter: the device has no battery"
    if powered:
        return (
            None,
            f"the battery is being charged or relieved ({powered[0]}): unplug it, and reach it over the network",
        )
    telling = [s for s in cells if _integer(s[3]) is not None]
    if not telling:
        return None, "no counter: the battery's current is not readable there"
    if telling[0][4] != "Discharging":
        return None, f"the battery is not being discharged ({telling[0][4].lower()}): unplug it"
    return telling[0][0], ""


def facts_of(said: str) -> dict[str, str]:
    """What ``FACTS`` told."""
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)


def host_of(facts: Mapping[str, str], name: str, build: str) -> Host:
    """The device as a benchmark names it.

    Args:
        name: what it is called by where it has no model's name.
        build: of the runner.
    """
    phone = " ".join(facts[key] for key in ("maker", "model") if key in facts)
    system = f"Android {facts['android']}" if "android" in facts else f"{facts.get('system')} {facts.get('kernel')}"
    return Host(
        device=phone or facts.get("board") or name,
        cpu=facts.get("soc") or facts.get("cpu"),
        cores=int(facts["cores"]) if facts.get("cores", "0") != "0" else None,
        logical_cores=int(facts["cpus"]) if "cpus" in facts else None,
        ram_bytes=1024 * int(facts["ram"]) if "ram" in facts else None,
        os=system,
        architecture=facts.get("machine"),
        runtime_build=build,
        load_average_1min=float(facts["load"]) if "load" in facts else None,
    )


def noise_of(before: State, after: State) -> Noise:
    """Temperature and clocks before and after; what else the device did, it does not tell."""
    hot = [before.hottest_c, after.hottest_c]
    clocks = [*before.clocks_mhz, *after.clocks_mhz]
    return Noise(
        temperature_c=[t for t in hot if t is not None] if None not in hot else None,
        frequency_mhz=[min(clocks), max(clocks)] if clocks else None,
    )


# --- energy -----------------------------------------------------------------------------------------------------------


def window_of(ticks: Sequence[Tick], spans: Sequence[float], tokens: int) -> Window:
    """Joules that the battery gave in some spans of time, by its power at both ends of each step between looks.

    Args:
        spans: begin, end, begin, end and so on, of the device's uptime.
    """
    told = [(tick.uptime_s, tick.watts) for tick in ticks if tick.watts is not None]
    window, steps = Window(tokens=tokens), list[float]()
    for begin, end in zip(spans[::2], spans[1::2], strict=True):
        inside = [
            (begin, _power_at(told, begin)),
            *(t for t in told if begin < t[0] < end),
            (end, _power_at(told, end)),
        ]
        untold = 0.0
        for (t0, w0), (t1, w1) in pairwise(inside):
            untold += (t1 - t0) * (w0 + w1) / 2
            if (t1, w1) in told and w1 != w0:
                window.updates += 1
                steps.append(untold)
                window.joules, untold = window.joules + untold, 0.0
        window.joules += untold
        window.seconds += end - begin
    window.granularity = min(steps, default=None)
    return window


def _power_at(told: Sequence[tuple[float, float]], at: float) -> float:
    """Of the last look before, or the first behind."""
    before = [watts for when, watts in told if when <= at]
    return before[-1] if before else told[0][1]


def charged_meanwhile(ticks: Iterable[Tick]) -> bool:
    """Whether the battery stopped being discharged while it was read."""
    return any(not tick.discharging for tick in ticks)
