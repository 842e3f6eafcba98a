"""Students before training: cut, fresh, or read; against the teacher's own logits."""

import itertools
import json
import shutil

import pytest
import torch
from pydantic import TypeAdapter

from edgekd.checkpoint import Checkpoint
from edgekd.errors import EdgekdError, SpecError
from edgekd.spec import StudentSpec
from edgekd.student import evenly_spaced_layers, init_student, load_model, load_tokenizer, save_model, student_config

IDS = torch.arange(24).view(2, 12) * 13 % 320


def _spec(**keys):
    return TypeAdapter(StudentSpec).validate_python(keys)


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("layers", range(2, 30))
def test_evenly_spaced_layers_are_evenly_spaced_with_both_ends(layers):
    kept = evenly_spaced_layers(29, layers)
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert len(kept) == layers and kept[0] == 0 and kept[-1] == 28
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_a_cut_of_all_layers_is_the_teacher(tiny_teacher):
    student = init_student(_spec(init="cut", layers=3), tiny_teacher, seed=0)
    assert torch.equal(_logits(student), _logits(load_model(tiny_teacher)))


def test_a_cut_keeps_exact_copies_of_the_first_and_last_layer(tiny_teacher):
    student = init_student(_spec(init="cut", layers=2), tiny_teacher, seed=0)
    teacher = load_model(tiny_teacher)
    for mine, its in ((0, 0), (1, 2)):
        ours, theirs = student.model.layers[mine].state_dict(), teacher.model.layers[its].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    # The teacher without its middle layer is the same function.
    del teacher.model.layers[1]
    teacher.config.num_hidden_layers = 2
    torch.testing.assert_close(_logits(student), _logits(teacher), rtol=0, atol=0)


def test_a_narrower_mlp_keeps_the_units_that_matter(tiny_teacher, tmp_path):
    """Units of zero weight are the ones that go, wherever they lie: the logits stay those of the teacher."""
    teacher = load_model(tiny_teacher)
    gone = torch.randperm(128, generator=torch.Generator().manual_seed(3))[:48]
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.mlp.up_proj.weight[gone] = 0
    save_model(teacher, load_tokenizer(tiny_teacher), tmp_path / "teacher")
    student = init_student(_spec(init="cut", layers=3, intermediate_size=80), tmp_path / "teacher", seed=0)
    assert student.config.intermediate_size == 80
    torch.testing.assert_close(_logits(student), _logits(teacher), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("architecture", "tied"), [("qwen3", True), ("qwen2", False), ("llama", False)])
def test_a_narrower_residual_stream_keeps_the_channels_that_matter(tiny_teacher, tmp_path, architecture, tied):
    """Channels that nothing writes to are the ones that go, and RMSNorm over the rest gives what it gave before."""
    fresh = _spec(
        init="config",
        architecture=architecture,
        hidden_size=64,
        intermediate_size=96,
        layers=2,
        heads=4,
        kv_heads=2,
        tie_embeddings=tied,
    )
    teacher = init_student(fresh, tiny_teacher, seed=1)
    gone = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:24]
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, gone] = 0
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
        for name, parameter in teacher.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    teacher.config.rms_norm_eps = 1e-12  # it is added to the mean, and so would not scale with the rest
    save_model(teacher, load_tokenizer(tiny_teacher), tmp_path / "teacher")
    teacher = load_model(tmp_path / "teacher")
    student = init_student(_spec(init="cut", layers=2, hidden_size=40), tmp_path / "teacher", seed=0)
    assert student.model.embed_tokens.weight.shape == (320, 40)
    torch.testing.assert_close(_logits(student), _logits(teacher), rtol=0, atol=1e-5)
    save_model(student, load_tokenizer(tiny_teacher), tmp_path / "student")
    assert torch.equal(_logits(load_model(tmp_path / "student")), _logits(student))


