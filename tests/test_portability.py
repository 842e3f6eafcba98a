"""Without POSIX, as on Windows, all but distilling imports; what the modules call, mypy checks in ``.ci/run``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

for _library in ("coremltools", "executorch", "llama_cpp", "onnxruntime"):
    pytest.importorskip(_library)

EVERY = """
import importlib, importlib.abc, json, sys
# They have their own code for Windows, which is not that of Linux.
import coremltools, executorch.exir, llama_cpp, onnx, onnxruntime, psutil, torch, transformers, typer

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}
for name in absent:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
print(json.dumps(failed))
"""


def test_every_module_but_those_that_distil_imports():
    root = Path(__file__).parents[1]
    files = [
        path.relative_to(root) for top in ("edgekd", "targets", "benchmarks") for path in (root / top).rglob("*.py")
    ]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    names = [name if name.startswith("edgekd") else f"edgekd.{name}" for name in names]
    there = [name for name in names if not {"distill", "teachers", "optimum", "peers"} & set(name.split("."))]
    assert len(there) > 80
    done = subprocess.run([sys.executable, "-c", EVERY, *there], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
