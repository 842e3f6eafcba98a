"""Trains a few steps in a process of its own: ``peak_of_training.py WORK_DIR SETTINGS``; prints how far its memory rose
above what it had before any model, as the kernel counts it, and what ``edgekd.memory`` computes of the same."""

import ctypes
import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from edgekd.architecture import read_architecture
from edgekd.benchmarks.memory import begin_phase, peak_rss_bytes, usage
from edgekd.distill.data import Windows
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import train
from edgekd.memory import Training, training_peak
from edgekd.spec import DistillSpec, MemorySpec

CONTEXT, BATCH = 128, 6
SIZES = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}


def made(**more):
    return Qwen2ForCausalLM(Qwen2Config(**SIZES | HEADS | {"tie_word_embeddings": True} | more))


if __name__ == "__main__":
    work, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    spared = MemorySpec.model_validate(asked.get("memory", {}))
    teacher = asked.get("teacher")
    ids = torch.randint(0, 8000, (24, CONTEXT), dtype=torch.int32)
    begins = torch.zeros_like(ids, dtype=torch.uint8)
    begins[:, 40] = 1
    windows = Windows(ids, torch.ones_like(begins), begins)
    half = spared.weights == "bfloat16"
    spec = DistillSpec(
        loss={"forward_kl": 1.0} if teacher else {"cross_entropy": 1.0},
        steps=2,
        batch_size=BATCH,
        validate_every=100,
        checkpoint_every=100,
        precision="auto" if half else "float32",
        memory=spared,
    )
    train(
        made(num_hidden_layers=1),
        windows,
        windows.at(torch.arange(1)),
        spec.model_copy(update={"steps": 1}),
        signal=None,
        seed=0,
        work_dir=work / "warm",
        on_event=lambda event: None,
        memory=spared,
    )  # imports
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = usage().rss
    begin_phase()
    signal = OnlineTeacher(made(num_hidden_layers=12).eval(), 8000) if teacher else None
    model = made()
    train(
        model,
        windows,
        windows.at(torch.arange(1)),
        spec,
        signal=signal,
        seed=0,
        work_dir=work / "peak",
        on_event=lambda event: None,
        memory=spared,
    )
    arch = read_architecture(model.config.to_dict())
    heard = [read_architecture(signal.model.config.to_dict())] if signal else []
    training = Training(BATCH, CONTEXT, spared, teacher="float32" if teacher else None)
    computed = training_peak(arch, heard, training, "cpu").allocated
    print(json.dumps({"measured": peak_rss_bytes() - before, "computed": computed}))
