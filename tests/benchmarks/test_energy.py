"""Energy from a made-up powercap tree that moves: known watts, wraps, dead counters, missing and locked files."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import pytest

from edgekd.benchmarks import energy
from edgekd.benchmarks.energy import EnergyRun, Meter, NoCounter, Window, counters, energy_run, no_counter, refusal
from edgekd.benchmarks.gpu import vram_bytes
from edgekd.benchmarks.harness import energies

pytestmark = pytest.mark.alone

IDLE_W, PREFILL_W, DECODE_W = 20.0, 80.0, 50.0


def _domain(root, folder, name, range_uj=2**40, energy_uj=0):
    path = root / "sys/class/powercap" / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path


class PowerPlant:
    """Moves the counter of a domain as so many watts would, every two milliseconds."""

    def __init__(self, domain, range_uj=2**40):
        self.watts, self.domain, self.range = IDLE_W, domain, range_uj
        self.joules, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        last = time.monotonic()
        while not self._stop.wait(0.002):
            now = time.monotonic()
            self.joules += self.watts * (now - last)
            last = now
            new = self.domain / "new"
            new.write_text(f"{int(1e6 * self.joules) % self.range}\n")
            os.replace(new, self.domain / "energy_uj")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


class Session:
    """A millisecond a prefilled token, four a decoded one; the plant runs harder meanwhile."""

    vocab_size, context_length = 257, 64

    def __init__(self, plant, decode_s=0.004):
        self.plant, self.decode_s = plant, decode_s

    def _work(self, watts, seconds):
        import numpy as np

        self.plant.watts = watts
        time.sleep(seconds)
        self.plant.watts = IDLE_W
        return np.zeros(257, np.float32)

    def tokenize(self, text, *, start=True):
        return list(text.encode())

    def reset(self):
        pass

    def prefill(self, ids):
        return self._work(PREFILL_W, 0.001 * len(ids))

    def decode(self, token):
        return self._work(DECODE_W, self.decode_s)

    def close(self):
        pass


def _artifact():
    return SimpleNamespace(manifest=SimpleNamespace(contract=SimpleNamespace(context_length=64)))


@pytest.mark.parametrize("range_uj", [2**40, 3_000_000])  # the small one wraps every 40 to 150 ms
def test_known_watts_are_found_in_each_phase(tmp_path, range_uj):
    domain = _domain(tmp_path, "intel-rapl:0", "package-0", range_uj)
    with PowerPlant(domain, range_uj) as plant:
        run = energy_run(lambda *_, **__: Session(plant), _artifact(), 32, 16, 1, 0.8, tmp_path)
    assert run.counters == ["package-0"]
    for watts in run.idle_w:
        assert watts == pytest.approx(IDLE_W, rel=0.1)
    # What a token took by the clock, times the watts beyond idling: a busy machine's late wake-ups are in both.
    prefill, decode = run.per_token(run.prefill)[0], run.per_token(run.decode)[0]
    assert prefill == pytest.approx((PREFILL_W - IDLE_W) * run.prefill.seconds / run.prefill.tokens, rel=0.15)
    assert decode == pytest.approx((DECODE_W - IDLE_W) * run.decode.seconds / run.decode.tokens, rel=0.15)
    told = energies(run)
    figure = told["decode_energy_j_per_token"]
    assert figure.value == decode and figure.gross > 1.5 * figure.value and figure.source == "measured:package-0"
    assert figure.counter_updates > 20 and 0 < figure.granularity_j < 1 and len(figure.idle_w) == 2
    assert figure.differences_ratio == pytest.approx(1, abs=0.2)
    assert told["request_energy_j"].value == pytest.approx(32 * prefill + 16 * decode, rel=0.2)


def test_a_counter_that_stands_still_is_refused(tmp_path):
    domain = _domain(tmp_path, "intel-rapl:0", "package-0")
    plant = SimpleNamespace(watts=0.0, domain=domain)
    run = energy_run(lambda *_, **__: Session(plant, 0.001), _artifact(), 8, 4, 1, 0.05, tmp_path)
    for figure in energies(run).values():
        assert figure.value is None and figure.reason.startswith("the counter moved 0 times in ")


def test_a_slow_counter_is_refused_by_its_updates():
    assert refusal(Window(joules=5, seconds=2, updates=19)) == "the counter moved 19 times in 2.0 s, 20 are needed"
    assert refusal(Window(joules=5, seconds=2, updates=20)) is None


def test_two_ways_that_differ_are_flagged():
    def window(joules, tokens):
        return Window(joules=joules, seconds=1.0, updates=100, granularity=0.001, tokens=tokens)

    idle = (window(10, 0), window(10, 0))
    # Prompts of 10 tokens take 1 J net each; requests of 10 + 10 take 30: by difference 2 J a token, alone 1 J.
    run = EnergyRun(["package-0"], 10, 10, idle, window(110, 100), window(110, 100), window(310, 10))
    figure = energies(run)["decode_energy_j_per_token"]
    assert figure.value == pytest.approx(1) and figure.differences_ratio == pytest.approx(2)
    assert figure.remarks == ["whole requests less their prompts give 2.00 times as much"]
    assert energies(run)["prefill_energy_j_per_token"].remarks == []


def test_what_is_added_up(tmp_path):
    for folder, name in {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }.items():
        _domain(tmp_path, folder, name)
    assert sorted(counter.name for counter in counters(tmp_path)) == ["dram", "dram", "package-0", "package-1"]
    other = tmp_path / "laptop"
    _domain(other, "intel-rapl:0", "psys")
    assert [counter.name for counter in counters(other)] == ["psys"]


def test_what_cannot_be_read_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    why = no_counter(tmp_path)
    assert "has no package" in why and "no battery" in why and "nvidia-ml-py is not installed" in why
    assert energies(why)["decode_energy_j_per_token"].reason == why
    domain = _domain(tmp_path, "intel-rapl:0", "package-0")
    (domain / "max_energy_range_uj").unlink()
    assert "is not readable" in no_counter(tmp_path)
    (domain / "max_energy_range_uj").write_text("many\n")
    assert "is not readable" in no_counter(tmp_path)

    def locked(*_):
        raise PermissionError(13, "Permission denied", str(domain / "energy_uj"))

    monkeypatch.setattr(energy, "PowercapDomain", locked)
    assert "for root alone; grant it: sudo chmod a+r" in no_counter(tmp_path)


def test_a_battery_that_is_discharged(tmp_path):
    folder = tmp_path / "sys/class/power_supply/BAT0"
    folder.mkdir(parents=True)
    (folder / "status").write_text("Charging\n")
    with pytest.raises(NoCounter, match="being charged: unplug it"):
        counters(tmp_path)
    (folder / "status").write_text("Discharging\n")
    (folder / "current_now").write_text("-2000000\n")
    (folder / "voltage_now").write_text("10000000\n")
    (battery,) = counters(tmp_path)
    clock = SimpleNamespace(now=0.0)
    battery = energy.Battery(folder, clock=lambda: clock.now)
    clock.now = 5.0
    assert battery.joules_since_last() == 0  # the driver said nothing new
    (folder / "current_now").write_text("-4000000\n")
    clock.now = 10.0
    assert battery.joules_since_last() == pytest.approx(5 * 20 + 5 * 30)


class Nvml:
    """NVML of one GPU that draws a joule between two readings."""

    def __init__(self, pid):
        self.millijoules, self.pid = 0, pid

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.millijoules += 1000
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=self.pid, usedGpuMemory=3 * 2**30), SimpleNamespace(pid=1, usedGpuMemory=None)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        return [SimpleNamespace(pid=3, usedGpuMemory=2**20)]


def test_a_gpu_by_nvml(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml(os.getpid()))
    assert vram_bytes() == {0: 3 * 2**30} and vram_bytes(2) == {} and vram_bytes(3) == {0: 2**20}
    (gpu,) = counters(tmp_path, [0])
    assert gpu.name == "gpu-0" and gpu.joules_since_last() == 1
    assert no_counter(tmp_path) is None
    window = Window()
    with Meter([gpu]).window(window):
        time.sleep(0.2)
    assert window.updates > 10 and window.joules == pytest.approx(window.updates)
