"""Every term of a benchmark against a session whose times are known."""

from __future__ import annotations

import time

import numpy as np
import pytest

from edgekd.benchmarks.definitions import first_text, real_text, serve
from edgekd.errors import EdgekdError
from scripted import spoken

pytestmark = pytest.mark.alone

TOKENIZE_S, PREFILL_S, DECODE_S = 0.010, 0.003, 0.004  # of a text, of a token, of a token
SPOKEN = "é=1\n"  # é is two tokens of a byte: the first has no whole character


class KnownTimes:
    """Bytes as tokens; it always says SPOKEN, over and over, and takes known times for everything."""

    vocab_size, context_length = 257, 64

    def __init__(self, sleep):
        self.sleep, self.said = sleep, 0

    def tokenize(self, text, *, start=True):
        self.sleep(TOKENIZE_S)
        return list(text.encode())

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else b""

    def reset(self):
        self.said = 0

    def _logits(self):
        logits = np.zeros(257, np.float32)
        spoken = SPOKEN.encode()
        logits[spoken[self.said % len(spoken)]] = 1
        self.said += 1
        return logits

    def prefill(self, ids):
        self.sleep(PREFILL_S * len(ids))
        return self._logits()

    def decode(self, token):
        self.sleep(DECODE_S)
        return self._logits()


class Clock:
    """A clock that only the session moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def check(request, tolerance):
    """The definitions, written out by hand for a prompt of 3 tokens and 8 decoded ones behind the first."""

    def is_about(value, expected):
        assert value == pytest.approx(expected, abs=tolerance)

    is_about(request.tokenize_s, TOKENIZE_S)
    is_about(request.prefill_s, 3 * PREFILL_S)
    is_about(request.first_token_s, 3 * PREFILL_S)
    is_about(request.ttft_s, TOKENIZE_S + 3 * PREFILL_S + DECODE_S)  # é is whole with the second token
    is_about(request.latency_s, TOKENIZE_S + 3 * PREFILL_S + 8 * DECODE_S)
    is_about(request.itl_s, (request.latency_s - request.ttft_s) / 8)  # AIPerf: 9 tokens
    is_about(request.itl_s, 7 * DECODE_S / 8)
    is_about(request.decode_s, 8 * DECODE_S)
    assert request.decode_tokens == 8 and request.prompt_tokens == 3
    # é, =, 1, newline, then é again: two tokens for one chunk.
    gaps = [DECODE_S, DECODE_S, DECODE_S, 2 * DECODE_S, DECODE_S]
    assert len(request.icl_s) >= len(gaps)
    for gap, expected in zip(request.icl_s, gaps, strict=False):
        is_about(gap, expected)
    assert len(request.sampling_s) == 8
    for seconds in request.sampling_s:
        is_about(seconds, 0)


def test_the_definitions_exactly():
    clock = Clock()
    check(serve(KnownTimes(clock.sleep), "abc", 8, clock=clock), 1e-9)


def test_the_definitions_within_2_ms_of_real_sleeps():
    """A busy machine may wake a sleeper late: one undisturbed request of many is asked for."""
    for _ in range(40):
        try:
            return check(serve(KnownTimes(time.sleep), "abc", 8), 0.002)
        except AssertionError as error:
            last = error
    raise last


def test_first_text_ends_with_the_first_whole_character():
    clock = Clock()
    session = KnownTimes(clock.sleep)
    request = first_text(session, "abc", 8)
    assert len(request.chosen) == 2 and len(request.chunks) == 1
    assert spoken(session, SPOKEN.encode()[:2]) == "é"


def test_tokens_without_text_have_no_ttft():
    class Silent(KnownTimes):
        def token_bytes(self, token):
            return b""

    request = first_text(Silent(lambda _: None), "abc", 5)
    assert request.ttft_s is None and request.itl_s is None and len(request.chosen) == 6


@pytest.mark.parametrize("tokens", [1, 2, 31, 500, 5000])
def test_text_of_a_length_has_that_length_and_is_english(tokens):
    session = KnownTimes(lambda _: None)
    text = real_text(session, tokens)
    assert len(session.tokenize(text)) == tokens
    assert tokens < 5000 or " the " in text


def test_text_of_a_tokenizer_that_merges_and_of_one_that_reads_nothing():
    class Words(KnownTimes):
        def tokenize(self, text, *, start=True):
            return [len(word) % 256 for word in text.split()]

    assert len(Words(None).tokenize(real_text(Words(None), 300_000))) == 300_000  # more than the text has

    class Deaf(KnownTimes):
        def tokenize(self, text, *, start=True):
            return []

    with pytest.raises(EdgekdError, match="makes 4 tokens of no text"):
        real_text(Deaf(None), 4)
