"""Which parts of edgekd work on this machine, found by trying each in a process of its own.

A runtime built for another CPU ends its process by a signal; a child process turns that into a sentence and a remedy.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "missing", "broken", "not_here"]

_LLAMA_CPP = "0.3.36"
_LOW_RAM_BYTES = 2 * 10**9
_LOW_DISK_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Check:
    """One finding: ``missing`` can be installed, ``broken`` is there and fails, ``not_here`` cannot be had here."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a child process ended."""

    answer: dict[str, str] | None
    """Its JSON line, None when it wrote none."""
    exit_code: int | None
    """None when it ran out of time."""
    signal: str | None
    """Name of the signal that killed it."""
    complaint: str
    """Last line of its standard error."""


@dataclass(frozen=True)
class SelfTest:
    """A test of :mod:`edgekd.selftest` and how to speak of it."""

    name: str
    extra: str
    timeout_s: float


SELF_TESTS = (
    SelfTest("training", "train", 180),
    SelfTest("grid", "train", 180),
    SelfTest("gguf", "gguf", 180),
    SelfTest("onnx", "onnx", 180),
    SelfTest("executorch", "executorch", 300),
    SelfTest("coreml", "coreml", 300),
)


def diagnose() -> list[Check]:
    """Try everything; takes some seconds. Raises nothing: what fails is a finding."""
    flags = cpu_flags()
    checks = [_python(), *(_version(name) for name in ("torch", "transformers"))]
    checks += [check_runtime(test, flags) for test in SELF_TESTS]
    if sys.platform != "darwin":
        checks.append(
            Check(
                "coreml predict", "not_here", "Core ML itself runs on macOS and iOS alone; conversion does not need it"
            )
        )
    return [*checks, _compiler(), _ram(), _disk(), _rapl(), _nvml()]


# --- runtimes ---------------------------------------------------------------------------------------------------------


def check_runtime(test: SelfTest, flags: frozenset[str], command: Sequence[str] | None = None) -> Check:
    """Run one self-test in a child process.

    Args:
        test: which one.
        flags: the CPU's features, as ``/proc/cpuinfo`` names them.
        command: the child, instead of the interpreter with :mod:`edgekd.selftest`.
    """
    if command is None:
        from .selftest import absent

        if missing := absent(test.name):
            return Check(test.name, "missing", f"not installed: {', '.join(missing)}", install(test.extra, flags))
        command = [sys.executable, "-m", "edgekd.selftest", test.name]
    return explain(test, run_child(command, test.timeout_s), flags)


def install(extra: str, flags: frozenset[str] = frozenset(), *, again: bool = False) -> str:
    """The command that installs an extra, or replaces what is installed."""
    # A plain install builds llama.cpp natively, which is what crashes.
    build = f'CMAKE_ARGS="{_cmake_args(flags)}" ' if extra == "gguf" else ""
    return f'{build}pip install {"--force-reinstall --no-cache-dir " * again}"edgekd[{extra}]"'


def run_child(command: Sequence[str], timeout_s: float) -> Outcome:
    """Run a command and read the JSON object on the last line of its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # one thread is enough
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, None, None, "")
    except OSError as error:
        return Outcome(None, 127, None, str(error))
    complaints = done.stderr.strip().splitlines()
    return Outcome(
        _answer(done.stdout), done.returncode, _signal(done.returncode), complaints[-1] if complaints else ""
    )


def _answer(output: str) -> dict[str, str] | None:
    lines = output.strip().splitlines()
    try:
        found: Any = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _signal(exit_code: int) -> str | None:
    if exit_code >= 0:
        return None
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def explain(test: SelfTest, outcome: Outcome, flags: frozenset[str]) -> Check:
    """A child's end in a sentence, with the remedy."""
    again = install(test.extra, flags, again=True)
    if outcome.exit_code is None:
        return Check(
            test.name,
            "broken",
            f"the self-test took more than {test.timeout_s:.0f} s",
            "Free the machine and try again.",
        )
    if outcome.signal in ("SIGILL", "SIGSEGV", "SIGBUS") and test.name == "gguf":
        return Check(test.name, "broken", _llama_cpp_cause(outcome.signal, flags), rebuild_llama_cpp(flags))
    if outcome.signal == "SIGKILL":
        return Check(
            test.name, "broken", "the self-test was killed (SIGKILL), most often for lack of memory", "Free some RAM."
        )
    if outcome.signal:
        words = "an instruction that this CPU lacks" if outcome.signal == "SIGILL" else "a crash inside the runtime"
        return Check(test.name, "broken", f"the self-test died of {outcome.signal}: {words}", again)
    if outcome.answer and "ok" in outcome.answer and outcome.exit_code == 0:
        return Check(test.name, "ok", outcome.answer["ok"])
    if outcome.answer and "failed" in outcome.answer:
        return Check(test.name, "broken", outcome.answer["failed"], again)
    reason = outcome.complaint or "no message"
    return Check(test.name, "broken", f"the self-test ended with exit code {outcome.exit_code}: {reason}", again)


