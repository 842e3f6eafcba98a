"""The shipped teacher's optimizer, in the loop that trains students."""

from functools import partial

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from edgekd.distill.data import Windows
from edgekd.distill.train import Descent, train
from edgekd.spec import TrainingSpec
from edgekd.teachers.train_pycode import DECAY_SHARE, PEAK_LR, WARMUP_STEPS, MuonAdamW, rate

STEPS = 6


def small_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def test_it_steps_as_muon_and_adamw_do():
    ours, theirs = small_model(), small_model()
    whole = MuonAdamW(ours)
    matrices = [p for n, p in theirs.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in theirs.named_parameters() if p.ndim != 2 or "embed" in n]
    parts = [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    ids = torch.arange(48).view(2, 24)
    for lr in (1e-3, 3e-3, 2e-3):
        for model, optimizers in ((ours, [whole]), (theirs, parts)):
            model(input_ids=ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_warms_up_stays_and_decays():
    steps = 1000
    rates = [rate(steps, step) for step in range(steps)]
    assert rates[0] == pytest.approx(PEAK_LR / WARMUP_STEPS)
    stays = range(WARMUP_STEPS, steps - int(steps * DECAY_SHARE))
    assert {rates[step] for step in stays} == {PEAK_LR}
    assert rates[-1] == pytest.approx(PEAK_LR / (steps * DECAY_SHARE)) and rates == [
        *rates[:500],
        *sorted(rates[500:])[::-1],
    ]
    assert all(r > 0 for r in (rate(1, 0), rate(2, 1)))


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    """The moments of both parts are in the checkpoint."""
    ids = torch.randint(0, 64, (12, 16), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    windows = Windows(ids, torch.ones_like(ids, dtype=torch.uint8))

    class Stopped(Exception):
        pass

    def run(folder, stop_at=None):
        def on_event(event):
            if event.step == stop_at and event.event == "validation":
                raise Stopped

        model = small_model()
        spec = TrainingSpec(
            loss={"cross_entropy": 1.0},
            precision="float32",
            steps=STEPS,
            batch_size=2,
            validate_every=2,
            checkpoint_every=1,
        )
        method = Descent(MuonAdamW(model), partial(rate, STEPS))
        train(model, windows, windows, spec, signal=None, seed=0, work_dir=folder, on_event=on_event, method=method)
        return model

    with pytest.raises(Stopped):
        run(tmp_path / "stopped", stop_at=4)
    again, whole = run(tmp_path / "stopped"), run(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
