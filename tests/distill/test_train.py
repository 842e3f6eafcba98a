"""The loop: what it learns, what it writes, and that a run which dies anywhere ends as if it had not.

Shapes: B windows, T tokens, V vocabulary.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from edgekd.distill import train as module
from edgekd.distill.checkpoint import Event, read_log, validation_curve
from edgekd.distill.data import Windows
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import batch_indices, evaluate, learning_rate, train
from edgekd.errors import EdgekdError, SpecError
from edgekd.spec import DistillSpec

VOCAB = 64


def _model(seed, layers=1):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def _windows(count=24, width=32, seed=7):
    ids = torch.randint(0, VOCAB, (count, width), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    return Windows(ids, torch.ones_like(ids, dtype=torch.uint8))


def _train(model, work_dir, *, windows=None, validation=None, signal=None, seed=0, on_event=None, shared=None, **spec):
    settings = {"steps": 4, "batch_size": 4, "warmup_steps": 1, "validate_every": 2, "precision": "float32"} | spec
    windows = windows or _windows()
    return train(
        model,
        windows,
        validation or _windows(4, seed=8),
        DistillSpec(**settings),
        signal=signal,
        seed=seed,
        work_dir=work_dir,
        on_event=on_event or (lambda event: None),
        precision_file=shared,
    )


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_step_is_adamw_on_the_mean_loss(tmp_path):
    """Against a step written out by hand with torch's own cross-entropy."""
    model, by_hand = _model(0), _model(0)
    windows = _windows()
    windows.loss_mask[::2, :20] = 0
    _train(model, tmp_path, windows=windows, steps=1, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)

    index = batch_indices(0, 0, 24, 4)
    ids = windows.ids[index].long()
    labels = ids[:, 1:].masked_fill(windows.loss_mask[index][:, 1:] == 0, -100)
    logits = by_hand(input_ids=ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
    groups = [
        {"params": [p for p in by_hand.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in by_hand.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)).step()
    # Adam's first step is the sign of the gradient, so tiny gradients may differ in the last bits.
    assert (_weights(model) - _weights(by_hand)).abs().max() < 1e-4


def test_accumulation_changes_nothing(tmp_path):
    whole, parts = _model(0), _model(0)
    windows = _windows()
    windows.loss_mask[::3, 5:] = 0  # micro-batches with different numbers of tokens
    teacher = OnlineTeacher(_model(9, 2).eval(), VOCAB)
    _train(whole, tmp_path / "a", windows=windows, signal=teacher, batch_size=6)
    _train(parts, tmp_path / "b", windows=windows, signal=teacher, batch_size=2, gradient_accumulation=3)
    assert (_weights(whole) - _weights(parts)).abs().max() < 2e-4


def test_distilling_brings_the_student_to_the_teacher(tmp_path):
    teacher = OnlineTeacher(_model(9, 2).eval(), VOCAB)
    with torch.no_grad():  # a teacher with something to say
        for parameter in teacher.model.parameters():
            parameter.mul_(4)
    student = _model(0, 2)
    before = evaluate(student, _windows(4, seed=8), teacher=teacher)
    figures = _train(
        student,
        tmp_path,
        signal=teacher,
        loss={"forward_kl": 1.0},
        steps=150,
        learning_rate=1e-2,
        validate_every=150,
        windows=_windows(4, seed=8),
    )
    after = evaluate(student, _windows(4, seed=8), teacher=teacher)
    assert after["kl_to_teacher"] < 0.1 * before["kl_to_teacher"]
    assert after["top1_agreement_with_teacher"] > 0.7 > before["top1_agreement_with_teacher"]
    assert figures["steps"] == 150 and figures["tokens"] == 150 * 4 * 32


def test_a_label_only_run_ignores_the_loss_of_the_spec_and_reads_the_same_windows(tmp_path, monkeypatch):
    read: dict[str, list[list[int]]] = {"student": [], "baseline": []}
    original = module.batch_indices
    for name, teacher in (("student", OnlineTeacher(_model(9).eval(), VOCAB)), ("baseline", None)):

        def recorded(*arguments, name=name):
            index = original(*arguments)
            read[name].append(index.tolist())
            return index

        monkeypatch.setattr(module, "batch_indices", recorded)
        events: list[Event] = []
        _train(_model(0), tmp_path / name, signal=teacher, on_event=events.append)
        assert ("forward_kl" in events[0].figures) is (teacher is not None)
    assert read["student"] == read["baseline"] and len(read["student"]) == 4


@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(1, 70))
def test_every_window_is_read_once_before_any_is_read_again(seed, windows, size):
    steps = 2 * windows // size + 2
    order = torch.cat([batch_indices(seed, step, windows, size) for step in range(steps)]).tolist()
    for epoch in range(len(order) // windows):
        assert sorted(order[epoch * windows : (epoch + 1) * windows]) == list(range(windows))
    assert batch_indices(seed, steps - 1, windows, size).tolist() == order[-size:]


def test_the_rate_rises_and_falls_to_zero():
    spec = DistillSpec(steps=100, warmup_steps=10, learning_rate=1e-3)
    rates = [learning_rate(spec, step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[10] == max(rates) == 1e-3
    assert rates[55] == pytest.approx(5e-4) and rates[100] == 0 and rates[99] > 0
    short = DistillSpec(steps=3, warmup_steps=20, learning_rate=1e-3)
    assert [learning_rate(short, step) for step in range(3)] == pytest.approx([5e-5, 1e-4, 1.5e-4])


def test_evaluate_against_plain_float64(tmp_path):
    model, teacher = _model(0), _model(9, 2).eval()
    windows = _windows(5)
    windows.loss_mask[1, 3:9] = 0
    ids = (windows.ids % 60).long()  # labels must lie in the shared vocabulary
    windows = Windows(ids.int(), windows.loss_mask)
    figures = evaluate(model, windows, teacher=OnlineTeacher(teacher, 60), batch_size=2)
    with torch.no_grad():
        q = model(input_ids=ids).logits[:, :-1, :60].double().log_softmax(-1)
        p = teacher(input_ids=ids).logits[:, :-1, :60].double().log_softmax(-1)
    keep, labels = windows.loss_mask[:, 1:].bool(), ids[:, 1:]
    nll = -q.gather(-1, labels[..., None])[..., 0][keep].mean()
    assert figures["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert figures["next_token_accuracy"] == pytest.approx((q.argmax(-1) == labels)[keep].double().mean().item())
    assert figures["kl_to_teacher"] == pytest.approx((p.exp() * (p - q)).sum(-1)[keep].mean().item(), rel=1e-4)
    agreement = (q.argmax(-1) == p.argmax(-1))[keep].double().mean().item()
    assert figures["top1_agreement_with_teacher"] == pytest.approx(agreement)
    assert figures["tokens"] == keep.sum() == 5 * 31 - 6
    assert "kl_to_teacher" not in evaluate(model, windows)


class _NoFloat64(TorchFunctionMode):
    """A device that refuses float64, as Apple's GPUs do; a tensor that was brought to the CPU may become one."""

    def __init__(self):
        self.brought = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.Tensor.double and not any(arguments[0] is tensor for tensor in self.brought):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result = function(*arguments, **(options or {}))
        if function is torch.Tensor.cpu:
            self.brought.append(result)
        return result


def test_a_gpu_without_float64_can_be_evaluated_on():
    windows, teacher = _windows(3), OnlineTeacher(_model(9).eval(), VOCAB)
    expected = evaluate(_model(0), windows, teacher=teacher)
    with _NoFloat64():
        assert evaluate(_model(0), windows, teacher=teacher) == expected


def test_a_padded_student_learns_only_the_shared_ids(tmp_path):
    """Teacher and student of different embedding sizes; rows beyond the tokenizer's ids get no gradient."""
    student, teacher = _model(0), OnlineTeacher(_model(9).eval(), 50)
    windows = _windows()
    windows.ids.remainder_(50)
    before = student.lm_head.weight.detach().clone()
    _train(student, tmp_path, windows=windows, validation=windows, signal=teacher, weight_decay=0.0, steps=2)
    changed = (student.lm_head.weight != before).any(1)
    assert changed[:50].all() and not changed[50:].any()


def test_patience_keeps_the_best_weights(tmp_path):
    """A rate far too high spoils the student after the first validations."""
    model = _model(0)
    validation = _windows(4, seed=8)
    figures = _train(
        model,
        tmp_path,
        validation=validation,
        steps=200,
        learning_rate=0.3,
        validate_every=1,
        patience=3,
    )
    assert figures["stopped_early"] and figures["steps"] < 200
    losses = [event.figures["loss"] for event in read_log(tmp_path / "log.jsonl") if event.event == "validation"]
    assert figures["best_step"] == 1 + losses.index(min(losses)) == figures["steps"] - 3
    assert evaluate(model, validation)["loss"] == pytest.approx(min(losses), rel=1e-6)
    # Started again, it knows that it is done, and gives the same weights.
    again = _model(0)
    repeated = _train(
        again,
        tmp_path,
        validation=validation,
        steps=200,
        learning_rate=0.3,
        validate_every=1,
        patience=3,
    )
    assert torch.equal(_weights(again), _weights(model)) and repeated == figures


def test_what_is_written_is_safetensors_and_json(tmp_path):
    _train(_model(0), tmp_path, checkpoint_every=2)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "tensorboard"}
    assert kinds == {".safetensors", ".json", ".jsonl"}


def test_bfloat16_autocast_runs_and_learns(tmp_path):
    model = _model(0)
    events: list[Event] = []
    figures = _train(
        model,
        tmp_path,
        precision="bfloat16",
        windows=_windows(2),
        batch_size=2,
        steps=30,
        learning_rate=1e-2,
        validate_every=30,
        on_event=events.append,
    )
    steps = [event for event in events if event.event == "step"]
    assert steps[-1].figures["loss"] < 0.8 * steps[0].figures["loss"] and figures["precision"] == "bfloat16"
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_work_folder_of_another_run_is_refused(tmp_path):
    _train(_model(0), tmp_path)
    for changed in ({"seed": 1}, {"learning_rate": 2e-3}, {"windows": _windows(seed=9)}):
        with pytest.raises(EdgekdError, match="another spec, seed, model or data"):
            _train(_model(0), tmp_path, **changed)
    with pytest.raises(EdgekdError, match="another spec, seed, model or data"):
        _train(_model(1), tmp_path)


def _flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut": lambda folder: os.truncate(folder / "optimizer.safetensors", 100),
    "a flipped bit of the weights": lambda folder: _flip(folder / "model.safetensors"),
    "a flipped bit of the optimizer": lambda folder: _flip(folder / "optimizer.safetensors"),
    "a file is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "a number is another": lambda folder: (folder / "progress.json").write_text(
        (folder / "progress.json").read_text().replace('"step": 4', '"step": 3')
    ),
    "progress is no object": lambda folder: (folder / "progress.json").write_text("[]"),
    "progress is missing": lambda folder: (folder / "progress.json").unlink(),
    "a checkpoint of an earlier version": lambda folder: (folder / "progress.json").write_text('{"step": 4}'),
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("older", [False, True], ids=["alone", "an older one beside it"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage, older):
    whole = _model(0)
    _train(whole, tmp_path / "whole", steps=6)
    work, keep = tmp_path / "work", tmp_path / "kept"

    def on_event(event):
        if event.step == 3 and older:
            shutil.copytree(work / "checkpoint-2", keep)
        if event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(_model(0), work, steps=6, checkpoint_every=2, on_event=on_event)
    DAMAGES[damage](work / "checkpoint-4")
    if older:
        keep.rename(work / "checkpoint-2")
    (work / "checkpoint-x").mkdir()
    again, events = _model(0), []
    _train(again, work, steps=6, checkpoint_every=2, on_event=events.append)
    assert events[0].step == (3 if older else 1) and torch.equal(_weights(again), _weights(whole))
    assert "checkpoint-4" in caplog.text and "Training goes on from the checkpoint before it" in caplog.text
    assert [event.step for event in read_log(work / "log.jsonl") if event.event == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_log_costs_only_its_damaged_lines(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(
        b'{"event": "validation", "step": 1, "perplexity": 9.0}\n{"event": "vali\n[]\n\xff\xfe\n{"event": "step"}\n'
        b'{"event": "validation", "step": 2}\n' + b"[" * 100_000 + b"\n"
        b'{"event": "validation", "step": 3, "perplexity": 8.0}\n{"event": "validation", "st'
    )
    assert validation_curve(tmp_path / "log.jsonl") == [
        {"step": 1, "validation_perplexity": 9.0},
        {"step": 3, "validation_perplexity": 8.0},
    ]


def test_links_in_the_work_folder_are_not_followed(tmp_path):
    work, outside = tmp_path / "work", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    work.mkdir()
    for name in ("tensorboard", "checkpoint-2", "log.jsonl"):
        (work / name).symlink_to(outside if name != "log.jsonl" else outside / "precious")
    _train(_model(0), work, checkpoint_every=2)
    assert [path.name for path in outside.iterdir()] == ["precious"] and (outside / "precious").read_text() == "x"


def test_windows_longer_than_the_student_and_a_loss_that_explodes(tmp_path):
    with pytest.raises(SpecError, match=r"data\.context: 65 .* 64 positions"):
        _train(_model(0), tmp_path / "a", windows=_windows(4, 65))
    broken = _model(0)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.inf)
    with pytest.raises(EdgekdError, match="Step 1: the loss"):
        _train(broken, tmp_path / "b")
    assert not list((tmp_path / "b").glob("checkpoint-*"))


CHILD = Path(__file__).with_name("train_and_die.py")


def _child(*arguments, kill_at=None, with_signal=signal.SIGKILL):
    """Run the child; ``kill_at``: send it a signal as soon as it tells of that step."""
    process = subprocess.Popen(
        [sys.executable, CHILD, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if kill_at is not None:
        for line in process.stdout:
            if line.strip() == f"step {kill_at}":
                process.send_signal(with_signal)
                break
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_student(tmp_path):
    work = tmp_path / "work"
    code, out, error = _child(work, "at-rename")
    assert code == -signal.SIGKILL, error
    assert out.split()[-1] == "8" and [f.name for f in work.glob("checkpoint-*")] == ["checkpoint-4"]
    (unfinished,) = work.glob(".checkpoint-8.*.tmp")
    assert (unfinished / "model.safetensors").exists()

    code, _, error = _child(work, "wait", kill_at=7)
    assert code == -signal.SIGKILL, error
    assert [f.name for f in work.glob("checkpoint-*")] == ["checkpoint-4"]

    code, out, error = _child(work, "wait", kill_at=10, with_signal=signal.SIGINT)
    assert code != 0 and "KeyboardInterrupt" in error
    (left,) = work.glob("checkpoint-*")
    stopped_at = int(left.name.rpartition("-")[2])
    assert stopped_at >= 10 and json.loads((left / "progress.json").read_text())["progress"]["step"] == stopped_at

    code, out, error = _child(work, "finish", tmp_path / "reference")
    assert code == 0, error
    lines = dict(line.split() for line in out.splitlines() if not line.startswith("step"))
    assert out.startswith(f"step {stopped_at + 1}\n") and lines["resumed"] == lines["reference"]

    def without_times(folder):
        return [
            (event.event, event.step, event.steps, {k: v for k, v in event.figures.items() if k != "tokens_per_s"})
            for event in read_log(folder / "log.jsonl")
        ]

    assert without_times(work) == without_times(tmp_path / "reference")
    _no_step_twice_in_tensorboard(work / "tensorboard")


def _no_step_twice_in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("step/loss")] == list(range(1, 15))
    assert [event.step for event in accumulator.Scalars("validation/perplexity")] == [3, 6, 9, 12, 14]


def test_auto_takes_the_faster_precision_and_keeps_to_it(tmp_path, monkeypatch):
    import edgekd.distill.precision as precision

    timed = {"float32": 1.0, "bfloat16": 0.5}
    monkeypatch.setattr(precision, "_seconds", lambda one_pass, name: timed[name])
    assert _train(_model(0), tmp_path / "a", precision="auto")["precision"] == "bfloat16"
    told = json.loads((tmp_path / "a" / "precision.json").read_text())
    assert told == {"precision": "bfloat16", "seconds": timed, "source": "measured:training-pass"}
    timed["bfloat16"] = 2.0
    assert _train(_model(0), tmp_path / "a", precision="auto", steps=4)["precision"] == "bfloat16"
    assert _train(_model(0), tmp_path / "b", precision="auto")["precision"] == "float32"
    timed["bfloat16"] = 0.8  # another run might find the contrary
    assert _train(_model(0), tmp_path / "c", precision="auto")["precision"] == "float32"
    shared = tmp_path / "a" / "precision.json"
    assert _train(_model(0), tmp_path / "d", precision="auto", shared=shared)["precision"] == "bfloat16"


def test_timing_leaves_the_training_as_it_was(tmp_path, monkeypatch):
    import edgekd.distill.precision as precision

    model, timed = _model(0), _model(0)
    _train(model, tmp_path / "a", precision="float32")
    monkeypatch.setattr(precision, "_GAIN", 0.0)  # whatever the clock says
    _train(timed, tmp_path / "b", precision="auto")
    assert torch.equal(_weights(model), _weights(timed))
    assert min(json.loads((tmp_path / "b" / "precision.json").read_text())["seconds"].values()) > 0
