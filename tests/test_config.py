"""``config.json`` and the tokenizer's files as strangers write them: an answer or one sentence."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import AutoConfig, GPT2Config, GPTNeoConfig, GPTNeoXConfig, LlamaConfig, MixtralConfig, OPTConfig

from edgekd import plan
from edgekd.architecture import Decoder, read_architecture, read_config, read_decoder
from edgekd.distill.signals import check_same_tokenizer
from edgekd.errors import EdgekdError
from edgekd.memory import Training
from edgekd.spec import StudentSpec, TrainingSpec
from edgekd.student import load_tokenizer, student_config, vocabulary_size
from edgekd.targets.onnx.target import FEATURES
from edgekd.targets.shared.decoder import check_features

BAD = [
    None,
    True,
    -1,
    0,
    3.5,
    -2.5,
    2**31,
    10**30,
    1e308,
    "",
    "x",
    "64",
    [],
    [1],
    ["a"],
    [None],
    [[1]],
    {},
    {"a": 1},
    {"rope_type": "llama3"},
    {"rope_type": 3},
    {"rope_theta": "x"},
    {"rope_theta": -1},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 4,
        "high_freq_factor": 1,
        "original_max_position_embeddings": 32,
    },
]
MACHINE = plan.Machine(ram_bytes=2**36, disk_free_bytes=2**40, flops_per_s=1e11, training_flops_per_s=1e11)
TRAINING = Training(8, 64, teacher="float32")
FRESH = {"init": "config", "architecture": "llama", "hidden_size": 32, "intermediate_size": 48, "layers": 1}


def spec_of(**keys: Any) -> Any:
    return TypeAdapter(StudentSpec).validate_python(keys)


@pytest.mark.parametrize("key", [*Decoder.model_fields, "text_config"])
def test_any_value_of_any_key_has_an_answer(key: str, tiny_teacher: Path) -> None:
    config = json.loads((tiny_teacher / "config.json").read_text())
    fresh, cut = spec_of(**FRESH, heads=2, kv_heads=1), spec_of(init="cut", layers=2, hidden_size=32)
    readers = [
        read_decoder,
        lambda config: check_features(read_architecture(config), FEATURES, "ONNX", 64),
        lambda config: plan.inference_cost([config], 100, MACHINE),
        lambda config: plan.calibration_cost(config, 100, MACHINE),
        lambda config: plan.training_cost(config, [config], TrainingSpec(), TRAINING, MACHINE),
        lambda config: student_config(fresh, config),
        lambda config: student_config(cut, config),
    ]
    said = []
    for value, read in itertools.product(BAD, readers):
        try:
            read(config | {key: value})
        except EdgekdError as error:
            said.append(str(error))
    assert said and all("\n" not in text and len(text) < 600 for text in said)


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"hidden_size": NaN}', '{"rms_norm_eps": 1e999}', "\ufeff{}", "{", "[" * 99_999]
)
def test_a_file_that_is_no_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(EdgekdError, match=r"config\.json: "):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("value", ["64", -1, 3.5, [64], True, {}])
def test_the_file_and_the_key_are_named(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": value}))
    with pytest.raises(EdgekdError, match=rf"{path}: key 'hidden_size': "):
        read_config(path)


@pytest.mark.parametrize(
    "theirs",
    [
        GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=77, vocab_size=99),
        GPTNeoConfig(hidden_size=48, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], vocab_size=99),
        OPTConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_dim=96, vocab_size=99),
        GPTNeoXConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, vocab_size=99),
        MixtralConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=99),
        LlamaConfig(hidden_size=48, num_attention_heads=4),
    ],
    ids=lambda config: config.model_type,
)
def test_every_family_is_read_as_transformers_reads_it(theirs: Any, tmp_path: Path) -> None:
    """Whatever its own names for the numbers, and with the defaults of its class where the file is silent."""
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(theirs.to_json_string(use_diff=True))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read_decoder(read_config(path))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    config = json.loads(path.read_text())
    student = student_config(spec_of(**FRESH, heads=2, kv_heads=1), config)
    assert student["vocab_size"] == theirs.vocab_size
    assert student["max_position_embeddings"] == theirs.max_position_embeddings
    assert plan.training_cost(student, [config], TrainingSpec(), TRAINING, MACHINE).ram_bytes > 0


def test_a_nested_language_model_is_read() -> None:
    inner = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    outer = {"model_type": "llava", "text_config": inner, "hidden_size": 7}
    assert read_decoder(outer).size("hidden_size") == 48
    sizes = {"vocab_size": 99, "intermediate_size": 64, "max_position_embeddings": 64}
    arch = read_architecture({**outer, "text_config": inner | sizes})
    with pytest.raises(EdgekdError, match=r"ONNX cannot hold: inputs other than text \(llama"):
        check_features(arch, FEATURES, "ONNX", 64)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def spoil(teacher: Path, folder: Path, name: str, change: Any) -> Path:
    shutil.copytree(teacher, folder)
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(value)))
    return folder


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda d: d | {"pre_tokenizer": {"type": "OfANewerLibrary"}}),
        ("tokenizer.json", lambda d: d | {"model": {"type": "BPE"}}),
        ("tokenizer.json", lambda d: []),
        ("tokenizer_config.json", lambda d: d | {"eos_token": 7}),
        ("tokenizer_config.json", lambda d: d | {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", lambda d: d | {"model_max_length": [], "padding_side": "up"}),
        ("tokenizer_config.json", lambda d: None),
    ],
)
def test_a_tokenizer_that_cannot_be_read(name: str, change: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = spoil(tiny_teacher, tmp_path / "m", name, change)
    with pytest.raises(EdgekdError, match=r"no usable tokenizer|tokenizer\.json: ") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_ids_may_have_holes(tiny_teacher: Path, tmp_path: Path) -> None:
    """The number of ids is one more than the largest, and it is what the embedding must hold."""

    def lift(tokenizer: dict[str, Any]) -> dict[str, Any]:
        for token in tokenizer["added_tokens"]:
            tokenizer["model"]["vocab"].pop(token["content"], None)
            token["id"] += 400
            tokenizer["model"]["vocab"][token["content"]] = token["id"]
        return tokenizer

    folder = spoil(tiny_teacher, tmp_path / "m", "tokenizer.json", lift)
    with pytest.raises(EdgekdError, match=r"has 40\d ids, the embedding 320 rows"):
        load_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 448}))
    tokenizer = load_tokenizer(folder)
    assert vocabulary_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1 > len(tokenizer)
    assert check_same_tokenizer(folder, folder) == vocabulary_size(tokenizer)
