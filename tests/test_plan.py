"""Estimates against the real thing, and the refusal of what cannot fit."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from edgekd import plan
from edgekd.architecture import read_architecture
from edgekd.errors import DoesNotFit
from edgekd.plan import PlannedCache
from edgekd.spec import DataSpec, DistillSpec, TargetSpec

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MACHINE = plan.Machine(ram_bytes=8 * plan.GIB, disk_free_bytes=plan.GIB, flops_per_s=1e11, training_flops_per_s=2e11)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("model", "config"),
    [(LlamaForCausalLM, LlamaConfig(**SHAPE)), (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32))],
)
def test_parameter_count_is_that_of_the_model(model, config, tied):
    config.tie_word_embeddings = tied
    assert read_architecture(config.to_dict()).parameters() == model(config).num_parameters()


def test_a_7b_shape_counts_about_7b():
    llama_2_7b = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    assert read_architecture(llama_2_7b).parameters() == pytest.approx(6.738e9, rel=0.001)


def test_training_a_7b_is_refused_on_a_small_machine():
    llama_2_7b = SHAPE | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    training = plan.training_of(DistillSpec(), DataSpec(source="stdlib"), "float32", MACHINE)
    cost = plan.training_cost(llama_2_7b, [SHAPE], DistillSpec(), training, MACHINE)
    with pytest.raises(DoesNotFit, match=r"stage student needs about [\d.]+ GiB of RAM, the machine has 8.0 GiB"):
        plan.refuse_what_cannot_fit({"student": cost}, MACHINE, Path("runs/x"))


def test_disk_is_added_up():
    cost = plan.Cost(ram_bytes=1, disk_bytes=int(0.6 * plan.GIB), seconds=1)
    plan.refuse_what_cannot_fit({"a": cost}, MACHINE, Path("runs/x"))
    with pytest.raises(DoesNotFit, match=r"needs about 1.20 GiB of disk"):
        plan.refuse_what_cannot_fit({"a": cost, "b": cost}, MACHINE, Path("runs/x"))


def test_the_machine_is_measured(tmp_path):
    machine = plan.measure_machine(tmp_path / "not" / "yet")
    assert machine.training_flops_per_s >= machine.flops_per_s > 1e8
    assert machine.disk_free_bytes > 0


def test_steps_that_were_measured_tell_the_time_left():
    cost = plan.Cost(ram_bytes=1, disk_bytes=1, seconds=4445)
    assert plan.with_measured_time(cost, [], 60 * 4096) == cost
    speeds = [2048 if i > 2 else 10 for i in range(1, 41)]
    measured = plan.with_measured_time(cost, speeds, 60 * 4096)
    assert (measured.seconds, measured.source) == (60 * 2.0, "measured:steps")


def test_what_a_context_costs_by_hand():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    }
    # keys and values, 3 layers, 2 heads of 16, 4 bytes
    each = 2 * 3 * 2 * 16 * 4
    assert PlannedCache.of("executorch", config, 4096, 4) == PlannedCache("executorch", 4096, 1000 * each, 4096 * each)


@pytest.mark.parametrize(("asked", "own", "context"), [(None, 32768, 4096), (None, 512, 512), (8192, 32768, 8192)])
def test_a_context_is_4096_at_most_unless_more_is_asked_for(asked, own, context):
    assert TargetSpec(target="gguf", recipes=["int8"], context=asked).context_of(own) == context
