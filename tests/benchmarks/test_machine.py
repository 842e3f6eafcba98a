"""What else the machine did: read from a made-up system, and seen beside a process that burns a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from edgekd.benchmarks.machine import NoiseWatch

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="Linux's counters")]


def _system(root, *, busy, steal, waited, memory, throttled, khz, degrees):
    for path, text in {
        "proc/stat": f"cpu  {busy} 0 0 500 0 0 0 {steal} 0 0\ncpu0 1 1 1 1\n",
        "proc/pressure/cpu": f"some avg10=0.00 avg60=0.00 avg300=0.00 total={waited}\nfull total=0\n",
        "proc/pressure/memory": f"some avg10=0.00 avg60=0.00 avg300=0.00 total={memory}\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": f"{throttled}\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": f"{khz}\n",
        "sys/class/thermal/thermal_zone0/temp": f"{degrees}\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_a_made_up_system(tmp_path):
    first = {"busy": 1000, "steal": 0, "waited": 0, "memory": 0, "throttled": 3, "khz": 3_000_000, "degrees": 50_000}
    _system(tmp_path, **first)
    watch = NoiseWatch(tmp_path)
    time.sleep(0.2)
    hertz, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count()
    later = {"busy": 1000 + hertz, "steal": hertz, "waited": 100_000, "memory": 0, "throttled": 5}
    _system(tmp_path, **later, khz=1_200_000, degrees=81_000)
    noise = watch.noise()
    assert noise.steal_share == pytest.approx(min(1, 1 / (0.2 * cores)), rel=0.3)
    assert noise.cpu_pressure_share == pytest.approx(0.5, rel=0.3)
    assert noise.throttled == 2
    assert noise.frequency_mhz == [1200, 3000] and noise.temperature_c == [50, 81]
    assert [words.split(" took ")[0] for words in noise.dirty[:2]] == ["the host", "other processes"]
    assert noise.dirty[2] == "the CPU slowed itself for its heat 2 times"


def test_a_system_that_tells_nothing_is_unknown_and_not_quiet(tmp_path):
    noise = NoiseWatch(tmp_path).noise()
    assert noise.steal_share is noise.others_cpu_share is noise.cpu_pressure_share is noise.throttled is None
    assert noise.frequency_mhz is noise.temperature_c is None and noise.dirty == []


def test_a_burner_beside_is_seen_and_own_work_is_not():
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = NoiseWatch()
        time.sleep(1.0)
        noise = watch.noise()
    finally:
        burner.kill()
        burner.wait()
    assert noise.others_cpu_share > 0.3
    assert any(words.startswith("other processes took") for words in noise.dirty)
    watch = NoiseWatch()
    mine = time.process_time()
    while time.process_time() - mine < 0.5:
        pass
    alone = watch.noise().others_cpu_share
    watch = NoiseWatch()
    time.sleep(0.5)
    assert alone < watch.noise().others_cpu_share + 0.5  # whatever the rest of the machine does