def _llama_cpp_cause(signal_name: str, flags: frozenset[str]) -> str:
    if "amx_tile" in flags:
        return (
            f"llama.cpp died of {signal_name} in its first prefill: it was built natively, and the AMX kernels it then "
            "uses do not run here, although the CPU advertises AMX"
        )
    if signal_name == "SIGILL":
        return "llama.cpp died of SIGILL: it was built for a CPU with instructions that this one lacks"
    return f"llama.cpp died of {signal_name} in its first prefill: the build does not suit this machine"


def rebuild_llama_cpp(flags: frozenset[str]) -> str:
    """The command that builds llama-cpp-python for this CPU, AMX left off."""
    return (
        f'CMAKE_ARGS="{_cmake_args(flags)}" pip install --force-reinstall --no-binary llama-cpp-python '
        f"llama-cpp-python=={_LLAMA_CPP} --no-deps --no-cache-dir"
    )


def _cmake_args(flags: frozenset[str]) -> str:
    from .targets.gguf.build_flags import cmake_args

    return " ".join(cmake_args(set(flags), platform.system(), platform.machine()))


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Features that every processor has, as Linux names them; empty where the system has no such file."""
    from .targets.gguf.build_flags import cpu_features

    return frozenset(cpu_features(cpuinfo.read_text("utf-8", "replace"))) if cpuinfo.is_file() else frozenset()


# --- the machine ------------------------------------------------------------------------------------------------------


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _version(name: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", install("train"))


def _compiler() -> Check:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return Check("compiler", "ok", path)
    remedy = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
    return Check("compiler", "missing", "no C++ compiler; building llama-cpp-python needs one", remedy)


def _ram() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    if memory.available < _LOW_RAM_BYTES:
        return Check(
            "ram", "broken", f"only {detail}", f"Free at least {_LOW_RAM_BYTES / 1e9:.0f} GB, or train a smaller model."
        )
    return Check("ram", "ok", detail)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 1e9:.1f} GB free in this folder"
    if free < _LOW_DISK_BYTES:
        return Check("disk", "broken", f"only {detail}", f"Free at least {_LOW_DISK_BYTES / 1e9:.0f} GB.")
    return Check("disk", "ok", detail)


def _rapl() -> Check:
    counters = sorted(Path("/sys/class/powercap").glob("*rapl*/energy_uj"))
    if not counters:
        return Check("energy rapl", "not_here", "no RAPL counters: energy of the CPU is not measured")
    if not os.access(counters[0], os.R_OK):
        return Check("energy rapl", "not_here", f"{counters[0]} is for root alone", f"sudo chmod a+r {counters[0]}")
    return Check("energy rapl", "ok", f"{len(counters)} counters")


def _nvml() -> Check:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return Check("energy nvml", "not_here", "no NVIDIA driver: energy of a GPU is not measured")
    if (code := library.nvmlInit_v2()) != 0:
        return Check("energy nvml", "broken", f"the NVIDIA driver's library answers with error {code}", "nvidia-smi")
    library.nvmlShutdown()
    return Check("energy nvml", "ok", "the NVIDIA driver answers")
