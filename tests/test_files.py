"""Files and folders that appear whole or not at all, and JSON of strangers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from edgekd.errors import BadArtifact, EdgekdError
from edgekd.files import (
    atomic_file,
    atomic_folder,
    check_writable,
    inside,
    read_json,
    read_sealed,
    sweep,
    write_json,
    write_sealed,
    write_text,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a") as temporary:
        temporary.write_text((tmp_path / "missing").read_text())
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == {"a"}


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.partial", ".manifest.json.tmp"])
def test_links_that_lie_in_wait_are_not_followed(tmp_path: Path, name: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "artifact"
    victim.write_text("precious")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    write_json(folder / "manifest.json", {"a": 1})
    assert victim.read_text() == "precious"
    assert json.loads((folder / "manifest.json").read_text()) == {"a": 1}
    assert not (folder / "manifest.json").is_symlink()


def test_a_file_has_the_usual_mode_whoever_wrote_it(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a") as temporary:
        temporary.chmod(0o600)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "f", replace=True) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text(text)
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "f") as folder:
        (folder / "y").touch()
    assert (tmp_path / "f" / "sub" / "x").read_text() == "two" and names(tmp_path) == {"f"}


def test_what_a_kill_leaves_goes_with_the_next_try(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from edgekd.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as outer, atomic_folder(outer) as inner:\n"
        "    (inner / 'x').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], check=False)
    assert done.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
    with atomic_folder(tmp_path / "f"):
        pass
    assert names(tmp_path) == {"f"}


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "", ".", "a\\b", "a\0b", "x" * 5000, "link", "loop", "in/link"]
)
def test_names_that_leave_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "f" / "in").mkdir(parents=True)
    (tmp_path / "f" / "link").symlink_to(tmp_path)
    (tmp_path / "f" / "in" / "link").symlink_to("/etc")
    (tmp_path / "f" / "loop").symlink_to("loop")
    with pytest.raises(BadArtifact, match="Do not use it"):
        inside(tmp_path / "f", name, BadArtifact)


def test_names_that_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    assert inside(tmp_path, "a/x") == tmp_path / "a" / "x"
    assert inside(tmp_path, "b") == tmp_path / "b"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'"a"',
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": [-1e999]}',
        b"\xef\xbb\xbf{}",
        b'{"a": "\xff"}',
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_json_of_strangers_ends_in_a_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(BadArtifact, match=r"x\.json.* Save it again\."):
        read_json(tmp_path / "x.json", BadArtifact)


@pytest.mark.parametrize("kind", ["missing", "folder", "dangling"])
def test_json_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    path.mkdir() if kind == "folder" else None
    path.symlink_to("nowhere") if kind == "dangling" else None
    with pytest.raises(EdgekdError, match="cannot be read"):
        read_json(path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EdgekdError, match="is a file"):
        check_writable(tmp_path / "file" / "x")
    check_writable(tmp_path / "new" / "deep")
    assert names(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
@pytest.mark.parametrize(("mode", "words"), [(0o755, "belongs to another user"), (0o700, "cannot be written")])
def test_a_folder_of_another_user_is_refused(mode: int, words: str) -> None:
    code = (
        "import os, sys; from pathlib import Path; from edgekd.files import check_writable\n"
        "os.seteuid(12345)\n"
        "try: check_writable(Path(sys.argv[1]))\n"
        "except Exception as error: print(error)\n"
    )
    with TemporaryDirectory() as folder:
        os.chmod(folder, mode)
        command = [sys.executable, "-c", code, f"{folder}/new" if mode == 0o700 else folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert words in done.stdout


@pytest.mark.parametrize("there", ["folder", "file", "link", "dangling link"])
def test_a_folder_takes_the_place_of_whatever_is_there(tmp_path: Path, there: str) -> None:
    path, outside = tmp_path / "f", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    if there == "folder":
        path.mkdir()
    elif there == "file":
        path.touch()
    else:
        path.symlink_to(outside if there == "link" else "/nowhere")
    with atomic_folder(path, replace=True) as folder:
        (folder / "x").touch()
    assert names(path) == {"x"} and not path.is_symlink()
    assert names(tmp_path) == {"f", "outside"} and names(outside) == {"precious"}


def test_sweeping_takes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    dead, alive, other = (
        f".x.{pid}-0123456789abcdef.tmp" for pid in (999_999_999, os.getppid(), "99999999999999999999")
    )
    (tmp_path / "sub" / dead).mkdir(parents=True)
    (tmp_path / dead).symlink_to("/nowhere")
    (tmp_path / f".{dead}.{os.getpid()}-0123456789abcdef.tmp").touch()
    for name in (alive, other, "x.tmp", ".x.tmp"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert names(tmp_path) == {"sub", alive, other, "x.tmp", ".x.tmp"} and not names(tmp_path / "sub")


def test_a_seal_shows_that_a_value_is_another(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, {"a": [1, 2.5, None, "ü"], "b": {10: 1, 9: 2}})
    assert read_sealed(path) == {"a": [1, 2.5, None, "ü"], "b": {"10": 1, "9": 2}}
    whole = path.read_text()
    for spoilt in (whole.replace("2.5", "2.4"), whole.replace('"a"', '"c"'), '{"a": 1}', '{"sha256": 1}', whole[:-9]):
        path.write_text(spoilt)
        with pytest.raises(BadArtifact, match=r"x\.json.* Save it again\."):
            read_sealed(path, BadArtifact)
