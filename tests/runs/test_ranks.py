"""The command line under torchrun: two processes on this machine's CPU come to what one comes to, die, and go on."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SPEC = """
name: tiny
teacher: {{model: {teacher}, signal: {signal}}}
student: {{init: cut, layers: 2, choose: even}}
data: {{source: text, paths: [text/*.txt], context: 32, validation_share: 0.2, test_share: 0.2}}
distill:
  {{precision: float32, steps: {steps}, batch_size: {batch}, warmup_steps: 1, validate_every: 10, checkpoint_every: 2,
    learning_rate: {rate}, baseline: false, loss: {{forward_kl: 0.9, cross_entropy: 0.1}}}}
targets: [{{target: gguf, recipes: [fp16], context: 64}}]
verify: {{windows: 2, context: 32, greedy_tokens: 4}}
bench: {{prompt_tokens: [8], decode_tokens: 4, runs: 1}}
"""
PLAIN = {"signal": "online", "steps": 12, "batch": 4, "rate": 1e-3}
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMAND = ["-m", "edgekd.cli", "distill"]


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_teacher):
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text").mkdir()
    for i in range(60):
        lines = (f"def f{i}_{j}(x, y={j}):\n    return x * {i + j} + y\n" for j in range(12))
        (folder / "text" / f"{i}.txt").write_text("".join(lines))
    for name, more in {
        "online": {},
        "cached": {"signal": "cached"},
        "long": {"steps": 100},
        "odd": {"batch": 3},
        "alone": {"rate": "1e-3, on_policy: {max_new_tokens: 4}"},
    }.items():
        (folder / f"{name}.yaml").write_text(SPEC.format(teacher=tiny_teacher, **PLAIN | more))
    return folder


def start(project, spec, out, ranks=True, **popen):
    command = [sys.executable, *(RANKS if ranks else []), *COMMAND, f"{spec}.yaml", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, env=environment, **pipes | popen)


def done(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def student(project, out):
    return load_file(project / out / "student" / "model.safetensors")


def check_same(project, out, other):
    found, expected = student(project, out), student(project, other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def trained(project, spec):
    """One process's run, made once."""
    out = f"one-{spec}"
    if not (project / out / "student").exists():
        code, _, err = done(start(project, spec, out, ranks=False))
        assert code == 0, err
    return out


@pytest.mark.parametrize("spec", ["online", "cached"])
def test_two_processes_come_to_what_one_comes_to(project, spec):
    code, out, err = done(start(project, spec, f"two-{spec}"))
    assert code == 0, err
    assert out.count("student: ") == 1, "the first alone tells"
    check_same(project, f"two-{spec}", trained(project, spec))


def wait_for(path, pattern, seconds=200):
    deadline = time.monotonic() + seconds
    while not (found := sorted(path.glob(pattern))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def rank(process, number):
    """The process of a rank."""
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == str(number):
            return child
    raise AssertionError(f"no rank {number}")


def test_kill_of_one_ends_both_and_one_goes_on(project):
    process = start(project, "long", "killed")
    wait_for(project / "killed" / ".edgekd", "student-*/checkpoint-*")
    rank(process, 1).send_signal(signal.SIGKILL)
    code, _, err = done(process)
    assert code != 0 and not (project / "killed" / "student").exists()
    assert wait_for(project / "killed" / ".edgekd", "student-*/checkpoint-*"), err
    code, _, err = done(start(project, "long", "killed", ranks=False))
    assert code == 0, err
    check_same(project, "killed", trained(project, "long"))


def test_interrupt_of_one_stops_both_with_one_sentence(project):
    process = start(project, "long", "interrupted")
    wait_for(project / "interrupted" / ".edgekd", "student-*/checkpoint-*")
    rank(process, 1).send_signal(signal.SIGINT)
    code, _, err = done(process)
    assert code != 0 and err.count("Interrupted.") == 1, err
    assert not re.search(r'File ".*[/\\\\]edgekd[/\\\\]', err), err


def sentences(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]


def test_what_cannot_be_done_is_said_once(project):
    code, _, err = done(start(project, "odd", "odd"))
    assert code != 0
    (sentence,) = sentences(err)
    assert "a step's 3 windows" in sentence and "2 processes" in sentence
    code, _, err = done(start(project, "alone", "alone"))
    (sentence,) = sentences(err)
    assert code != 0 and "they train in one process" in sentence
    code, _, err = done(start(project, "missing", "missing"))
    assert code != 0 and sentences(err) == ["error: missing.yaml: no such spec. Write one with: edgekd init"]


def test_processes_of_other_specs_are_refused(project):
    """As on two machines, each with files of its own."""
    with_rank = f"{sys.executable} {' '.join(COMMAND)} $([ $RANK = 1 ] && echo online || echo long).yaml --out other"
    command = [sys.executable, *RANKS, "--no-python", "sh", "-c", with_rank]
    found = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    (sentence,) = sentences(found.stderr)
    assert found.returncode != 0
    assert "The 2 processes do not agree on spec, seed, data, teacher or student." in sentence
