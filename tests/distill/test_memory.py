"""What spares memory learns what plain training learns, to the rounding that it admits."""

import pytest
import torch
from test_versions import VOCAB, model, wide, windows

from edgekd.distill.learner import adamw, learning
from edgekd.distill.narrow import Int4Linear, narrowed
from edgekd.distill.ranks import ALONE, Ranks
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import train
from edgekd.errors import Agreed
from edgekd.quant.grid import dequantize_int4, quantize_int4
from edgekd.spec import DistillSpec, LoraSpec, MemorySpec

NARROW = MemorySpec(weights="bfloat16", optimizer="adamw8bit")
LORA = MemorySpec(lora=LoraSpec(r=4, targets=["q_proj", "down_proj"]))


def trained(student, work, memory=None, on_event=None, **settings):
    losses = []

    def tell(event):
        losses.append(event.figures["loss"])
        if on_event:
            on_event(event)

    plain = {"steps": 4, "batch_size": 4, "warmup_steps": 1, "validate_every": 100, "checkpoint_every": 2}
    precision = {} if memory and memory.weights == "bfloat16" else {"precision": "float32"}
    train(
        student,
        windows(24, 7),
        windows(4, 8),
        DistillSpec(**plain | precision | settings),
        signal=OnlineTeacher(model(9, 3).eval(), VOCAB),
        seed=3,
        work_dir=work,
        on_event=tell,
        memory=memory or MemorySpec(),
    )
    return losses


def weights(student):
    return {name: p.detach().clone() for name, p in student.named_parameters()}


def test_layers_that_are_computed_twice_give_the_same_weights(tmp_path):
    plain, twice = model(0), model(0)
    trained(plain, tmp_path / "a")
    trained(twice, tmp_path / "b", MemorySpec(checkpoint_activations=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), twice.parameters(), strict=True))
    assert not twice.is_activation_checkpointing


