"""Figures: typed, with a source, and null only for a reason; and what an earlier version wrote of them is read."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from edgekd.proof import METRICS, Benchmark, Comparison, Evaluation, Figure, Hop, Parity, PhaseMemory, figure
from edgekd.spec import Thresholds

COMPARED = {"windows": 1, "window_tokens": 8, "unusable_positions": 0}


def test_a_figure_has_its_unit_from_the_table():
    made = figure("decode_tokens_per_s", 0.5, "measured:clock", (0.4, 0.6))
    expected = {"value": 0.5, "unit": "tok/s", "source": "measured:clock", "samples": [0.4, 0.6], "reason": None}
    expected["ci95"] = None
    assert json.loads(json.dumps(made.model_dump())) == expected


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"value": None}, "a figure that is null has a reason"),
        ({"value": None, "reason": ""}, "a figure that is null has a reason"),
        ({"value": 1.0}, "a figure has a source"),
        ({"value": 1.0, "source": "my stopwatch"}, "source"),
        ({"value": 1.0, "source": "measured:"}, "source"),
        ({"value": float("nan"), "source": "measured:clock"}, "value"),
        ({"value": "1.0", "source": "measured:clock"}, "value"),
        ({"value": True, "source": "measured:clock"}, "value"),
        ({"value": 1.0, "source": "measured:clock", "samples": [None]}, "samples"),
    ],
)
def test_what_is_no_figure_is_refused(given, complaint):
    with pytest.raises(ValidationError, match=complaint):
        Figure.model_validate(given)


def test_what_was_not_measured_is_null_with_a_reason():
    for name, value in Benchmark():
        if isinstance(value, Figure):
            assert value.value is None and value.reason, name
    compared = Comparison.model_validate(COMPARED | {"reasons": {"kl_mean": "no text"}})
    assert compared.figure("kl_mean").reason == "no text" and compared.figure("kl_p99").reason == "not measured"


def test_a_figure_of_a_comparison_has_its_samples():
    compared = Comparison.model_validate(COMPARED | {"kl_mean": 0.5, "samples": {"kl_mean": [0.25, 0.75]}})
    expected = Figure(value=0.5, unit="nats", source="measured:logits", samples=[0.25, 0.75])
    assert compared.figure("kl_mean") == expected


def test_what_earlier_versions_wrote_is_read():
    old = {"value": 0.5, "source": "measured:clock", "samples": [0.4, 0.6]}
    read = Benchmark.model_validate({"load_s": old, "ttft_s": {"32": old}, "energy_j_per_token": None, "machine": {}})
    assert read.load_s == read.ttft_s["32"] == Figure.model_validate(old)
    assert read.settings.ttft_from == "ids" and read.decode_energy_j_per_token.value is None
    assert Benchmark.model_validate({"inter_token_p95_s": old}).icl_p95_s == Figure.model_validate(old)
    assert Parity.model_validate(COMPARED | {"kl_mean": None}).failures is None
    hop = {"from": "teacher", "to": "student", "kl_mean": 0.3, "kl_ci95": None}
    told = Hop.model_validate(hop).model_dump()
    assert {key: told[key] for key in hop} == hop


def test_the_table_knows_every_figure():
    of_benchmark = {
        key for key in Benchmark.model_fields if key not in ("settings", "machine", "noise", "memory", "sustained")
    }
    of_benchmark |= set(PhaseMemory.model_fields)
    of_hop = {key for key in Hop.model_fields if not key.endswith("ci95")} - {"start", "end"}
    assert of_benchmark | of_hop | set(Evaluation.model_fields) - {"loss"} <= set(METRICS)
    assert all(key == metric.key for key, metric in METRICS.items())


def test_a_gate_is_a_threshold_of_the_spec_on_its_own_side():
    gates = {metric.gate: metric for metric in METRICS.values() if metric.gate}
    assert set(gates) == set(Thresholds.model_fields)
    for name, metric in gates.items():
        assert metric.better == ("lower" if name.endswith("_max") else "higher") and metric.key in Parity.model_fields


def test_labels_tell_the_unit_that_the_text_lacks():
    assert METRICS["ttft_s"].label("32") == "TTFT at 32 tokens"
    assert METRICS["prefill_tokens_per_s"].label("32") == "Prefill at 32 tokens, tok/s"
    assert METRICS["kl_mean"].label() == "KL mean, nats"