def test_a_cut_can_be_saved_and_loaded(tiny_teacher, tmp_path):
    spec = _spec(init="cut", layers=2, intermediate_size=64)
    student = init_student(spec, tiny_teacher, seed=0)
    save_model(student, load_tokenizer(tiny_teacher), tmp_path / "student")
    assert torch.equal(_logits(load_model(tmp_path / "student")), _logits(student))
    promised = student_config(spec, Checkpoint(tiny_teacher).config)
    written = Checkpoint(tmp_path / "student").config
    assert {key: written.get(key) for key in promised} == promised | {
        "transformers_version": written["transformers_version"]
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_student_has_the_shape_asked_for(tiny_teacher, architecture, tied):
    spec = _spec(
        init="config",
        architecture=architecture,
        hidden_size=32,
        intermediate_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        tie_embeddings=tied,
    )
    before = torch.random.get_rng_state()
    student = init_student(spec, tiny_teacher, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = {name: tuple(p.shape) for name, p in student.named_parameters()}
    assert student.config.model_type == architecture and _logits(student).shape == (2, 12, 320)
    assert weights["model.embed_tokens.weight"] == (320, 32) and ("lm_head.weight" in weights) is not tied
    assert weights["model.layers.1.mlp.gate_proj.weight"] == (48, 32)
    assert weights["model.layers.1.self_attn.k_proj.weight"] == (16, 32)
    assert ("model.layers.0.self_attn.q_proj.bias" in weights) is (architecture == "qwen2")
    assert student.config.eos_token_id == 0 and student.config.bos_token_id is None
    assert student.config.max_position_embeddings == 128
    again = init_student(spec, tiny_teacher, seed=5)
    other = init_student(spec, tiny_teacher, seed=6)
    assert torch.equal(_logits(again), _logits(student)) and not torch.equal(_logits(other), _logits(student))


def test_a_fresh_student_takes_the_teachers_rope_base():
    spec = _spec(
        init="config", architecture="llama", hidden_size=32, intermediate_size=48, layers=1, heads=1, kv_heads=1
    )
    for teacher in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}):
        assert student_config(spec, {"vocab_size": 320} | teacher)["rope_parameters"] == {
            "rope_type": "default",
            "rope_theta": 5e5,
        }


def test_sliding_layers_stay_sliding_when_layers_go():
    teacher = {
        "model_type": "qwen2",
        "num_hidden_layers": 5,
        "use_sliding_window": True,
        "max_window_layers": 2,
    }
    config = student_config(_spec(init="cut", layers=3), teacher)
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]


def test_a_student_from_a_checkpoint(tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "student")
    student = init_student(_spec(init="checkpoint", model="student"), tiny_teacher, seed=0, base=tmp_path)
    assert torch.equal(_logits(student), _logits(load_model(tiny_teacher)))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    (tmp_path / "student" / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    with pytest.raises(SpecError, match=r"student\.model: .* 256 embedding rows for 320 ids"):
        init_student(_spec(init="checkpoint", model="student"), tiny_teacher, seed=0, base=tmp_path)


FRESH = {
    "init": "config",
    "architecture": "qwen3",
    "hidden_size": 60,
    "intermediate_size": 8,
    "layers": 1,
    "heads": 4,
    "kv_heads": 2,
}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init": "cut", "layers": 4}, r"student\.layers: 4 .* teacher of 3"),
        ({"init": "cut", "layers": 1, "choose": "even"}, r"student\.layers: 1 .* 3 layers"),
        ({"init": "cut", "layers": 2, "intermediate_size": 129}, r"student\.intermediate_size: 129 .* 128"),
        ({"init": "cut", "layers": 2, "hidden_size": 65}, r"student\.hidden_size: 65 .* 64"),
        ({**FRESH, "hidden_size": 62}, r"student\.heads: 4 .* 62"),
        ({**FRESH, "kv_heads": 3}, r"student\.kv_heads: 3 .* 4"),
        ({**FRESH}, r"student\.head_dim: 15 is odd"),
    ],
)
def test_what_cannot_be_built_is_said_with_key_and_numbers(tiny_teacher, keys, message):
    with pytest.raises(SpecError, match=message):
        init_student(_spec(**keys), tiny_teacher, seed=0)


def test_a_teacher_of_an_unknown_kind_or_with_missing_tensors(tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(EdgekdError, match="nonesuch"):
        init_student(_spec(init="cut", layers=2), tmp_path / "teacher", seed=0)
    path.write_text(json.dumps(config | {"num_hidden_layers": 9}))
    with pytest.raises(SpecError, match="9 layers and 3 layer_types"):
        init_student(_spec(init="cut", layers=3), tmp_path / "teacher", seed=0)
    path.write_text(json.dumps(config | {"num_hidden_layers": 9, "layer_types": ["full_attention"] * 9}))
    with pytest.raises(EdgekdError, match=r"has no tensor model\.layers\.4\."):
        init_student(_spec(init="cut", layers=3), tmp_path / "teacher", seed=0)


def test_a_tokenizer_is_tried_first(tiny_teacher, tmp_path):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(EdgekdError, match="the tokenizer fails"):
        load_tokenizer(folder)


@pytest.mark.parametrize("length", ["128", [128], {}])
def test_a_tokenizers_setting_of_a_wrong_type_is_refused(tiny_teacher, tmp_path, length):
    folder = shutil.copytree(tiny_teacher, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    with pytest.raises(EdgekdError, match="no usable tokenizer"):
        load_tokenizer(folder)


def test_a_model_of_another_kind_is_refused_in_a_sentence(tiny_teacher, tmp_path):
    """transformers' own words are a page of class names."""
    shutil.copytree(tiny_teacher, tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config | {"model_type": "clip_text_model"}))
    with pytest.raises(EdgekdError) as refused:
        load_model(tmp_path / "encoder")
    assert str(refused.value).count("\n") == 0
    assert "cannot be loaded: it is no model that continues text (model_type)." in str(refused.value)
