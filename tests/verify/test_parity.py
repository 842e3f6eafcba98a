"""Parity against closed forms and against PyTorch's own divergence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgekd.errors import EdgekdError
from edgekd.proof import TokenCheck
from edgekd.spec import Thresholds
from edgekd.verify.parity import _compare, bootstrap_ci95, judge, measure, session_logits
from edgekd.verify.reference import remembering
from edgekd.verify.tokens import check_tokens

SAME = TokenCheck(strings=2, strings_identical=2, chats=1, chats_identical=1, round_trips=0, round_trips_identical=0)


def probabilities(reference, windows) -> np.ndarray:
    """float64 (N, T, V), by PyTorch."""
    logits = np.stack([reference(ids) for ids in windows])
    return torch.softmax(torch.from_numpy(logits).double(), -1).numpy()


LOGITS = st.floats(-500, 500, width=32) | st.just(-np.inf)


@given(arrays(np.float32, (2, 3, 17), elements=LOGITS))
def test_a_window_s_figures_are_pytorchs(logits):
    logits[..., 0] = 0  # something of every row is possible
    logits[1, logits[0] > -np.inf] = logits[1, logits[0] > -np.inf].clip(-500)  # ... and a KL has a bound
    ids = np.array([4, 0, 2])
    window = _compare(ids, *logits)
    reference, artifact = torch.from_numpy(logits).double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(artifact, reference, reduction="none", log_target=True)
    expected = torch.where(reference > -torch.inf, kl, 0.0).sum(-1).clamp_min(0)
    np.testing.assert_allclose(window.kl, expected, rtol=1e-9, atol=1e-12)
    for found, of in ((window.nll_reference, reference), (window.nll_artifact, artifact)):
        np.testing.assert_allclose(found, -of[[0, 1], ids[1:]], rtol=1e-12, atol=1e-12)
    with np.errstate(invalid="ignore"):
        difference = np.abs(logits[0].astype(float) - logits[1])
    difference = np.where(logits[0] == logits[1], 0.0, difference)
    difference = difference[np.isfinite(difference)]
    assert window.max_difference == difference.max()
    assert window.mean_difference == pytest.approx(difference.mean(), rel=1e-12)


def test_logits_of_remembered_windows_are_computed_once(reference, windows):
    asked = []

    def counting(ids):
        asked.append(ids.tobytes())
        return reference(ids)

    logits = remembering(counting, windows[:2])
    for ids in (*windows[:3], *windows[:3]):
        np.testing.assert_array_equal(logits(ids), reference(ids))
    assert sorted(asked) == sorted([ids.tobytes() for ids in windows[:3]] + [windows[2].tobytes()])


def test_the_model_against_itself(session, reference, windows):
    figures = measure(session, reference, windows, greedy_tokens=16)
    assert 0 <= figures.kl_mean < 1e-9
    assert figures.top1_agreement == 1
    assert figures.perplexity_ratio == pytest.approx(1, abs=1e-6)
    assert figures.first_diverging_token is None
    assert figures.first_diverging_token_by_prompt == [None] * 4
    assert set(figures.chunked_prefill) == {"7", "32", "all"}
    for chunk in figures.chunked_prefill.values():
        assert chunk.argmax_equal == 1
        assert chunk.max_abs_difference < 1e-3
    assert (
        judge(figures, SAME, Thresholds(kl_mean_max=1e-6, kl_p99_max=1e-6, top1_min=1, perplexity_ratio_max=1.001))
        == []
    )
    json.dumps(figures.model_dump(), allow_nan=False)


def test_perplexity_is_pytorchs_cross_entropy(session, reference, windows):
    figures = measure(session, reference, windows, greedy_tokens=1)
    logits = torch.from_numpy(np.stack([reference(ids)[:-1] for ids in windows])).double()
    targets = torch.from_numpy(windows[:, 1:].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert figures.perplexity_reference == pytest.approx(loss.exp().item(), rel=1e-9)


def test_kl_of_a_known_shift_is_its_closed_form(perturbed, reference, windows):
    """Adding c to the logits of a set S: KL = log(1 + P(S) (e^c - 1)) - c P(S)."""
    shift, chosen = 0.7, np.arange(0, 384, 3)

    def perturb(logits, _positions):
        moved = logits.copy()
        moved[:, chosen] += shift
        return moved

    mass = probabilities(reference, windows)[..., chosen].sum(-1)
    expected = np.log1p(mass * np.expm1(shift)) - shift * mass
    figures = measure(perturbed(perturb), reference, windows, greedy_tokens=4)
    assert figures.kl_mean == pytest.approx(expected.mean(), rel=1e-5)
    assert figures.kl_p50 == pytest.approx(np.percentile(expected, 50), rel=1e-5)
    assert figures.kl_p99 == pytest.approx(np.percentile(expected, 99), rel=1e-5)
    assert figures.kl_max == pytest.approx(expected.max(), rel=1e-5)
    at = figures.kl_max_at
    assert expected[at.window, at.token] == expected.max()
    assert figures.samples["kl_mean"] == pytest.approx(expected.mean(-1).tolist(), rel=1e-5)
    low, high = figures.kl_mean_ci95
    assert low < figures.kl_mean < high
    assert figures.logit_max_abs_difference == pytest.approx(shift, abs=1e-5)
    assert figures.logit_mean_abs_difference == pytest.approx(shift / 3, abs=1e-5)


def test_kl_of_random_noise_is_pytorchs(perturbed, reference, windows):
    noise = np.random.default_rng(3).normal(0, 0.5, (40, 384)).astype(np.float32)
    session = perturbed(lambda logits, positions: logits + noise[positions])
    logits = torch.from_numpy(np.stack([reference(ids) for ids in windows]))
    log_p = torch.log_softmax(logits.double(), -1)
    log_q = torch.log_softmax((logits + torch.from_numpy(noise)).double(), -1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    same = (logits.argmax(-1) == (logits + torch.from_numpy(noise)).argmax(-1)).double().mean()
    figures = measure(session, reference, windows, greedy_tokens=1)
    assert figures.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert figures.top1_agreement == pytest.approx(same.item())
    assert 0 < same < 1


def test_a_shift_of_all_logits_changes_nothing_but_the_logits(perturbed, reference, windows):
    figures = measure(perturbed(lambda logits, _: logits + 3), reference, windows, greedy_tokens=4)
    assert figures.kl_mean < 1e-9
    assert figures.logit_mean_abs_difference == pytest.approx(3, abs=1e-4)


def test_greedy_divergence_is_where_two_generations_part(perturbed, session, reference, windows):
    """Compared with the plain definition: generate with both and look for the first difference."""
    favoured = 5.0 * np.random.default_rng(7).standard_normal(384).astype(np.float32)

    def perturb(logits, positions):
        return logits + favoured * (positions >= 23)[:, None]

    other = perturbed(perturb)
    expected = []
    for ids in windows[:4]:
        ours = list(session.generate(ids[:20].tolist(), 16))
        theirs = list(other.generate(ids[:20].tolist(), 16))
        expected.append(next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None))
    figures = measure(other, reference, windows, greedy_tokens=16)
    assert figures.first_diverging_token_by_prompt == expected
    assert figures.first_diverging_token == min(e for e in expected if e is not None) >= 4


def test_rounding_that_depends_on_the_chunk_is_not_a_failure(session, reference, windows):
    """It moves the logits about, as far from the reference as they were."""
    whole = type(session).prefill
    rng = np.random.default_rng(0)

    def noisy(ids, *, all_logits=False):
        logits = whole(session, ids, all_logits=all_logits)
        return logits + rng.uniform(-0.04, 0.04, logits.shape).astype(np.float32)

    session.prefill = noisy
    figures = measure(session, reference, windows, greedy_tokens=2)
    assert all(chunk.kl_mean > 1e-5 for chunk in figures.chunked_prefill.values())
    assert judge(figures, SAME, Thresholds()) == []
    assert judge(figures, None, Thresholds())[0] == "tokens: they were not compared"


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_logits_that_are_not_numbers_fail_and_stay_json(perturbed, reference, windows, bad):
    def perturb(logits, positions):
        spoiled = logits.copy()
        spoiled[positions == 5, :-1] = bad
        return spoiled

    figures = measure(perturbed(perturb), reference, windows, greedy_tokens=2)
    assert figures.unusable_positions == len(windows)
    assert figures.kl_mean < 1e-9
    json.dumps(figures.model_dump(), allow_nan=False)
    assert any("unusable" in failure for failure in judge(figures, SAME, Thresholds()))


def test_all_logits_bad(perturbed, reference, windows):
    figures = measure(perturbed(lambda logits, _: logits * np.nan), reference, windows, greedy_tokens=2)
    assert figures.kl_mean is None and figures.reasons["kl_mean"] == "no position has usable logits"
    assert figures.figure("kl_mean").reason == figures.reasons["kl_mean"]
    json.dumps(figures.model_dump(), allow_nan=False)
    failures = judge(figures, SAME, Thresholds(kl_mean_max=0.1, perplexity_ratio_max=2, top1_min=0.5))
    assert any(failure.startswith("kl_mean could not be computed") for failure in failures)
    assert any(failure.startswith("top1_agreement") for failure in failures)


def test_judge_says_what_where_and_by_how_much(session, reference, windows):
    figures = measure(session, reference, windows, greedy_tokens=1).model_copy(
        update={"kl_mean": 0.031, "kl_p99": 0.5, "top1_agreement": 0.9, "perplexity_ratio": 1.2}
    )
    assert judge(figures, SAME, Thresholds()) == []
    assert (
        judge(figures, SAME, Thresholds(kl_mean_max=0.031, kl_p99_max=0.5, top1_min=0.9, perplexity_ratio_max=1.2))
        == []
    )
    missed = judge(figures, SAME, Thresholds(kl_mean_max=0.02, kl_p99_max=0.4, top1_min=0.95, perplexity_ratio_max=1.1))
    assert missed[0].startswith("kl_mean 0.031 exceeds 0.02 by 0.011 (worst at window ")
    assert missed[1].startswith("kl_p99 0.5 exceeds 0.4 by 0.1 ")
    assert missed[2:] == ["top1_agreement 0.9 is below 0.95 by 0.05", "perplexity_ratio 1.2 exceeds 1.1 by 0.1"]


def test_judge_fails_on_differing_tokens(session, reference, windows, tokenizer, contract):
    class Off(type(session)):
        def tokenize(self, text, *, start=True):
            return super().tokenize(text.replace("\t", " "))

    tokens = check_tokens(Off(session.model, tokenizer), tokenizer, contract)
    failures = judge(measure(session, reference, windows, greedy_tokens=1), tokens, Thresholds())
    assert failures[0].startswith("tokens: ")
    assert "strings differ from the reference tokenizer's, first '" in failures[0]


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_ci95(rng.exponential(1.0, 30), np.full(30, 10))
        hits += low <= 1.0 <= high
    assert 0.85 <= hits / 200 <= 0.98  # percentile intervals are a little narrow at 30 windows
    assert bootstrap_ci95(np.ones(1), np.ones(1)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": np.zeros((0, 8), int)}, "windows"),
        ({"windows": np.zeros((1, 97), int)}, "exceed the artifact's context of 96"),
        ({"windows": np.full((1, 8), 384)}, "hold id 384"),
        ({"greedy_tokens": 96}, "greedy_tokens 96"),
        ({"chunk_sizes": (0,)}, "chunk sizes"),
    ],
)
def test_bad_input_is_refused_before_work(session, reference, windows, change, message):
    session.prefill = None  # would fail at the first use
    arguments = {"windows": windows, "greedy_tokens": 4} | change
    with pytest.raises(EdgekdError, match=message):
        measure(session, reference, **arguments)


def test_another_vocabulary_is_refused(session, reference, windows):
    with pytest.raises(EdgekdError, match="student it was exported from"):
        measure(session, lambda ids: reference(ids)[:, :-1], windows, greedy_tokens=1)


def test_a_large_vocabulary_needs_two_windows_of_memory():
    """151,936 ids: two windows of logits and a few blocks, not the whole window again in float64."""
    import tracemalloc

    vocab, length = 151_936, 128
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((length, vocab), dtype=np.float32)

    class Fixed:
        vocab_size, context_length = vocab, 512

        def reset(self):
            self.at = 0

        def prefill(self, ids, *, all_logits=False):
            start, self.at = self.at, self.at + len(ids)
            return logits[start : self.at] if all_logits else logits[self.at - 1]

        def decode(self, token):
            return self.prefill([token])

    tracemalloc.start()
    figures = measure(
        Fixed(), lambda ids: logits[: len(ids)], np.zeros((1, length), int), greedy_tokens=1, chunk_sizes=(7,)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert figures.kl_mean == 0
    assert peak < 2 * logits.nbytes + 100 * 2**20


def test_remembered_logits_of_whole_windows_are_not_asked_again(session, reference, windows, monkeypatch):
    expected = measure(session, reference, windows, greedy_tokens=4)
    whole = remembering(session_logits(session), windows)
    for ids in windows:
        whole(ids)
    fed, prefill = [], session.prefill
    monkeypatch.setattr(session, "prefill", lambda ids, **how: fed.append(len(ids)) or prefill(ids, **how))
    assert measure(session, reference, windows, greedy_tokens=4, whole=whole) == expected
    assert max(fed) < windows.shape[1]
