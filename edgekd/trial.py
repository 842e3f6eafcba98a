"""Files that a stranger may have made are tried in a process of its own first: in native code a damaged one can end the
process, hang, or take all memory.

What has passed is known to this process and to those it starts, by the digest of what was tried; nothing is written.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from . import errors
from .errors import EdgekdError

_PASSED = "EDGEKD_TRIED"
_SECONDS, _BYTES_PER_SECOND = 60, 20e6
_SPARE_BYTES, _BYTES_OF_A_BYTE = 2 * 2**30, 64  # libraries; int4 as float32, and a cache eight times as large
_SAID = 3
_CODE = "import sys; from edgekd.trial import child; child(*sys.argv[1:])"


def try_once(
    key: str, function: str, path: Path, size_bytes: int, error: type[EdgekdError], seconds: int = _SECONDS
) -> None:
    """Run a function on a path in a child process, unless it has passed.

    Args:
        key: digest of everything the result depends on.
        function: ``package.module:name``; takes the path.
        size_bytes: of the files; the child's memory and time are in proportion.
        error: raised where the child dies, hangs, or ends in an exception that is not ours.
        seconds: the time for a small file.

    Raises:
        EdgekdError: the child's own, or of the class given.
    """
    if key in os.environ.get(_PASSED, "").split():
        return
    limit = _SPARE_BYTES + _BYTES_OF_A_BYTE * size_bytes
    seconds += round(size_bytes / _BYTES_PER_SECOND)
    command = [sys.executable, "-P", "-c", _CODE, function, str(path), str(limit)]
    # Debuggers that llama.cpp would start, and threads that would each want a stack.
    environment = os.environ | {"GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        how = f"it does not answer within {seconds} s"
    else:
        if done.returncode == _SAID:
            _raise(done.stdout)
        how = _how(done.returncode, done.stderr)
    if how:
        raise error(f"{path}: tried in a process of its own, {how}.", "Do not use it, or get it again from its source.")
    mark(key)


def mark(key: str) -> None:
    """What this process has made needs no trial."""
    os.environ[_PASSED] = f"{os.environ.get(_PASSED, '')} {key}".strip()


def child(function: str, path: str, limit: str) -> NoReturn:
    """The child's side: end with 0, or say the error on standard output, as JSON on its last line."""
    _limit(int(limit))
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(Path(path))
    except EdgekdError as error:
        said = {"kind": type(error).__name__, "cause": error.cause, "remedy": error.remedy}
        print(f"\n{json.dumps(said)}", flush=True)
        os._exit(_SAID)
    os._exit(0)  # without the destructors of half a dozen libraries


def _limit(data_bytes: int) -> None:
    """Bound what the process may allocate, where the system can; mapped files do not count."""
    if sys.platform == "win32":
        return
    import resource

    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, data_bytes)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _raise(stdout: bytes) -> NoReturn:
    """Raise the child's error as if it had happened here."""
    said = json.loads(stdout.splitlines()[-1])
    kind: type[EdgekdError] = getattr(errors, said["kind"])
    error = kind.__new__(kind)  # not all take a cause and a remedy
    EdgekdError.__init__(error, said["cause"], said["remedy"])
    raise error


def _how(returncode: int, stderr: bytes) -> str:
    """How the child ended, if not well."""
    if returncode == 0:
        return ""
    if returncode < 0:
        known = -returncode in set(signal.Signals)
        return f"it ends the process by {signal.Signals(-returncode).name if known else f'signal {-returncode}'}"
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return f"it fails: {lines[-1].strip().rstrip('.')[:300]}" if lines else f"it ends the process with {returncode}"
