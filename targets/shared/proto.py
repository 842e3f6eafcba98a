"""Protobuf messages of formats that differ in their classes, walked in one way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def messages(message: Any, name: str) -> Iterator[Any]:
    """Every message of a type, however deep.

    Args:
        name: the type's, without its package.
    """
    if message.DESCRIPTOR.name == name:
        yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        inner = value.values() if isinstance(value, Mapping) else [value] if hasattr(value, "DESCRIPTOR") else value
        for one in inner:
            if hasattr(one, "DESCRIPTOR"):  # a map may hold plain values
                yield from messages(one, name)
