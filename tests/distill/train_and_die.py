"""Trains a tiny student in a process of its own, to be killed: ``train_and_die.py WORK_DIR MODE [REFERENCE_DIR]``.

Modes: ``at-rename`` kills itself (SIGKILL) when its second checkpoint is about to be renamed into place; ``wait``
prints each step and goes on slowly, for the parent to kill or interrupt; ``finish`` goes on to the end, then trains
the same from the start in REFERENCE_DIR, and prints the sha256 of both students' weights.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from edgekd.distill.data import Windows
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import train
from edgekd.spec import DistillSpec


def tiny(seed: int, layers: int, dropout: float = 0.1) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_dropout=dropout,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def run(work_dir: Path, on_event) -> str:
    ids = torch.randint(0, 64, (40, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(7))
    windows = Windows(ids, torch.ones_like(ids, dtype=torch.uint8))
    spec = DistillSpec(
        steps=14, batch_size=2, gradient_accumulation=2, checkpoint_every=4, validate_every=3, patience=9
    )
    model = tiny(1, 1)
    train(
        model,
        windows,
        Windows(ids[:4], windows.loss_mask[:4]),
        spec,
        signal=OnlineTeacher(tiny(2, 2).eval(), 64),
        seed=3,
        work_dir=work_dir,
        on_event=on_event,
    )
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def tell(event) -> None:
    if event.event == "step":
        print("step", event.step, flush=True)


def tell_slowly(event) -> None:
    tell(event)
    time.sleep(0.3)


def die_at_second_rename(source, target) -> None:
    if Path(target).name == "checkpoint-8":
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(source, target)


if __name__ == "__main__":
    work_dir, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "at-rename":
        os.rename = die_at_second_rename
    result = run(work_dir, tell_slowly if mode == "wait" else tell)
    if mode == "finish":
        print("resumed", result)
        print("reference", run(Path(sys.argv[3]), lambda event: None))
