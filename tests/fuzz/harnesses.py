"""What is fuzzed: each kind of file that edgekd reads, valid ones of that kind, and the way a user's command takes it.

A harness may answer an input with ``EdgekdError`` or take it. Whatever else it raises goes through ``errors.as_error``,
as in the command line, and must not come out as a ``Fault``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.plan import Machine

MACHINE = Machine(ram_bytes=2**31, disk_free_bytes=2**33, flops_per_s=1e11, training_flops_per_s=1e11)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
]
TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPEC = """
name: tiny
teacher: {model: teacher}
student: STUDENT
data: {source: text, paths: [text/*.txt], context: 32, validation_share: 0.2, test_share: 0.2}
distill: {steps: 4, loss: {forward_kl: 0.9, jsd: 0.1}}
quantize: {method: qad, compare: [rtn, search], qad: {steps: 5, patience: 2}}
targets:
- {target: gguf, recipes: [fp16, portable-int4, gguf-q4_k_m], context: 64}
- {target: onnx, recipes: [int8], providers: [cpu]}
- {target: coreml, recipes: [portable-int4], minimum_ios: 18}
- {target: executorch, recipes: [portable-int4]}
verify: {windows: 2, context: 32, greedy_tokens: 4, thresholds: {fp16: {kl_mean_max: 0.1}, default: {top1_min: 0.5}}}
bench: {prompt_tokens: [8], decode_tokens: 8, runs: 1, threads: 1}
"""
STUDENTS = (
    "{init: cut, layers: 2, hidden_size: 32, intermediate_size: 32}",
    "{init: config, architecture: qwen3, hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2, kv_heads: 1}",
    "{init: checkpoint, model: teacher}",
)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 3,
    "layer_types": ["full_attention"] * 3,
    "initializer_range": 0.02,
    "use_cache": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": None,
    "transformers_version": "5.0.0",
}
LLAMA3 = {
    **CONFIG,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "mlp_bias": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@dataclass(frozen=True)
class Harness:
    """How one kind of input is fed."""

    form: str
    """As ``mutate`` knows it."""
    seeds: Sequence[bytes]
    check: Callable[[bytes], Any]
    """Takes an input as a command would."""


def _tokenizer() -> dict[str, Any]:
    """A ``tokenizer.json`` whose tokens are the bytes, and three special ones."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": step,
        "post_processor": step,
        "decoder": step,
        "added_tokens": [{"id": 256 + i, "content": text, **flags} for i, text in enumerate(special)],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: i for i, letter in enumerate(letters)},
            "merges": [],
        },
    }


def _weights() -> dict[str, np.ndarray]:
    """The tensors that ``CONFIG`` asks for."""
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (260, 32), "model.norm.weight": (32,)}
    for i in range(3):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{p}_proj.weight": (32 if p == "q" else 16, 32) for p in "qkv"}
        shapes |= {f"{block}self_attn.{p}_norm.weight": (16,) for p in "qk"}
        shapes |= {f"{block}{p}_layernorm.weight": (32,) for p in ("input", "post_attention")}
        shapes |= {f"{block}mlp.{p}_proj.weight": (64, 32) for p in ("gate", "up")}
        shapes |= {f"{block}self_attn.o_proj.weight": (32, 32), f"{block}mlp.down_proj.weight": (32, 64)}
    return {name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def tiny_model(folder: Path) -> Path:
    """A model folder of 30,000 weights, made without torch."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 256]}))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})
    return folder


def _project(folder: Path) -> Path:
    """A folder with a teacher, and text that a spec names."""
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("One and one is two.\n\n" * 50)
    tiny_model(folder / "teacher")
    return folder


def _plan(spec: Any, base: Path) -> Any:
    """As ``edgekd plan`` does, but for measuring the machine."""
    from edgekd.plan import refuse_what_cannot_fit
    from edgekd.runs.chain import stages
    from edgekd.runs.preflight import open_run

    run = open_run(spec, base=base, out=base / "run")
    refuse_what_cannot_fit({stage.name: stage.cost for stage in stages(run, MACHINE)}, MACHINE, base)
    return run


def _specs(folder: Path) -> list[Any]:
    """A spec for each kind of student, checked."""
    from edgekd.spec import load_spec

    path, specs = folder / "spec.yaml", []
    for student in STUDENTS:
        path.write_text(SPEC.replace("STUDENT", student))
        specs.append(load_spec(path))
    return specs


def _one_of(choices: Sequence[Any], data: bytes) -> Any:
    return choices[zlib.crc32(data) % len(choices)]


# --- the harnesses ----------------------------------------------------------------------------------------------------


def spec(folder: Path) -> Harness:
    """A spec's text, up to the files it names."""
    from edgekd.spec import load_spec

    path = folder / "spec.yaml"
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").touch()
    shipped = [p.read_bytes() for p in sorted(Path(str(resources.files("edgekd") / "specs")).glob("*.yaml"))]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        loaded = load_spec(path)
        assert loaded.quantize.methods
        loaded.data.files(folder)

    return Harness("yaml", [SPEC.replace("STUDENT", student).encode() for student in STUDENTS] + shipped, check)


def plan(folder: Path) -> Harness:
    """A spec, up to the plan of its run."""
    from edgekd.spec import load_spec

    path = _project(folder) / "spec.yaml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        _plan(load_spec(path), folder)

    return Harness("yaml", [SPEC.replace("STUDENT", student).encode() for student in STUDENTS], check)


def manifest(folder: Path) -> Harness:
    """A ``manifest.json`` beside files that it names rightly."""
    from edgekd.files import file_sha256
    from edgekd.manifest import MANIFEST, load_artifact

    names = ("model.gguf", "tokenizer.json", "sub/weights.bin")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    contract = {
        "context_length": 128,
        "vocab_size": 260,
        "bos_id": None,
        "eos_ids": [257, 256],
        "add_bos": False,
        "chat_template": TEMPLATE,
        "normalizer": None,
    }
    whole = {
        "schema_version": 1,
        "name": "tiny",
        "target": "gguf",
        "recipe": "portable-int4",
        "runtime": "llama.cpp",
        "main_file": names[0],
        "files": {name: file_sha256(folder / name) for name in names},
        "student_digest": "0" * 64,
        "grid_digest": "1" * 64,
        "method": "gptq",
        "int8_by_width": ["a.weight"],
        "parameters": 30000,
        "bits_per_weight": 4.5,
        "contract": contract,
        "versions": {"edgekd": "0.1.0"},
        "details": {"layers": 3, "tokenizer": {"used": "x", "texts": 3}},
        "parity": {"windows": 2, "window_tokens": 8, "unusable_positions": 0, "kl_mean": 0.1},
        "benchmark": {"ttft_s": {"8": {"value": 0.1, "source": "measured:clock", "samples": [0.1]}}, "load_s": None},
    }
    seeds = [whole, whole | {"target": "onnx"}, {k: v for k, v in whole.items() if v is not None and k != "parity"}]

    def check(data: bytes) -> None:
        (folder / MANIFEST).write_bytes(data)
        assert load_artifact(folder).size_bytes > 0

    return Harness("json", [json.dumps(seed).encode() for seed in seeds], check)


def config(folder: Path) -> Harness:
    """A teacher's ``config.json``, up to the plan of a run with each kind of student and all targets."""
    specs = _specs(_project(folder))

    def check(data: bytes) -> None:
        (folder / "teacher" / "config.json").write_bytes(data)
        _plan(_one_of(specs, data), folder)

    return Harness("json", [json.dumps(seed).encode() for seed in (CONFIG, LLAMA3)], check)


def model(folder: Path) -> Harness:
    """A ``config.json`` that passes the plan, up to the teacher and the student in memory."""
    from edgekd.student import init_student, load_model

    specs = _specs(_project(folder))

    def check(data: bytes) -> None:
        (folder / "teacher" / "config.json").write_bytes(data)
        chosen = _one_of(specs, data)
        run = _plan(chosen, folder)
        load_model(run.teacher.folder)
        init_student(chosen.student, run.teacher.folder, 0, folder)

    return Harness("json", [json.dumps(CONFIG).encode()], check)


def _read_weights(folder: Path) -> None:
    """Every tensor of a model folder, as an export reads them."""
    from edgekd.student import Checkpoint

    checkpoint = Checkpoint(folder)
    for name in checkpoint:
        assert tuple(checkpoint.tensor(name).shape) == checkpoint.shape(name)
    assert checkpoint.digest


def index(folder: Path) -> Harness:
    """A ``model.safetensors.index.json`` with two shards."""
    from safetensors.numpy import save_file

    teacher, weights = tiny_model(folder / "teacher"), _weights()
    (teacher / "model.safetensors").unlink()
    shards = {f"model-0000{i}-of-00002.safetensors": list(weights)[i - 1 :: 2] for i in (1, 2)}
    for shard, names in shards.items():
        save_file({name: weights[name] for name in names}, teacher / shard, {"format": "pt"})
    places = {name: shard for shard, names in shards.items() for name in names}
    size = sum(weight.nbytes for weight in weights.values())

    def check(data: bytes) -> None:
        (teacher / "model.safetensors.index.json").write_bytes(data)
        _read_weights(teacher)

    return Harness("json", [json.dumps({"metadata": {"total_size": size}, "weight_map": places}).encode()], check)


def safetensors(folder: Path) -> Harness:
    """A ``model.safetensors``."""
    teacher = tiny_model(folder / "teacher")
    path = teacher / "model.safetensors"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        _read_weights(teacher)

    return Harness("safetensors", [path.read_bytes()], check)


def tokenizer(folder: Path) -> Harness:
    """A ``tokenizer.json``, up to what the targets ask of it."""
    from edgekd import targets
    from edgekd.spec import TargetSpec
    from edgekd.student import load_tokenizer

    teacher = tiny_model(folder / "teacher")
    path, specs = teacher / "tokenizer.json", [TargetSpec(target=name, recipes=["fp16"]) for name in targets.TARGETS]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        load_tokenizer(teacher)("def f(x): return 'é'\n")
        targets.check(CONFIG, teacher, _one_of(specs, data))

    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+"}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": "a+b"}, "content": "ab"}
    cut = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 256,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    whole = _tokenizer()
    seeds = [
        whole,
        whole | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, whole["pre_tokenizer"]]}},
        whole | {"pre_tokenizer": metaspace, "decoder": metaspace, "normalizer": None},
        whole
        | {"truncation": cut, "padding": padding, "normalizer": {"type": "Sequence", "normalizers": [replace] * 3}},
    ]
    return Harness("json", [json.dumps(seed).encode() for seed in seeds], check)


def settings(folder: Path) -> Harness:
    """``tokenizer_config.json`` and, of the same damage, ``generation_config.json``."""
    from edgekd import targets
    from edgekd.spec import TargetSpec
    from edgekd.student import load_tokenizer

    teacher = tiny_model(folder / "teacher")
    spec = TargetSpec(target="gguf", recipes=["fp16"])
    rich = {
        "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
        "eos_token_id": 257,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {"256": {"content": "<|endoftext|>", "special": True}},
        "extra_special_tokens": {"x": "<|im_end|>"},
        "do_sample": True,
        "temperature": 0.7,
    }
    names = ("tokenizer_config.json", "generation_config.json")
    seeds = {name: [(teacher / name).read_bytes(), json.dumps(rich).encode()] for name in names}

    def check(data: bytes) -> None:
        name = _one_of(list(seeds), data)
        for other, kept in seeds.items():
            (teacher / other).write_bytes(data if other == name else kept[0])
        load_tokenizer(teacher)("a")
        targets.check(CONFIG, teacher, spec)

    return Harness("json", [seed for group in seeds.values() for seed in group], check)


def gguf(folder: Path) -> Harness:
    """A GGUF file, which is imported as far as its logits."""
    from tempfile import TemporaryDirectory

    from edgekd import targets
    from edgekd.spec import TargetSpec
    from edgekd.targets.gguf.importer import try_file, write_folder

    teacher, path = tiny_model(folder / "teacher"), folder / "file.gguf"
    artifact = targets.export(teacher, TargetSpec(target="gguf", recipes=["fp16"]), "fp16", folder / "made", name="t")

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try_file(path)
        with TemporaryDirectory(dir=folder) as out:
            write_folder(path, Path(out))

    return Harness("binary", [artifact.main_file.read_bytes()], check)


def template(folder: Path) -> Harness:
    """A chat template, which renders a chat."""
    from edgekd.conversation import render_chat

    def check(data: bytes) -> None:
        render_chat(data.decode("utf-8", "replace"), CHAT)

    return Harness("template", [TEMPLATE.encode(), b"{{ messages[0].content }}"], check)


def rows(folder: Path) -> Harness:
    """Rows of chats, up to the windows of training."""
    from edgekd.distill.data import prepare
    from edgekd.spec import DataSpec
    from edgekd.student import load_tokenizer

    tokenizer, path = load_tokenizer(tiny_model(folder / "teacher")), folder / "rows.jsonl"
    tool = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    whole = [
        {"text": [*CHAT[i % 2 :], *([tool, {"role": "tool", "content": str(i)}] if i % 3 == 0 else [])], "id": i}
        for i in range(12)
    ]
    texts = [{"text": f"One and {i} is {1 + i}. " * 3, "id": i} for i in range(12)]
    shares = {"validation_share": 0.2, "test_share": 0.2, "context": 8}
    specs = [DataSpec(source="jsonl", paths=["rows.jsonl"], chat=chat, **shares) for chat in (True, False)]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        prepare(specs[b'"role"' not in data], tokenizer, folder / "out", seed=0, base=folder)

    return Harness("jsonl", [b"\n".join(json.dumps(row).encode() for row in part) for part in (whole, texts)], check)


HARNESSES: dict[str, Callable[[Path], Harness]] = {
    made.__name__: made
    for made in (spec, plan, manifest, config, model, index, safetensors, tokenizer, settings, gguf, template, rows)
}
