"""Chats as a model reads them: the one renderer of chat templates, which does what transformers' does without it.

A chat template is a program by whoever made the model. It runs in jinja2's sandbox, in a process of its own that has
little memory and little time: one that does not end, or eats memory, costs a sentence and not the caller.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from .errors import BadArtifact, EdgekdError

if TYPE_CHECKING:
    from .manifest import Contract
    from .session import Session

MOST_CPU_SECONDS = 5.0
MOST_MEMORY_BYTES = 512 * 2**20
MOST_CHARACTERS = 2**24
"""Of a rendered chat: several times what the longest context holds."""

Message = Mapping[str, object]
Span = tuple[int, int]
_WHITE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""White space as Unicode has it; Python's ``isspace`` counts four control characters more."""
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateRefused(EdgekdError):
    """A template does not render a chat; the cause ends in its own words."""

    def __init__(self, words: str) -> None:
        self.words = words
        super().__init__(f"the chat template refuses the chat: {words}.", "Change the chat, or the template.")


class TooLong(EdgekdError):
    """A text that does not fit the context."""


class Rendered(NamedTuple):
    """A chat as text."""

    text: str
    generated: list[Span]
    """The characters inside ``{% generation %}``; none where the template does not mark them."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the values it may use.

    Args:
        source: Jinja.
        special_tokens: ``bos_token``, ``eos_token`` and their like, by these names.
        now: what ``strftime_now`` tells; None: the clock.
    """

    source: str
    special_tokens: Mapping[str, str]
    now: datetime | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """A chat as transformers' ``apply_chat_template`` renders it.

        Args:
            tools: JSON schemas.
            add_generation_prompt: go on to where the assistant speaks.

        Raises:
            TemplateRefused: the template raises, or is in error.
            EdgekdError: it does not end, or its process does.
        """
        variables = {
            **self.special_tokens,
            "messages": [_as_template_reads(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        now = self.now.isoformat() if self.now else None
        answer = _WORKER.ask({"source": self.source, "variables": variables, "now": now})
        if "refused" in answer:
            raise TemplateRefused(answer["refused"])
        return Rendered(answer["text"], [(start, end) for start, end in answer["generated"]])


def render_chat(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str] | None = None,
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
) -> str:
    """A chat as its template renders it, up to where the assistant speaks; see :class:`ChatTemplate`."""
    rendered = ChatTemplate(template, special_tokens or {}).render(messages, tools=tools, add_generation_prompt=True)
    return rendered.text


def chat_ids(session: Session, contract: Contract, text: str) -> list[int]:
    """Ids of a rendered chat: special tokens are placed by id, and what is between them is text. Nothing is added: the
    template writes its own BOS, and an EOS would end it.

    Raises:
        BadArtifact: the contract does not name the special tokens.
    """
    if contract.special_ids is None:
        raise BadArtifact("the manifest does not name the special tokens.", "Export the artifact again.")
    ids: list[int] = []
    for at, part in parts(text, contract.special_ids, contract.special_strips):
        ids += [part] if isinstance(part, int) else session.tokenize(part, start=at == 0)
    return ids


def text_ids(session: Session, contract: Contract, text: str) -> list[int]:
    """Ids of a text to be gone on with, in which nothing is a special token: BOS as the contract says, and no EOS."""
    before = [contract.bos_id] if contract.add_bos and contract.bos_id is not None else []
    return before + session.tokenize(text)


def fitted_chat(
    session: Session, contract: Contract, messages: Sequence[Message], max_tokens: int
) -> tuple[list[int], list[Message]]:
    """Ids of a chat up to where the assistant speaks, and the chat: less its oldest exchanges where they would leave no
    room for an answer of ``max_tokens``, or half the context.

    Raises:
        TooLong: its last question alone has no room.
        TemplateRefused: the contract's template does.
    """
    kept = list(messages)
    while True:
        text = render_chat(contract.chat_template or "", kept, contract.special_tokens)
        ids = chat_ids(session, contract, text)
        room, shorter = session.context_length - len(ids), without_oldest(kept)
        if shorter is None or room >= min(max_tokens, session.context_length // 2):
            return check_prompt(session, ids), kept
        kept = shorter


def without_oldest(messages: Sequence[Message]) -> list[Message] | None:
    """A chat less what stands between its system messages and its second question; None where there is none."""
    roles = [message["role"] for message in messages]
    first = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
    second = next((i for i in range(first + 1, len(roles)) if roles[i] == "user"), None)
    return None if second is None else [*messages[:first], *messages[second:]]


def check_prompt(session: Session, ids: list[int]) -> list[int]:
    """The ids, where the context holds them and an answer.

    Raises:
        TooLong: it does not, or there are none.
    """
    if not 0 < len(ids) < session.context_length:
        cause = f"the text has {len(ids)} tokens, the context holds {session.context_length} with an answer."
        raise TooLong(cause, "Give a text that fits.")
    return ids


class Stops:
    """Ends a stream of text before the first of some texts; the beginning of one is held back until it is none.

    The first is the one that ends first; of those that end together, the longest.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._held = ""
        self.found: str | None = None
        """The text that has ended the stream."""

    def feed(self, piece: str) -> str:
        """What can be shown once this piece has come; nothing behind a found text."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._texts if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        held = max((self._begun(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back when the stream has ended by itself."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many of the last characters are the first ones of ``stop``."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def parts(text: str, ids: Mapping[str, int], strips: Mapping[str, str]) -> Iterator[tuple[int, int | str]]:
    """A rendered chat in its parts, each with its place: ids of special tokens, the longest where several begin, and
    the text between them."""
    end = 0
    for found in _pattern(tuple(sorted(ids, key=len, reverse=True)), tuple(sorted(strips.items()))).finditer(text):
        if found.start() > end:
            yield end, text[end : found.start()]
        yield found.start(), ids[found[0].strip(_WHITE) if found[0] not in ids else found[0]]
        end = found.end()
    if end < len(text):
        yield end, text[end:]


@lru_cache(maxsize=8)
def _pattern(special: tuple[str, ...], strips: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    """An expression for special tokens and the white space that they take along."""
    sides, white = dict(strips), f"[{re.escape(_WHITE)}]*"
    before = {text: white * (sides.get(text) in ("left", "both")) for text in special}
    after = {text: white * (sides.get(text) in ("right", "both")) for text in special}
    return re.compile("|".join(before[t] + re.escape(t) + after[t] for t in special) or r"(?!)")


def _as_template_reads(message: Message) -> dict[str, object]:
    """A message less its empty keys, its reasoning under every name that templates read it by."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


# --- the caller's side ------------------------------------------------------------------------------------------------


class _Answer(TypedDict, total=False):
    """What the process says: why it does not render, or the text."""

    refused: str
    text: str
    generated: list[Span]


class _Worker:
    """The process that renders: started when first asked, and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, object]) -> _Answer:
        """The answer to one request.

        Raises:
            EdgekdError: the process did not survive it.
        """
        try:
            line = json.dumps(request, default=_placeholder).encode() + b"\n"
        except (ValueError, RecursionError) as error:
            raise TemplateRefused(f"it cannot be written as JSON ({error})") from error
        with self._lock:
            process = self._running()
            try:
                answer = self._exchange(process, line)
            except BaseException:  # also Ctrl-C: the next request must not read this one's answer
                self._stop(process)
                raise
            if not answer:
                raise EdgekdError(*_why(self._stop(process)))
        return json.loads(answer)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():  # a forked child must not share its parent's
            command = [sys.executable, "-P", "-m", f"{__package__}.template_process"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
        return self._process

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        return process.stdout.readline()

    def _stop(self, process: subprocess.Popen[bytes]) -> int:
        self._process = None
        process.kill()  # of no effect on one that is dead
        assert process.stdin and process.stdout
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()


_WORKER = _Worker()


def _placeholder(value: Any) -> str:
    """What a template sees of a value that JSON does not have."""
    return f"<{type(value).__name__}>"


def _why(status: int) -> tuple[str, str]:
    """Cause and remedy of a template's process that ended."""
    if sys.platform != "win32" and status == -signal.SIGPROF:
        return f"the chat template does not end: stopped after {MOST_CPU_SECONDS:g} s of work.", "Change the template."
    return f"the chat template ended its process (status {status}).", "Change the template."
