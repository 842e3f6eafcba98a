"""Predictions: lines that are known, the errors that are promised, profiles that are refused."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekd.benchmarks.anchors import Point, points
from edgekd.benchmarks.history import record_of
from edgekd.benchmarks.predict import (
    errors_table,
    fit,
    fit_of,
    local_points,
    predict,
    predict_here,
    validate,
    validate_here,
)
from edgekd.benchmarks.profiles import load_profile, profile_names
from edgekd.errors import EdgekdError, SpecError
from edgekd.proof import Benchmark

DOCS = Path(__file__).parents[2] / "docs"


def _point(chip, read, bandwidth, seconds):
    return Point(chip, chip, "gpu", "m", read, bandwidth, 1 / seconds)


def test_a_line_without_noise_is_found():
    known = [
        _point(f"c{i}", read, bw, 1.3 * read / bw + 0.002)
        for i, (read, bw) in enumerate([(1e9, 1e11), (4e9, 1e11), (4e9, 5e11), (8e9, 1e12), (1e9, 1e12)])
    ]
    found = fit(known)
    assert found.k == pytest.approx(1.3, rel=1e-4) and found.c == pytest.approx(0.002, rel=1e-3)
    assert found.tokens_per_s(2e9, 2e11) == pytest.approx(1 / (1.3 * 0.01 + 0.002), rel=1e-4)


def test_one_that_is_far_off_moves_the_line_little_and_overhead_is_never_negative():
    rng = np.random.default_rng(0)
    known = [_point(f"c{i}", x * 1e9, 1e11, 1.5 * x / 100) for i, x in enumerate(rng.uniform(1, 10, 12))]
    known[0] = replace(known[0], tokens_per_s=known[0].tokens_per_s / 4)
    assert fit(known).k == pytest.approx(1.5, rel=0.02)
    steep = [_point(f"c{i}", x * 1e9, 1e11, 1.5 * x / 100 - 0.004) for i, x in enumerate((1, 2, 4, 8))]
    assert fit(steep).c == 0


def test_the_errors_that_are_promised():
    rows = {row.what: row for row in validate()}
    every = rows["all classes"]
    assert every.points >= 55 and every.devices >= 20
    assert every.median <= 0.12 and every.p90 <= 0.35
    assert 0.7 <= every.covered <= 0.9
    constant = sorted(
        abs(0.6 * p.bandwidth_bytes_per_s / p.read_bytes / p.tokens_per_s - 1)
        for p in points()
        if p.bandwidth_bytes_per_s
    )
    assert every.median < constant[len(constant) // 2]  # better than one constant efficiency


def test_the_table_in_the_docs_is_what_the_command_prints():
    assert errors_table(validate()) in (DOCS / "benchmarking.md").read_text("utf-8")


def test_no_point_of_a_held_out_chip_is_in_its_fit():
    """Ten times the truth on one chip: its own prediction stays where the others put it."""
    gpu = [p for p in points() if p.device_class == "gpu" and p.bandwidth_bytes_per_s]
    chips = {p.chip for p in gpu}
    assert all("(" not in chip for chip in chips)
    from edgekd.benchmarks.predict import _by_chip

    before = {id(p): speed for p, speed, _ in _by_chip(gpu) if p.chip == gpu[0].chip}
    spoiled = [replace(p, tokens_per_s=10 * p.tokens_per_s) if p.chip == gpu[0].chip else p for p in gpu]
    after = [speed for p, speed, _ in _by_chip(spoiled) if p.chip == gpu[0].chip]
    assert after == pytest.approx(list(before.values()))


def test_every_point_and_profile_has_its_source():
    import csv

    for name in ("published_points.csv", "devices.csv"):
        path = Path(__file__).parents[2] / "benchmarks" / "anchors" / name
        for row in csv.DictReader(path.read_text("utf-8").splitlines()):
            assert row["source"] or not row.get("bandwidth_gb_s"), row
    kinds = {load_profile(name).kind for name in profile_names()}
    assert kinds == {"laptop", "desktop", "mini-pc", "board", "phone", "gpu"}
    assert len(profile_names()) >= 17


def test_an_artifact_on_devices(make_artifact):
    artifact = make_artifact("a", read=4_617_000_000)
    found = predict(artifact, load_profile("rtx-4090"), 0)
    line = fit_of("gpu")
    assert found.decode_tokens_per_s.value == pytest.approx(line.tokens_per_s(4.617e9, 1.008e12))
    assert found.decode_tokens_per_s.low < 130.58 < found.decode_tokens_per_s.high  # as published
    assert found.ttft_s.value == 0 and "not validated" in found.prefill_tokens_per_s.source
    watts = found.estimated_decode_energy_j_per_token
    assert watts.value == pytest.approx(450 / found.decode_tokens_per_s.value) and watts.source.startswith("estimated:")
    phone = predict(artifact, load_profile("iphone-15-pro"), 256)
    assert phone.fits is True and phone.prefill_tokens_per_s.value is None and phone.ttft_s.reason
    mini = predict(artifact, load_profile("mini-pc"), 0)
    assert mini.decode_tokens_per_s.value == pytest.approx(18.2e9 / 4.617e9)  # published of this very chip
    assert predict(artifact, load_profile("iphone-12-mini")).decode_tokens_per_s.reason
    assert predict(artifact, load_profile("pixel-9")).fits is None  # nobody could source its budget


def test_a_budget_counts_what_was_measured(make_artifact):
    memory = {"decode": {"anonymous_bytes": {"value": 4e9, "source": "measured:smaps_rollup"}}}
    artifact = make_artifact("a", read=1000, benchmark={"memory": memory})
    assert predict(artifact, load_profile("iphone-15-pro")).fits is False
    small = make_artifact("b", read=1000)
    assert any("lower" in words for words in predict(small, load_profile("laptop")).remarks)


GOOD = """\
title: "Mine"
kind: board
class: cpu
chip: "X"
bandwidth: {value: 10, unit: GB/s, basis: measured, source: "my machine", date: "2026-11"}
"""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (', source: "my machine"', "", "key 'bandwidth.source' is missing"),
        (', date: "2026-11"', "", "key 'bandwidth.date' is missing"),
        (", basis: measured", "", "key 'bandwidth.basis' is missing"),
        ("unit: GB/s", "unit: W", "bandwidth: unit W instead of GB/s"),
        ("value: 10", "value: -1", "bandwidth.value"),
        ("value: 10", "value: 10, range: [11, 12]", "value 10 is not within its range"),
        ("kind: board", "kind: fridge", "key 'kind'"),
        ('chip: "X"', 'chip: "X"\nbandwith: 3', "did you mean 'bandwidth'?"),
        ('title: "Mine"', "- a", "not valid YAML"),
    ],
)
def test_a_profile_that_lacks_something_is_refused(tmp_path, old, new, complaint):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert load_profile(str(path)).name == "mine"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(SpecError, match=re.escape(complaint)):
        load_profile(str(path))


def test_unknown_profiles_and_ones_that_hold_nothing(tmp_path):
    with pytest.raises(SpecError, match="did you mean 'iphone-15-pro'"):
        load_profile("iphone15-pro")
    with pytest.raises(SpecError, match="there are: apple-m1"):
        load_profile("zx-spectrum")
    with pytest.raises(SpecError, match="neither threads nor app_memory"):
        load_profile("galaxy-s25").limits()
    limits = load_profile("iphone-13-pro").limits()
    assert limits.memory_bytes == 3_120_000_000 and limits.memory_counts == "anonymous"


def _record(artifact, speed, read, cpu="here"):
    benchmark = {
        "machine": {"cpu": cpu},
        "decode_tokens_per_s": {"value": speed, "source": "measured:clock"},
        "bytes_per_token": {"value": read, "source": "computed:manifest"},
        "bandwidth_bytes_per_s": {"value": 2e10, "source": "measured:memchr"},
    }
    return record_of(artifact, Benchmark.model_validate(benchmark))


def test_this_machine_from_its_history(make_artifact):
    records, sizes = [], (1e7, 3e7, 1e8, 3e8)
    for i, read in enumerate(sizes):
        artifact = make_artifact(f"a{i}", read=int(read) - 256_000)
        records.append(_record(artifact, 1 / (2 * read / 2e10 + 0.001), read))
    records.append(_record(make_artifact("elsewhere", read=1000), 1e9, 1e7, cpu="another"))
    known = local_points(records, "gguf", "here")
    assert len(known) == 4
    held_out = predict_here(artifact, known)  # the largest is not among its own points
    assert held_out.value == pytest.approx(1 / (2 * 3e8 / 2e10 + 0.001), rel=1e-3)
    few = predict_here(artifact, known[:2])
    assert few.value is None and "2 other artifacts" in few.reason
    assert math.isclose(known[0].tokens_per_s, records[0].benchmark.decode_tokens_per_s.value)


def test_the_errors_of_a_machine_are_those_of_artifacts_left_out(make_artifact):
    """Four that obey one law and a fifth at half its speed: only that one is far from what the others say."""
    records = []
    for i, read in enumerate((1e7, 3e7, 1e8, 2e8, 3e8)):
        lawful = 1 / (2 * read / 2e10 + 0.001)
        records.append(_record(make_artifact(f"a{i}", read=1000), lawful / (2 if i == 1 else 1), read))
    (row,) = validate_here(records)
    assert (row.what, row.points, row.devices) == ("gguf, here", 5, 5)
    assert row.median < 0.05 and row.p90 > 0.5
    assert "| gguf, here | 5 | 5 |" in errors_table([row])
    with pytest.raises(EdgekdError, match="no 4 artifacts of one target"):
        validate_here(records[:3])
