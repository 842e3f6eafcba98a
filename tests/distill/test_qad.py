"""Quantization-aware distillation: what is trained is what is written, and it is nearer than rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from edgekd.distill.data import Windows
from edgekd.distill.evaluate import evenly_spaced
from edgekd.distill.qad import FakeQuantized, quantize_aware_distill, start_from_gptq
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import PRECISION, evaluate
from edgekd.errors import EdgekdError
from edgekd.quant.grid import quantize_int4
from edgekd.quant.quantize import quantize
from edgekd.quant.store.reader import load_dequantized, open_quantized
from edgekd.spec import QadSpec
from edgekd.student import load_model, load_tokenizer, save_model
from edgekd.targets import load_recipe

VOCAB = 320


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_teacher) -> Path:
    """The tiny teacher with matrices as large as trained ones, so that rounding them tells."""
    model = load_model(tiny_teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("student")
    save_model(model, load_tokenizer(tiny_teacher), folder)
    return folder


def windows(count: int, seed: int) -> Windows:
    """Text with something to learn: arithmetic progressions of ids, (count, 48)."""
    generator = torch.Generator().manual_seed(seed)
    start, stride = (torch.randint(low, VOCAB, (count, 1), generator=generator) for low in (0, 1))
    ids = ((start + stride * torch.arange(48)) % VOCAB).int()
    return Windows(ids, torch.ones_like(ids, dtype=torch.uint8))


def distill(student: Path, out: Path, recipe: str = "portable-int4", **settings) -> dict:
    spec = QadSpec(steps=150, batch_size=8, warmup_steps=3, learning_rate=2e-4).model_copy(update=settings)
    return quantize_aware_distill(
        student,
        out,
        load_recipe(recipe),
        windows(512, 1),
        windows(8, 2),
        spec,
        calibration=evenly_spaced(windows(512, 1), 8).ids,
        signal=OnlineTeacher(load_model(student), VOCAB),
        seed=0,
        work_dir=out.with_name(out.name + ".training"),
        on_event=lambda event: None,
    )


@pytest.mark.parametrize("recipe", ["portable-int4", "portable-int4-head4", "int8"])
def test_the_student_runs_as_what_it_writes(tmp_path, student, recipe):
    model = load_model(student)
    chosen = load_recipe(recipe)
    kinds = {name: chosen.kind_of(name, tuple(p.shape)) for name, p in model.named_parameters()}
    scales = {n: quantize_int4(p.detach())[1] for n, p in model.named_parameters() if kinds[n] == "int4"}
    quantize(student, tmp_path / "rtn", chosen)
    expected = load_dequantized(open_quantized(tmp_path / "rtn"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(FakeQuantized(model, kinds, scales)(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("recipe", ["portable-int4", "portable-int4-head4"])
def test_it_starts_from_gptq_s_integers(tmp_path, student, recipe):
    chosen, ids, model = load_recipe(recipe), windows(16, 1).ids, load_model(student)
    quantize(student, tmp_path / "gptq", chosen, method="gptq", ids=ids)
    packed = open_quantized(tmp_path / "gptq")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantized = FakeQuantized(model, packed.kinds, start_from_gptq(model, student, ids, packed.kinds))
    shares = []
    for name in packed:
        if packed.kinds[name] == "int4":
            pair = packed.integers(name)
            q, scale = quantized.integers(name)
            assert torch.equal(q, pair[0]) and torch.equal(scale, pair[1]), name
            kept = model.get_parameter(name) == before[name]
            shares.append(float(kept.float().mean()))
    assert max(shares) < 1 and sum(shares) > 0.5 * len(shares), "most weights round to GPTQ's integer as they are"


def test_it_is_nearer_to_the_student_than_rounding(tmp_path, student):
    figures = distill(student, tmp_path / "qad", "portable-int4-head4")
    quantize(student, tmp_path / "rtn", load_recipe("portable-int4-head4"))
    of = {
        name: evaluate(
            load_dequantized(open_quantized(tmp_path / name)),
            windows(16, 3),
            teacher=OnlineTeacher(load_model(student), VOCAB),
        )["kl_to_teacher"]
        for name in ("rtn", "qad")
    }
    assert of["qad"] < 0.8 * of["rtn"]
    packed = open_quantized(tmp_path / "qad")
    assert figures["digest"] == packed.digest and packed.record.method == "qad"
    # What was validated last is what was written.
    again = evaluate(load_dequantized(packed), windows(8, 2))
    assert again["loss"] == pytest.approx(figures["validation"]["loss"], rel=1e-6)
    assert not torch.equal(packed.tensor("model.norm.weight"), load_model(student).model.norm.weight), "norms learn"


def test_nothing_is_left_of_a_run_that_fails(tmp_path, student):
    with pytest.raises(EdgekdError, match="not finite"):
        distill(student, tmp_path / "qad", learning_rate=1e30, warmup_steps=0)
    assert not (tmp_path / "qad").exists()


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill_and_ends_the_same(tmp_path, student):
    (tmp_path / "notes.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))

    def start(out: str) -> subprocess.Popen[str]:
        options = ["--method", "qad", "--text", "notes.txt", "--steps", "130", "--context", "32", "--json"]
        command = [sys.executable, "-m", "edgekd.cli", "quantize", str(student), out, *options]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def finish(process: subprocess.Popen[str]) -> dict:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return json.loads(out)

    for name in ("whole", "killed"):  # a precision that is timed may differ from run to run
        (tmp_path / f"{name}.training").mkdir()
        (tmp_path / f"{name}.training" / PRECISION).write_text('{"precision": "float32"}')
    whole = finish(start("whole"))
    killed = start("killed")
    deadline = time.monotonic() + 300
    while not any(tmp_path.glob("killed.training/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    again = finish(start("killed"))
    assert whole["digest"] == again["digest"] and whole["steps"] == again["steps"] == 130
    log = (tmp_path / "killed.training" / "log.jsonl").read_text().splitlines()
    steps = [event["step"] for event in map(json.loads, log) if event["event"] == "step"]
    assert steps == list(range(1, 131))
