"""Verdicts: identical pairs stay silent, a real slowdown is flagged; histories only grow."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from edgekd.benchmarks.compare import _orders, compare, judge, signed_rank_p
from edgekd.benchmarks.history import append, read_history, record_of
from edgekd.benchmarks.report.history import build, is_worse, render
from edgekd.errors import EdgekdError
from edgekd.proof import Benchmark, Figure
from edgekd.spec import BenchSpec

pytestmark = pytest.mark.alone


def _blocks(rng, slowdown, blocks=12):
    """As a shared machine gives them: 4 % of noise a run, a drift of 15 % that both meet, a run in ten disturbed."""
    drift = 1 + 0.15 * np.sin(np.linspace(0, 5, 4 * blocks) + rng.uniform(0, 6))
    speeds = 100 * drift * rng.normal(1, 0.04, 4 * blocks) * np.where(rng.random(4 * blocks) < 0.1, 0.8, 1)
    a, b = speeds[0::4] + speeds[3::4], speeds[1::4] + speeds[2::4]  # ABBA
    return list(zip(a / 2, (1 - slowdown) * b / 2, strict=True))


def test_identical_pairs_stay_silent_and_a_slowdown_of_ten_percent_is_flagged():
    rng = np.random.default_rng(3)
    silent = [judge("decode_tokens_per_s", _blocks(rng, 0.0)).verdict for _ in range(200)]
    assert silent.count("no difference shown") >= 199  # of 20 pairs, less than one in ten times is any flagged
    slow = [judge("decode_tokens_per_s", _blocks(rng, 0.1)).verdict for _ in range(100)]
    assert "faster" not in slow and slow.count("slower") >= 75


def test_the_exact_p_against_every_sign():
    """All 2^8 ways to give eight differences their signs, counted."""
    import itertools

    sizes = np.arange(1, 9) / 10
    given = np.array([1, 1, 1, -1, 1, 1, 1, 1])
    seen = abs((given * np.arange(1, 9)).sum())
    as_far = [
        abs(sum(s * r for s, r in zip(signs, range(1, 9), strict=True))) >= seen
        for signs in itertools.product((-1, 1), repeat=8)
    ]
    assert signed_rank_p(given * sizes) == pytest.approx(sum(as_far) / 2**8)
    assert signed_rank_p(np.zeros(5)) == 1


def test_less_is_better_of_a_time_and_a_small_difference_is_nobodys():
    found = judge("ttft_s", [(1.0, 1.25)] * 9)
    assert found.verdict == "slower" and found.speedup == pytest.approx(0.8)
    assert judge("ttft_s", [(1.0, 0.8)] * 9).verdict == "faster"
    assert judge("ttft_s", [(1.0, 1.02)] * 9).verdict == "no difference shown"
    assert judge("ttft_s", [(1.0, 1.02)] * 9, margin=0.01).verdict == "slower"


def test_the_orders_are_balanced_and_drawn_by_chance():
    orders = list(_orders(8, 0))
    assert sorted(orders) == ["ABBA"] * 4 + ["BAAB"] * 4 and orders != list(_orders(8, 1))


@pytest.fixture
def artifacts(tmp_path, numpy_artifact):
    return [numpy_artifact(tmp_path / name, name) for name in ("plain", "slowed")]


@pytest.mark.slow
def test_real_processes(runtime, artifacts):
    """A runtime whose decode is a sleep, a third longer for one of the two."""
    spec = BenchSpec(prompt_tokens=[8], decode_tokens=8, threads=1)
    told = []
    found = compare(runtime.open_named, *artifacts, spec, blocks=9, on_run=lambda *run: told.append(run))
    assert told[-1] == (36, 36)
    assert found.verdict == "slower" and found.figures[0].key == "decode_tokens_per_s"
    assert 0.6 < found.figures[0].speedup < 0.85  # 9 ms instead of 12
    json.dumps(found.model_dump())
    with pytest.raises(EdgekdError, match=r"60 \+ 8 tokens exceed the context"):
        compare(runtime.open_named, *artifacts, spec.model_copy(update={"prompt_tokens": [60]}))


def _benchmark(decode):
    figure = {"value": decode, "source": "measured:clock", "ci95": [0.99 * decode, 1.01 * decode]}
    return Benchmark.model_validate(
        {"decode_tokens_per_s": figure, "machine": {"cpu": "c"}, "noise": {"dirty": ["<b>busy"]}}
    )


def test_a_history_only_grows_and_is_read_back(artifacts, tmp_path):
    path = tmp_path / "deep" / "history.jsonl"
    first, second = (record_of(artifacts[0], _benchmark(x)) for x in (100.0, 90.0))
    append(path, [first])
    before = path.read_bytes()
    append(path, [second, first])
    assert path.read_bytes().startswith(before)
    assert read_history(path) == [first, second, first]
    path.write_bytes(path.read_bytes() + b'{"artifact": 3}\n')
    with pytest.raises(EdgekdError, match="line 4: key 'created'"):
        read_history(path)
    path.write_bytes(before + b"{half a li")
    with pytest.raises(EdgekdError, match="line 2: not JSON"):
        read_history(path)
    with pytest.raises(EdgekdError, match="cannot be read"):
        read_history(tmp_path / "nowhere")
    with pytest.raises(EdgekdError, match="cannot be written"):
        append(tmp_path, [first])


def test_the_page_of_a_history(artifacts, tmp_path):
    records = [record_of(artifacts[0], _benchmark(x)) for x in (100.0, 90.0)]
    page = build(records, tmp_path / "page.html").read_text("utf-8")
    assert page.count('class="worse"') == 1 and "&lt;b&gt;busy" in page and "<b>busy" not in page
    assert page.count("<h2>") == 1
    other = replace(artifacts[1])
    assert render([*records, record_of(other, _benchmark(1.0))]).count("<h2>") == 2
    benchmark = records[0].benchmark
    settings = benchmark.settings.model_copy(update={"ttft_from": "text"})
    from_text = records[0].model_copy(update={"benchmark": benchmark.model_copy(update={"settings": settings})})
    assert render([*records, from_text]).count("<h2>") == 2, "another TTFT is another figure"
    with pytest.raises(EdgekdError, match="history is empty"):
        build([], tmp_path / "none.html")


def test_worse_by_more_than_both_intervals():
    def figure(low, high):
        return Figure(value=(low + high) / 2, source="measured:clock", ci95=[low, high])

    assert is_worse("decode_tokens_per_s", figure(80, 90), figure(95, 99))
    assert not is_worse("decode_tokens_per_s", figure(80, 96), figure(95, 99))
    assert is_worse("load_s", figure(3, 4), figure(1, 2)) and not is_worse("load_s", figure(1, 2), None)
