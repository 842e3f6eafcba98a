"""No damaged input reaches the place where a fault of edgekd is told, ends the process, hangs it, or makes it write
outside its folder: a fixed part of what ``make fuzz`` does for hours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd.errors import EdgekdError, Fault, as_error
from harnesses import HARNESSES
from mutate import mutate
from run import FIELDS, feed

COUNTS = {
    "spec": 6000,
    "manifest": 10_000,
    "plan": 100,
    "config": 150,
    "model": 60,
    "index": 100,
    "safetensors": 100,
    "tokenizer": 100,
    "settings": 100,
    "gguf": 30,
    "template": 150,
    "rows": 40,
}
RUN = Path(__file__).with_name("run.py")


def test_every_harness_is_run():
    assert COUNTS.keys() == HARNESSES.keys()


@pytest.mark.parametrize("kind", HARNESSES)
def test_damaged_inputs_are_refused_in_a_sentence(tmp_path, kind):
    command = [sys.executable, RUN, "--kind", kind, "--count", str(COUNTS[kind]), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    log = tmp_path / f"{kind}-0" / "log.txt"
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log.read_text()[-4000:] if log.exists() else ''}"
    assert f"inputs {COUNTS[kind]:,}, " in done.stdout


@pytest.mark.parametrize("kind", ["spec", "manifest"])
def test_what_hypothesis_finds_is_refused_in_a_sentence(tmp_path_factory, kind):
    harness = HARNESSES[kind](tmp_path_factory.mktemp(kind))

    @settings(derandomize=True, max_examples=300, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def check(data):
        error = feed(harness.check, mutate(harness.seeds, harness.form, lambda n: data.draw(st.integers(0, n - 1))))
        assert error is None or not isinstance(as_error(error), Fault), repr(error)

    check()


@pytest.mark.parametrize("kind", ["spec", "manifest"])
def test_valid_inputs_are_taken(tmp_path, kind):
    harness = HARNESSES[kind](tmp_path)
    for seed in harness.seeds:
        harness.check(seed)


BROKEN = """
import os, signal, socket, sys, time
sys.path.insert(0, {folder!r})
import harnesses, run
from edgekd.errors import EdgekdError
from harnesses import Harness
def wrong(folder):
    def check(data):
        number = int(data)
        if number == 0: raise EdgekdError("refused")
        if number == 1: [].pop()
        if number == 2: open({outside!r}, "w").close()
        if number == 3: os.kill(os.getpid(), signal.SIGSEGV)
        if number == 4: time.sleep(60)
        if number == 5: socket.getaddrinfo("127.0.0.1", 1)
        if number == 6: keep.append(bytearray(b"x") * 2**28); keep.clear()
        if number == 7:
            began = time.process_time()
            while time.process_time() - began < 0.4: pass
        if number == 8: open(folder / "mine", "w").close()
    return Harness("binary", [], check)
keep = []
harnesses.HARNESSES["spec"] = wrong
run.mutate = lambda seeds, form, pick: str(next(numbers)).encode()
run.HANG_S, run.SLOW_CPU_S, run.GROWTH_KIB = 10, 0.3, 2**17
def inputs(job, state, *rest, one=run.one):
    global numbers
    numbers = iter([state[0]])
    one(job, state, *rest)
run.one = inputs
run.main()
"""


def test_the_driver_sees_every_kind_of_harm(tmp_path):
    """Faults on purpose: each is counted once, and the run goes on behind it, and again where it was stopped."""
    code = BROKEN.format(folder=str(RUN.parent), outside=str(tmp_path / "outside"))
    command = [sys.executable, "-c", code, "--kind", "spec", "--out", str(tmp_path / "log"), "--count"]
    for count, returncode in (("4", 1), ("9", 1)):
        done = subprocess.run([*command, count], capture_output=True, text=True)
        assert done.returncode == returncode, done.stderr
    (state,) = json.loads((tmp_path / "log" / "spec-0" / "state.json").read_text())
    counts = dict(zip(FIELDS, state, strict=True))
    assert counts.pop("peak_rss_kib") > 2**18
    assert counts == {
        "next": 9,
        "inputs": 9,
        "accepted": 5,
        "refused": 1,
        "faults": 1,
        "slow": 1,
        "grown": 1,
        "outside": 2,
        "died": 1,
        "hung": 1,
    }
    log = (tmp_path / "log" / "spec-0" / "log.txt").read_text()
    assert "IndexError at" in log and "exit code -11" in log and "getaddrinfo" in log


def test_a_fault_is_told_from_a_refusal():
    assert not isinstance(as_error(EdgekdError("no")), Fault)
    assert not isinstance(as_error(PermissionError(13, "no", "a")), Fault)
    assert isinstance(as_error(ValueError("no")), Fault)
