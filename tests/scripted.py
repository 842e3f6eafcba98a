"""A session without a model, for what is done with one: its tokens are ASCII characters, it says what it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from edgekd.session import Characters

END = 3


class Scripted:
    """Answers a prompt with ``answer`` of its text, then ends; the second likeliest token is always a space.

    Args:
        answer: what is said behind a prompt.
        pace: waited for before each token that is decoded.
    """

    vocab_size = 128

    def __init__(
        self, answer: Callable[[str], str] = lambda prompt: "ok", *, context_length: int = 60, pace: float = 0.0
    ) -> None:
        self.answer, self.context_length, self.pace = answer, context_length, pace
        self.given: list[str] = []
        """The whole text in the cache at the end of each prompt."""
        self.fed: list[int] = []
        """How many ids each call brought."""
        self.rewinds = True
        self.interrupt: BaseException | None = None
        """Raised by the next decode."""
        self.held = threading.Event()
        """Cleared, decoding waits."""
        self.held.set()
        self._cache: list[int] = []
        self._script: list[int] = []
        self._begins = True  # what is fed next ends a prompt

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        return list(text.encode("ascii", "replace"))

    def token_bytes(self, token: int) -> bytes:
        return b"" if token in (2, END) else bytes([token])

    def reset(self) -> None:
        self._cache, self._begins = [], True

    def rewind(self, length: int) -> int:
        assert 0 <= length <= len(self._cache)
        self._begins = True
        self._cache = self._cache[:length] if self.rewinds or length == len(self._cache) else []
        return len(self._cache)

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        self._write(ids)
        self.given.append(bytes(self._cache).decode())
        self._script, self._begins = [*self.answer(self.given[-1]).encode(), END], False
        return self._next()

    def decode(self, token: int) -> np.ndarray:
        if self._begins:
            return self.prefill([token])
        self.held.wait(30)
        threading.Event().wait(self.pace)
        if self.interrupt is not None:
            error, self.interrupt = self.interrupt, None
            raise error
        self._write([token])
        return self._next()

    def _write(self, ids: Sequence[int]) -> None:
        assert 0 < len(ids) <= self.context_length - len(self._cache)
        self._cache += ids
        self.fed.append(len(ids))

    def _next(self) -> np.ndarray:
        logits = np.zeros(self.vocab_size, np.float32)
        logits[ord(" ")], logits[self._script.pop(0) if self._script else END] = 5, 10
        return logits

    def generate(self, *args: object, **options: object) -> object:
        raise AssertionError("edgekd.generation draws the tokens")

    def close(self) -> None:
        pass


def spoken(session: Any, tokens: Iterable[int]) -> str:
    """What tokens of any session say, one after another."""
    characters = Characters(session)
    return "".join([*map(characters.feed, tokens), characters.finish()])
