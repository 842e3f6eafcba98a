"""The Makefile's targets: what its head tells of is there and parses, and what a target downloads can be downloaded."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
TOLD = re.findall(r"^# make ([\w-]+)", MAKEFILE.read_text("utf-8"), re.M)
PHONY = re.search(r"^\.PHONY: ((?:.+\\\n)*.+)$", MAKEFILE.read_text("utf-8"), re.M)[1].replace("\\\n", " ").split()

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_the_head_tells_of_targets_that_exist() -> None:
    assert len(TOLD) >= 6 and set(TOLD) <= set(PHONY)


@pytest.mark.parametrize("target", PHONY)
def test_a_target_parses(target: str) -> None:
    done = subprocess.run(["make", "-n", "-B", target], cwd=MAKEFILE.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_what_pytest_is_told_comes_last() -> None:
    """So that it has its way: ``-n 0`` too."""
    words = ["make", "-n", "-o", "setup", "test", "JOBS=3", "PYTEST_ARGS=-n 0 -m 'not slow' tests/test_spec.py"]
    done = subprocess.run(words, cwd=MAKEFILE.parent, capture_output=True, text=True)
    (line,) = (line for line in done.stdout.splitlines() if " -m pytest " in line)
    assert " -n 3 " in line and line.endswith(" -n 0 -m 'not slow' tests/test_spec.py")


def test_a_llama_cpp_of_other_flags_is_never_reused(tmp_path: Path) -> None:
    """The flags name the wheel's cache and the stamp of the set-up."""
    found = set()
    for flag in ("-DGGML_CUDA=ON", "-DGGML_VULKAN=ON"):
        python = tmp_path / flag
        python.write_text(f"#!/bin/sh\necho {flag}\n")
        python.chmod(0o755)
        command = ["make", "-n", "-B", "setup", f"PYTHON={python}"]
        told = subprocess.run(command, cwd=MAKEFILE.parent, capture_output=True, text=True, check=True).stdout
        assert f'CMAKE_ARGS="{flag} ' in told and "--force-reinstall" in told
        found |= {re.search(r'--cache-dir "(.+)"', told)[1], re.search(r"^touch (.+)$", told, re.M)[1]}
    assert len(found) == 4


def online() -> bool:
    """Whether the package index answers."""
    try:
        socket.create_connection(("pypi.org", 443), timeout=3).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_llama_bench_gets_its_source(tmp_path: Path) -> None:
    """The download of a fresh clone, whose .venv holds no build backend."""
    lines = subprocess.run(
        ["make", "-n", "-o", "setup", "llama-bench"], cwd=MAKEFILE.parent, capture_output=True, text=True
    )
    (download,) = (line for line in lines.stdout.splitlines() if " download " in line)
    if not online():
        pytest.skip("no network")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / ".venv"], check=True)
    shutil.copy(MAKEFILE.with_name("constraints.txt"), tmp_path)
    done = subprocess.run(["sh", "-c", download], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("build/llama_cpp_python-*.tar.gz"))) == 1
