"""The terms of a benchmark, each as one expression over the clock's readings of one request.

The words are those of the industry's load generators (NVIDIA AIPerf, MLPerf):

- **TTFT**, time to first token: from the text in hand to the first whole UTF-8 character out, tokenizer included.
- **first token**: from the ids in hand to the first token chosen; what a tokenizer or a split character costs is not
  in it.
- **ITL**, inter-token latency: (latency − TTFT) ÷ (tokens − 1), one number a request.
- **ICL**, inter-chunk latency: the gaps between pieces of text as a user sees them come; its percentiles are apart.
- **prefill** is what reads the prompt, **decode** what writes behind it: their tokens and seconds are never mixed.

``docs/benchmarking.md`` says the same in words, with a drawing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from ..errors import EdgekdError
from ..session import Characters, Session, sample

MOST_SILENT_TOKENS = 16
"""That are waited for when a first character is looked for: more have no text at all."""


@dataclass(frozen=True)
class Request:
    """What the clock said while one request was served, in seconds."""

    prompt_tokens: int
    text_in: float
    ids_ready: float
    prefilled: float
    """The logits behind the last token of the prompt are there."""
    decoded: Sequence[float]
    """The logits of each further token are there."""
    chosen: Sequence[float]
    """Each token is chosen; the first of them from the prompt's logits."""
    chunks: Sequence[float]
    """Each piece of whole characters is out."""

    @property
    def tokenize_s(self) -> float:
        """From the text to its ids."""
        return self.ids_ready - self.text_in

    @property
    def prefill_s(self) -> float:
        """From the ids to the logits behind the last of them."""
        return self.prefilled - self.ids_ready

    @property
    def first_token_s(self) -> float:
        """From the ids to the first token chosen."""
        return self.chosen[0] - self.ids_ready

    @property
    def ttft_s(self) -> float | None:
        """From the text to the first whole character; None where no token had text."""
        return self.chunks[0] - self.text_in if self.chunks else None

    @property
    def latency_s(self) -> float:
        """From the text to the last token chosen."""
        return self.chosen[-1] - self.text_in

    @property
    def itl_s(self) -> float | None:
        """Inter-token latency as AIPerf has it; None for a single token, or none with text."""
        if self.ttft_s is None or len(self.chosen) < 2:
            return None
        return (self.latency_s - self.ttft_s) / (len(self.chosen) - 1)

    @property
    def icl_s(self) -> list[float]:
        """Gaps between pieces of text."""
        return [later - earlier for earlier, later in pairwise(self.chunks)]

    @property
    def decode_s(self) -> float:
        """From the first token chosen to the last: the time of ``decode_tokens``."""
        return self.chosen[-1] - self.chosen[0]

    @property
    def decode_tokens(self) -> int:
        """Tokens that decoding gave; the first came from prefill."""
        return len(self.chosen) - 1

    @property
    def sampling_s(self) -> list[float]:
        """From a token's logits to the token, for each that was decoded."""
        return [chosen - logits for logits, chosen in zip(self.decoded, self.chosen[1:], strict=True)]


def serve(
    session: Session,
    text: str,
    decode_tokens: int,
    *,
    until_text: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Request:
    """Serve one greedy request with a stopwatch; the end of a text does not end it.

    Args:
        decode_tokens: to decode behind the first token.
        until_text: stop at the first whole character instead; ``decode_tokens`` counts as silent tokens at most.
    """
    rng = np.random.default_rng(0)
    characters = Characters(session)
    decoded, chosen, chunks = list[float](), list[float](), list[float]()

    def choose(logits: np.ndarray) -> int:
        token = sample(logits, 0.0, rng)
        chosen.append(clock())
        if characters.feed(token):
            chunks.append(clock())
        return token

    session.reset()
    text_in = clock()
    ids = session.tokenize(text)
    ids_ready = clock()
    logits = session.prefill(ids)
    prefilled = clock()
    token = choose(logits)
    while len(chosen) <= decode_tokens and not (until_text and chunks):
        logits = session.decode(token)
        decoded.append(clock())
        token = choose(logits)
    return Request(len(ids), text_in, ids_ready, prefilled, decoded, chosen, chunks)


def first_text(session: Session, text: str, room: int) -> Request:
    """Serve a request up to its first whole character.

    Args:
        room: tokens that the context has left behind the prompt.
    """
    return serve(session, text, min(MOST_SILENT_TOKENS, room), until_text=True)


@cache
def _english() -> str:
    """Python's own reference, 600,000 characters that are on every machine."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def real_text(session: Session, tokens: int) -> str:
    """English text that the session's tokenizer reads as exactly so many tokens.

    Raises:
        EdgekdError: no stretch of the text has so many.
    """
    english = _english()
    for start in range(0, 4096, 64):
        # Twenty characters a token are more than any vocabulary makes of prose.
        repeated = english[start:] * (1 + 20 * tokens // len(english))
        if (end := _end_of(session, repeated, tokens)) is not None:
            return repeated[:end]
    raise EdgekdError(f"the artifact's tokenizer makes {tokens} tokens of no text.", "Export the artifact again.")


def _end_of(session: Session, text: str, tokens: int) -> int | None:
    """Length of a beginning of ``text`` that has so many tokens: the count hardly ever falls with the length."""

    def count(end: int) -> int:
        return len(session.tokenize(text[:end]))

    high = tokens
    while count(high) < tokens:
        if high >= len(text):
            return None
        high = min(2 * high, len(text))
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(middle) < tokens else (low, middle)
    return next((end for end in range(max(1, low - 4), min(low + 8, len(text)) + 1) if count(end) == tokens), None)
