"""Answers that are JSON of a schema, by llguidance."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np

from ..errors import EdgekdError, MissingExtra
from ..files import Json
from ..generation import Constraint
from ..manifest import Contract
from ..session import Session

_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python writes JSON: a small model that may put white space anywhere does not come to an end."""


class BadGrammar(EdgekdError):
    """A schema that nothing can be written by."""


class Grammars:
    """The grammars of one artifact's vocabulary."""

    def __init__(self, session: Session, contract: Contract) -> None:
        self._session, self._contract = session, contract
        self._lock = threading.Lock()
        self._made: Any = None

    def json(self, schema: Json) -> Constraint:
        """What JSON of a schema must be.

        Raises:
            BadGrammar: the schema is in error, or uses what llguidance does not know.
            MissingExtra: llguidance is not installed.
        """
        tokenizer = self._tokenizer()
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_STYLE)
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise BadGrammar(f"the JSON schema cannot be followed: {_first_line(matcher.get_error())}.")
        return _Matching(matcher, self._contract.vocab_size)

    def _tokenizer(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def _make(self) -> Any:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError as error:
            raise MissingExtra("llguidance", "serve") from error
        eos = self._contract.eos_ids
        if not eos:
            raise BadGrammar("the artifact has no end-of-sequence token, by which JSON would end.")
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._session, self._contract)), eos_token=eos)


class _Vocabulary:
    """The artifact's tokens, as llguidance asks for them."""

    def __init__(self, session: Session, contract: Contract) -> None:
        self._session = session
        self.eos_token_id, self.bos_token_id = contract.eos_ids[0], contract.bos_id
        self.tokens = [session.token_bytes(token) for token in range(contract.vocab_size)]
        self.special_token_ids = sorted({*(contract.special_ids or {}).values(), *contract.eos_ids})

    def __call__(self, text: str) -> list[int]:
        return self._session.tokenize(text)


class _Matching:
    """The grammar's place behind the tokens so far."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self, logits: np.ndarray) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)
        if self._matcher.is_error() or not allowed.any():
            raise EdgekdError(f"the JSON schema cannot be followed further: {_first_line(self._matcher.get_error())}.")
        return np.where(allowed, logits, -np.inf)

    def take(self, token: int) -> bool:
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300].rstrip(".") or "it gave no reason"
