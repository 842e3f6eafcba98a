"""What an artifact does to the machine when it runs: watched by strace, in a network namespace without interfaces.

The artifact is loaded, tokenizes, is prefilled at once and in pieces, and generates, in a child process with an empty
home, a temporary folder of its own, and nothing of the caller's environment that could quieten a library.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

from .errors import EdgekdError
from .manifest import MANIFEST, Artifact
from .proof import Audit
from .strace import OPTIONS, Event, read_log

# --- what may be touched; all else fails ------------------------------------------------------------------------------

_SYSTEM = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sbin",  # libraries, time zones, locales
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/ld.so.preload",  # how libraries are found
    "/etc/localtime",
    "/etc/timezone",
    "/etc/locale.alias",
    "/etc/os-release",
    "/etc/ssl/openssl.cnf",  # OpenSSL's settings, read with Python's hashlib; not its certificates
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",  # the user's name; not the files that a host's name is found by
    "/proc",
    "/sys",
    "/dev",  # the machine and the process itself
)
"""What a runtime may read of the system."""
_DEVICES = ("/dev/null", "/dev/tty", "/dev/shm")
"""What it may write beside the temporary folder: nothing of it stays."""
_THREAD_NAME = re.compile(r"/proc/(?:self|thread-self|\d+)/task/\d+/comm")
_NAME_SERVICE = ("connect AF_UNIX /var/run/nscd/socket", "connect AF_UNIX /run/nscd/socket")
"""Where the C library asks for the user's name; a host's name goes through a socket of the network all the same."""
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG")

# ----------------------------------------------------------------------------------------------------------------------

_TEXT = 'def read_lines(path):\n    """Lines of a file."""\n    return '
_NEW_TOKENS = 8
_TIMEOUT_S = 1800
_SHOWN = {"home": "~", "tmp": "TMPDIR", "work": "."}
"""The child's folders, and how they are shown: its home, where it may write, and where it was started."""
_TRUE = (sys.executable, "-I", "-S", "-c", "")


@dataclass(frozen=True)
class Watch:
    """The tools of this machine that a program is watched with."""

    isolated: Sequence[str]
    """The command that runs another without a network; empty where there is none."""
    traced: Sequence[str]
    """strace and its options, but for ``-o``."""
    not_checked: Sequence[str]
    """What cannot be checked here, and why."""


def find_tools() -> Watch:
    """Try what this machine allows: containers and hardened systems often allow the one and not the other."""
    isolated, why_isolated = _first_working([], [["unshare", "-n"], ["unshare", "-rn"]])
    options = [["strace", "--seccomp-bpf", *OPTIONS], ["strace", *OPTIONS]]  # the former is faster, and newer
    traced, why_traced = _first_working(isolated, [[*option, "-o", os.devnull] for option in options])
    not_checked = []
    if not isolated:
        not_checked.append(f"running without a network: {why_isolated}")
    if not traced:
        not_checked.append(f"sockets, files read and files written: {why_traced}")
    return Watch(isolated, traced[:-2], not_checked)


def _first_working(prefix: Sequence[str], candidates: Sequence[Sequence[str]]) -> tuple[Sequence[str], str]:
    """The first of these wrappers that runs a program, or why the last does not."""
    name, reason = candidates[0][0], ""
    if which(name) is None:
        return [], f"{name} is not installed"
    for words in candidates:
        done = subprocess.run([*prefix, *words, *_TRUE], capture_output=True, text=True, errors="replace")
        if done.returncode == 0:
            return words, ""
        reason = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
    return [], f"{name} does not work here ({reason})"


def audit(artifact: Artifact, tools: Watch | None = None) -> Audit:
    """Run an artifact under watch.

    Args:
        tools: default: what is found.

    Raises:
        EdgekdError: the artifact does not open, for a reason that its user can mend.
    """
    command = [sys.executable, "-P", "-m", "edgekd.audit", str(artifact.folder.resolve())]
    return watch(command, artifact, tools or find_tools())


def watch(command: Sequence[str], artifact: Artifact, tools: Watch) -> Audit:
    """Run a command that uses an artifact, and judge what it did.

    Raises:
        EdgekdError: the command ends with exit code 2, which is how one of ours says what its user can mend.
    """
    if not (tools.isolated or tools.traced):
        return _verdict(tools, [])
    with TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        for name in _SHOWN:
            (place / name).mkdir()
        log = place / "strace.log"
        tracing = [*tools.traced, "-o", str(log)] if tools.traced else []
        trouble = _run([*tools.isolated, *tracing, *command], place)
        lines = log.read_text("utf-8", "surrogateescape").splitlines() if log.is_file() else []
        events = [_without_links(event) for event in read_log(lines, str(place / "work"))]
        if tools.traced and not events:
            trouble.append("run: strace saw nothing of it")
        return _verdict(tools, events, _Rules(artifact, place), trouble)


