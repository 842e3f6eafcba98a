"""The shape of a student for a device: counted against students that are really built, cut and exported."""

import itertools
import json
import math

import pytest
from safetensors import safe_open

from edgekd import targets
from edgekd.architecture import read_architecture
from edgekd.distill.shape import Search, Shape, shapes
from edgekd.errors import DoesNotFit, SpecError
from edgekd.spec import CutStudent, TargetSpec
from edgekd.student import init_student, load_tokenizer, save_model, student_config
from edgekd.targets import load_recipe

INT4 = load_recipe("portable-int4")
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
QWEN = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 8, "head_dim": 64}
QWEN |= {"num_key_value_heads": 4}
WINDOWED = QWEN | {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "sliding_window": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 64,
}
PHI = LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
OF_SHAPE = ("layers", "hidden_size", "intermediate_size")


def _config(teacher):
    return json.loads((teacher / "config.json").read_text())


def _cut(shape):
    return CutStudent(init="cut", **{key: getattr(shape, key) for key in OF_SHAPE})


def _parameters(config, **sizes):
    return read_architecture(student_config(CutStudent(init="cut", **sizes), config)).parameters()


@pytest.mark.parametrize("config", [LLAMA, QWEN, WINDOWED, PHI], ids=lambda config: config["model_type"])
def test_every_shape_can_be_built_and_has_the_parameters_it_says(config):
    wanted = _parameters(config, layers=4)
    found = shapes(config, INT4, wanted, 128, fewest=1)
    assert [shape.layers for shape in found] == sorted({shape.layers for shape in found}, reverse=True)
    assert (4, 576, 1536) in [(shape.layers, shape.hidden_size, shape.intermediate_size) for shape in found]
    for shape in found:
        built = read_architecture(student_config(_cut(shape), config))
        assert built.parameters() == shape.parameters
        assert abs(shape.parameters - wanted) <= 0.02 * wanted
        assert shape.hidden_size % 32 == shape.intermediate_size % 32 == 0
        assert (shape.heads, shape.kv_heads) == (config["num_attention_heads"], config["num_key_value_heads"])


def test_channels_that_the_class_refuses_are_no_shape():
    """A Llama's must be a multiple of its heads: of 9 heads, in steps of 32, none below 576 but 288 is."""
    found = shapes(LLAMA, INT4, _parameters(LLAMA, layers=4), 128, fewest=1)
    assert {shape.hidden_size for shape in found} <= {288, 576}
    assert {shape.hidden_size for shape in shapes(QWEN, INT4, _parameters(QWEN, layers=4), 128, 1)} > {576}


def test_of_each_depth_the_evenest_shape_is_found(tiny_teacher):
    """Against all shapes of the tiny teacher, each built."""
    config = _config(tiny_teacher)
    every = {
        (layers, hidden, units): _parameters(config, layers=layers, hidden_size=hidden, intermediate_size=units)
        for layers, hidden, units in itertools.product((1, 2, 3), (32, 64), (64, 96, 128))
        if abs(math.log((units / 128) / (hidden / 64))) <= math.log(4 / 3) + 1e-9
    }
    for wanted in every.values():
        expected = {}
        for (layers, hidden, units), count in every.items():
            if abs(count - wanted) <= 0.02 * wanted:
                rank = (round(abs(math.log((units / 128) / (hidden / 64))), 9), abs(count - wanted), hidden, units)
                expected[layers] = min(rank, expected.get(layers, rank))
        found = {
            shape.layers: (shape.hidden_size, shape.intermediate_size) for shape in shapes(config, INT4, wanted, 8, 1)
        }
        assert found == {layers: rank[2:] for layers, rank in expected.items()}


