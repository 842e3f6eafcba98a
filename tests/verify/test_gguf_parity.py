"""The whole verification on a real GGUF in llama.cpp."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("llama_cpp")
from edgekd.spec import TargetSpec, Thresholds
from edgekd.student import save_model
from edgekd.targets import export, open_artifact
from edgekd.verify.parity import judge, measure
from edgekd.verify.tokens import check_tokens

VOCAB, CONTEXT = 384, 96


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("student")
    save_model(model, tokenizer, folder)
    return folder, model


def verified(student, tokenizer, recipe, out):
    folder, model = student

    def reference(ids):
        with torch.inference_mode():
            return model(torch.from_numpy(np.asarray(ids, np.int64))[None]).logits[0].float().numpy()

    artifact = export(folder, TargetSpec(target="gguf", recipes=[recipe]), recipe, out, name=f"tiny-{recipe}")
    session = open_artifact(artifact, threads=1)
    try:
        windows = np.random.default_rng(0).integers(3, VOCAB - 90, (4, 48))
        return (
            measure(session, reference, windows, greedy_tokens=8),
            check_tokens(session, tokenizer, artifact.manifest.contract),
        )
    finally:
        session.close()


def test_fp16_passes_a_tight_gate(student, tokenizer, tmp_path):
    figures, tokens = verified(student, tokenizer, "fp16", tmp_path / "fp16")
    json.dumps([figures.model_dump(), tokens.model_dump()], allow_nan=False)
    assert judge(figures, tokens, Thresholds(kl_mean_max=1e-5, top1_min=0.98, perplexity_ratio_max=1.001)) == []
    assert tokens.strings == tokens.strings_identical >= 300
    assert tokens.chats == tokens.chats_identical == 10
    assert tokens.round_trips == tokens.round_trips_identical >= 280


def test_int4_costs_more_than_fp16_and_misses_that_gate(student, tokenizer, tmp_path):
    figures, tokens = verified(student, tokenizer, "portable-int4", tmp_path / "portable-int4")
    assert 1e-5 < figures.kl_mean < 1
    assert tokens.strings == tokens.strings_identical
    assert [failure.split()[0] for failure in judge(figures, tokens, Thresholds(kl_mean_max=1e-5))] == ["kl_mean"]
