"""A GGUF file back to a model folder: against the model it was made from, and against transformers' own reader."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cases import ARCHITECTURES, IDS, LLAMA3_ROPE, export_to, reference
from edgekd.cli import app
from edgekd.errors import EdgekdError, Unsupported
from edgekd.origin import ORIGIN, read_origin
from edgekd.runs import verbs
from edgekd.runs.verbs import import_gguf
from edgekd.student import load_model, load_tokenizer
from edgekd.targets.gguf.target import MAIN_FILE

export = partial(export_to, "gguf")
TEXTS = ["Hello, world!", " 12345  don't\n\n\tx", "naïve 世界 🚀 e\u0301", "<|im_start|>user\nhi<|im_end|>\n", "\x00"]
LLAMA31 = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: case for name, case in ARCHITECTURES.items() if "rope" not in name},
    "llama 3.1": ("llama", {"rope_parameters": LLAMA31, "max_position_embeddings": 9000}),
    "qwen2 untied": ("qwen2", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
}


def quiet(_fraction: float, _note: str) -> None:
    pass


def rewrite(source: Path, out: Path, change: Any, encode: Any = None) -> Path:
    """A GGUF file again, its keys and tensors changed.

    Args:
        change: takes the dicts of keys ``(value, type)`` and of tensors ``(array, ggml type)``.
        encode: tensor name, array → array, ggml type.
    """
    reader = gguf.GGUFReader(source)
    keys = {
        name: (field.contents(), field.types)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    architecture = change(keys, tensors) or reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, (value, types) in keys.items():
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, (data, kind) in tensors.items():
        data, kind = encode(name, data.astype(np.float32)) if encode and data.ndim == 2 else (data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory, student_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("file")
    student = student_factory(folder / "student", "llama")
    return export(student, "fp16", folder / "out").folder / MAIN_FILE


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_ours_comes_back(name: str, tmp_path: Path, student_factory: Any) -> None:
    kind, settings = MODELS[name]
    student = student_factory(tmp_path / "student", kind, **settings)
    artifact = export(student, "fp16", tmp_path / "out")
    origin = import_gguf(artifact.folder / MAIN_FILE, tmp_path / "back", quiet)
    assert origin.dequantized_from == [] and origin.remark is None and origin.logits.kl_mean < 1e-4
    weights, again = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "back"))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name].float(), again[name].float()) for name in weights)
    assert np.array_equal(reference(student, IDS), reference(tmp_path / "back", IDS))
    before, after = AutoTokenizer.from_pretrained(student), AutoTokenizer.from_pretrained(tmp_path / "back")
    assert [before(text)["input_ids"] for text in TEXTS] == [after(text)["input_ids"] for text in TEXTS]
    chat = [{"role": "user", "content": "Hello!"}]
    assert before.apply_chat_template(chat) == after.apply_chat_template(chat)
    assert before.eos_token_id == after.eos_token_id
    ends = json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == set(artifact.manifest.contract.eos_ids)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_quantized_weights_are_those_of_transformers(kind: str, tmp_path: Path, llama_file: Path) -> None:
    quant = gguf.GGMLQuantizationType[kind]

    def encode(_name: str, data: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        return gguf.quantize(data, quant), quant

    path = rewrite(llama_file, tmp_path / "q.gguf", lambda *_: None, encode)
    origin = import_gguf(path, tmp_path / "back", quiet)
    assert origin.dequantized_from == ([] if kind == "BF16" else [kind])
    stored = load_file(tmp_path / "back" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert stored.dtype == (torch.bfloat16 if kind == "BF16" else torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="q.gguf", dtype=torch.float32).state_dict()
    ours = load_model(tmp_path / "back").state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_k_quants(tmp_path: Path, student_factory: Any) -> None:
    student = student_factory(tmp_path / "student", "qwen3", hidden_size=256, intermediate_size=256, head_dim=128)
    artifact = export(student, "gguf-q6_k", tmp_path / "out")
    origin = import_gguf(artifact.folder / MAIN_FILE, tmp_path / "back", quiet)
    assert "Q6_K" in origin.dequantized_from and origin.logits.kl_mean < 1e-4
    assert read_origin(tmp_path / "back") == origin
    again = export(tmp_path / "back", "fp16", tmp_path / "again")
    assert again.manifest.dequantized_from == origin.dequantized_from


def test_the_digits_rule_survives(
    tmp_path: Path, student_factory: Any, tokenizer_factory: Any, byte_level_factory: Any
):
    tokenizer = tokenizer_factory(byte_level_factory(digits=True, use_regex=True))
    student = student_factory(tmp_path / "student", "llama", tokenizer)
    path = export(student, "fp16", tmp_path / "out").folder / MAIN_FILE

    def rename(keys: Any, _tensors: Any) -> None:
        keys["tokenizer.ggml.pre"] = ("smollm", keys["tokenizer.ggml.pre"][1])

    import_gguf(rewrite(path, tmp_path / "smollm.gguf", rename), tmp_path / "back", quiet)
    assert load_tokenizer(tmp_path / "back")("x 2024 123")["input_ids"] == tokenizer("x 2024 123")["input_ids"]
    assert '"Digits"' in (tmp_path / "back" / "tokenizer.json").read_text()


def test_sentencepiece(tmp_path: Path, student_factory: Any, sentencepiece_factory: Any) -> None:
    tokenizer = sentencepiece_factory()
    student = student_factory(tmp_path / "student", "llama", tokenizer)
    path = export(student, "fp16", tmp_path / "out").folder / MAIN_FILE
    import_gguf(path, tmp_path / "back", quiet)
    again = load_tokenizer(tmp_path / "back")
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [again.decode(again(text)["input_ids"]) for text in TEXTS] == [
        tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS
    ]


def test_an_ordinary_entry_that_reads_as_a_special_token(
    tmp_path: Path, student_factory: Any, tokenizer_factory: Any
) -> None:
    data = json.loads(tokenizer_factory().backend_tokenizer.to_str())
    data["model"]["vocab"]["</s>"] = 700  # as Qwen2.5's
    backend = Tokenizer.from_str(json.dumps(data))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    student = student_factory(tmp_path / "student", "qwen2", tokenizer, head_dim=16)
    import_gguf(export(student, "fp16", tmp_path / "out").folder / MAIN_FILE, tmp_path / "back", quiet)
    assert load_tokenizer(tmp_path / "back")("a</s>b")["input_ids"] == tokenizer("a</s>b")["input_ids"]


def _key(name: str, value: Any, kind: gguf.GGUFValueType) -> Any:
    return lambda keys, _: keys.update({name: (value, [kind])})


U32, F32, TEXT = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
REFUSED = {
    "another architecture": (lambda *_: "mamba", "mamba"),
    "experts": (_key("llama.expert_count", 8, U32), "expert_count"),
    "a window": (_key("llama.attention.sliding_window", 64, U32), "sliding_window"),
    "scaled rope": (_key("llama.rope.scaling.type", "yarn", TEXT), "rope.scaling.type"),
    "part of a head": (_key("llama.rope.dimension_count", 16, U32), "dimension_count"),
    "an adapter": (_key("general.type", "adapter", TEXT), "adapter"),
    "a part": (_key("split.count", 3, gguf.GGUFValueType.UINT16), "several parts"),
    "layers beyond reason": (_key("llama.block_count", 2**31, U32), "num_hidden_layers"),
    "no such layer": (_key("llama.block_count", 3, U32), "blk.2"),
    "a text for a number": (_key("llama.context_length", "many", TEXT), "context_length"),
    "another tokenizer": (_key("tokenizer.ggml.model", "bert", TEXT), "bert"),
    "an id beyond": (_key("tokenizer.ggml.eos_token_id", 10**6, U32), "eos_token_id"),
    "a tensor too many": (
        lambda _, t: t.update({"blk.0.attn_sinks.weight": (np.zeros(4, np.float32), gguf.GGMLQuantizationType.F32)}),
        "attn_sinks",
    ),
    "a tensor missing": (lambda _, t: t.pop("blk.1.ffn_up.weight") and None, "blk.1.ffn_up"),
    "another shape": (lambda _, t: t.update({"output_norm.weight": (np.ones(8, np.float32), 0)}), "output_norm"),
    "not a number": (
        lambda _, t: t.update({"output_norm.weight": (np.full(64, np.nan, np.float32), 0)}),
        "output_norm",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_understood_is_refused(fault: str, tmp_path: Path, llama_file: Path) -> None:
    change, named = REFUSED[fault]
    path = rewrite(llama_file, tmp_path / "file.gguf", change)
    with pytest.raises(EdgekdError, match=named):
        import_gguf(path, tmp_path / "back", quiet)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.gguf"]


@pytest.mark.parametrize("bytes_left", [0, 3, 40, 5000, -100])
def test_a_truncated_file_is_refused(bytes_left: int, tmp_path: Path, llama_file: Path) -> None:
    (tmp_path / "file.gguf").write_bytes(llama_file.read_bytes()[:bytes_left])
    with pytest.raises(EdgekdError, match=r"file\.gguf"):
        import_gguf(tmp_path / "file.gguf", tmp_path / "back", quiet)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.gguf"]


def test_an_unknown_pre_tokenizer_is_found_by_its_ids_or_refused(tmp_path: Path, llama_file: Path) -> None:
    # llama.cpp cuts bloom's texts by an expression of their own, as this import does not.
    path = rewrite(llama_file, tmp_path / "file.gguf", _key("tokenizer.ggml.pre", "bloom", TEXT))
    with pytest.raises(Unsupported, match="tokenizer cannot be imported; on '"):
        import_gguf(path, tmp_path / "back", quiet)


def test_weights_that_come_out_otherwise_are_refused(
    tmp_path: Path, llama_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.targets.gguf import foreign

    monkeypatch.setattr(foreign, "pairs_to_halves", lambda rows, heads: rows)
    with pytest.raises(EdgekdError, match=r"logits are not llama\.cpp's"):
        import_gguf(llama_file, tmp_path / "back", quiet)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path: Path, llama_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "_imported_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(llama_file, tmp_path / "back", quiet)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, llama_file: Path) -> None:
    out = tmp_path / "back"
    done = CliRunner().invoke(app, ["import", str(llama_file), str(out), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["folder"] == str(out) and said["logits"]["kl_mean"] < 1e-4 and said["tokenizer_texts"] > 40
    assert json.loads((out / ORIGIN).read_text()) == {k: v for k, v in said.items() if k != "folder"}
    again = CliRunner().invoke(app, ["import", str(llama_file), str(out)])
    assert isinstance(again.exception, EdgekdError) and "exists" in str(again.exception)
    with pytest.raises(EdgekdError, match="no such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "x", quiet)
