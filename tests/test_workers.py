"""Several workers share the suite: an ordinary test runs beside others, one marked ``alone`` beside none and last."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")

TOGETHER = """
import json, pathlib, time

def meet(name):
    began = time.time()
    pathlib.Path(name).touch()
    while not all(pathlib.Path(other).exists() for other in ("one", "two")):
        assert time.time() < began + 60, "the other is not run beside it"
        time.sleep(0.01)
    time.sleep(0.2)
    with open("log", "a") as log:
        log.write(json.dumps([began, time.time()]) + "\\n")
"""
ORDINARY = """
import together

def test_it():
    together.meet(NAME)
"""
ALONE = """
import pytest, json, time
pytestmark = pytest.mark.alone

@pytest.mark.parametrize("number", range(3))
def test_it(number):
    began = time.time()
    time.sleep(0.1)
    with open("log", "a") as log:
        log.write(json.dumps([began, time.time()]) + "\\n")
"""
SETTINGS = """
[pytest]
addopts = --strict-markers
pythonpath = .
markers =
    alone: x
"""


def test_one_alone_runs_beside_no_other(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    files = {"pytest.ini": SETTINGS, "together.py": TOGETHER, "test_a.py": ALONE, "test_b.py": ALONE}
    files |= {f"test_{name}.py": ORDINARY.replace("NAME", repr(name)) for name in ("one", "two")}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "8 passed" in done.stdout.splitlines()[-1], done.stdout + done.stderr
    spans = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    first, second, *alone = spans
    assert max(first[0], second[0]) < min(first[1], second[1])
    for (_, ended), (began, _) in zip([max(first, second, key=max), *alone], alone, strict=False):
        assert ended <= began
