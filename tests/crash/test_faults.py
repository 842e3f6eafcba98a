"""A few faults of each kind; ``faults.py`` strikes as often as one likes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("llama_cpp", "onnxruntime_genai"):
    pytest.importorskip(name)


def can_mount(folder: Path) -> bool:
    """Whether this process may make a disk that can be filled."""
    done = subprocess.run(["mount", "-t", "tmpfs", "edgekd", folder], capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run(["umount", folder], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and fills a tmpfs")
def test_runs_that_die_anywhere_end_with_the_same_bytes(tmp_path):
    counts = {"--kills": 3, "--interrupts": 1, "--full-disks": 1 if can_mount(tmp_path) else 0}
    command = [sys.executable, str(Path(__file__).with_name("faults.py"))]
    for option, count in counts.items():
        command += [option, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert sum(sum(stages.values()) for stages in told["struck"].values()) == sum(counts.values())
    assert told["whole_runs"] >= 1 and told["files"] > 50
