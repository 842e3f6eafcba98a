"""Every file edgekd writes, and how it reads JSON that somebody else may have written.

A file or folder is written beside its place under a random name, synced, and renamed, so that a reader sees the old one
or the new one, never half; what stands under that name already is never followed or opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from .errors import EdgekdError

_MAX_JSON_BYTES = 256 * 2**20
Json = dict[str, Any]
"""An object of a JSON text whose keys another program names."""


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A new, empty file beside ``path`` to be filled, by its name; it takes ``path``'s place when the block ends.

    An error in the block removes it and leaves ``path`` as it was.
    """
    temporary = _temporary(path)
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        error.filename = str(path)  # the name that the user knows
        raise
    mode = os.fstat(handle).st_mode & 0o777
    os.close(handle)
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors writes for the owner's eyes alone
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new, empty folder beside ``path`` to be filled; it takes ``path``'s place when the block ends.

    An error in the block removes it. What a killed process left of an earlier one is removed first.

    Args:
        replace: an existing ``path`` is removed once the new folder is whole.

    Raises:
        OSError: ``path`` exists and is not to be replaced, or cannot be written.
    """
    import psutil

    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in path.parent.iterdir():
        if (pid := _left_by(entry.name, re.escape(path.name))) and not psutil.pid_exists(pid):
            with suppress(OSError):
                remove(entry)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if replace and os.path.lexists(path):
            old = _temporary(path)
            path.rename(old)
            temporary.rename(path)
            remove(old)
        else:
            temporary.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(folder: Path) -> None:
    """Remove what killed processes left of what they were writing, anywhere below a folder that this process holds."""
    import psutil

    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            # This process has written nothing yet: its number was an earlier one's, as it often is in a container.
            if (pid := _left_by(name)) and (pid == os.getpid() or not psutil.pid_exists(pid)):
                with suppress(OSError):
                    remove(Path(parent, name))


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link but not what it names; nothing is fine too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_writable(folder: Path, error: type[EdgekdError] = EdgekdError) -> None:
    """Refuse a folder that cannot be written, or is there and somebody else's, before the work whose result goes there.

    Args:
        folder: it, or, before it is made, the nearest one above.

    Raises:
        EdgekdError: of the class given.
    """
    try:
        if hasattr(os, "geteuid") and folder.exists() and os.geteuid() not in (0, folder.stat().st_uid):
            raise error(f"{folder} belongs to another user.", "Copy it to a folder of your own.")
        while not folder.exists():
            folder = folder.absolute().parent
        if not folder.is_dir():
            raise error(f"{folder} is a file, not a folder.", "Name another folder.")
        probe = _temporary(folder / "probe")
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()
    except OSError as reason:
        raise error(f"{folder} cannot be written: {reason.strerror}.", "Choose another folder.") from reason


def _temporary(path: Path) -> Path:
    """A name that nobody can have prepared; it tells whose process it is."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")


def _left_by(name: str, of: str = ".+") -> int | None:
    """The process that began to write under a temporary name; None for every other name.

    Args:
        of: pattern of the name that it was to become.
    """
    # Work that fills a temporary folder may make one of its own beside it, so the ending can stand twice.
    named = re.fullmatch(rf"\.+{of}(?:\.(\d{{1,9}})-[0-9a-f]{{16}}\.tmp)+", name)
    return int(named[1]) if named else None


def _sync(path: Path) -> None:
    """Have a file's or folder's bytes on the disk; Windows cannot open folders."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


SEAL = "sha256"


def write_sealed(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object together with the digest of itself, by which ``read_sealed`` sees damage."""
    plain = json.loads(json.dumps(value))  # as it will be read: every key a string
    write_json(path, {**plain, SEAL: digest(plain)})


# --- reading ----------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def inside(folder: Path, name: str, error: type[EdgekdError] = EdgekdError) -> Path:
    """The path of ``folder``'s file of a relative POSIX name, which may come from a stranger.

    Raises:
        EdgekdError: of the class given: the name is no file name, or it leaves the folder, by itself or through a link.
    """
    pure = PurePosixPath(name)
    try:
        leaves = pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts
        path = folder / name
        if leaves or not path.resolve().is_relative_to(folder.resolve()):
            raise error(f"{folder}: {name!r:.200} leaves the folder.", "Do not use it.")
        path.exists()  # a name that is too long
    except (OSError, ValueError, RuntimeError) as reason:  # NUL, a loop of links
        raise error(f"{folder}: {name!r:.200} is no usable file name ({reason!s:.80}).", "Do not use it.") from reason
    return path


def read_json(path: Path, error: type[EdgekdError] = EdgekdError, remedy: str = "Save it again.") -> dict[str, object]:
    """The object in a JSON file that may be damaged or hostile.

    Raises:
        EdgekdError: of the class given: the file is missing, is not UTF-8 or JSON, holds NaN or an infinity, or is no
            object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise error(f"{path}: {path.stat().st_size:,} bytes are too many for such a file.", remedy)
        value = json.loads(path.read_text("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}.", remedy) from reason
    except (ValueError, RecursionError) as reason:  # ValueError: also not UTF-8, and an integer of 5,000 digits
        raise error(f"{path}: not readable as JSON ({_short(reason)}).", remedy) from reason
    if not isinstance(value, dict):
        raise error(f"{path}: holds a {type(value).__name__}, not an object with keys.", remedy)
    return value


def read_sealed(
    path: Path, error: type[EdgekdError] = EdgekdError, remedy: str = "Save it again."
) -> dict[str, object]:
    """What ``write_sealed`` wrote.

    Raises:
        EdgekdError: as ``read_json``, or the object is not the one that was written.
    """
    value = read_json(path, error, remedy)
    if value.pop(SEAL, None) != digest(value):
        raise error(f"{path}: is not what was written.", remedy)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.40} is too large a number")
    return number


def _short(reason: Exception) -> str:
    return "nested too deep" if isinstance(reason, RecursionError) else f"{reason!s:.120}"
