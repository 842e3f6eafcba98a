"""Golden answers: what an artifact said where it was verified, for an app to hear again on the device it runs on."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice, takewhile

import numpy as np

from ..proof import GoldenAnswer
from ..session import Session, greedy

ANSWERS, WINDOWS = 4, 16
PROMPT_TOKENS, ANSWER_TOKENS = 32, 16
LEAD = 0.5
"""Of the most likely token's logit over the second's. Builds of one runtime for other instruction sets differ by
tenths: where two tokens are nearer, either is right."""


def golden_answers(session: Session, eos_ids: Collection[int], windows: np.ndarray) -> list[GoldenAnswer]:
    """Greedy tokens behind the beginnings of held-out windows, as far as no build of the runtime may differ.

    Args:
        windows: int ``(N, T)``.

    Returns:
        The longest answers.
    """
    room = session.context_length - ANSWER_TOKENS
    answers = [_answer(session, eos_ids, ids[: min(PROMPT_TOKENS, room)].tolist()) for ids in windows[:WINDOWS]]
    longest = sorted(answers, key=lambda answer: len(answer.tokens), reverse=True)[:ANSWERS]
    return [answer for answer in longest if answer.tokens]


def _answer(session: Session, eos_ids: Collection[int], prompt: list[int]) -> GoldenAnswer:
    """Tokens up to the first near tie, which is not among them."""
    clear = takewhile(lambda told: told[1] >= LEAD, greedy(session, eos_ids, prompt))
    return GoldenAnswer(prompt_ids=prompt, tokens=[token for token, _ in islice(clear, ANSWER_TOKENS)])
