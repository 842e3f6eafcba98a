"""Answers of any session, token by token: sampling, texts that end them, a grammar, and a cache that keeps what two
prompts begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from .conversation import Stops
from .session import Characters, Session, sample

_PIECE = 512
"""Ids of a prompt that are fed between two looks at whether anybody still waits."""


class Constraint(Protocol):
    """What an answer must be, such as JSON of a schema."""

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits ``(V,)``, minus infinity where a token cannot come next."""
        ...

    def take(self, token: int) -> bool:
        """The next token; whether the answer is complete and can only end."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn, and when it ends."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: Sequence[str] = ()
    top_logprobs: int | None = None
    """How many of the most likely tokens are told at each place; None: no probability is."""
    echo: bool = False
    """The answer begins with the prompt, whose tokens are told as its own are."""


class Token(NamedTuple):
    """A token of an answer; its log-probability, and the most likely ones, where they were asked for."""

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Ending(NamedTuple):
    """How an answer ended."""

    reason: Literal["stop", "length"]
    tokens: int
    """That were drawn, the end-of-sequence token excluded."""
    kept: int
    """Tokens of the prompt that were in the cache."""


class Piece(NamedTuple):
    """The next text of an answer, and the tokens whose text is out with it; the last piece has the ending."""

    text: str
    tokens: Sequence[Token] = ()
    ending: Ending | None = None


class Cache:
    """A session's cache, and what it holds. Nobody else may use the session meanwhile."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._held: list[int] = []

    def keep(self, ids: Sequence[int]) -> int:
        """Leave in the cache what it shares with the beginning of some ids; how many that are."""
        pairs = zip(self._held, ids, strict=False)
        shared = min(len(self._held), len(ids))
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
        held, self._held = self._held, []  # what an error leaves behind is not known
        if common:
            common = self.session.rewind(common)
        self._held = held[:common]
        return common

    def feed(self, ids: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Append ids; logits of the last ``(V,)``, or of all ``(T, V)``."""
        held, self._held = self._held, []
        if not held:  # or not known
            self.session.reset()
        one = len(ids) == 1 and not all_logits
        logits = self.session.decode(ids[0]) if one else self.session.prefill(ids, all_logits=all_logits)
        held += ids
        self._held = held
        return logits


class Generator:
    """Answers one prompt after another."""

    def __init__(self, session: Session, eos_ids: Sequence[int]) -> None:
        self.session, self.cache = session, Cache(session)
        self._eos_ids = frozenset(eos_ids)

    def answer(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        constraint: Constraint | None = None,
        *,
        keep: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Piece]:
        """Pieces of the answer to a prompt that leaves room for one; without the last one when it was cancelled.

        Args:
            keep: feed the prompt behind what the cache shares with it. A runtime that computes in other pieces rounds
                otherwise, so only without does an answer depend on nothing that was asked before.
            cancelled: asked before every token, and every few hundred of the prompt.
        """
        keep = keep and not sampling.echo
        kept = self.cache.keep(ids[:-1] if keep else [])  # the last one's logits are wanted
        logits, told = self._prompt(ids[kept:], sampling, cancelled)
        if logits is None:
            return
        if sampling.echo:
            yield Piece(b"".join(map(self.session.token_bytes, ids)).decode("utf-8", "replace"), told)
        rng, out = np.random.default_rng(sampling.seed), _Text(self.session, sampling.stops)
        most = min(sampling.max_tokens, self.session.context_length - len(ids) + 1)
        for count in range(1, most + 1):
            if cancelled():
                return
            allowed = logits if constraint is None else constraint.mask(logits)
            token = sample(allowed, sampling.temperature, rng, sampling.top_p)
            if token in self._eos_ids:
                yield out.finish(Ending("stop", count - 1, kept))
                return
            complete = constraint is not None and constraint.take(token)
            yield out.feed(_told(token, logits, sampling.top_logprobs))
            if complete or out.stopped:
                yield out.finish(Ending("stop", count, kept))
                return
            if count < most:
                logits = self.cache.feed([token])
        yield out.finish(Ending("length", most, kept))

    def _prompt(
        self, ids: Sequence[int], sampling: Sampling, cancelled: Callable[[], bool]
    ) -> tuple[np.ndarray | None, list[Token]]:
        """Logits behind the rest of a prompt, None where nobody waits for them any more; and its tokens, where they are
        echoed."""
        logits: np.ndarray | None = None
        told: list[Token] = []
        for start in range(0, len(ids), _PIECE):
            if cancelled():
                return None, told
            piece = ids[start : start + _PIECE]
            if not sampling.echo:
                logits = self.cache.feed(piece)
                continue
            rows = self.cache.feed(piece, all_logits=True)
            before = [logits, *rows[:-1]]
            told += [_told(i, row, sampling.top_logprobs) for i, row in zip(piece, before, strict=True)]
            logits = rows[-1].copy()
        return logits, told


class _Text:
    """Tokens as text; each leaves when its text has."""

    def __init__(self, session: Session, stops: Sequence[str]) -> None:
        self._characters, self._stops = Characters(session), Stops(stops)
        self._waiting: list[tuple[int, int, Token]] = []
        """Tokens that are not out, each with where its text begins and ends."""
        self._read = self._shown = 0

    @property
    def stopped(self) -> bool:
        return self._stops.found is not None

    def feed(self, token: Token) -> Piece:
        text = self._characters.feed(token.id)
        begin, self._read = self._read, self._read + len(text)
        self._waiting.append((begin, self._read, token))
        return self._out(self._stops.feed(text))

    def finish(self, ending: Ending) -> Piece:
        """What was held back, where no text has ended the answer."""
        if self.stopped:
            return Piece("", (), ending)
        rest = self._stops.feed(self._characters.finish()) + self._stops.finish()
        return Piece(rest, [token for _, _, token in self._waiting], ending)

    def _out(self, text: str) -> Piece:
        self._shown += len(text)
        # A text that ends the answer takes the tokens along that are wholly in or behind it.
        count = sum(begin < self._shown if self.stopped else end <= self._shown for begin, end, _ in self._waiting)
        out, self._waiting = self._waiting[:count], self._waiting[count:]
        return Piece(text, [token for _, _, token in out])


def _told(token: int, logits: np.ndarray | None, top: int | None) -> Token:
    """A token with what was asked of its probability, by the model's own logits."""
    if top is None or logits is None:
        return Token(token)
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    # The whole order of a large vocabulary costs more than the model's own work for the token.
    least = np.partition(logprobs, -top)[-top] if 0 < top < len(logprobs) else -np.inf
    likely = np.flatnonzero(logprobs >= least)
    best = likely[np.argsort(-logprobs[likely], kind="stable")[:top]]
    return Token(token, float(logprobs[token]), [(int(i), float(logprobs[i])) for i in best])
