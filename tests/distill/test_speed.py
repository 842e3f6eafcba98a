"""Compiling where it pays, and the share of the processor's work that a training makes use of."""

import json
import logging
import time

import pytest
import torch
from test_versions import VOCAB, model, windows

from edgekd.distill import compiled as module
from edgekd.distill import train as loop
from edgekd.distill.checkpoint import read_log
from edgekd.distill.compiled import COMPILED, has_compiler, perhaps_compiled
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.speed import peak_flops_per_s, published
from edgekd.distill.train import train
from edgekd.spec import DistillSpec


def is_compiled(layer):
    return layer._compiled_call_impl is not None


def asked(folder, eager, compiled, passes=10**6, fails=False):
    """Whether layers were compiled whose passes take so many seconds, and how often they were timed."""
    layers, timed = [torch.nn.Linear(2, 2) for _ in range(3)], []

    def one_pass():
        timed.append(is_compiled(layers[0]))
        if timed[-1] and fails:
            raise RuntimeError("g++: fatal error")
        time.sleep(compiled if timed[-1] else eager)

    with perhaps_compiled(layers, one_pass, passes, folder / COMPILED, "float32") as chosen:
        assert all(is_compiled(layer) == chosen for layer in layers)
    assert not any(map(is_compiled, layers))
    return chosen, timed


def test_what_is_faster_is_taken_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "has_compiler", lambda device: True)
    assert asked(tmp_path, 0.02, 0.002)[0]
    told = json.loads((tmp_path / COMPILED).read_text())
    assert told["compiled"] and told["seconds"]["compiled"] < told["seconds"]["eager"]
    assert asked(tmp_path, 0.002, 0.02) == (True, []), "a training that goes on takes the same, untimed"


@pytest.mark.parametrize(
    ("eager", "compiled", "passes", "there"),
    [(0.004, 0.02, 10**6, True), (0.02, 0.002, 10, True), (0.02, 0.002, 1000, True), (0.02, 0.002, 10**6, False)],
    ids=["slower", "few", "short", "no compiler"],
)
def test_what_does_not_pay_is_left(tmp_path, monkeypatch, eager, compiled, passes, there):
    monkeypatch.setattr(module, "has_compiler", lambda device: there)
    assert not asked(tmp_path, eager, compiled, passes)[0]


def test_a_compiler_that_fails_ends_no_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "has_compiler", lambda device: True)
    with caplog.at_level(logging.WARNING):
        assert not asked(tmp_path, 0.01, 0.001, fails=True)[0]
    assert "torch.compile: g++: fatal error. The training goes on without it." in caplog.text


def trained(work, **more):
    student = model(0)
    train(
        student,
        windows(24, 7),
        windows(4, 8),
        DistillSpec(steps=4, batch_size=4, warmup_steps=1, validate_every=4, precision="float32"),
        signal=OnlineTeacher(model(9, 3).eval(), VOCAB),
        seed=3,
        work_dir=work,
        on_event=lambda event: None,
        **more,
    )
    return student, [event for event in read_log(work / "log.jsonl") if event.event == "step"]


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler("cpu"), reason="no C++ compiler")
def test_a_compiled_training_learns_the_same(tmp_path, monkeypatch):
    plain, _ = trained(tmp_path / "plain")
    for name, value in {"_FEWEST_PASSES": 0, "_WORTH_SECONDS": 0.0}.items():
        monkeypatch.setattr(module, name, value)
    (tmp_path / "fast").mkdir()
    told = {"compiled": True, "precision": "float32"}
    (tmp_path / "fast" / COMPILED).write_text(json.dumps(told))
    fast, _ = trained(tmp_path / "fast")
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_mfu_is_operations_over_the_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops_per_s", lambda device, precision: 2e9)
    _, steps = trained(tmp_path, flops_per_token=5000)
    assert [event.figures["mfu"] for event in steps] == pytest.approx(
        [event.figures["tokens_per_s"] * 5000 / 2e9 for event in steps]
    )


def test_mfu_is_null_where_it_is_unknown(tmp_path, monkeypatch):
    _, steps = trained(tmp_path / "operations")
    assert all("mfu" not in event.figures and list(event.unknown) == ["mfu"] for event in steps)
    line = (tmp_path / "operations" / "log.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["mfu"] is None
    monkeypatch.setattr(loop, "peak_flops_per_s", lambda device, precision: None)
    _, steps = trained(tmp_path / "peak", flops_per_token=5000)
    assert all("mfu" not in event.figures for event in steps)


def test_peaks():
    assert published("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert published("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert published("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert published("NVIDIA GeForce RTX 4090", "bfloat16") == 165.2e12
    assert published("Tesla K80", "float32") is None
    here = peak_flops_per_s(torch.device("cpu"), "float32")
    assert here is not None and here > 1e8
    assert peak_flops_per_s(torch.device("meta"), "float32") is None
