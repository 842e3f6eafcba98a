"""What every target's runtime looks like to verification, benchmarks and chat: the ``Session`` protocol.

Shapes: ``T`` tokens fed by one call, ``V`` vocabulary size. Logits are float32 NumPy arrays.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

Arithmetic = Literal["float32", "float16", "float16 sums", "float16 throughout", "int8 by 32", "int8 by token"]
"""What a runtime makes of the inputs of a matrix product: as they are, in half precision (sums: and their products are
added up in it; throughout: and so is what every operator gives), or in 8 bits, with a scale for 32 of them or for all
inputs of a token."""


class Session(Protocol):
    """An artifact as its own runtime runs it: one sequence with a key-value cache."""

    @property
    def vocab_size(self) -> int:
        """Length ``V`` of the logits."""
        ...

    @property
    def context_length(self) -> int:
        """Most tokens the cache holds."""
        ...

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a text by the runtime's own tokenizer. Nothing in it is a special token, and nothing is added to it:
        see ``conversation.text_ids`` and ``chat_ids``.

        Args:
            start: it begins a sequence, where some tokenizers put a space; else a special token is before it.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; they may end inside a UTF-8 character. Special tokens render as nothing."""
        ...

    def reset(self) -> None:
        """Empty the cache."""
        ...

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` tokens of the cache, of those that it has.

        Returns:
            How many it keeps: as many, or none where the runtime cannot take back what it was fed.
        """
        ...

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Append ids to the cache; may be called again to go on with the next chunk.

        Returns:
            Logits of the last id ``(V,)``, or of every id ``(T, V)`` when ``all_logits``. The former may be the
            runtime's own memory: read or copy them before the next call.

        Raises:
            ValueError: no ids, or more than the cache has room for.
        """
        ...

    def decode(self, token: int) -> np.ndarray:
        """Append one id and return its logits ``(V,)``, to be read or copied before the next call."""
        ...

    def generate(
        self, ids: Sequence[int], max_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Reset, prefill ``ids`` and yield new tokens one at a time, the end-of-sequence token excluded and ending it.

        ``temperature`` 0 is greedy.

        Raises:
            ValueError: another call has changed the cache since the last token.
        """
        ...

    def close(self) -> None:
        """Free the runtime's memory; calling it twice is fine."""
        ...


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        ValueError: names the span of the ids.
    """
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"an id of {min(ids)}..{max(ids)} is outside the vocabulary of {vocab_size}")


def check_room(used: int, count: int, context_length: int) -> None:
    """Refuse more tokens than the cache has room for.

    Raises:
        ValueError: names the three numbers.
    """
    if used + count > context_length:
        raise ValueError(f"{used} + {count} tokens exceed the context of {context_length}")


def generate(
    session: Session, eos_ids: Sequence[int], ids: Sequence[int], max_tokens: int, temperature: float, seed: int
) -> Iterator[int]:
    """``Session.generate`` for any runtime: new tokens until one of ``eos_ids``, ``max_tokens``, or a full cache."""
    rng = np.random.default_rng(seed)
    session.reset()
    logits = session.prefill(ids)
    for count in range(1, max_tokens + 1):
        token = sample(logits, temperature, rng)
        if token in eos_ids:
            return
        yield token
        if count == max_tokens or len(ids) + count > session.context_length:
            return
        logits = session.decode(token)


def greedy(session: Session, eos_ids: Collection[int], ids: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Greedy tokens behind some ids, until one of ``eos_ids``; each with its logit's lead over the next one's."""
    session.reset()
    logits = session.prefill(ids)
    while (token := int(logits.argmax())) not in eos_ids:
        second, first = np.partition(logits, -2)[-2:]
        yield token, float(first - second)
        logits = session.decode(token)


class Characters:
    """The text of a stream of tokens, holding back bytes until their UTF-8 character is whole."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that a token completes."""
        return self._decoder.decode(self._session.token_bytes(token))

    def finish(self) -> str:
        """What stands for the bytes that nothing has completed."""
        return self._decoder.decode(b"", final=True)


def sample(logits: np.ndarray, temperature: float, rng: np.random.Generator, top_p: float = 1.0) -> int:
    """One token from logits ``(V,)``: the most likely at temperature 0, else drawn from the softened distribution.

    Args:
        top_p: draw among the fewest most likely tokens whose probabilities reach this sum.
    """
    if temperature <= 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / temperature
    weights = np.exp(scaled, dtype=np.float64)
    probabilities = weights / weights.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        kept = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1]
        return int(rng.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
    return int(rng.choice(len(weights), p=probabilities))
