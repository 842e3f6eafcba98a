"""Artifacts for benchmarks: with a proof made by hand, of the NumPy runtime, and a real GGUF of two layers."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from edgekd.manifest import Traffic, write_artifact
from edgekd.proof import Benchmark, Parity

CONTRACT = {
    "context_length": 4096,
    "vocab_size": 257,
    "bos_id": None,
    "eos_ids": [256],
    "add_bos": False,
    "chat_template": None,
}


def _write(folder, weights, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(weights)
    return write_artifact(folder, main_file="model.bin", student_digest="0", versions={}, **fields)


@pytest.fixture
def make_artifact(tmp_path):
    """An artifact: its bytes, what a token reads, and what was measured of it."""

    def make(name: str, *, size=1000, read=None, top1=None, benchmark=None, failures=(), target="gguf"):
        parity = None
        if top1 is not None:
            found = {"windows": 1, "window_tokens": 8, "unusable_positions": 0, "top1_agreement": top1}
            parity = Parity.model_validate(found | {"failures": list(failures)})
        return _write(
            tmp_path / "artifacts" / name,
            name.encode().ljust(size, b"\0"),
            name=name,
            target=target,
            recipe="r",
            runtime="llama.cpp",
            parameters=10**9,
            bits_per_weight=8.0,
            traffic=None if read is None else Traffic(weight_bytes=read, kv_bytes_per_position=1000),
            contract=CONTRACT,
            parity=parity,
            benchmark=None if benchmark is None else Benchmark.model_validate(benchmark),
        )

    return make


@pytest.fixture
def runtime(monkeypatch):
    """The module of the NumPy runtime, which the processes that are started find too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # spawned processes inherit sys.path
    return importlib.import_module("numpy_runtime")


@pytest.fixture
def numpy_artifact():
    """An artifact of the NumPy runtime: a folder and a name."""

    def make(folder, name):
        return _write(
            folder,
            b"weights",
            name=name,
            target="numpy",
            recipe="f32",
            runtime="numpy",
            parameters=1000,
            bits_per_weight=32.0,
            contract=CONTRACT | {"context_length": 64},
        )

    return make


@pytest.fixture(scope="session")
def export_gguf():
    """A GGUF, int8, of two random layers that read bytes: a folder for the student, one for the artifact, its name."""
    pytest.importorskip("llama_cpp")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from edgekd.spec import TargetSpec
    from edgekd.student import save_model
    from edgekd.targets import export

    def make(student, out, name, kind, **config):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<|endoftext|>": 0} | {char: i + 1 for i, char in enumerate(alphabet)}
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
        made = getattr(transformers, f"{kind}Config")(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            eos_token_id=0,
            bos_token_id=None,
            **config,
        )
        torch.manual_seed(0)
        save_model(getattr(transformers, f"{kind}ForCausalLM")(made), tokenizer, student)
        return export(student, TargetSpec(target="gguf", recipes=["int8"]), "int8", out, name=name)

    return make
