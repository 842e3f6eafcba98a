"""What clients are told, in OpenAI's forms."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..files import Json
from ..generation import Ending, Piece, Token
from ..session import Session


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """An error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass
class Reply:
    """The form of one answer, whole or in chunks."""

    session: Session
    model: str
    fingerprint: str
    prompt_tokens: int
    wants_logprobs: bool

    KIND: ClassVar[str]
    CHUNK_KIND: ClassVar[str]
    ID: ClassVar[str]

    def __post_init__(self) -> None:
        self._id, self._created = f"{self.ID}-{secrets.token_hex(12)}", int(time.time())

    def _envelope(self, kind: str, **rest: Any) -> Json:
        told = {"id": self._id, "object": kind, "created": self._created, "model": self.model}
        return {**told, "system_fingerprint": self.fingerprint, **rest}

    def _usage(self, ending: Ending) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": ending.tokens,
            "total_tokens": self.prompt_tokens + ending.tokens,
            "prompt_tokens_details": {"cached_tokens": ending.kept},
        }

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """An answer at once."""
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        ending = pieces[-1].ending
        assert ending
        choice = {"index": 0, **self._said(text), "logprobs": self._logprobs(tokens), "finish_reason": ending.reason}
        return self._envelope(self.KIND, choices=[choice], usage=self._usage(ending))

    def chunks(self, pieces: Sequence[Piece], usage: bool) -> Iterable[Json]:
        """Pieces of an answer as chunks: one for all that are here, then that of the ending, and what was used.

        Args:
            usage: the client wants to be told, in a chunk of its own; all others say null.
        """
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens] if self.wants_logprobs else []
        null = {"usage": None} if usage else {}
        if text or tokens:
            yield self._chunk(self._delta(text), self._logprobs(tokens), None, null)
        if ending := pieces[-1].ending:
            yield self._chunk(self._delta(None), None, ending.reason, null)
            if usage:
                yield self._envelope(self.CHUNK_KIND, choices=[], usage=self._usage(ending))

    def _chunk(self, said: Json, logprobs: Any, reason: str | None, rest: Json) -> Json:
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": reason}
        return self._envelope(self.CHUNK_KIND, choices=[choice], **rest)

    def first(self, usage: bool) -> Iterable[Json]:
        """Chunks before the first text."""
        return ()

    def _said(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, text: str | None) -> Json:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        raise NotImplementedError

    def _text(self, token: int) -> str:
        return self.session.token_bytes(token).decode("utf-8", "replace")


class ChatReply(Reply):
    """``/v1/chat/completions``."""

    KIND, CHUNK_KIND, ID = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self, usage: bool) -> Iterable[Json]:
        """Who speaks."""
        null = {"usage": None} if usage else {}
        yield self._chunk({"delta": {"role": "assistant", "content": ""}}, None, None, null)

    def _said(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str | None) -> Json:
        return {"delta": {} if text is None else {"content": text}}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.wants_logprobs:
            return None
        entries = [
            {**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*other) for other in t.top]} for t in tokens
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self.session.token_bytes(token))}


class CompletionReply(Reply):
    """``/v1/completions``."""

    KIND, CHUNK_KIND, ID = "text_completion", "text_completion", "cmpl"
    tokens_as_ids = False
    """Tokens are told by their ids, as vLLM does: no two are the same, and none is half a character."""
    _offset = 0

    def _said(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str | None) -> Json:
        return {"text": text or ""}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.wants_logprobs:
            return None
        texts, offsets = [self._text(token.id) for token in tokens], []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> Json | None:
        """The likeliest in its place; none of the first of a prompt, which follows nothing."""
        return None if token.logprob is None else {self._name(i): logprob for i, logprob in token.top}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.tokens_as_ids else self._text(token)
