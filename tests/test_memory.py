"""The peak that is computed against real models: what their layers keep, and what the kernel counts of a training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edgekd.architecture import read_architecture
from edgekd.distill import losses
from edgekd.memory import CHUNK_BYTES, CHUNK_TOKENS, Training, proposals, saved_bytes, teacher_bytes, training_peak
from edgekd.spec import DistillSpec, LoraSpec, MatchSpec, MemorySpec, OnPolicySpec

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
SIZES = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 320, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": None}
NARROW = MemorySpec(weights="bfloat16", optimizer="adamw8bit")
MODES = {"float32": Training(2, 80), "autocast": Training(2, 80, autocast=True), "narrow": Training(2, 80, NARROW)}


def walked(family, layers, training):
    """Bytes that a forward pass keeps beside the weights and autocast's copies of them, by the storages it keeps."""
    config, kind = FAMILIES[family]
    model = kind(config(**SIZES | HEADS, num_hidden_layers=layers)).train()
    if training.spared.weights == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its place
        return tensor

    ids = torch.zeros(2, 80, dtype=torch.long)
    positions = (torch.arange(80) % 40).expand(2, 80) if training.masked else None
    half = torch.autocast("cpu", torch.bfloat16, enabled=training.autocast)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(size for size, _ in kept.values()), read_architecture(model.config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_what_a_layer_keeps_is_what_the_model_keeps(family, mode):
    few, _ = walked(family, 1, MODES[mode])
    more, arch = walked(family, 3, MODES[mode])
    assert (more - few) / 2 == pytest.approx(saved_bytes(arch, MODES[mode]), rel=0.05)


def test_documents_that_see_each_other_keep_less():
    alone = Training(2, 80, masked=False)
    few, more = walked("qwen2", 1, alone), walked("qwen2", 3, alone)
    assert (more[0] - few[0]) / 2 == pytest.approx(saved_bytes(more[1], alone), rel=0.05)


CASES = {
    "plain": {},
    "layers computed twice": {"memory": {"checkpoint_activations": True}},
    "a teacher": {"teacher": True},
    "adapters": {"memory": {"lora": {"r": 8}}},
    "8 bits": {"memory": {"optimizer": "adamw8bit"}},
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a phase's peak")
@pytest.mark.parametrize("case", CASES)
def test_a_trainings_peak_is_what_the_kernel_counts(tmp_path, case):
    child = Path(__file__).parent / "distill" / "peak_of_training.py"
    # A model of today's size has tensors that malloc gives back at once; this one's would stay in its pools.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, child, tmp_path, json.dumps(CASES[case])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["computed"] == pytest.approx(found["measured"], rel=0.15)


QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
QWEN_1_5B = {
    **QWEN,
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_7B = {
    **QWEN,
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
STUDENT, TEACHER = read_architecture(QWEN_1_5B), read_architecture(QWEN_7B)
SPARING = MemorySpec(weights="bfloat16", optimizer="adamw8bit", checkpoint_activations=True)
TWICE = MemorySpec(checkpoint_activations=True)
PAPER = {
    "from a cache, 8-bit Adam": (11.5, Training(8, 512, SPARING)),
    "beside a teacher in int4": (17.3, Training(8, 512, SPARING, teacher="int4")),
    "full Adam on two": (22.1, Training(4, 512, TWICE, autocast=True, teacher="int4", processes=2)),
    "as written": (68.0, Training(4, 512, teacher="float32")),
}


@pytest.mark.parametrize("case", PAPER)
def test_a_1_5b_student_of_a_7b_teacher_on_paper(case):
    gigabytes, training = PAPER[case]
    assert training_peak(STUDENT, [TEACHER], training, "cuda").bytes == pytest.approx(gigabytes * 1e9, rel=0.15)


def test_what_would_fit_24_gb():
    told = proposals(STUDENT, [TEACHER], Training(8, 512, teacher="float32"), "cuda", 24 * 10**9)
    fits = {proposal.setting: proposal.fits for proposal in told}
    assert told[0].setting == "as written" and told[0].bytes > 60e9 and not told[0].fits
    assert fits["… and teacher.signal: cached"] and fits["… and teacher.weights: int4"]
    assert not fits["memory.checkpoint_activations"]
    cached = {p.setting: p.fits for p in proposals(STUDENT, [TEACHER], Training(2, 512), "cuda", 24 * 10**9)}
    assert cached["memory.lora"] and "teacher.signal: cached" not in cached


@pytest.mark.parametrize(
    ("distill", "cacheable", "shareable"),
    [
        ({}, True, True),
        ({"on_policy": OnPolicySpec()}, False, False),
        ({"match": MatchSpec()}, False, False),
        ({"loss": {"reverse_kl": 1.0}}, False, True),
        ({"batch_size": 3}, True, False),
        ({"memory": NARROW}, True, False),
    ],
)
def test_no_way_is_told_that_is_refused(distill, cacheable, shareable):
    spec = DistillSpec(**distill)
    assert (spec.cacheable, spec.shareable(2)) == (cacheable, shareable)
    written = Training(8, 512, teacher="float32")
    told = proposals(STUDENT, [TEACHER], written, "cpu", 2**40, cacheable=cacheable, shareable=shareable)
    settings = [proposal.setting for proposal in told]
    assert any("cached" in setting for setting in settings) == cacheable
    assert any("torchrun" in setting for setting in settings) == shareable


@pytest.mark.parametrize(("spared", "each"), [(MemorySpec(), 16), (NARROW, 6 + 8 / 256)])
def test_bytes_of_a_weight(spared, each):
    peak = training_peak(STUDENT, [], Training(1, 16, spared, accumulates=True), "cuda")
    whole = peak.weights + peak.gradients + peak.moments
    assert whole == pytest.approx(each * STUDENT.parameters(), rel=1e-6)


def test_adapters_counted_by_hand():
    lora = MemorySpec(lora=LoraSpec(r=8, targets=["q_proj", "down_proj"]))
    peak = training_peak(STUDENT, [], Training(1, 16, lora, accumulates=True), "cuda")
    adapters = 28 * 8 * (1536 + 1536 + 8960 + 1536)
    assert (peak.moments, peak.gradients) == (8 * adapters, 4 * adapters)
    assert peak.weights == 4 * (STUDENT.parameters() + adapters)


def test_a_teacher_in_int4_by_hand():
    matrices = 28 * (3584 * 3584 * 2 + 2 * 512 * 3584 + 3 * 3584 * 18_944)
    assert teacher_bytes(TEACHER, "int4") == int(0.5625 * matrices) + 2 * (TEACHER.parameters() - matrices)
    assert teacher_bytes(TEACHER, "float32") == 4 * TEACHER.parameters()


def test_the_losses_chunk_what_is_planned():
    assert (losses.CHUNK_BYTES, losses.CHUNK_TOKENS) == (CHUNK_BYTES, CHUNK_TOKENS)
