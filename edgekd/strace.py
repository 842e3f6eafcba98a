"""What a program did to files and sockets, read from the log that ``strace -f -y`` wrote of it.

A call whose result says which file was opened is believed over its arguments: that path has no links in it. Of a call
that failed, or never returned, the arguments tell what was tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from posixpath import join, normpath
from typing import Literal

_OPENS = ("open", "openat", "openat2", "creat")
_RUNS = ("execve", "execveat")
_CHANGES = (
    *("mkdir", "mkdirat", "mknod", "mknodat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"),
    *("link", "linkat", "symlink", "symlinkat", "truncate", "utime", "utimes", "utimensat", "futimesat"),
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchown", "fchownat"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
)
_NETWORK = ("socket", "connect", "bind", "sendto", "sendmsg", "sendmmsg")
_PLACES = ("chdir", "fchdir", "fork", "vfork", "clone", "clone3")
_UNSEEN = ("io_uring_setup",)
# A question mark: not every architecture has the call.
_CALLS = ",".join(f"?{name}" for name in (*_OPENS, *_RUNS, *_CHANGES, *_NETWORK, *_PLACES, *_UNSEEN))
OPTIONS = ("-f", "-y", "-s", "4096", "-e", f"trace={_CALLS}", "-e", "signal=none")
"""The options that make the log this module reads; add ``-o`` and the command."""

_UNFINISHED = " <unfinished ...>"
_LINE = re.compile(r"(\d+)\s+(.*)")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (.*)")
_STRING = r'"(?:[^"\\]|\\.)*"'
_NAMED = r"<((?:[^<>\\]|\\.)*)>"  # -y: the path of a descriptor
_PATH = re.compile(rf"(?:(?:AT_FDCWD|-?\d+)(?:{_NAMED})?, )?({_STRING})")
_DESCRIPTOR = re.compile(rf"(?:AT_FDCWD|\d+){_NAMED}")
_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|[0-7]{1,3}|.)")
_LETTERS = {"n": 10, "t": 9, "r": 13, "v": 11, "f": 12}
_WRITES = re.compile(r"O_(?:WRONLY|RDWR|CREAT|TRUNC|APPEND|TMPFILE)\b")
_ADDRESS = re.compile(
    rf"sa_family=(AF_\w+)(?:, sun_path=(@?{_STRING}))?(?:.*?port=htons\((\d+)\))?"
    r'(?:.*?(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)")?'
)

Kind = Literal["read", "write", "socket", "unseen"]


@dataclass(frozen=True)
class Event:
    """A file that was opened or run, a file that was changed, a socket, or a call that cannot be judged."""

    kind: Kind
    what: str
    """An absolute path, or for the others words: ``AF_INET SOCK_DGRAM``, ``connect AF_UNIX /run/x``."""


@dataclass
class _Reader:
    """Joins calls that were interrupted in the log, and knows every process's working folder."""

    cwd: str
    folders: dict[str, list[str]] = field(default_factory=dict)
    """By process or thread; threads share the list of one name."""
    waiting: dict[str, str] = field(default_factory=dict)

    def events(self, lines: Iterable[str]) -> Iterator[Event]:
        for line in lines:
            if parts := _LINE.match(line.rstrip("\n")):
                yield from self._line(*parts.groups())
        for pid, call in self.waiting.items():  # those that never returned
            yield from self._call(pid, f"{call}) = ?")

    def _line(self, pid: str, text: str) -> Iterator[Event]:
        if resumed := _RESUMED.match(text):
            text = self.waiting.pop(pid, f"{resumed[1]}(") + resumed[2]
        if text.endswith(_UNFINISHED):
            self.waiting[pid] = text.removesuffix(_UNFINISHED)
        elif not text.startswith(("+++", "---")):  # ends and signals
            yield from self._call(pid, text)

    def _folder(self, pid: str) -> list[str]:
        if pid not in self.folders:  # a child may speak before the log has its parent's clone
            cloning = (p for p, call in self.waiting.items() if re.match(r"v?fork|clone", call))
            parent = next(cloning, None)
            self.folders[pid] = list(self.folders.get(parent or "", [self.cwd]))
        return self.folders[pid]

    def _call(self, pid: str, text: str) -> Iterator[Event]:
        if not (parts := _CALL.match(text)):
            yield Event("unseen", text[:100])
            return
        name, arguments, result = parts.groups()
        worked = result[0].isdigit()
        if name in _PLACES:
            self._move(pid, name, arguments, result) if worked else None
        elif name in _OPENS:
            yield from self._open(pid, name, arguments, result, worked)
        elif name in _RUNS:
            if worked or result[0] == "?":
                yield Event("read", self._paths(pid, arguments)[0])
        elif name in _CHANGES:
            if not result.startswith("-1 EEXIST"):  # many make the folders of a path from the root on
                yield from self._change(pid, name, arguments)
        elif name in _NETWORK:
            yield from _socket(name, arguments)
        elif name in _UNSEEN:
            yield Event("unseen", name)

    def _move(self, pid: str, name: str, arguments: str, result: str) -> None:
        if name in ("chdir", "fchdir"):
            self._folder(pid)[0] = self._paths(pid, arguments)[0]
        else:
            mine = self._folder(pid)
            self.folders[result.split()[0]] = mine if "CLONE_FS" in arguments else list(mine)

    def _open(self, pid: str, name: str, arguments: str, result: str, worked: bool) -> Iterator[Event]:
        writes = name == "creat" or _WRITES.search(re.sub(_STRING, "", arguments))
        named = _DESCRIPTOR.match(result)
        path = _unescaped(named[1]) if worked and named else self._paths(pid, arguments)[0]
        if path.startswith("/") and (writes or result[0] != "-"):  # others are pipes; what was not opened was not read
            yield Event("write" if writes else "read", path.removesuffix(" (deleted)"))

    def _change(self, pid: str, name: str, arguments: str) -> Iterator[Event]:
        paths = self._paths(pid, arguments)
        if name.startswith("link"):
            yield Event("read", paths[0])
        for path in paths[-1:] if "link" in name and not name.startswith("unlink") else paths:
            if path.startswith("/"):
                yield Event("write", path)

    def _paths(self, pid: str, arguments: str) -> list[str]:
        """The paths in a call, absolute; those of its descriptors where it has no names."""
        cwd = self._folder(pid)[0]
        found = [
            normpath(join(cwd, _unescaped(start or ""), _unescaped(name[1:-1])))
            for start, name in _PATH.findall(arguments)
            if name != '""'  # AT_EMPTY_PATH: the descriptor itself
        ]
        return found or [_unescaped(name) for name in _DESCRIPTOR.findall(arguments)] or [cwd]


def read_log(lines: Iterable[str], cwd: str) -> list[Event]:
    """Everything that the program did, in the order of the log.

    Args:
        lines: of the log.
        cwd: the folder it began in.
    """
    return list(_Reader(cwd).events(lines))


def _socket(name: str, arguments: str) -> Iterator[Event]:
    if name == "socket":
        family, kind = [*(part.strip() for part in arguments.split(",")), ""][:2]
        yield Event("socket", f"{family} {kind.split('|')[0]}")
    for family, unix, port, host in _ADDRESS.findall(arguments):
        where = _unescaped(unix.replace('"', "")) or f"{host}:{port}"
        yield Event("socket", f"{name} {family} {where}")


def _unescaped(text: str) -> str:
    """A string as strace prints it, to the bytes' own text."""

    def byte(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] == "x" and len(code) == 3:
            return chr(int(code[1:], 16))
        return chr(int(code, 8)) if code[0].isdigit() else chr(_LETTERS.get(code, ord(code)))

    return _ESCAPE.sub(byte, text).encode("latin-1", "replace").decode("utf-8", "surrogateescape")