def _run(command: Sequence[str], place: Path) -> list[str]:
    """Run the child in its own home and temporary folder; how it failed, if it did."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # Compiled files that a fresh installation lacks are Python's to write, not the artifact's.
    environment |= {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=place / "work",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return [f"run: no end within {_TIMEOUT_S} s"]
    last = (done.stderr.strip() or "without a word").splitlines()[-1]
    if done.returncode == EdgekdError.exit_code:
        raise EdgekdError(last)
    return [f"run: ended with exit code {done.returncode}: {last}"] if done.returncode else []


def _without_links(event: Event) -> Event:
    """The event with the folder's true place; a name itself may be a link that was made or removed."""
    if event.kind not in ("read", "write"):
        return event
    folder, _, name = event.what.rpartition("/")
    return Event(event.kind, os.path.join(os.path.realpath(folder or "/"), name))


class _Rules:
    """What a program that uses an artifact may touch."""

    def __init__(self, artifact: Artifact, place: Path) -> None:
        folder = artifact.folder.resolve()
        listed = [folder / name for name in (MANIFEST, *artifact.manifest.files)]
        self._artifact = {str(path) for file in listed for path in (file, *file.parents) if path.is_relative_to(folder)}
        self._groups = {"interpreter": _interpreter(), "temporary": [str(place / "tmp")], "system": _SYSTEM}
        self._place = place

    def owner(self, path: str) -> str | None:
        """Whose a file is that was read; None for one that must not be."""
        if path in self._artifact:
            return "artifact"
        if path.startswith("/memfd:"):
            return "temporary"
        return next((group for group, roots in self._groups.items() if _below(path, roots)), None)

    def may_write(self, path: str) -> bool:
        """Whether a file may be written: nothing of it stays."""
        return _below(path, _DEVICES) or self.owner(path) == "temporary" or bool(_THREAD_NAME.fullmatch(path))

    def shown(self, path: str) -> str:
        """A path as a reader knows it: the child's home is his."""
        for name, words in _SHOWN.items():
            if _below(path, [str(self._place / name)]):
                return words + path.removeprefix(str(self._place / name))
        return path


def _interpreter() -> list[str]:
    """Python, every folder it takes packages from, and this package, which lies elsewhere when installed editable."""
    from . import __path__ as own
    from .benchmarks import __path__ as benchmarks
    from .targets import __path__ as targets

    # Asked of a new interpreter: this one may have been given its caller's folder.
    asked = subprocess.run([sys.executable, "-P", "-c", "import sys; print(*sys.path, sep='\\n')"], capture_output=True)
    found = os.fsdecode(asked.stdout).splitlines()
    named = [sys.prefix, sys.base_prefix, *own, *targets, *benchmarks, *filter(os.path.isabs, found)]
    return [place(path) for path in named for place in (os.path.realpath, os.path.abspath)]


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)


def _verdict(tools: Watch, events: Sequence[Event], rules: _Rules | None = None, trouble: Sequence[str] = ()) -> Audit:
    """What the rules say of each event; ``trouble`` has failed already."""
    opened: dict[str, set[str]] = {}
    written: set[str] = set()
    sockets: list[str] = []
    failures = list(trouble)
    for event in dict.fromkeys(events):
        if event.kind == "socket":
            sockets.append(event.what)
            bad = not _stays_here(event.what)
        elif event.kind == "unseen":
            bad = True
        else:
            assert rules is not None
            owner, may_write = rules.owner(event.what), rules.may_write(event.what)
            event = Event(event.kind, rules.shown(event.what))
            bad = owner is None if event.kind == "read" else not may_write
            (opened.setdefault(owner or "other", set()) if event.kind == "read" else written).add(event.what)
        if bad:
            failures.append(f"{event.kind}: {event.what}")
    outside = set().union(*(opened.get(group, ()) for group in ("system", "temporary", "other")))
    return Audit(
        status="failed" if failures else "not checked" if tools.not_checked else "passed",
        failures=failures,
        not_checked=list(tools.not_checked),
        opened={group: len(paths) for group, paths in sorted(opened.items())},
        opened_outside=sorted(outside),
        written=sorted(written),
        sockets=sockets,
    )


def _stays_here(words: str) -> bool:
    """Whether a socket stays in the kernel, or asks the C library's own name service."""
    family = re.search(r"AF_\w+", words)
    if family is None or family[0] not in ("AF_UNIX", "AF_NETLINK"):
        return False
    return family[0] == "AF_NETLINK" or words.startswith("AF_UNIX") or words.endswith(_NAME_SERVICE)


def exercise(folder: Path) -> None:
    """Everything that an app does with an artifact, once: this is what is watched."""
    from .targets import open_artifact

    session = open_artifact(folder)
    try:
        ids = (session.tokenize(_TEXT) or [0])[: max(1, session.context_length // 2)]
        session.prefill(ids, all_logits=True)
        session.reset()
        for piece in (ids[:1], ids[1:]):
            if piece:
                session.prefill(piece)
        for token in session.generate(ids, _NEW_TOKENS):
            session.token_bytes(token)
    finally:
        session.close()


if __name__ == "__main__":
    try:
        exercise(Path(sys.argv[1]))
    except EdgekdError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
