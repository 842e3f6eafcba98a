"""Golden answers against the session's own generation, and where they end."""

import numpy as np

from edgekd.manifest import Contract
from edgekd.verify.golden import ANSWER_TOKENS, ANSWERS, CHAT, LEAD, PROMPT_TOKENS, TEXTS, golden_answers, golden_texts


class Scripted:
    """A session whose best token follows from the last one, with a lead of its own."""

    vocab_size, context_length = 12, 64

    def __init__(self, leads):
        self._leads = leads

    def reset(self):
        self.fed = []

    def prefill(self, ids):
        self.fed += ids
        logits = np.zeros(self.vocab_size, np.float32)
        logits[(ids[-1] + 1) % self.vocab_size] = self._leads[ids[-1]]
        return logits

    def decode(self, token):
        return self.prefill([token])


def test_an_answer_ends_before_its_first_near_tie_and_before_the_end_of_the_text():
    leads = [5.0] * 12
    leads[4] = LEAD - 0.01
    windows = np.array([[0, 1], [5, 6], [0, 4]])
    answers = golden_answers(Scripted(leads), {10}, windows)
    assert [(answer.prompt_ids, answer.tokens) for answer in answers] == [
        ([0, 1], [2, 3, 4]),  # behind 4 two tokens are nearly as likely
        ([5, 6], [7, 8, 9]),  # 10 ends a text
    ]  # and nothing is recorded behind [0, 4]


def test_the_longest_answers_are_kept():
    windows = np.array([[first] * (PROMPT_TOKENS + 8) for first in range(8)])
    answers = golden_answers(Scripted([5.0] * 12), {11}, windows)
    assert [len(answer.tokens) for answer in answers] == [10, 9, 8, 7] and len(answers) == ANSWERS
    assert {len(answer.prompt_ids) for answer in answers} == {PROMPT_TOKENS}
    assert len(golden_answers(Scripted([5.0] * 12), set(), windows)[0].tokens) == ANSWER_TOKENS


class Lengths(Scripted):
    """Reads a text as its length."""

    def tokenize(self, text, *, start=True):
        return [len(text) % 8]


TEMPLATE = "{{ messages[0].content }}<e>"
CONTRACT = Contract(
    context_length=64,
    vocab_size=12,
    bos_id=9,
    eos_ids=[11],
    add_bos=True,
    chat_template=TEMPLATE,
    special_ids={"<e>": 7},
)


def test_texts_and_a_chat_have_their_ids_and_the_last_is_followed():
    *texts, chat = golden_texts(Lengths([5.0] * 12), CONTRACT)
    assert [(answer.text, answer.prompt_ids, answer.tokens) for answer in texts] == [
        (text, [9, len(text) % 8], []) for text in TEXTS
    ]
    question = CHAT[0]["content"]
    assert (chat.text, chat.messages) == (f"{question}<e>", CHAT)
    assert chat.prompt_ids == [len(question) % 8, 7] and chat.tokens == [8, 9, 10]
    for template in (None, "{{ strftime_now('%d') }}" + TEMPLATE):  # the second renders another text tomorrow
        last = golden_texts(Lengths([5.0] * 12), CONTRACT.model_copy(update={"chat_template": template}))[-1]
        begin = len(TEXTS[-1]) % 8
        assert last.text == TEXTS[-1] and last.messages is None and last.tokens == list(range(begin + 1, 11))


def test_a_text_that_fills_the_context_is_left_out():
    short = Lengths([5.0] * 12)
    short.context_length = 2
    (only,) = golden_texts(short, CONTRACT.model_copy(update={"special_ids": {}}))
    assert only.messages == CHAT and len(only.prompt_ids) == 1 and len(only.tokens) == 1


def test_logits_that_are_no_numbers_are_no_answer():
    assert golden_answers(Scripted([float("nan")] * 12), set(), np.array([[0, 1]])) == []
