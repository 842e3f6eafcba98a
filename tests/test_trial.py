"""A trial in a process of its own: every way to end is a sentence, and what has passed is not tried again."""

import time
from pathlib import Path

import pytest

from edgekd.errors import BadArtifact, MissingExtra, Unsupported
from edgekd.trial import mark, try_once


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("EDGEKD_TRIED", "")


def attempt(name: str, path: Path, key: str = "k", seconds: int = 60) -> None:
    try_once(key, f"trial_functions:{name}", path, 0, BadArtifact, seconds)


def test_what_passed_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "noted"
    for key in ("a", "b", "a"):
        attempt("note", path, key)
    assert path.read_text() == "xx"
    mark("c")
    attempt("dies", path, "c")


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(BadArtifact, match="ends the process by SIGABRT"):
            attempt("dies", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("leaves", "ends the process with 7"),
        ("takes_all_memory", "MemoryError"),
        ("fails", "it fails: of two lines"),
    ],
)
def test_other_ends(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(BadArtifact, match=said):
        attempt(name, tmp_path)


def test_a_hang_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(BadArtifact, match="does not answer within 1 s"):
        attempt("hangs", tmp_path, seconds=1)
    assert time.monotonic() - start < 20


def test_our_errors_come_through_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        attempt("refuses", tmp_path / "ü")
    assert (caught.value.cause, caught.value.remedy, str(caught.value)) == ("ü: ü.", "Do this.", "ü: ü. Do this.")
    with pytest.raises(MissingExtra, match=r"some-package is not installed\. Run: pip install"):
        attempt("lacks_a_package", tmp_path)
