"""The layer-by-layer walk against the whole model in transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from edgekd.checkpoint import Checkpoint
from edgekd.errors import EdgekdError
from edgekd.quant.calibrate import Walk, second_moments
from edgekd.student import load_model


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with float32, to float32's digits; bfloat16 has a test of its own."""
    monkeypatch.setattr("edgekd.matmul.has_bfloat16", lambda: False)


ARCHITECTURES = ["llama", "qwen2", "qwen3"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make(folder: Path, kind: str, *, tied: bool = True, **changes: object) -> Path:
    settings: dict[str, object] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings)).save_pretrained(folder)
    return folder


def windows(count: int = 5, context: int = 24) -> torch.Tensor:
    return torch.randint(0, 96, (count, context), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def whole_model_moments(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(_: torch.nn.Module, args: tuple[torch.Tensor, ...], key: str = f"{name}.weight") -> None:
                sums[key] = sums.get(key, 0) + args[0].double().square().sum((0, 1))

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        model(ids.long())
    return {name: value / ids.numel() for name, value in sums.items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_moments_are_those_of_the_whole_model(
    tmp_path: Path, kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.quant.calibrate.BATCH_TOKENS", 48)  # several batches, the last one short
    make(tmp_path, kind, tied=tied)
    ids = windows()
    expected = whole_model_moments(load_model(tmp_path), ids)
    if tied:
        expected[EMBEDDING] = expected.pop(HEAD)
    seen: list[tuple[int, int]] = []
    moments = second_moments(tmp_path, ids, lambda done, total: seen.append((done, total)))
    assert moments.keys() == expected.keys() and len(moments) == 15
    assert seen == [(0, 2), (1, 2), (2, 2)]
    for name, value in moments.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=0)


def test_sliding_attention_layers_get_their_own_mask(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention"]
    make(tmp_path, "qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=types)
    ids = windows()
    expected = whole_model_moments(load_model(tmp_path), ids)
    moments = second_moments(tmp_path, ids)
    name = "model.layers.1.self_attn.o_proj.weight"
    torch.testing.assert_close(moments[name].double(), expected[name], rtol=1e-5, atol=0)


def test_bf16_students_are_walked_in_float32(tmp_path: Path) -> None:
    make(tmp_path / "s", "llama")
    load_model(tmp_path / "s").bfloat16().save_pretrained(tmp_path / "b")
    expected = whole_model_moments(load_model(tmp_path / "b"), windows())
    moments = second_moments(tmp_path / "b", windows())
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(moments[name].double(), expected[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_linears_are_grouped_by_input_in_order_of_execution(tmp_path: Path, kind: str) -> None:
    walk = Walk(Checkpoint(make(tmp_path, kind)), windows())
    assert len(walk) == 2
    for index, layer in enumerate(walk):
        inside = [[name.removeprefix(f"model.layers.{index}.") for name in group] for group in layer.groups]
        assert inside == [
            ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            ["self_attn.o_proj.weight"],
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            ["mlp.down_proj.weight"],
        ]


def test_only_one_layer_is_in_memory_and_changes_to_it_propagate(tmp_path: Path) -> None:
    folder, ids = make(tmp_path, "llama"), windows()
    model = load_model(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).zero_()
        expected = model.model(ids.long()).last_hidden_state
    walk = Walk(Checkpoint(folder), ids)
    previous = None
    for layer in walk:
        if previous is not None:
            assert all(linear.weight.is_meta for linear in previous.linears.values())
        if name in layer.linears:
            before = next(layer.inputs("model.layers.0.mlp.down_proj.weight"))
            layer.linears[name].weight.zero_()
            assert before.any() and not next(layer.inputs("model.layers.0.mlp.down_proj.weight")).any()
        previous = layer
    torch.testing.assert_close(torch.cat(list(walk.head_inputs())).view(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_the_embedding_can_be_changed_on_its_way_in(tmp_path: Path) -> None:
    folder, ids = make(tmp_path, "qwen2"), windows()
    walk = Walk(Checkpoint(folder), ids, lambda index, rows: rows.round(decimals=1) + index.unsqueeze(1))
    layer = next(iter(walk))
    norm = torch.nn.functional.rms_norm
    rows = Checkpoint(folder).tensor(EMBEDDING)[ids.long()].round(decimals=1).flatten(0, 1) + ids.flatten().unsqueeze(1)
    expected = norm(rows, (64,), eps=1e-6)  # the norm's own weights are ones
    torch.testing.assert_close(next(layer.inputs("model.layers.0.self_attn.q_proj.weight")), expected)


def test_torch_s_generator_is_left_alone(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    before = torch.get_rng_state()
    second_moments(folder, windows(1, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(0, 24), (3, 0)])
def test_less_than_a_window(tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(EdgekdError, match=r"quantize\.calibration_windows.*shorter than a window"):
        second_moments(make(tmp_path, "llama"), torch.zeros(shape, dtype=torch.int32))


@pytest.mark.parametrize("bad", [-1, 96])
def test_ids_beyond_the_vocabulary(tmp_path: Path, bad: int) -> None:
    ids = windows()
    ids[1, 2] = bad
    with pytest.raises(EdgekdError, match=f"token id {bad}, beyond the student's 96"):
        second_moments(make(tmp_path, "llama"), ids)


def test_architectures_that_cannot_be_walked(tmp_path: Path) -> None:
    gpt2 = CONFIG_MAPPING["gpt2"](vocab_size=96, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(EdgekdError, match=r"model_type 'gpt2'.*no decoder layers"):
        second_moments(tmp_path / "gpt2", windows())
    make(tmp_path / "gemma", "gemma")  # scales the embedding on its way to the layers
    with pytest.raises(EdgekdError, match=r"model_type 'gemma'.*no decoder layers"):
        second_moments(tmp_path / "gemma", windows())
    shutil.copytree(tmp_path / "gemma", tmp_path / "unknown")
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "nobody", "hidden_size": 64}))
    with pytest.raises(EdgekdError, match="model_type 'nobody'"):
        second_moments(tmp_path / "unknown", windows())


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_activations_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    change(make(tmp_path, "llama"), "model.layers.1.mlp.down_proj.weight", torch.full((64, 96), torch.inf))
    with pytest.raises(EdgekdError, match=r"model\.layers\.1: .*NaN or infinite"):
        second_moments(tmp_path, windows())


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(make(tmp_path, "llama"), name, torch.zeros(8, 8))
    with pytest.raises(EdgekdError, match=r"model\.layers\.1: size mismatch for mlp\.up_proj\.weight"):
        second_moments(tmp_path, windows())
    change(tmp_path, name, None)
    with pytest.raises(EdgekdError, match=f"tensor '{name}' is missing"):
        second_moments(tmp_path, windows())


def test_what_is_settled_is_not_computed_again_and_all_comes_out_the_same(tmp_path: Path) -> None:
    folder, ids = make(tmp_path, "qwen2"), windows()
    plain, settled = Walk(Checkpoint(folder), ids), Walk(Checkpoint(folder), ids)
    calls: list[str] = []
    for one, other in zip(plain, settled, strict=True):
        for name, linear in other.linears.items():
            linear.register_forward_hook(lambda *_, name=name: calls.append(name))
        for group in one.groups:
            for a, b in zip(one.inputs(group[0]), other.inputs(group[0]), strict=True):
                torch.testing.assert_close(a, b)
            other.settle(group[0])
    for a, b in zip(plain.head_inputs(), settled.head_inputs(), strict=True):
        torch.testing.assert_close(a, b)
    # Of the passes for o, gate and up, down, and the layer's end, the first alone computes the attention.
    assert calls.count("model.layers.0.self_attn.q_proj.weight") * 3 == calls.count(
        "model.layers.0.self_attn.o_proj.weight"
    )


def test_a_layer_that_passes_its_outputs_on_records_what_entered(tmp_path: Path) -> None:
    folder, ids = make(tmp_path, "llama"), windows()
    expected, walk = Walk(Checkpoint(folder), ids), Walk(Checkpoint(folder), ids)
    for one, other in zip(expected, walk, strict=True):
        names = [group[0] for group in one.groups]
        inputs = {name: list(one.inputs(name)) for name in names}
        recorded = other.advance(names)
        assert all(linear.weight.is_meta for linear in other.linears.values())
        for name in names:
            torch.testing.assert_close(torch.cat(recorded[name]), torch.cat(inputs[name]).bfloat16())
    for a, b in zip(expected.head_inputs(), walk.head_inputs(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma2", "granite", "olmo2", "phi3"])
def test_in_bfloat16_the_walk_stays_near(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.matmul.has_bfloat16", lambda: True)
    make(tmp_path, kind, pad_token_id=0)
    ids = windows()
    moments = second_moments(tmp_path, ids)
    monkeypatch.setattr("edgekd.matmul.has_bfloat16", lambda: False)
    exact = second_moments(tmp_path, ids)
    assert any(not torch.equal(moments[name], expected) for name, expected in exact.items())
    for name, expected in exact.items():
        torch.testing.assert_close(moments[name].mean(), expected.mean(), rtol=0.01, atol=0)
