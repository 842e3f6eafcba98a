"""Golden answers: what an artifact said where it was verified, for an app to hear again on the device it runs on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice, takewhile

import numpy as np

from ..conversation import chat_ids, render_chat, text_ids
from ..manifest import Contract
from ..proof import GoldenAnswer
from ..session import Session, greedy

ANSWERS, WINDOWS = 4, 16
PROMPT_TOKENS, ANSWER_TOKENS = 32, 16
LEAD = 0.5
"""Of the most likely token's logit over the second's. Builds of one runtime for other instruction sets differ by
tenths: where two tokens are nearer, either is right."""
TEXTS = (
    "Hello, world!",
    "Grüße, 世界 👨\u200d👩\u200d👧\u200d👦 e\u0301",
    "3.14 <|im_end|> </s>",
    "\n\n  ",
    "  def f(x):\n\treturn x + 1\n",
)
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def golden_answers(session: Session, eos_ids: Collection[int], windows: np.ndarray) -> list[GoldenAnswer]:
    """Greedy tokens behind the beginnings of held-out windows, as far as no build of the runtime may differ.

    Args:
        windows: int ``(N, T)``.

    Returns:
        The longest answers.
    """
    room = session.context_length - ANSWER_TOKENS
    prompts = [ids[: min(PROMPT_TOKENS, room)].tolist() for ids in windows[:WINDOWS]]
    answers = [GoldenAnswer(prompt_ids=ids, tokens=_tokens(session, eos_ids, ids)) for ids in prompts]
    longest = sorted(answers, key=lambda answer: len(answer.tokens), reverse=True)[:ANSWERS]
    return [answer for answer in longest if answer.tokens]


def golden_texts(session: Session, contract: Contract) -> list[GoldenAnswer]:
    """Ids of texts and of a chat, which an app's tokenizer and template must give too, and what follows the last."""
    answers = [GoldenAnswer(prompt_ids=text_ids(session, contract, text), tokens=[], text=text) for text in TEXTS]
    template = contract.chat_template
    # A template that asks for the day renders another text tomorrow.
    if template is not None and contract.special_ids is not None and "strftime_now" not in template:
        text = render_chat(template, CHAT, contract.special_tokens)
        answers += [GoldenAnswer(prompt_ids=chat_ids(session, contract, text), tokens=[], text=text, messages=CHAT)]
    fitting = [answer for answer in answers if 0 < len(answer.prompt_ids) < session.context_length]
    for last in fitting[-1:]:
        tokens = _tokens(session, contract.eos_ids, last.prompt_ids)
        fitting[-1] = last.model_copy(update={"tokens": tokens})
    return fitting


def _tokens(session: Session, eos_ids: Collection[int], prompt: Sequence[int]) -> list[int]:
    """What follows up to the first near tie, which is not among them."""
    clear = takewhile(lambda told: told[1] >= LEAD, greedy(session, eos_ids, prompt))
    return [token for token, _ in islice(clear, min(ANSWER_TOKENS, session.context_length - len(prompt)))]
