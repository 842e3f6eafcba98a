"""Choices: limits first, unknown never fits, what is given up and what is nearest is said; costs by hand."""

from __future__ import annotations

import pytest

from edgekd.benchmarks.cost import check_tokens, cost, default_prices
from edgekd.benchmarks.pick import AXES, Candidate, Value, candidate, dominates, limit_of, lines, pick
from edgekd.benchmarks.profiles import load_profile
from edgekd.errors import EdgekdError


def one(name, quality=0.9, ttft=0.1, decode=50.0, memory=1e9, size=1e8, failures=()):
    given = {"quality": quality, "ttft": ttft, "decode": decode, "memory": memory, "energy": None, "size": size}
    values = {
        key: Value(value=x, kind=None if x is None else "measured", reason="not read" if x is None else None)
        for key, x in given.items()
    }
    return Candidate(name=name, values=values, failures=list(failures))


ALL = [
    one("good", quality=0.99, decode=40.0, size=2e8),
    one("fast", quality=0.96, decode=90.0),
    one("beaten", quality=0.95, decode=80.0, size=3e8),
    one("failed", quality=1.0, decode=999.0, failures=["kl_mean 1 exceeds 0.1"]),
    one("unknown", quality=0.97, memory=None),
]


def test_limits_first_then_quality_and_what_was_given_up_is_said():
    choice = pick(ALL, {"memory": 1.5e9, "quality": 0.955})
    assert choice.taken.name == "good" and choice.front == ["good", "fast"]
    assert choice.given_up == ["fast has decode in tok/s 90.0 instead of 40.0, size 100 MB instead of 200 MB"]
    reasons = {refusal.name: refusal.reasons for refusal in choice.refused}
    assert set(reasons) == {"beaten", "failed", "unknown"}
    assert reasons["unknown"] == ["memory is unknown: not read"]
    assert reasons["failed"] == ["failed its gate: kl_mean 1 exceeds 0.1"]
    assert pick(ALL, {"decode": 85}).taken.name == "fast"
    assert "unknown of it: energy in J per token" in list(lines(choice))


def test_when_nothing_fits_the_nearest_is_named_and_the_unknown_is_not_near():
    choice = pick(ALL, {"decode": 100, "memory": 9e8})
    assert choice.taken is None and choice.nearest == "fast"
    assert next(iter(lines(choice))) == "nothing fits; fast misses least"
    assert pick(ALL[3:], {"memory": 1}).nearest is None


def test_an_axis_that_is_unknown_of_one_beats_nobody_by_it():
    assert not dominates(one("a", memory=None), one("b"))
    assert dominates(one("a", decode=60.0), one("b"))
    assert not dominates(one("a"), one("a"))
    assert set(AXES) == set(one("a").values)


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("memory", "1.5GB", 1.5e9),
        ("memory", "512MiB", 2**29),
        ("ttft", "0.5s", 0.5),
        ("ttft", "500 ms", 0.5),
        ("quality", "0.95", 0.95),
    ],
)
def test_limits_as_people_write_them(option, text, expected):
    assert limit_of(option, text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("memory", "1.5"),
        ("memory", "lots"),
        ("ttft", "1GB"),
        ("quality", "95"),
        ("quality", "0"),
        ("ttft", "-1s"),
        ("size", "1e99GB"),
        ("memory", ""),
        ("decode", "nan"),
    ],
)
def test_impossible_limits_are_refused_in_a_sentence(option, text):
    with pytest.raises(EdgekdError, match=f"^--{option} "):
        limit_of(option, text)


def test_an_artifact_here_and_on_a_device(make_artifact):
    benchmark = {
        "ttft_s": {"32": {"value": 0.1, "source": "measured:clock"}, "256": {"value": 0.4, "source": "measured:clock"}},
        "decode_tokens_per_s": {"value": 60.0, "source": "measured:clock"},
        "peak_rss_bytes": {"value": 2e8, "source": "measured:peak-rss"},
    }
    artifact = make_artifact("a", read=700_000_000, top1=0.97, benchmark=benchmark)
    here = candidate(artifact)
    assert here.values["ttft"].value == 0.4 and here.values["quality"].value == 0.97
    assert here.values["energy"].value is None and here.values["energy"].reason
    there = candidate(artifact, load_profile("laptop"))
    assert there.values["decode"].kind == "predicted" and there.values["decode"].value != 60.0
    assert there.values["energy"].kind == "estimated" and there.values["quality"].kind == "measured"
    assert "(predicted)" in next(iter(lines(pick([there], {}))))


def test_costs_by_hand(make_artifact):
    energy = {"value": 0.5, "unit": "J per token", "source": "measured:powercap"}
    counted = {"prefill_energy_j_per_token": energy | {"value": 0.1}, "decode_energy_j_per_token": energy}
    artifact = make_artifact("a", read=100_000_000, benchmark=counted)
    prices = default_prices().with_own(price_in=1.0, price_out=2.0, hosted_energy=3.6, electricity=0.5, carbon=100.0)
    found = cost("a", artifact.manifest, None, 100, 50, prices)
    # 10^6 requests: 100 tokens at 1 USD and 50 at 2 USD a million each; 50 tokens of 3.6 J are 180 J, so 50 kWh.
    assert found.teacher.usd == pytest.approx(200) and found.teacher.energy_kwh == pytest.approx(50)
    assert found.teacher.carbon_kg == pytest.approx(5)
    # 100 x 0.1 J + 50 x 0.5 J = 35 J, so 9.722 kWh at 0.5 USD.
    assert found.student.energy_kwh == pytest.approx(35e6 / 3.6e6) and found.student.usd == pytest.approx(
        4.861, rel=1e-3
    )
    assert found.cheaper == pytest.approx(200 / 4.8611, rel=1e-3) and found.less_energy == pytest.approx(
        5.143, rel=1e-3
    )
    assert found.student.source == "measured:powercap"
    unmeasured = make_artifact("b", read=100_000_000)
    unknown = cost("a", unmeasured.manifest, None, 100, 50, prices)
    assert unknown.student.usd is None and unknown.cheaper is None and "no energy counter" in unknown.student.source
    estimated = cost("a", unmeasured.manifest, load_profile("laptop"), 100, 50, prices)
    assert estimated.student.source.startswith("estimated:") and any("no counter" in w for w in estimated.remarks)
    assert cost("a", unmeasured.manifest, load_profile("pixel-9"), 100, 50, prices).student.usd is None
    with pytest.raises(EdgekdError, match="exceed the context of 4096"):
        check_tokens(4000, 200, artifact.manifest.contract.context_length)
