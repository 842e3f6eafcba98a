"""Chats as text, and which characters of it the assistant wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]

# A private-use character on each side: no template trims, splits or looks for it.
_SENTINEL = "\ue000edgekd\ue001"


def render_chat(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[Span]] | None:
    """A chat as its template renders it, and the character spans to train on.

    A span is what an assistant's content becomes in the text, with the special token that ends the turn. It is found
    by rendering the chat again with that content replaced, and taking what the two renders do not share: this needs
    no ``{% generation %}`` in the template, and holds for templates that rewrite earlier turns (Qwen3 drops their
    reasoning).

    Returns:
        None if the template refuses the chat, or if no span can be told apart.
    """
    from jinja2.exceptions import TemplateError

    endings = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    try:
        text = _render(messages, tokenizer)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message.get("content"):
                continue
            changed = _render([*messages[:i], {**message, "content": _SENTINEL}, *messages[i + 1 :]], tokenizer)
            if changed.count(_SENTINEL) != 1:
                return None
            before, after = changed.split(_SENTINEL)
            start = _shared(text, before)
            end = len(text) - _shared(text[start:][::-1], after[::-1])
            spans.append((start, end + _length_of_ending(text[end:], endings)))
    except (TemplateError, TypeError, ValueError, KeyError):
        return None
    return (text, spans) if spans else None


def _render(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False))


def _shared(a: str, b: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _length_of_ending(rest: str, endings: Sequence[str]) -> int:
    """Characters up to and with the special token that ``rest`` begins with, blanks before it allowed; else 0."""
    blanks = len(rest) - len(rest.lstrip())
    return next((blanks + len(ending) for ending in endings if rest.startswith(ending, blanks)), 0)
