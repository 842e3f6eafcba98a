"""The standard-library corpus: the running interpreter's own Python source, split by module.

A *group* is a top-level module or package together with its tests (``json/decoder.py`` and
``test/test_json/test_decode.py`` are both ``json``). The group's name alone decides its split, so that a module
lies in the same split on every Python version and every machine, and never in two.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("test", "validation", "train")
_HELD_OUT = {0: "test", 1: "validation"}  # of 20 hash buckets: 5 % each
_SHINGLE_LINES = 3
_DUPLICATE_SHARE = 0.5


@dataclass(frozen=True)
class Corpus:
    """Documents per split, in a fixed order, and the figures of how they were chosen."""

    train: list[str]
    validation: list[str]
    test: list[str]
    stats: dict[str, int | float] = field(default_factory=dict)


def split_of(group: str) -> str:
    """The split ("train", "validation" or "test") of a group, by the hash of its name."""
    bucket = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") % 20
    return _HELD_OUT.get(bucket, "train")


def group_of(relative: Path) -> tuple[str, bool]:
    """The group of a file given relative to the standard library, and whether it is a test."""
    parts = relative.with_suffix("").parts
    is_test = any(part in ("test", "tests") or part.startswith("test_") for part in parts)
    if parts[0] == "test":
        named = next((part for part in parts[1:] if part.startswith("test_")), parts[-1])
        return named.removeprefix("test_"), True
    return parts[0], is_test


def stdlib_files(include_tests: bool) -> Iterable[tuple[Path, str]]:
    """Each source file of the running interpreter's standard library with its group, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts):
            continue
        group, is_test = group_of(relative)
        if include_tests or not is_test:
            yield path, group


def _shingles(text: str) -> set[int]:
    """Hashes of every run of three non-blank lines, indentation ignored."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    runs = range(max(1, len(lines) - _SHINGLE_LINES + 1))
    digests = (hashlib.blake2b("\n".join(lines[i : i + _SHINGLE_LINES]).encode(), digest_size=8) for i in runs)
    return {int.from_bytes(digest.digest(), "big") for digest in digests}


def stdlib_corpus(include_tests: bool = False) -> Corpus:
    """Read, split and de-duplicate the standard library.

    Files that are not UTF-8 are skipped and counted. A document of which half the three-line runs already stand in
    a kept one is dropped as a near-duplicate; held-out splits are read first, so that it is the training copy that
    goes. ``stats["test_lines_seen_in_train"]`` is the share of test runs that still occur in train.

    Args:
        include_tests: also read the test suites.
    """
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    skipped = 0
    for path, group in stdlib_files(include_tests):
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            skipped += 1
            continue
        if text.strip():
            by_split[split_of(group)].append(text)

    kept: dict[str, list[str]] = {}
    seen_in: dict[str, set[int]] = {}
    seen: set[int] = set()
    dropped = 0
    for split in SPLITS:
        kept[split], seen_in[split] = [], set()
        for text in by_split[split]:
            shingles = _shingles(text)
            if len(shingles & seen) >= _DUPLICATE_SHARE * len(shingles):
                dropped += 1
                continue
            seen |= shingles
            seen_in[split] |= shingles
            kept[split].append(text)

    leaked = len(seen_in["test"] & seen_in["train"]) / max(1, len(seen_in["test"]))
    stats: dict[str, int | float] = {
        "not_utf8_skipped": skipped,
        "near_duplicates_dropped": dropped,
        "test_lines_seen_in_train": round(leaked, 4),
    }
    for split in SPLITS:
        stats[f"{split}_files"] = len(kept[split])
        stats[f"{split}_bytes"] = sum(len(text.encode()) for text in kept[split])
    return Corpus(kept["train"], kept["validation"], kept["test"], stats)
