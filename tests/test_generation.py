"""Answers token by token: what is drawn, what is kept in the cache, and when it ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.generation import Ending, Generator, Piece, Sampling
from edgekd.session import sample
from scripted import END, Scripted


def answers(session: Scripted, prompt: str, **options: object) -> list[Piece]:
    keep = bool(options.pop("keep", True))
    sampling = Sampling(**{"max_tokens": 99, **options})  # type: ignore[arg-type]
    return list(Generator(session, [END]).answer(session.tokenize(prompt), sampling, keep=keep))


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_an_answer_ends_by_itself_at_its_length_or_with_the_context() -> None:
    session = Scripted(lambda prompt: "hello", context_length=12)
    assert answers(session, "hi")[-1].ending == Ending("stop", 5, 0)
    assert answers(session, "hi", max_tokens=5)[-1].ending == Ending("length", 5, 0)
    assert text_of(answers(session, "hi", max_tokens=4)) == "hell"
    full = answers(session, "h" * 9)  # three more are cached, and one is drawn behind the last
    assert full[-1].ending == Ending("length", 4, 0) and text_of(full) == "hell"
    assert len(session.fed) > 9  # what ends the answer is not fed
    assert answers(Scripted(lambda prompt: ""), "hi") == [Piece("", [], Ending("stop", 0, 0))]


def test_a_text_that_ends_it_is_not_shown_nor_are_its_tokens() -> None:
    session = Scripted(lambda prompt: "one two three")
    pieces = answers(session, "hi", stops=[" two", "!"], top_logprobs=0)
    assert text_of(pieces) == "one" and pieces[-1].ending == Ending("stop", 7, 0)
    assert [chr(token.id) for piece in pieces for token in piece.tokens] == ["o", "n", "e"]
    pieces = answers(session, "hi", stops=["three!"])
    assert text_of(pieces) == "one two three" and len([t for p in pieces for t in p.tokens]) == 13


def test_a_prompt_is_read_from_where_it_differs() -> None:
    session = Scripted(lambda prompt: "ok")
    generator, sampling = Generator(session, [END]), Sampling(9)

    def kept(prompt: str, keep: bool = True) -> int:
        ending = list(generator.answer(session.tokenize(prompt), sampling, keep=keep))[-1].ending
        assert ending and session.given[-1] == prompt
        return ending.kept

    assert kept("What?") == 0
    assert kept("What?ok And?") == 7
    assert kept("What?ok Or?") == 8
    assert kept("What?ok Or?") == 10  # the last id is fed again: its logits are wanted
    assert kept("Who?") == 2
    assert kept("Who?", keep=False) == 0
    assert kept("else") == 0
    session.rewinds = False
    assert kept("elseok more") == 6 and kept("elseok less") == 0


def test_what_an_error_leaves_in_the_cache_is_forgotten() -> None:
    session = Scripted(lambda prompt: "ok")
    generator = Generator(session, [END])
    session.interrupt = RuntimeError("the runtime")
    ids = session.tokenize("hi")
    with pytest.raises(RuntimeError, match="the runtime"):
        list(generator.answer(ids, Sampling(9)))
    pieces = list(generator.answer(ids, Sampling(9)))
    assert text_of(pieces) == "ok" and pieces[-1].ending == Ending("stop", 2, 0)


def test_an_answer_that_nobody_waits_for_ends() -> None:
    session = Scripted(lambda prompt: "x" * 50, context_length=2000)
    generator, seen = Generator(session, [END]), list[Piece]()
    for piece in generator.answer(session.tokenize("hi"), Sampling(50), cancelled=lambda: len(seen) >= 5):
        seen.append(piece)
    assert text_of(seen) == "xxxxx" and seen[-1].ending is None
    session.fed.clear()  # a long prompt is given up between two of its pieces
    assert not list(generator.answer([7] * 1500, Sampling(50), cancelled=lambda: len(session.fed) == 2))
    assert session.fed == [512, 512]


def test_probabilities_are_the_models_own() -> None:
    (first, *_), logits = answers(Scripted(), "hi", top_logprobs=3, temperature=0.5), np.zeros(128)
    logits[ord("o")], logits[ord(" ")] = 10, 5
    expected = np.log(np.exp(logits) / np.exp(logits).sum())
    (token,) = first.tokens
    assert token.id == ord("o") and token.logprob == pytest.approx(expected[ord("o")])
    assert [index for index, _ in token.top] == [ord("o"), ord(" "), 0]
    assert [value for _, value in token.top] == pytest.approx([expected[ord("o")], expected[ord(" ")], expected[0]])


class Only:
    """A grammar of some letters; it is complete after the third token."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self, logits: np.ndarray) -> np.ndarray:
        return np.where(np.isin(np.arange(len(logits)), [ord("a"), ord(" ")]), logits, -np.inf)

    def take(self, token: int) -> bool:
        self.taken.append(token)
        return len(self.taken) == 3


def test_a_grammar_decides_what_can_come_and_when_it_is_over() -> None:
    session, grammar = Scripted(), Only()
    pieces = list(Generator(session, [END]).answer([7, 8], Sampling(9), grammar))
    assert text_of(pieces) == "   " and pieces[-1].ending == Ending("stop", 3, 0)
    assert grammar.taken == [ord(" ")] * 3 and session.fed == [2, 1, 1]


@given(
    st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=20),
    st.floats(0.1, 2.0),
    st.floats(0.01, 1.0),
    st.integers(0, 2**32),
)
def test_a_draw_is_among_the_fewest_tokens_that_reach_top_p(
    values: list[float], temperature: float, top_p: float, seed: int
) -> None:
    logits = np.array(values, np.float32)
    token = sample(logits, temperature, np.random.default_rng(seed), top_p)
    weights = [float(np.exp((value - max(values)) / temperature)) for value in values]
    likelier = sum(weight for weight in weights if weight > weights[token] * (1 + 1e-6))
    assert likelier / sum(weights) <= top_p * (1 + 1e-6)


def test_draws_follow_the_probabilities() -> None:
    rng, logits = np.random.default_rng(0), np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    drawn = np.bincount([sample(logits, 1.0, rng, 0.75) for _ in range(8000)], minlength=4) / 8000
    assert drawn == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
