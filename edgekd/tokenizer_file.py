"""``tokenizer.json`` of a stranger: what it may ask for is bounded, and it is tried in a process of its own.

The tokenizers package does what the file says: it pads to 10⁹ ids, doubles a text forty times, and panics, past every
``except Exception``, where a regular expression backtracks too long.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EdgekdError
from .files import digest, file_sha256, read_json
from .trial import try_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHAINS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_EMPTY: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
_MAX_STEPS = 64
_MAX_GROWTH = 64
_MAX_PAD = 2**20
_REMEDY = "Save the tokenizer again, without it."
_PLAIN_TEXT = "Hello, world! Grüße 你好 🚀 \x00"
_RUN = 4000


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
"""The byte that each character of a byte-level vocabulary stands for (GPT-2's alphabet)."""


def hard_texts(path: Path | None) -> list[str]:
    """Long runs of one character, over which regular expressions backtrack: of common ones, and of those that the
    expressions of a ``tokenizer.json`` name."""
    content = read_json(path) if path else {}
    patterns = [_pattern(step) for key in _CHAINS for step in _steps(content.get(key))]
    chars = dict.fromkeys("a1 .!-_\n\t'é世" + "".join(patterns))
    return [_PLAIN_TEXT, *(char * _RUN + "\x01" for char in list(chars)[:_MAX_STEPS])]


def check_tokenizer_file(path: Path, error: type[EdgekdError] = EdgekdError) -> dict[str, object]:
    """Refuse a ``tokenizer.json`` that would take time or memory out of proportion; its content.

    Raises:
        EdgekdError: of the class given: it is not readable, pads to more than 2²⁰ ids, has more than 64 steps, or
            replacements that make a text more than 64 times as long.
    """
    data = read_json(path, error, "Save the tokenizer again.")
    if not isinstance(data.get("model"), dict):
        raise error(f"{path}: key 'model' holds no tokenizer.", "Save the tokenizer again.")
    for key in _CHAINS:
        steps = _steps(data.get(key))
        if len(steps) > _MAX_STEPS:
            raise error(f"{path}: key {key!r} has {len(steps)} steps, more than {_MAX_STEPS}.", _REMEDY)
        growth = prod(_growth(step) for step in steps)
        if growth > _MAX_GROWTH:
            raise error(f"{path}: key {key!r} makes a text {growth:.3g} times as long.", _REMEDY)
    if (length := _padding(data.get("padding"))) > _MAX_PAD:
        raise error(f"{path}: key 'padding' asks for {length} ids.", _REMEDY)
    return data


def try_tokenizer(path: Path) -> None:
    """Check a model folder's ``tokenizer.json`` and load it in a process of its own, unless that was done already.

    Raises:
        EdgekdError: as ``check_tokenizer_file``; or the process died, hung, or could not tokenize.
    """
    check_tokenizer_file(path)
    key = digest(["tokenizer", file_sha256(path)])
    try_once(key, f"{__name__}:run_trial", path.absolute(), path.stat().st_size, EdgekdError)


def run_trial(path: Path) -> None:
    """What ``try_tokenizer`` runs: hard texts to ids and back.

    Raises:
        EdgekdError: the tokenizers package refuses the file, or fails on a text.
    """
    tokenizer, _ = read_tokenizer_file(path)
    for text in hard_texts(path):
        with tokenizer_errors(path):
            tokenizer.decode(tokenizer.encode(text).ids)


def read_tokenizer_file(path: Path, error: type[EdgekdError] = EdgekdError) -> tuple[Tokenizer, dict[str, object]]:
    """The tokenizers package's tokenizer, which pads and cuts nothing, and the file's content.

    Raises:
        EdgekdError: of the class given: as ``check_tokenizer_file``, or the package refuses the file.
        ModuleNotFoundError: the package is not installed.
    """
    from tokenizers import Tokenizer

    data = check_tokenizer_file(path, error)
    try:
        with tokenizer_errors(path, error):
            tokenizer = Tokenizer.from_file(str(path))
    except error as reason:
        if unknown := _unknown_part(data):
            raise error(
                f"{path}: {unknown} is nothing that tokenizers {version('tokenizers')} knows.",
                "Update tokenizers, or save the tokenizer with this version.",
            ) from reason
        raise
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, data


def _unknown_part(data: dict[str, Any]) -> str:
    """The part that the tokenizers package does not read, though it stand alone; empty: none of them."""
    if other := data.keys() - {"version", "truncation", "padding", "added_tokens", "model", *_CHAINS}:
        return f"key {min(other)!r:.60}"
    if data.get("version") != _EMPTY["version"]:
        return f"version {data.get('version')!r:.20}"
    for key in _CHAINS:
        for step in reversed(_steps(data.get(key))):  # the inner ones first
            if not _is_readable({**_EMPTY, key: step}):
                return f"key {key!r}: {step['type']!r:.60} as it stands there"
    if _is_readable({**_EMPTY, "model": data["model"]}):
        return ""
    return f"key 'model': {data['model'].get('type')!r:.60} as it stands there"


def _is_readable(content: dict[str, Any]) -> bool:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(json.dumps(content))
    except BaseException as reason:
        if type(reason).__name__ not in ("Exception", "PanicException"):
            raise
        return False
    return True


@contextmanager
def tokenizer_errors(path: Path, error: type[EdgekdError] = EdgekdError) -> Iterator[None]:
    """Turn the tokenizers package's errors, ``Exception`` itself and a panic that is none, into ours."""
    try:
        yield
    except BaseException as reason:
        if type(reason).__name__ not in ("Exception", "PanicException"):
            raise
        raise error(f"{path}: the tokenizer fails: {reason!s:.200}.", "Use another tokenizer.") from reason


def _steps(value: Any) -> list[dict[str, object]]:
    """Every object with a type, however deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    here = [value] if isinstance(value, dict) and "type" in value else []
    return here + [step for one in inner for step in _steps(one)]


def _pattern(step: dict[str, object]) -> str:
    """Its regular expression, if it has one."""
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    return expression if isinstance(expression, str) else ""


def _growth(step: dict[str, object]) -> float:
    """How many times as long a step makes a text, at most."""
    pattern, content = step.get("pattern"), step.get("content")
    if not isinstance(pattern, dict) or not isinstance(content, str):
        return 1
    literal = pattern.get("String")
    return max(1, len(content) / len(literal) if isinstance(literal, str) and literal else len(content) + 1)


def _padding(padding: Any) -> int:
    """The most ids that it pads to on its own account."""
    if not isinstance(padding, dict):
        return 0
    strategy = padding.get("strategy")
    fixed = strategy.get("Fixed") if isinstance(strategy, dict) else 0
    return max((n for n in (fixed, padding.get("pad_to_multiple_of")) if isinstance(n, int)), default=0)
