"""YAML as a spec has it: mappings, lists, words and numbers. What YAML has beyond that is refused by its line.

Values are built from the parser's events and not by PyYAML's constructors: nothing here calls itself however deep a
file nests, no tag makes an object, no alias multiplies what it names, and a key that stands twice is seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .errors import EdgekdError

_MAX_BYTES = 2**20
_MAX_DEPTH = 32
_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML was built with it
# YAML 1.1's words, as everyone's editor colours them, and YAML 1.2's numbers, which have 1e-3 among them.
_MEANINGS = {"null": None, "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS = {form: value for word, value in _MEANINGS.items() for form in (word, word.title(), word.upper())}
_WORDS |= {"": None, "~": None}
_INTEGER = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_MAX_DIGITS = 400  # as many as the smallest float has; Python refuses to read an integer of 4,301


def read_yaml(path: Path, error: type[EdgekdError]) -> Any:
    """What a YAML file holds: dict, list, str, int, float, bool or None; every key of a dict is a str.

    Raises:
        EdgekdError: of the class given: the file cannot be read, is too long, is not UTF-8 or YAML, nests too deep,
            gives a key twice, or has a tag, an anchor or an alias.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the name
        raise error(f"{path}: cannot be read: {getattr(reason, 'strerror', None) or reason}.") from reason
    if len(data) > _MAX_BYTES:
        raise error(f"{path}: longer than {_MAX_BYTES:,} bytes.", "Name many files by a pattern such as data/*.txt.")
    try:
        documents = _build(yaml.parse(data.decode("utf-8-sig"), _Parser))
    except (yaml.YAMLError, ValueError, OverflowError) as reason:  # not UTF-8, or no character has such a number
        raise error(f"{path}: not valid YAML: {' '.join(str(reason).split())[:300]}.") from reason
    if len(documents) > 1:
        raise error(f"{path}: holds {len(documents)} YAML documents.", "Keep one.")
    return documents[0] if documents else None


def _build(events: Iterable[yaml.Event]) -> list[Any]:
    """The documents that events describe."""
    documents: list[Any] = []
    open_values: list[list[Any] | dict[str, object]] = [documents]
    keys: list[str | None] = [None]  # of each open value, the key that waits for its value
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            open_values.pop()
            keys.pop()
        if not isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent, yaml.AliasEvent)):
            continue
        parent = open_values[-1]
        if isinstance(parent, dict) and keys[-1] is None:
            keys[-1] = _key(event, parent)
            continue
        value = _value(event)
        if isinstance(parent, dict):
            parent[str(keys[-1])], keys[-1] = value, None
        else:
            parent.append(value)
        if isinstance(value, (dict, list)):
            if len(open_values) > _MAX_DEPTH:
                raise _refusal(event, "nested too deep")
            open_values.append(value)
            keys.append(None)
    return documents


def _key(event: yaml.Event, mapping: dict[str, object]) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise _refusal(event, "a key is one word, not a list or mapping")
    _ = _value(event)
    if event.value in mapping:
        raise _refusal(event, f"key {event.value!r:.80} stands twice")
    return str(event.value)


def _value(event: yaml.ScalarEvent | yaml.CollectionStartEvent | yaml.AliasEvent) -> Any:
    """The value of a scalar, or an empty list or mapping to be filled."""
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _refusal(event, "anchors (&) and aliases (*) are not read; write the value out")
    if event.tag is not None:
        raise _refusal(event, f"tags such as {event.tag!r:.80} are not read")
    if not isinstance(event, yaml.ScalarEvent):
        return {} if isinstance(event, yaml.MappingStartEvent) else []
    text = str(event.value)
    text.encode()  # PyYAML's own parser, unlike libyaml, lets half a surrogate pair through
    plain = event.implicit[0]
    return _plain(text) if plain else text


def _plain(text: str) -> Any:
    """What a word without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= _MAX_DIGITS:
        for pattern, kind in ((_INTEGER, int), (_NUMBER, float)):
            if pattern.fullmatch(text):
                return kind(text)
    return text


def _refusal(event: yaml.Event, what: str) -> yaml.YAMLError:
    where = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
    return yaml.YAMLError(f"{where}{what}")
