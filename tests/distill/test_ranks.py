"""Two processes on this machine's CPU train what one trains, and go on from what the other number of them left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgekd.distill.checkpoint import read_log
from edgekd.distill.ranks import ALONE, Ranks
from edgekd.distill.train import batch_indices
from edgekd.errors import EdgekdError

CHILD = Path(__file__).with_name("train_in_ranks.py")


def two(work: Path, *faults: str) -> list[subprocess.CompletedProcess]:
    """What each of two processes said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        # Files, because a full pipe would stop one of them, and with it the other.
        with (work / f"out{rank}").open("w") as out, (work / f"error{rank}").open("w") as error:
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, CHILD, work, *faults]
            processes.append(subprocess.Popen(command, stdout=out, stderr=error, env=environment))
    codes = [process.wait(timeout=200) for process in processes]
    return [
        subprocess.CompletedProcess([], code, (work / f"out{rank}").read_text(), (work / f"error{rank}").read_text())
        for rank, code in enumerate(codes)
    ]


def one(work: Path, fault: str = "") -> dict:
    from train_in_ranks import run

    return run(work, fault=fault)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What one process comes to."""
    return one(tmp_path_factory.mktemp("alone"))


def check_is(told: subprocess.CompletedProcess, alone: dict, from_step: int = 0) -> None:
    assert told.returncode == 0 and told.stdout, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(alone["weights"]), rtol=0, atol=1e-5)
    assert found["best"] == pytest.approx(alone["best"], abs=1e-5)
    if not from_step:
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def checkpoints(work: Path) -> list[str]:
    return sorted(path.name for path in work.glob("checkpoint-*"))


def test_a_process_now_and_then_has_nothing_to_learn():
    """What the tests below read, of which every other window is masked: 0/0 in one process is no fault."""
    shares = [batch_indices(3, step, 40, 4)[rank::2] for step in range(6) for rank in range(2)]
    assert any(bool((share % 2 == 0).all()) for share in shares)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path, alone):
    first, second = two(tmp_path)
    check_is(first, alone)
    assert json.loads(second.stdout)["weights"] == json.loads(first.stdout.splitlines()[-1])["weights"]
    assert second.stdout.count("\n") == 1, "the first alone tells"
    assert [event.step for event in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 3, 4, 5, 6, 6]
    kinds = {path.suffix for path in tmp_path.glob("checkpoint-6/*")}
    assert checkpoints(tmp_path) == ["checkpoint-6"] and kinds == {".safetensors", ".json"}


@pytest.mark.slow
def test_kill_of_one_ends_both_and_two_go_on(tmp_path, alone):
    first, second = two(tmp_path, "kill")
    assert second.returncode == -signal.SIGKILL
    assert "ended: another process of the training has ended." in first.stdout, first.stderr
    assert checkpoints(tmp_path / "kill") == ["checkpoint-2"]
    (tmp_path / "kill").rename(tmp_path / "on")
    check_is(two(tmp_path / "on")[0], alone, from_step=2)


@pytest.mark.slow
def test_interrupt_of_one_stops_both_at_one_step_and_one_goes_on(tmp_path, alone):
    work = tmp_path / "interrupt"
    for told in two(tmp_path, "interrupt"):
        assert told.stdout.endswith("ended: interrupted\n"), told.stderr
    (left,) = checkpoints(work)
    assert left in ("checkpoint-4", "checkpoint-5")
    found = one(work)
    torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(alone["weights"]), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_one_began_two_finish(tmp_path, alone):
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path, "interrupt")
    assert checkpoints(tmp_path)[0] in ("checkpoint-2", "checkpoint-4", "checkpoint-5")
    check_is(two(tmp_path)[0], alone, from_step=2)


@pytest.mark.slow
def test_what_one_process_cannot_do_none_does(tmp_path):
    """A loss that is no number, and a text that is another's."""
    for told in two(tmp_path, "nan", "data"):
        lines = [line for line in told.stdout.splitlines() if not line.startswith("step")]
        assert "the loss or its gradient is not finite" in lines[0], told.stderr
        assert "The 2 processes do not agree on spec, seed, data, teacher or student." in lines[1]
    assert checkpoints(tmp_path / "data") == []


def test_windows_that_cannot_be_shared_are_refused():
    assert Ranks(1, 4).share(8) == 2 and ALONE.share(7) == 7
    with pytest.raises(EdgekdError, match=r"distill\.batch_size: a step's 6 windows .* 4 processes"):
        Ranks(1, 4).share(6)
