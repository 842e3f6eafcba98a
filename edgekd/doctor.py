"""Which parts of edgekd work on this machine, found by trying each in a process of its own.

A runtime built for another CPU ends its process by a signal; a child process turns that into a sentence and a remedy.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .errors import EdgekdError

Status = Literal["ok", "missing", "broken", "not_here"]

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


def pip_install(requirement: str, again: bool = False) -> str:
    """The command that installs a distribution, or replaces what is installed."""
    return f'pip install {"--force-reinstall --no-cache-dir " * again}"{requirement}"'


def _nothing_known(signal_name: str) -> tuple[str, str] | None:
    return None


@dataclass(frozen=True)
class SelfTest:
    """A test of :mod:`edgekd.selftest` and how to speak of it."""

    name: str
    packages: tuple[str, ...]
    """The distributions without which it is not run."""
    install: Callable[[bool], str]
    """The command that installs what it needs, or (True) replaces it."""
    explain_crash: Callable[[str], tuple[str, str] | None] = _nothing_known
    """What a signal means in this runtime, and the remedy."""
    timeout_s: float = 300


OWN_TESTS = (
    SelfTest("training", ("torch", "transformers"), partial(pip_install, "edgekd[train]")),
    SelfTest("quantization", ("torch", "transformers", "accelerate"), partial(pip_install, "edgekd[train]")),
)
"""What needs no target."""


def self_test_of(name: str) -> SelfTest:
    """The self-test of a target.

    Raises:
        SpecError: no such target, or it does not load.
    """
    from .targets import load_target, requirement

    target = load_target(name)
    return SelfTest(
        name,
        target.PACKAGES,
        getattr(target, "install", partial(pip_install, requirement(name))),
        getattr(target, "explain_crash", _nothing_known),
    )


def diagnose() -> list[Check]:
    """Try everything; takes some seconds. Raises nothing: what fails is a finding."""
    from .targets import names

    checks = [_python(), *(_version(name) for name in ("torch", "transformers"))]
    checks += [check_runtime(test) for test in OWN_TESTS]
    checks += [check_gpu(OWN_TESTS[0])]
    checks += [check for name in names() for check in _target(name)]
    return [*checks, _compiler(), _ram(), _disk(), _rapl(), _nvml(), *_devices()]


def _target(name: str) -> list[Check]:
    """Whether a target works here, and, where it is not its own runtime that runs, what does."""
    from .targets import load_target, stand_in

    try:
        test, instead = self_test_of(name), stand_in(name)
    except EdgekdError as error:  # a plug-in that does not load
        return [Check(name, "broken", error.cause, error.remedy)]
    checks = [check_runtime(test)]
    if instead:
        words = f"its runtime does not run on this machine; in its place: {instead}"
        checks.append(Check(f"{name} runtime", "not_here", words))
    if checks[0].status == "ok" and hasattr(load_target(name), "describe_gpus"):
        checks.append(check_gpu(test))
    return checks


# --- runtimes ---------------------------------------------------------------------------------------------------------


def check_runtime(test: SelfTest, command: Sequence[str] | None = None) -> Check:
    """Run one self-test in a child process.

    Args:
        test: which one.
        command: the child, instead of the interpreter with :mod:`edgekd.selftest`.
    """
    if command is None:
        from .targets import absent

        if missing := absent(test.packages):
            return Check(test.name, "missing", f"not installed: {', '.join(missing)}", test.install(False))
        command = [sys.executable, "-m", "edgekd.selftest", test.name]
    return explain(test, run_child(command, test.timeout_s))


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


def explain(test: SelfTest, outcome: Outcome) -> Check:
    """A child's end in a sentence, with the remedy."""
    if outcome.exit_code is None:
        words = f"the self-test took more than {test.timeout_s:.0f} s"
        return Check(test.name, "broken", words, "Free the machine and try again.")
    if outcome.signal:
        return Check(test.name, "broken", *_crash(test, outcome.signal))
    match outcome.answer:
        case {"ok": detail} if outcome.exit_code == 0:
            return Check(test.name, "ok", detail)
        case {"missing": package}:
            return Check(test.name, "missing", f"not installed: {package}", test.install(False))
        case {"not_here": reason, "remedy": remedy}:
            return Check(test.name, "not_here", reason, remedy)
        case {"failed": reason}:
            return Check(test.name, "broken", reason, test.install(True))
    reason = f"the self-test ended with exit code {outcome.exit_code}: {outcome.complaint or 'no message'}"
    return Check(test.name, "broken", reason, test.install(True))


def _crash(test: SelfTest, signal_name: str) -> tuple[str, str]:
    """What a signal means, and the remedy."""
    if known := test.explain_crash(signal_name):
        return known
    if signal_name == "SIGKILL":
        return "the self-test was killed (SIGKILL), most often for lack of memory", "Free some RAM."
    words = "an instruction that this CPU lacks" if signal_name == "SIGILL" else "a crash inside the runtime"
    return f"the self-test died of {signal_name}: {words}", test.install(True)


def check_gpu(test: SelfTest) -> Check:
    """Which GPUs training, or a target's runtime, has here; asked in a child process, since drivers may crash."""
    return check_runtime(dataclasses.replace(test, name=f"gpu {test.name}", explain_crash=_driver))


def _driver(signal_name: str) -> tuple[str, str]:
    return f"looking for GPUs died of {signal_name}, inside a driver", "Update or remove the GPU's driver."


# --- the machine ------------------------------------------------------------------------------------------------------


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _version(name: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", pip_install("edgekd[train]"))


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


# --- devices ----------------------------------------------------------------------------------------------------------

_DEVICE_PROGRAMS = {
    "device adb": ("adb", "phones", "apt-get install adb, or brew install android-platform-tools"),
    "device ssh": ("ssh", "boards", "apt-get install openssh-client"),
}
_NDK = ("ANDROID_NDK_HOME", "ANDROID_NDK_ROOT", "ANDROID_NDK")


def _devices() -> list[Check]:
    """What ``edgekd bench --device`` needs here."""
    found = [_program(name, *words) for name, words in _DEVICE_PROGRAMS.items()]
    return [*found, _ndk(), _runner()]


def _program(name: str, program: str, what: str, remedy: str) -> Check:
    if path := shutil.which(program):
        return Check(name, "ok", path)
    return Check(name, "missing", f"no {program}: {what} are not measured", remedy)


def _ndk() -> Check:
    folder = next((Path(value) for name in _NDK if (value := os.environ.get(name))), None)
    if folder is None:
        return Check("device NDK", "missing", "no Android NDK: no runner is built for phones", f"Set {_NDK[0]}.")
    if not (folder / "build" / "cmake" / "android.toolchain.cmake").is_file():
        return Check("device NDK", "missing", f"{folder} is no Android NDK", f"Set {_NDK[0]}.")
    return Check("device NDK", "ok", str(folder))


def _runner() -> Check:
    built = sorted(Path("build").glob("*/edgekd-llama"))
    if not built:
        return Check("device runner", "missing", "none is built in ./build", "make device-runner: docs/benchmarking.md")
    return Check("device runner", "ok", ", ".join(map(str, built)))
