"""The harness with real processes: a NumPy runtime of known speed, children that die, and a real GGUF."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from edgekd.benchmarks.children import Limits
from edgekd.benchmarks.harness import bench, bench_in_turns, describe_machine
from edgekd.errors import EdgekdError
from edgekd.manifest import Traffic
from edgekd.proof import Figure
from edgekd.spec import BenchSpec

pytestmark = pytest.mark.alone

HERE = Path(__file__).parent
QUICK = {"cold_runs": 0, "curve_seconds": 0, "energy_seconds": 0}
SPEC = BenchSpec(prompt_tokens=[20, 5], decode_tokens=12, runs=2, threads=1, **QUICK)


@pytest.fixture
def artifact(tmp_path, numpy_artifact):
    return numpy_artifact(tmp_path, "tiny-f32")


@pytest.fixture(autouse=True)
def small_bandwidth_buffer(monkeypatch):
    monkeypatch.setattr("edgekd.benchmarks.harness.bandwidth_buffer_bytes", lambda: 64 * 2**20)


def test_times_of_a_runtime_of_known_speed(runtime, artifact):
    events = []
    traffic = Traffic(weight_bytes=4000, kv_bytes_per_position=100)
    artifact = replace(artifact, manifest=artifact.manifest.model_copy(update={"traffic": traffic}))
    result = bench(runtime.open_slow, artifact, SPEC, on_run=lambda *told: events.append(told))
    json.dumps(result.model_dump(), allow_nan=False)
    assert events == [(1, 2), (2, 2)]
    # Sleeping is exact from below; above, a busy machine may add a good deal.
    assert 0.1 <= result.load_s.value < 1
    assert 0.005 <= result.first_token_s["5"].value <= result.ttft_s["5"].value < 0.2
    assert 0.02 <= result.ttft_s["20"].value < 0.2
    assert 0.005 <= result.first_ttft_s.value < 0.2 and result.settings.cold_tokens == 5
    assert 100 < result.prefill_tokens_per_s["20"].value <= 1000
    assert 25 < result.decode_tokens_per_s.value <= 250
    assert 0.004 <= result.itl_s.value < 0.2
    assert 0.004 <= result.icl_p50_s.value <= result.icl_p95_s.value <= result.icl_p99_s.value < 0.2
    for key in ("load_s", "decode_tokens_per_s", "icl_p95_s", "peak_rss_bytes", "decode_roofline_fraction"):
        assert len(getattr(result, key).samples) == 2
    grown = result.peak_rss_bytes.value - result.rss_before_load_bytes.value
    assert 64 * 2**20 <= grown < 128 * 2**20
    assert result.bytes_per_token == Figure(value=4000 + 100 * (20 + 6), unit="bytes", source="computed:manifest")
    expected = result.decode_tokens_per_s.value * 4000 / result.bandwidth_bytes_per_s.value
    assert result.decode_roofline_fraction.value == pytest.approx(expected * 6600 / 4000, rel=0.2)
    assert result.kv_bytes_per_1000_tokens.value == 100_000 and result.kv_cache_bytes.value == 6400
    assert result.decode_energy_j_per_token.value is None and result.decode_energy_j_per_token.reason
    assert result.settings.prompt_tokens == [5, 20] and result.settings.ttft_from == "text"
    assert result.settings.decode_after_tokens == 20
    assert result.settings.torch_in_process is False
    assert result.cold_ttft_s.reason == "no cold start was asked for" and not result.ttft_curve_s


def test_cold_first_and_the_curves(runtime, artifact):
    """Cold counts from the process's start: the 0.1 s of loading are in it, and Python's own start."""
    spec = BenchSpec(prompt_tokens=[5], decode_tokens=4, runs=1, threads=1, cold_runs=1, curve_seconds=20)
    result = bench(runtime.open_slow, artifact, spec)
    assert result.cold_ttft_s.value > 0.105 + result.first_ttft_s.value - result.ttft_s["5"].value
    assert result.cold_major_faults.value is not None and result.cold_read_bytes.source == "measured:proc-io"
    assert list(result.ttft_curve_s) == ["32", "48"]  # 16 of 64 tokens are decoded at each point
    assert result.ttft_curve_s["48"].value >= 0.048 and result.decode_curve_tokens_per_s["48"].value <= 250
    short = bench(runtime.open_slow, artifact, spec.model_copy(update={"curve_seconds": 0.01, "cold_runs": 0}))
    assert short.ttft_curve_s["32"].value and short.ttft_curve_s["48"].value is None
    assert short.ttft_curve_s["48"].reason == "bench.curve_seconds 0.01 were used up"


def test_one_that_fails_leaves_the_others_alone(runtime, artifact):
    failed, measured = bench_in_turns(runtime.open_by_context, [_of_context(artifact, 63), artifact], SPEC)
    assert isinstance(failed, EdgekdError) and "memory ran out" in failed.cause
    assert measured.decode_tokens_per_s.value > 0


def _of_context(artifact, tokens):
    contract = artifact.manifest.contract.model_copy(update={"context_length": tokens})
    return replace(artifact, manifest=artifact.manifest.model_copy(update={"contract": contract}))


def test_a_run_that_a_phone_would_end_is_ended_here(runtime, artifact):
    limits = Limits("a small phone", threads=1, memory_bytes=60 * 2**20)
    with pytest.raises(EdgekdError, match=r"was killed: it held .* MB, and a small phone gives an app 62\.9 MB"):
        bench(runtime.open_slow, artifact, SPEC, limits=limits)
    roomy = Limits("a large phone", threads=1, memory_bytes=2**30)
    spec = SPEC.model_copy(update={"threads": None, "runs": 1})
    held = bench(runtime.open_slow, artifact, spec, limits=roomy)
    assert held.settings.profile == "a large phone" and held.settings.threads == 1
    assert held.settings.limits == ["1 threads on as many CPUs", "1.07 GB of anonymous memory and swap"]


def test_a_roofline_that_is_exceeded_is_no_figure(runtime, artifact):
    traffic = Traffic(weight_bytes=10**12, kv_bytes_per_position=0)
    artifact = replace(artifact, manifest=artifact.manifest.model_copy(update={"traffic": traffic}))
    result = bench(runtime.open_slow, artifact, SPEC.model_copy(update={"runs": 1}))
    assert result.decode_roofline_fraction.value is None
    assert "wrong roofline" in result.decode_roofline_fraction.reason and "%" in result.decode_roofline_fraction.reason


def test_a_child_does_not_inherit_its_parents_peak(runtime, artifact):
    """The parent held 300 MB; a child that copied its peak (as ru_maxrss does) would show them."""
    ballast = bytearray(b"x") * (300 * 2**20)
    result = bench(
        runtime.open_numpy, artifact, BenchSpec(prompt_tokens=[4], decode_tokens=2, runs=1, threads=1, **QUICK)
    )
    assert len(ballast)
    assert result.peak_rss_bytes.value < 250 * 2**20
    # 1000 parameters of 32 bits
    assert result.bytes_per_token == Figure(value=4000, unit="bytes", source="computed:manifest")


def test_more_tokens_than_the_context_are_refused_before_work(artifact):
    with pytest.raises(EdgekdError, match=r"bench.prompt_tokens 60 .* exceed the context of tiny-f32, 64 tokens"):
        bench(None, artifact, BenchSpec(prompt_tokens=[8, 60], decode_tokens=5))


@pytest.mark.parametrize(
    ("opener", "message"),
    [
        ("open_and_die", r"run 1 of 2\) was ended by SIGILL\. .*edgekd doctor"),
        ("open_and_exit", r"exit code 7"),
        ("open_without_extra", r'some-runtime is not installed\. Run: pip install "edgekd\[some\]"'),
        ("open_and_raise", r"RuntimeError: unknown opcode 7"),
    ],
)
def test_a_child_that_fails_is_one_sentence(runtime, artifact, opener, message):
    with pytest.raises(EdgekdError, match=message):
        bench(getattr(runtime, opener), artifact, SPEC)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import numpy_runtime
from edgekd.benchmarks import harness
from edgekd.manifest import load_artifact
from edgekd.spec import BenchSpec
harness.bandwidth_buffer_bytes = lambda: 2**20
if __name__ == "__main__":
    harness.bench(numpy_runtime.open_and_hang, load_artifact({folder!r}), BenchSpec(prompt_tokens=[4], decode_tokens=2))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_child_outlives_its_parent(artifact, tmp_path_factory, end):
    script = tmp_path_factory.mktemp("script") / "run.py"
    script.write_text(SCRIPT.format(here=str(HERE), folder=str(artifact.folder)))
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE)
    pid_file = artifact.folder / "pid"
    child = psutil.Process(int(_eventually(lambda: pid_file.is_file() and pid_file.read_text())))
    assert child.is_running()
    os.kill(parent.pid, end)
    parent.communicate(timeout=20)
    assert parent.returncode != 0
    _eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def _eventually(condition, timeout_s: float = 20.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("did not happen in time")


def test_the_machine_is_described():
    machine = describe_machine()
    json.dumps(machine.model_dump())
    assert machine.cpu
    assert machine.logical_cores >= 1
    assert machine.ram_bytes > 2**28


def test_a_real_gguf(tmp_path, export_gguf):
    from transformers import AutoConfig

    from edgekd.targets import open_artifact

    student, out = tmp_path / "student", tmp_path / "artifact"
    artifact = export_gguf(student, out, "tiny-q8_0", "Qwen3", head_dim=32, max_position_embeddings=64)
    config = AutoConfig.from_pretrained(student)

    result = bench(open_artifact, artifact, SPEC)
    json.dumps(result.model_dump(), allow_nan=False)
    assert result.settings.torch_in_process is False
    assert result.ttft_s["20"].value > 0
    assert result.decode_tokens_per_s.value > 10
    assert result.peak_rss_bytes.value > result.rss_before_load_bytes.value
    weights = artifact.manifest.parameters * artifact.manifest.bits_per_weight / 8
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (20 + 12 / 2)
    assert result.bytes_per_token.value == pytest.approx(weights + cache, abs=1)


def test_a_gpus_memory_and_energy_reach_the_figures(runtime, artifact, tmp_path, monkeypatch):
    """By a library that says what NVML would, in the processes that are measured: 1 GiB held, 100 W drawn."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "pynvml.py").write_text(
        "import os, time\nfrom types import SimpleNamespace\n"
        "def nvmlInit(): pass\n"
        "def nvmlDeviceGetCount(): return 1\n"
        "def nvmlDeviceGetHandleByIndex(index): return index\n"
        "def nvmlDeviceGetTotalEnergyConsumption(handle): return int(time.monotonic() * 100_000)\n"
        "def nvmlDeviceGetComputeRunningProcesses(handle): return []\n"
        "def nvmlDeviceGetGraphicsRunningProcesses(handle):\n"
        "    return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**30)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    spec = SPEC.model_copy(update={"energy_seconds": 0.3, "runs": 1})
    (result,) = bench_in_turns(runtime.open_slow, [artifact], spec, gpus=["3 layers on a GPU"])
    assert result.machine.gpu == "3 layers on a GPU"
    for phase in ("load", "prefill", "decode"):
        assert result.memory[phase].vram_bytes.value == 2**30
    energy = result.decode_energy_j_per_token
    assert "gpu-0" in energy.counters
    assert energy.gross == pytest.approx(100 / result.decode_tokens_per_s.value, rel=0.5)
