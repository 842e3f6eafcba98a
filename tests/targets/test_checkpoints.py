"""Model folders as strangers leave them, exported: the artifact computes what transformers reads from the folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from cases import IDS, export_to, logits, mean_kl, quantized, reference

TARGETS = [("gguf", "fp16"), ("onnx", "onnx-fp32")]


@torch.no_grad()
def transformers_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


def edit(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


@pytest.mark.parametrize(("target", "recipe"), TARGETS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_head_of_its_own_wins_over_the_tie(
    target: str, recipe: str, kind: str, tmp_path: Path, student_factory: Any
) -> None:
    student = student_factory(tmp_path / "student", kind, head_dim=16, tie_word_embeddings=False)
    artifact = export_to(target, edit(student, tie_word_embeddings=True), recipe, tmp_path / "artifact")
    assert mean_kl(transformers_logits(student), logits(artifact, IDS)) < 1e-4


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_head_of_its_own_is_quantized_apart(target: str, tmp_path: Path, student_factory: Any) -> None:
    student = edit(student_factory(tmp_path / "student", "llama", tie_word_embeddings=False), tie_word_embeddings=True)
    packed = quantized(student, tmp_path / "quantized")
    assert json.loads((packed / "config.json").read_text())["tie_word_embeddings"] is False
    artifact = export_to(target, student, "portable-int4", tmp_path / "artifact", packed)
    assert mean_kl(reference(student, IDS, packed), logits(artifact, IDS)) < 0.02


@pytest.mark.parametrize(("target", "recipe"), TARGETS)
def test_heads_that_do_not_divide_the_channels(target: str, recipe: str, tmp_path: Path, student_factory: Any) -> None:
    """transformers builds no such Llama, but the same function under Mistral's name."""
    sizes = {"hidden_size": 72, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16}
    student = student_factory(tmp_path / "student", "llama")
    config = json.loads((student / "config.json").read_text()) | sizes
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(**{k: v for k, v in config.items() if k != "model_type"}, sliding_window=None)
    )
    model.half().save_pretrained(tmp_path / "mistral")
    shutil.copy(tmp_path / "mistral" / "model.safetensors", student)
    edit(student, **sizes)
    artifact = export_to(target, student, recipe, tmp_path / "artifact")
    assert mean_kl(transformers_logits(tmp_path / "mistral"), logits(artifact, IDS)) < 1e-4


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(
            lambda name: f"_orig_mod.{name}", id="compiled", marks=pytest.mark.filterwarnings("ignore:.*_orig")
        ),
        pytest.param(lambda name: name.removeprefix("model."), id="decoder alone"),
    ],
)
def test_other_names_of_the_same_weights(rename: Any, tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen3")
    expected = transformers_logits(student)
    path = student / "model.safetensors"
    save_file({rename(name): value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    artifact = export_to("gguf", student, "fp16", tmp_path / "artifact")
    assert mean_kl(expected, logits(artifact, IDS)) < 1e-4
    assert quantized(student, tmp_path / "quantized").is_dir()
