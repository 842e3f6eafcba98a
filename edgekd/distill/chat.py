"""Chats as text to learn from, and which characters of it the assistant gave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from ..conversation import ChatTemplate, Rendered, Span, TemplateRefused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINING_TIME = datetime(2024, 7, 26)
"""What ``strftime_now`` tells in training text, so that the same data gives the same windows on every day: the day that
Llama 3's own template falls back to."""

# A private-use character on each side: no template trims, splits or looks for it.
_SENTINEL = "\ue000edgekd\ue001"
_GIVEN = ("content", "tool_calls", "reasoning_content", "thinking", "reasoning")


class Unusable(Exception):
    """A row that nothing can be learned from: why, in words that hold for its like."""


@dataclass(frozen=True)
class Chat:
    """A chat of the training data."""

    messages: list[dict[str, object]]
    tools: list[dict[str, object]] | None = None
    """JSON schemas of the tools that the assistant may call."""

    @property
    def text(self) -> str:
        """All of it, to tell whether two are the same."""
        whole = [self.messages, self.tools] if self.tools else self.messages
        return json.dumps(whole, sort_keys=True, default=str)


class ChatReader:
    """Chats as a tokenizer's template renders them, with the character spans to train on.

    A span is what an assistant's turn becomes in the text, with the special token that ends it. The template's own
    ``{% generation %}`` marks decide, where it has them. Otherwise the chat is rendered again with the turn's words
    replaced, and what the two renders do not share is the span: this holds for templates that rewrite earlier turns
    (Qwen3 drops their reasoning). A turn that calls tools is what the text has more, up to its end, than the prompt
    that the model would be given there; where one of the two ways fails, the other is tried.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._endings = tuple(sorted(tokenizer.get_added_vocab(), key=len, reverse=True))

    def read(self, chat: Chat) -> tuple[str, list[Span]]:
        """Text and spans.

        Raises:
            Unusable: the template refuses the chat, nobody answers in it, or no span can be told apart.
            EdgekdError: the template does not end.
        """
        chat = self._as_template_takes(chat)
        messages = chat.messages
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and any(m.get(key) for key in _GIVEN)]
        if not turns:
            roles = ", ".join(sorted({str(message["role"]) for message in messages}))
            raise Unusable(f"no turn of the role assistant says anything (roles: {roles})")
        try:
            text, marked = self._render(chat, messages)
        except (TemplateRefused, ValueError) as refusal:
            raise Unusable(f"the chat template refuses them: {getattr(refusal, 'words', refusal)}") from refusal
        spans = [span for span in marked if span[0] < span[1]] or [self._span(chat, text, turn) for turn in turns]
        return text, spans

    def _as_template_takes(self, chat: Chat) -> Chat:
        """The chat with contents that are lists of text as one text, unless the template wants lists: one that wants
        texts refuses a list, or writes its brackets down."""
        if not any(isinstance(message.get("content"), list) for message in chat.messages) or self._wants_lists:
            return chat
        return Chat([_with_text(message) for message in chat.messages], chat.tools)

    @cached_property
    def _wants_lists(self) -> bool:
        probe: list[dict[str, object]] = [{"role": "user", "content": _SENTINEL}]
        try:
            return _SENTINEL not in self._render(Chat(probe), probe).text
        except TemplateRefused:
            return False

    def _render(self, chat: Chat, messages: Sequence[dict[str, object]], prompt: bool = False) -> Rendered:
        template = ChatTemplate(
            self._tokenizer.get_chat_template(tools=chat.tools), self._tokenizer.special_tokens_map, TRAINING_TIME
        )
        return template.render(messages, tools=chat.tools, add_generation_prompt=prompt)

    def _span(self, chat: Chat, text: str, turn: int) -> Span:
        ways = [self._replaced, self._grown]
        if chat.messages[turn].get("tool_calls"):  # a tool's answer may be written by what the call was
            ways.reverse()
        for way in ways:
            try:
                if span := way(chat, text, turn):
                    return span
            except TemplateRefused:
                continue
        raise Unusable("the assistant's words cannot be told from the template's")

    def _replaced(self, chat: Chat, text: str, turn: int) -> Span | None:
        """What changes in the text when the turn says something else."""
        messages, message = chat.messages, chat.messages[turn]
        others = {key: value for key, value in message.items() if key not in _GIVEN}
        parts = isinstance(message.get("content"), list)
        content = [{"type": "text", "text": _SENTINEL}] if parts else _SENTINEL
        changed = self._render(chat, [*messages[:turn], others | {"content": content}, *messages[turn + 1 :]]).text
        if changed.count(_SENTINEL) != 1:
            return None
        before, after = changed.split(_SENTINEL)
        if message.get("tool_calls") and not text.endswith(after):
            return None
        start = _shared(text, before)
        end = len(text) - _shared(text[start:][::-1], after[::-1])
        return start, end + _length_of_ending(text[end:], self._endings)

    def _grown(self, chat: Chat, text: str, turn: int) -> Span | None:
        """What the text has more, up to the turn's end, than the prompt for the turn."""
        prompt = self._render(chat, chat.messages[:turn], prompt=True).text
        whole = self._render(chat, chat.messages[: turn + 1]).text
        if not (whole.startswith(prompt) and text.startswith(whole) and len(prompt) < len(whole)):
            return None
        bare = whole.rstrip()
        return len(prompt), len(bare if bare.endswith(self._endings) else whole)


def _with_text(message: dict[str, object]) -> dict[str, object]:
    """The message with a content of text parts alone as one text."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return message
    return message | {"content": "".join(part["text"] for part in parts)}


def _shared(a: str, b: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _length_of_ending(rest: str, endings: Sequence[str]) -> int:
    """Characters up to and with the special token that ``rest`` begins with, blanks before it allowed; else 0."""
    blanks = len(rest) - len(rest.lstrip())
    return next((blanks + len(ending) for ending in endings if rest.startswith(ending, blanks)), 0)
