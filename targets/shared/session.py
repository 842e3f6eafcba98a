"""The ``Session`` protocol, once for every runtime: what must be checked, in which pieces ids are fed, how far the
cache is filled. A runtime brings its engine, which computes.

Shapes: ``T`` tokens, ``V`` vocabulary. Logits are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ...manifest import Contract
from ...session import check_ids, check_room, generate

BATCH_TOKENS = 512
"""Most ids that an engine is fed at once."""


class Engine(Protocol):
    """A runtime with a model and a cache. What it is given has been checked."""

    def feed(self, ids: Sequence[int], start: int) -> np.ndarray:
        """Write ids behind ``start`` cached ones; logits of the last ``(V,)``, valid until the next call."""
        ...

    def feed_all(self, ids: Sequence[int], start: int) -> np.ndarray:
        """The same, with the logits of every id, ``(T, V)``."""
        ...

    def reset(self) -> None:
        """The next ``start`` is 0."""
        ...

    def rewind(self, length: int) -> bool:
        """The next ``start`` is ``length``, less than was fed; False, and nothing is done, where that cannot be."""
        ...

    def close(self) -> None:
        """Free the memory; called once."""
        ...


class Tokenizer(Protocol):
    """Text to ids, and ids to bytes."""

    def tokenize(self, text: str, *, start: bool = True) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...


class DecoderSession:
    """An artifact at work: the ``Session`` protocol."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, contract: Contract) -> None:
        self._engine: Engine | None = engine
        self._tokenizer, self._contract, self._used = tokenizer, contract, 0
        self._turn = 0  # counts the calls that change the cache

    @property
    def vocab_size(self) -> int:
        """Length ``V`` of the logits."""
        return self._contract.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens the cache holds."""
        return self._contract.context_length

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a text, in which nothing is a special token and to which nothing is added."""
        self._open()
        return self._tokenizer.tokenize(text, start=start)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; nothing for a special one."""
        self._open()
        check_ids([token], self.vocab_size)
        return self._tokenizer.token_bytes(token)

    def reset(self) -> None:
        """Empty the cache."""
        self._turn += 1
        self._open().reset()
        self._used = 0

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` cached tokens; how many are kept."""
        if not 0 <= length <= self._used:
            raise ValueError(f"the cache has {self._used} tokens, not {length}")
        engine = self._open()
        self._turn += 1
        if length < self._used and not (length and engine.rewind(length)):
            self.reset()
        else:
            self._used = length
        return self._used

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Append ids; logits of the last ``(V,)``, or of all ``(T, V)``."""
        if not len(ids):
            raise ValueError("no ids to prefill")
        check_ids(ids, self.vocab_size)
        engine = self._room(len(ids))
        self._turn += 1
        rows = []
        for i in range(0, len(ids), BATCH_TOKENS):
            piece = ids[i : i + BATCH_TOKENS]
            if all_logits:
                rows.append(engine.feed_all(piece, self._used))
            else:
                last = engine.feed(piece, self._used)
            self._used += len(piece)
        if not all_logits:
            return last
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def decode(self, token: int) -> np.ndarray:
        """Append one id; its logits ``(V,)``."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        engine = self._room(1)
        self._turn += 1
        logits = engine.feed((token,), self._used)
        self._used += 1
        return logits

    def generate(
        self, ids: Sequence[int], max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Yield new tokens until an end-of-sequence token, ``max_tokens``, or a full cache.

        Raises:
            ValueError: another call has changed the cache since the last token.
        """
        tokens = generate(self, self._contract.eos_ids, ids, max_tokens, temperature, seed)
        for count, token in enumerate(tokens, 1):
            turn = self._turn
            yield token
            if self._turn != turn and count < max_tokens:
                raise ValueError("the session was used by another call; this generation cannot go on")

    def close(self) -> None:
        """Free the runtime's memory."""
        self._turn += 1
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _open(self) -> Engine:
        if self._engine is None:
            raise ValueError("the session is closed")
        return self._engine

    def _room(self, count: int) -> Engine:
        engine = self._open()
        check_room(self._used, count, self.context_length)
        return engine
