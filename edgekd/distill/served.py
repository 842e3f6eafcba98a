"""A teacher that a server runs, by OpenAI's interface: what it says of a text is asked of ``/v1/completions``.

A server tells the likeliest tokens of each place, and of all the others only that they are the rest. A loss is then one
of K + 1 outcomes: it is at most the loss over the whole vocabulary, and says nothing of the order among the others.

The text is sent as ids, and the server's ids are compared with them: another tokenizer is found out at once.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import torch
from torch import Tensor

from ..errors import EdgekdError, SpecError
from .losses import FLOOR, Buckets
from .pack import documents

if TYPE_CHECKING:
    from ..spec import ServedSpec

_AT_ONCE = 8
_MOST_BYTES = 2**28
_PAUSES_S = (1.0, 4.0)
"""Before a server that is busy, or whose connection broke, is asked again."""
_ID = "token_id:"
_TOLERANCE = 1e-3


def access_key(spec: ServedSpec) -> str | None:
    """The key that the server wants, from the environment variable that the spec names.

    Raises:
        SpecError: it is not set.
    """
    if spec.key_variable is None:
        return None
    key = os.environ.get(spec.key_variable, "")
    if not key.isascii() or not key.strip():
        raise SpecError(
            f"teacher.served.key_variable: the environment has no {spec.key_variable}.",
            f"Set it: export {spec.key_variable}=...",
        )
    return key.strip()


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher signal by a server's log-probabilities.

    Args:
        model: its name there.
        vocab_size: of the student's tokenizer, which is the server's too.
    """

    spec: ServedSpec
    model: str
    vocab_size: int

    def teach(self, ids: Tensor, index: Tensor | None, positions: Tensor | None = None) -> Buckets:
        """What the server says of each document; see ``TeacherSignal``.

        Raises:
            EdgekdError: it does not answer, or not as it should.
        """
        each = [*documents(ids, positions)]
        given = [ids[row, start:end].tolist() for row, start, end in each]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            told = [*pool.map(self._told, given)]
        top = self.spec.top_logprobs
        named = torch.arange(top).expand(*ids.shape, top).contiguous()
        logs = torch.full((*ids.shape, top + 1), -torch.log(torch.tensor(top + 1.0)).item())  # nobody asked
        for (row, start, end), places in zip(each, told, strict=True):
            for place, (of_place, log_probs) in zip(range(start, end - 1), places, strict=True):
                named[row, place] = torch.tensor(of_place)
                logs[row, place] = torch.tensor(log_probs)
        return Buckets(named.to(ids.device), logs.to(ids.device))

    def _told(self, ids: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Of every token of a text but the first: the likeliest ids, their log-probabilities, and that of the rest."""
        if len(ids) < 2:
            return []
        answer = self._ask(
            {
                "model": self.model,
                "prompt": list(ids),
                "max_tokens": 1,
                "temperature": 0,
                "echo": True,
                "logprobs": self.spec.top_logprobs,
                "return_tokens_as_token_ids": True,
            }
        )
        try:
            told = answer["choices"][0]["logprobs"]
            tokens, places = told["tokens"], told["top_logprobs"]
            if not isinstance(tokens, list) or not isinstance(places, list):
                raise TypeError
        except (KeyError, IndexError, TypeError) as error:
            raise self._error("its answer has no log-probabilities of the prompt (echo with logprobs)") from error
        self._check_ids([self._id(token) for token in tokens[: len(ids)]], ids)
        if len(places) < len(ids):
            raise self._error(f"it told of {len(places)} of {len(ids)} tokens of the prompt")
        return [self._place(place) for place in places[1 : len(ids)]]

    def _check_ids(self, told: Sequence[int], ids: Sequence[int]) -> None:
        differs = next((i for i, (a, b) in enumerate(zip(told, ids, strict=False)) if a != b), min(len(told), len(ids)))
        if differs < len(ids):
            found = told[differs] if differs < len(told) else "none"
            raise self._error(f"it reads the text as other tokens: id {ids[differs]} was sent, it has {found}")

    def _place(self, place: Any) -> tuple[list[int], list[float]]:
        """The likeliest ids of a place, their log-probabilities, and that of all others."""
        top = self.spec.top_logprobs
        if not isinstance(place, dict) or not all(
            isinstance(x, float | int) and x <= _TOLERANCE for x in place.values()
        ):
            raise self._error("what it tells of a token are no log-probabilities")
        best = sorted(((log, self._id(token)) for token, log in place.items()), reverse=True)[:top]
        if len(best) < top:
            raise self._error(
                f"it gives {len(best)} log-probabilities of a token, not {top}", "Lower teacher.served.top_logprobs."
            )
        known = {token: min(0.0, max(FLOOR, float(log))) for log, token in best if token < self.vocab_size}
        for other in count():  # in the place of padding: an id of no probability
            if len(known) == top:
                break
            known.setdefault(other, FLOOR)
        logs = torch.tensor([*known.values()], dtype=torch.float64)
        rest = 1 - float(logs.exp().sum())
        if rest < -_TOLERANCE:
            raise self._error("its probabilities add up to more than one")
        return [*known], [*known.values(), float(torch.tensor(max(rest, 1e-9)).log())]

    def _id(self, token: object) -> int:
        if isinstance(token, str) and token.startswith(_ID) and token.removeprefix(_ID).isdecimal():
            return int(token.removeprefix(_ID))
        raise self._error(f"it tells tokens as texts, not by their ids ({token!r:.40})")

    def _ask(self, body: dict[str, object]) -> Any:
        """The server's answer; a busy one is asked again."""
        for pause in (*_PAUSES_S, None):
            try:
                status, data = _post(self.spec, json.dumps(body).encode(), access_key(self.spec))
            except TimeoutError as error:
                said = f"no answer in {self.spec.timeout_s:g} s"
                raise self._error(said, "Raise teacher.served.timeout_s, or lower data.context.") from error
            except (OSError, http.client.HTTPException) as error:
                status, data, reason = 0, b"", f"it cannot be reached: {error or type(error).__name__}"
            else:
                reason = f"it answers {status} {_said(data)}"
            if status == HTTPStatus.OK:
                return self._json(data)
            if pause is None or (status and status != HTTPStatus.TOO_MANY_REQUESTS and status < 500):
                break
            time.sleep(pause)
        unknown = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        raise self._error(reason, "Name its key with teacher.served.key_variable." if unknown else _REMEDY)

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._error("its answer is no JSON") from error

    def _error(self, words: str, remedy: str = "") -> EdgekdError:
        return EdgekdError(f"teacher.served {self.spec.url}, model {self.model}: {words}.", remedy or _REMEDY)


_REMEDY = "It must give log-probabilities of a prompt's ids, as vLLM and edgekd serve do; the same command goes on."


def _post(spec: ServedSpec, body: bytes, key: str | None) -> tuple[int, bytes]:
    """Status and body of the answer. No redirection is followed: the text goes where the spec says alone."""
    url = urlsplit(spec.url)
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    connection = _connection(url, spec.timeout_s)
    try:
        connection.request("POST", f"{url.path.rstrip('/')}/completions", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(_MOST_BYTES)
    finally:
        connection.close()


def _connection(url: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname or "", url.port, timeout=timeout_s)


def _said(data: bytes) -> str:
    """What a server says of an error, in one line."""
    try:
        text = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = data.decode("utf-8", "replace")
    return " ".join(str(text).split())[:200]
