"""Any session as lm-evaluation-harness wants a model: log-likelihoods of continuations, and answers.

Imported where the package is known to be installed. Its numbers are those that the harness's own class for transformers
gives: the same ids are scored, from the same context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..conversation import ChatTemplate, Message, chat_ids, text_ids
from ..errors import EdgekdError
from ..files import Json
from ..generation import Generator, Sampling
from ..manifest import Contract
from ..session import Session

_MOST_ANSWER = 256  # tokens, where a task does not say
_KNOWN = {"do_sample", "until", "max_gen_toks", "temperature", "top_p"}
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class SessionLM(TemplateLM):
    """A session at tasks.

    Args:
        chat: the tasks' questions come rendered by the chat template, whose special tokens are placed by id, and which
            brings its own BOS.
        tell: told the share of each kind of request that is done.
    """

    def __init__(
        self, session: Session, contract: Contract, *, chat: bool, tell: Callable[[float], None] = lambda share: None
    ) -> None:
        super().__init__()
        self._session, self._contract, self._chat, self._tell = session, contract, chat, tell
        self._generator = Generator(session, contract.eos_ids)

    # --- text and ids ---

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        if not self._contract.eos_ids:
            raise EdgekdError("the artifact has no end-of-sequence token.", "Export it again.")
        return self._contract.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing else does."""
        return self.eot_token_id if self._contract.bos_id is None else self._contract.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text: of a rendered chat as it stands, else behind a BOS where the contract has one."""
        if self._chat:
            return chat_ids(self._session, self._contract, string)
        if add_special_tokens is False:
            return self._session.tokenize(string)
        return text_ids(self._session, self._contract, string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does, which moves the context's trailing white space to the continuation; and where one of
        the two is then without an id, as behind a context of white space alone, or where a continuation melts into
        the context's last token, that token is scored, and stands behind at least one other."""
        bare = context.rstrip()
        if bare:
            ids = self.tok_encode(context + continuation)
            length = min(len(self.tok_encode(bare)), len(ids) - 1)
        else:
            ids, length = self.tok_encode(context + continuation), 0
        starts_with_prefix = ids[:1] == [self.prefix_token_id]
        if length < 1:
            ids, length = (ids, 1) if starts_with_prefix else ([self.prefix_token_id, *ids], 1)
        return ids[:length], ids[length:]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as its template renders it; without the prompt its last message is left open, to be gone on with."""
        template = ChatTemplate(self._contract.chat_template or "", self._contract.special_tokens)
        messages: Sequence[Message] = chat_history
        text = template.render(messages, add_generation_prompt=add_generation_prompt).text
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        last = last if last in text else last.strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the harness's record."""
        return self._contract.chat_template

    @property
    def tokenizer_name(self) -> str:
        """For the harness's record."""
        return "edgekd"

    # --- what tasks ask ---

    def _loglikelihood_tokens(self, requests: list[Scored], **_: Any) -> list[tuple[float, bool]]:
        found = []
        for number, (_texts, context, continuation) in enumerate(requests, 1):
            found.append(self._score(context, continuation))
            self._tell(number / len(requests))
        return found

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether each of its tokens is the most likely one."""
        most = self._session.context_length
        if len(continuation) > most:
            raise EdgekdError(f"a continuation of {len(continuation)} tokens exceeds the context of {most}.")
        fed = [*context, *continuation][-most - 1 : -1]  # of a longer one the beginning is cut off
        first, cache = len(fed) - len(continuation), self._generator.cache
        kept = cache.keep(fed[:first])
        if kept < first:
            cache.feed(fed[kept:first])
        rows = cache.feed(fed[first:], all_logits=True).astype(np.float64)
        shifted = rows - rows.max(-1, keepdims=True)
        logprobs = shifted[range(len(continuation)), continuation] - np.log(np.exp(shifted).sum(-1))
        return float(logprobs.sum()), bool((rows.argmax(-1) == continuation).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows as long as the context."""
        found = []
        for number, request in enumerate(requests, 1):
            windows = get_rolling_token_windows(
                token_list=self._session.tokenize(request.args[0]),  # a BOS is the prefix token, and stands once
                prefix_token=self.prefix_token_id,
                max_seq_len=self._session.context_length,
                context_len=1,
            )
            found.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
            self._tell(number / len(requests))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its texts that end it."""
        found = []
        for number, request in enumerate(requests, 1):
            found.append(self._answer(*request.args))
            self._tell(number / len(requests))
        return found

    def _answer(self, context: str, options: Json) -> str:
        given = normalize_gen_kwargs(dict(options), _MOST_ANSWER)
        if unknown := {key for key, value in given.items() if key not in _KNOWN and value not in (None, 1, False)}:
            raise EdgekdError(f"a task asks for {', '.join(sorted(unknown))}, by which edgekd cannot generate.")
        room = self._session.context_length - given["max_gen_toks"]
        if room < 1:
            raise EdgekdError(
                f"a task asks for answers of {given['max_gen_toks']} tokens; the context holds "
                f"{self._session.context_length}.",
                "Lower max_gen_toks in the task.",
            )
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        temperature = float(given.get("temperature") or 0) if given.get("do_sample") else 0.0
        stops = [text for text in given["until"] if text]
        sampling = Sampling(given["max_gen_toks"], temperature, float(given.get("top_p") or 1), seed=0, stops=stops)
        return "".join(piece.text for piece in self._generator.answer(ids, sampling))