def kept_bytes(student, ids):
    """What a forward pass keeps for the backward pass."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student.outputs(ids)
    return sum(sizes)


def test_layers_are_computed_twice_and_their_activations_not_kept():
    kept = {}
    for spared in (MemorySpec(), MemorySpec(checkpoint_activations=True)):
        with learning(model(0, 4), ALONE, spared) as student:
            kept[spared.checkpoint_activations] = kept_bytes(student.train(), windows(4, 7).ids.long())
    assert kept[True] < 0.3 * kept[False]


def test_adapters_are_low_rank_products_and_merge_exactly():
    student = model(0).eval()
    before, ids = weights(student), windows(2, 7).ids.long()
    with learning(student, ALONE, LORA, seed=5) as learner:
        learned = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        assert len(learned) == 2 * 2 * 2 and all("lora" in name for name in learned)
        first = student(input_ids=ids).logits
        for name, p in learned.items():
            if "lora_B" in name:
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        apart = student(input_ids=ids).logits
        by_hand = {
            name: 2
            * learned[f"model.model.layers.{layer}.{part}.lora_B.default.weight"].detach().clone()
            @ learned[f"model.model.layers.{layer}.{part}.lora_A.default.weight"].detach()
            for layer in range(2)
            for part in ("self_attn.q_proj", "mlp.down_proj")
            for name in [f"model.layers.{layer}.{part}.weight"]
        }
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, apart, rtol=0, atol=1e-6 * apart.abs().max())
    assert (apart - first).abs().max() > 0.01
    after = weights(student)
    assert after.keys() == before.keys() and all(p.requires_grad for p in student.parameters())
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight + by_hand.get(name, 0), rtol=0, atol=1e-6)


def test_adapters_alone_learn(tmp_path):
    student = model(0)
    before = weights(student)
    losses = trained(student, tmp_path, LORA, steps=40, learning_rate=2e-2)
    changed = {name.split(".")[-2] for name, p in weights(student).items() if not torch.equal(p, before[name])}
    assert changed == {"q_proj", "down_proj"} and losses[-2] < 0.9 * losses[0]


@pytest.mark.parametrize("memory", [LORA, NARROW, MemorySpec(optimizer="adamw8bit")], ids=["lora", "narrow", "8bit"])
def test_a_training_that_died_goes_on_to_the_same_weights(tmp_path, memory):
    whole, died = (wide(2) for _ in range(2))
    trained(whole, tmp_path / "whole", memory)

    def die(event):
        if event.step == 3:
            raise RuntimeError("dead")

    with pytest.raises(RuntimeError, match="dead"):
        trained(died, tmp_path / "died", memory, die)
    died = wide(2)
    trained(died, tmp_path / "died", memory)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), died.parameters(), strict=True))


def test_moments_in_a_byte_learn_as_adams_do(tmp_path):
    curves, first = {}, wide(2)
    for name, memory in {"adamw": MemorySpec(), "8bit": MemorySpec(optimizer="adamw8bit"), "narrow": NARROW}.items():
        student = wide(2)
        curves[name] = torch.tensor(trained(student, tmp_path / name, memory, steps=40, learning_rate=1e-2)[:-1])
        assert all(p.dtype == torch.float32 for p in student.parameters())
        assert (student.lm_head.weight - first.lm_head.weight).abs().mean() > 1e-3
    gain = curves["adamw"][0] - curves["adamw"][-1]
    assert gain > 0.3
    for name in ("8bit", "narrow"):
        assert (curves[name] - curves["adamw"]).abs().max() < 0.1 * gain


def test_what_narrow_training_holds():
    with learning(wide(2), ALONE, NARROW) as student:
        assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
        optimizer = adamw(student, DistillSpec(), NARROW)
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        matrices = [p for p in student.parameters() if p.numel() >= 4096]
        held = sum(
            optimizer.state[p][key].codes.nbytes + optimizer.state[p][key].scale.nbytes
            for p in matrices
            for key in ("exp_avg", "exp_avg_sq")
        )
        assert held == pytest.approx(2 * (1 + 4 / 256) * sum(p.numel() for p in matrices))


def test_what_cannot_be_spared_is_refused():
    with pytest.raises(ValueError, match="weights bfloat16 would lose adamw's small steps"):
        MemorySpec(weights="bfloat16")
    with pytest.raises(ValueError, match=r"precision float32 cannot be had of memory\.weights bfloat16"):
        DistillSpec(precision="float32", memory=NARROW)
    with (
        pytest.raises(Agreed, match="adamw8bit keeps its moments on one process"),
        learning(wide(1), Ranks(0, 2), NARROW),
    ):
        pass


def test_a_training_that_spares_nothing_has_the_key_that_it_had():
    assert "memory" not in DistillSpec().outcome()
    assert DistillSpec(memory=MemorySpec(checkpoint_activations=True)).outcome() == DistillSpec().outcome()
    assert DistillSpec(memory=LORA).outcome()["memory"] == {"lora": {"r": 4, "targets": ["q_proj", "down_proj"]}}


def test_a_teacher_in_int4_is_the_grids():
    teacher, on_grid, ids = wide(3).eval(), wide(3).eval(), torch.arange(60).view(2, 30)
    with torch.no_grad():
        for name, weight in on_grid.named_parameters():
            if "_proj" in name:
                weight.copy_(dequantize_int4(*quantize_int4(weight)))
        expected = on_grid(input_ids=ids).logits
        found = narrowed(teacher, teacher.model.layers)(input_ids=ids).logits
    assert sum(isinstance(part, Int4Linear) for part in teacher.modules()) == 3 * 7
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_teacher_in_int4_takes_half_a_byte_a_weight():
    linear = torch.nn.Linear(128, 64, bias=False)
    told = Int4Linear(linear)
    assert sum(buffer.nbytes for buffer in told.buffers()) == 64 * 128 * (0.5 + 2 / 32)
    half = told.weight(torch.bfloat16)
    assert torch.equal(half, dequantize_int4(*quantize_int4(linear.weight.detach())).bfloat16())