def test_what_is_cut_and_exported_has_the_size_that_was_told(tiny_teacher, tmp_path):
    gguf = pytest.importorskip("gguf")
    [shape] = shapes(_config(tiny_teacher), INT4, 47_500, 100, fewest=1)
    assert (shape.layers, shape.hidden_size, shape.intermediate_size) == (3, 32, 64)
    model = init_student(_cut(shape), tiny_teacher, seed=0)
    save_model(model, load_tokenizer(tiny_teacher), tmp_path / "student")
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as stored:
        assert sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys()) == shape.parameters  # noqa: SIM118
    spec = TargetSpec(target="gguf", recipes=["portable-int4"], context=100)
    artifact = targets.export(tmp_path / "student", spec, "portable-int4", tmp_path / "artifact", name="tiny")
    tensors = gguf.GGUFReader(tmp_path / "artifact" / "model.gguf").tensors
    assert sum(tensor.n_bytes for tensor in tensors) == pytest.approx(shape.weight_bytes, rel=0.02)
    assert artifact.manifest.traffic.kv_bytes_per_position * 100 == shape.cache_bytes


@pytest.mark.parametrize("recipe", ["fp16", "int8", "portable-int4-head4", "portable-mixed"])
def test_recipes_differ_by_their_bits(recipe):
    [whole, *_] = shapes(QWEN, load_recipe(recipe), _parameters(QWEN, layers=6), 128, fewest=6)
    bits = {"fp16": 16, "int8": 8.5, "portable-int4-head4": 4.5, "portable-mixed": 6.5}[recipe]
    assert 8 * whole.weight_bytes / whole.parameters == pytest.approx(bits, rel=0.01)


def test_the_cache_is_that_of_the_layers_that_see_most():
    """Every other of the six has a window of 32; three that have none may be those that stay."""
    by_depth = {shape.layers: shape for shape in shapes(WINDOWED, INT4, _parameters(WINDOWED, layers=4), 128, 1)}
    of_position = 2 * 2 * 4 * 64
    assert by_depth[4].cache_bytes == of_position * (3 * 128 + 32)


def _search(budget_bytes, *needs):
    of = [Shape(layers, 64, 128, 2, 1, 1000, weights, cache) for layers, weights, cache in needs]
    return Search(of, "a phone", budget_bytes, context=64)


def test_the_deepest_that_fits_is_chosen_to_the_byte():
    needs = [(4, 100, 40), (3, 101, 30), (2, 102, 20)]
    assert _search(140, *needs).taken().layers == 4
    assert _search(139, *needs).taken().layers == 3
    assert _search(122, *needs).taken().layers == 2
    with pytest.raises(
        DoesNotFit, match=r"gives an app 121 B, and the smallest .* takes 122 B: weights 102 B, cache of 64"
    ):
        _search(121, *needs).taken()


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        (10**9, "layers 6, hidden_size 576, intermediate_size 1536"),
        (1000, "layers 1, hidden_size 288, intermediate_size 576"),
    ],
)
def test_a_number_that_no_shape_has_names_the_nearest(wanted, nearest):
    with pytest.raises(SpecError) as raised:
        shapes(QWEN, INT4, wanted, 128, fewest=1)
    assert nearest in str(raised.value) and "\n" not in str(raised.value)
    told = int(str(raised.value).split("the nearest has ")[1].split(" parameters")[0].replace(",", "").replace(" ", ""))
    assert shapes(QWEN, INT4, told, 128, fewest=1)[0].parameters == pytest.approx(told, rel=0.02)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size"])
def test_a_file_that_names_absurd_sizes_is_no_minutes_of_work(key):
    value = 2**16 if key == "num_hidden_layers" else 2**31 - 512
    with pytest.raises(SpecError, match=f"config.json: {key}: {value} is more than any teacher has"):
        shapes(QWEN | {key: value}, INT4, 10**6, 128, 1)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(SpecError, match="gguf-q4_k_m stores is known to gguf alone"):
        shapes(QWEN, load_recipe("gguf-q4_k_m"), 10**6, 128, 1)
    with pytest.raises(SpecError, match="does not know every part of a 'mamba'"):
        shapes(QWEN | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, INT4, 10**6, 128, 1)
