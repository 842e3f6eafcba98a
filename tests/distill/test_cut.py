"""What a cut student keeps, against the same choice written out with whole models."""

import pytest
import torch
from pydantic import TypeAdapter

from edgekd.distill.cut import choose, read_kept, road, sample, with_widths, write_kept
from edgekd.distill.data import Windows
from edgekd.errors import EdgekdError
from edgekd.spec import StudentSpec
from edgekd.student import Kept, init_student, load_model, load_tokenizer, save_model

IDS = torch.arange(48).view(2, 24) * 13 % 320


def _spec(**keys):
    return TypeAdapter(StudentSpec).validate_python({"init": "cut", **keys})


def _logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def teacher(tiny_teacher, tmp_path_factory):
    """Six layers of which the third and the fifth do nothing, in a folder."""
    fresh = TypeAdapter(StudentSpec).validate_python(
        {"init": "config", "architecture": "qwen3", "hidden_size": 64, "intermediate_size": 96}
        | {"layers": 6, "heads": 2, "kv_heads": 1}
    )
    model = init_student(fresh, tiny_teacher, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(8)
        for i in (2, 4):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(model, load_tokenizer(tiny_teacher), folder)
    return folder


def _kl(student, teacher, ids):
    """At the best of the temperatures, with torch's own softmax in float64."""
    p = _logits(teacher, ids).double().log_softmax(-1)
    q = _logits(student, ids).double()
    return min(
        (p.exp() * (p - (q / t).log_softmax(-1))).sum(-1).mean().item() for t in (0.6, 0.75, 0.9, 1.0, 1.2, 1.5, 2.0)
    )


def _whole_cut(folder, layers):
    return init_student(_spec(layers=len(layers)), folder, 0, kept=Kept(layers))


def test_the_road_is_greedy_elimination_by_whole_models(teacher):
    model = load_model(teacher)
    before = _logits(model)
    walked = list(road(model, IDS, 1))
    assert torch.equal(_logits(model), before), "the teacher is whole again"
    kept = list(range(6))
    assert walked[0] == (kept, 0.0)
    for found, distance in walked[1:]:
        each = {gone: _kl(_whole_cut(teacher, [k for k in kept if k != gone]), model, IDS) for gone in kept}
        gone = min(each, key=each.get)
        assert found == [k for k in kept if k != gone]
        assert distance == pytest.approx(each[gone], rel=1e-3, abs=1e-6)
        kept = found
    assert {2, 4} == set(range(6)) - set(walked[2][0]), "layers that do nothing go first"


def test_a_chosen_cut_is_nearer_than_evenly_spaced_layers(teacher):
    model, spec = load_model(teacher), _spec(layers=4)
    kept = choose(spec, model, IDS)
    assert list(kept.layers) == [0, 1, 3, 5] and kept.channels is None and not kept.units
    chosen, even = init_student(spec, teacher, 0, kept=kept), init_student(spec, teacher, 0)
    torch.testing.assert_close(_logits(chosen), _logits(model), rtol=0, atol=1e-4)
    assert _kl(even, model, IDS) > 0.001


def test_widths_keep_what_is_active(teacher, tmp_path, tiny_teacher):
    """Units and channels that carry nothing on the text go, though their weights are the largest."""
    model = load_model(teacher)
    quiet, dead = torch.arange(0, 96, 3), torch.arange(1, 64, 4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[quiet] *= 0  # silu(0) = 0
            layer.mlp.up_proj.weight[quiet] *= 50
            layer.mlp.down_proj.weight[dead] = 0
            layer.self_attn.o_proj.weight[dead] = 0
        used = IDS.unique()
        embedding = model.model.embed_tokens.weight
        embedding[used[:, None], dead] = 0
        rest = torch.tensor(sorted(set(range(320)) - set(used.tolist())))
        embedding[rest[:, None], dead] = 40.0
        model.config.rms_norm_eps = 1e-12
    save_model(model, load_tokenizer(tiny_teacher), tmp_path / "teacher")
    model = load_model(tmp_path / "teacher")
    spec = _spec(layers=6, hidden_size=48, intermediate_size=64)
    kept = with_widths(spec, model, IDS, range(6))
    assert not set(kept.channels.tolist()) & set(dead.tolist())
    working = {layer: set(units.tolist()) for layer, units in kept.units.items() if layer not in (2, 4)}
    assert len(working) == 4 and not any(units & set(quiet.tolist()) for units in working.values())
    student = init_student(spec, tmp_path / "teacher", 0, kept=kept)
    # The head still reads the other ids' rows, so the hidden states are compared.
    hidden = [m.model(input_ids=IDS, use_cache=False).last_hidden_state.detach() for m in (student, model)]
    torch.testing.assert_close(hidden[0], hidden[1][..., kept.channels], rtol=0, atol=1e-4)


def test_what_was_kept_is_read_back(tmp_path):
    kept = Kept((0, 3, 5), torch.arange(7), {0: torch.arange(3), 3: torch.arange(1, 4), 5: torch.arange(2, 5)})
    write_kept(tmp_path, kept)
    again = read_kept(tmp_path)
    assert list(again.layers) == [0, 3, 5] and torch.equal(again.channels, kept.channels)
    assert {i: u.tolist() for i, u in again.units.items()} == {i: u.tolist() for i, u in kept.units.items()}
    (tmp_path / "kept.safetensors").write_bytes(b"x")
    with pytest.raises(EdgekdError, match="not readable"):
        read_kept(tmp_path)


def test_the_sample_is_512_tokens_of_any_windows():
    for width, count in ((64, 40), (512, 3), (2048, 2), (64, 3)):
        ids = torch.arange(width * count, dtype=torch.int32).view(count, width)
        found = sample(Windows(ids, torch.ones_like(ids, dtype=torch.uint8)))
        assert found.numel() == min(512, width * count) and found.dtype == torch.int64
        assert len({tuple(row) for row in found.tolist()}) == len(found)


SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        (
            "gemma3_text",
            {"sliding_window": 6, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
        ("phi3", {}),
        ("olmo2", {}),
    ],
)
def test_families_whose_layers_differ_can_be_walked(tmp_path, model_type, keys):
    """Windows and rope by layer, norms behind blocks, fused matrices: leaving a layer out is what a student
    without it computes."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SMALL, **keys), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(tmp_path)
    _, (kept, distance), *_ = road(model, IDS, 2)
    assert len(kept) == 3
    assert distance == pytest.approx(_kl(_whole_cut(tmp_path, kept), model, IDS), rel=1e-3)
