"""Layers pulled towards the teacher's: what is compared, its gradient, and a training that goes on as it was."""

import pytest
import torch
from pydantic import ValidationError
from random_models import random_qwen3

from edgekd.distill.matching import Matching, layer_pairs, relative_error
from edgekd.distill.pack import Windows
from edgekd.distill.ranks import Ranks
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import train
from edgekd.errors import Agreed
from edgekd.spec import DistillSpec, MatchSpec, Spec

VOCAB = 64


def model(seed, layers=2, hidden=32):
    return random_qwen3(seed, vocab=VOCAB, layers=layers, hidden=hidden)


def windows(count=24, seed=7):
    ids = torch.randint(0, VOCAB, (count, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.uint8)
    mask[::3, 5:20] = 0
    return Windows(ids, mask)


def test_every_layer_stands_for_as_many():
    assert layer_pairs(4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert layer_pairs(4, 14)[-1] == (3, 13) and layer_pairs(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert layer_pairs(4, 12, [[1, 7]]) == [(1, 7)]


def test_the_error_is_relative_and_its_gradient_true():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = [((a - b) @ (a - b) / (b @ b)).item() for a, b in zip(ours, theirs, strict=True)]
    assert relative_error(ours, theirs).tolist() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: relative_error(x, theirs), ours.requires_grad_())
    assert relative_error(theirs, theirs).tolist() == [0.0] * 6
    assert torch.isfinite(relative_error(ours, torch.zeros_like(theirs))).all()


def heard(of, ids):
    """Hidden states as transformers tells them, and what each attention's last product gives."""
    given = {}
    for layer, block in enumerate(of.model.layers):
        block.self_attn.o_proj.register_forward_hook(lambda m, i, out, layer=layer: given.update({layer: out}))
    said = of(input_ids=ids, output_hidden_states=True)
    return said.hidden_states[1:], given


@pytest.mark.parametrize("hidden", [32, 48])
def test_the_loss_against_what_transformers_tells(hidden):
    student, teacher = model(0), model(9, 6, hidden)
    spec = MatchSpec(weights={"hidden": 2.0, "attention": 0.5}, layers=[[0, 3], [1, 1]])
    matching = Matching(student, teacher, spec, seed=4)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    with matching.listening():
        with torch.inference_mode():
            teacher(input_ids=ids)
        student(input_ids=ids)
        total, parts = matching.loss(mask)
    (hidden_s, attention_s), (hidden_t, attention_t) = heard(student, ids), heard(teacher, ids)
    expected = dict.fromkeys(("hidden", "attention"), 0.0)
    for name, ours, theirs in (("hidden", hidden_s, hidden_t), ("attention", attention_s, attention_t)):
        for layer, of_teacher in ((0, 3), (1, 1)):
            if name == "hidden" and layer == 1:  # transformers tells the last one behind the norm
                continue
            weight = matching.projections[f"{name}-{layer}"]
            gap = ours[layer] @ weight - theirs[of_teacher]
            expected[name] += ((gap**2).sum(-1) / (theirs[of_teacher] ** 2).sum(-1) * mask).sum().item() / 2
    assert parts[1].item() == pytest.approx(expected["attention"], rel=1e-4)
    assert parts[0].item() > expected["hidden"] > 0
    assert total.item() == pytest.approx(2 * parts[0].item() + 0.5 * parts[1].item(), rel=1e-5)
    total.backward()
    assert all(p.grad is not None for p in matching.parameters()) and all(p.grad is None for p in teacher.parameters())
    assert student.model.layers[0].mlp.up_proj.weight.grad.any()


def test_a_model_matches_itself_and_nothing_is_left_behind():
    student = model(0)
    matching = Matching(student, model(0), MatchSpec(weights={"hidden": 1.0, "attention": 1.0}), seed=0)
    ids = torch.randint(0, VOCAB, (2, 9))
    with matching.listening():
        for one in matching._models:
            one(input_ids=ids)
        assert matching.loss(torch.ones(2, 9))[0].item() == pytest.approx(0, abs=1e-6)
    assert not matching._heard and not any(m._forward_hooks for m in student.modules())
    names = {f"projections.{name}-{layer}" for name in ("hidden", "attention") for layer in (0, 1)}
    assert {name for name, _ in matching.named_parameters()} == names


def trained(work_dir, student, teacher, *, match, on_event=lambda event: None, ranks=None, **spec):
    settings = {"steps": 6, "batch_size": 4, "warmup_steps": 1, "validate_every": 3, "precision": "float32"} | spec
    settings = DistillSpec(**settings, match=match, checkpoint_every=2)
    figures = train(
        student,
        windows(),
        windows(4, seed=8),
        settings,
        signal=OnlineTeacher(teacher, VOCAB),
        seed=0,
        work_dir=work_dir,
        on_event=on_event,
        match=settings.match,
        **({"ranks": ranks} if ranks else {}),
    )
    assert figures["steps"] == settings.steps
    return torch.cat([p.detach().flatten() for p in student.parameters()])


MATCH = {"weights": {"hidden": 1.0, "attention": 0.3}}


@pytest.mark.parametrize("loss", [{"forward_kl": 1.0}, {"cross_entropy": 1.0}])
def test_training_brings_the_layers_nearer(tmp_path, loss):
    events = []
    spec = {"steps": 60, "learning_rate": 1e-2, "validate_every": 60, "loss": loss}
    trained(tmp_path, model(0, 2, 48), model(9, 4), match=MATCH, on_event=events.append, **spec)
    steps = [event.figures for event in events if event.event == "step"]
    for name in ("hidden", "attention"):
        assert steps[-1][name] < 0.7 * steps[0][name]
    (name,) = loss
    assert steps[0]["loss"] == pytest.approx(
        steps[0][name] + steps[0]["hidden"] + 0.3 * steps[0]["attention"], rel=1e-5
    )


def test_an_interrupted_training_keeps_its_projections(tmp_path):
    whole = trained(tmp_path / "whole", model(0, 2, 48), model(9, 4), match=MATCH)

    def stop(event):
        if event.event == "step" and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", model(0, 2, 48), model(9, 4), match=MATCH, on_event=stop)
    assert torch.equal(trained(tmp_path / "cut", model(0, 2, 48), model(9, 4), match=MATCH), whole)


def test_accumulation_changes_nothing(tmp_path):
    whole = trained(tmp_path / "a", model(0), model(9, 4), match=MATCH, steps=3, batch_size=6)
    parts = trained(tmp_path / "b", model(0), model(9, 4), match=MATCH, steps=3, batch_size=2, gradient_accumulation=3)
    assert (whole - parts).abs().max() < 2e-3


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(Agreed, match="they train in one process"):
        trained(tmp_path, model(0), model(9), match=MATCH, ranks=Ranks(0, 2))


@pytest.mark.parametrize(
    ("match", "teacher", "words"),
    [
        ({"weights": {}}, {}, "weights needs at least one of hidden, attention"),
        ({"layers": [[1]]}, {}, "at least 2 items"),
        ({"layers": [[-1, 0]]}, {}, "greater than or equal to 0"),
        ({}, {"signal": "cached"}, "inside of one teacher"),
        ({}, {"more": [{"model": "x"}]}, "inside of one teacher"),
    ],
)
def test_mistakes_are_named(match, teacher, words):
    base = {
        "name": "a",
        "student": {"init": "cut", "layers": 2},
        "data": {"source": "stdlib"},
        "targets": [{"target": "gguf", "recipes": ["fp16"]}],
    }
    Spec.model_validate(base | {"teacher": {"model": "x"}, "distill": {"match": {}}})
    with pytest.raises(ValidationError, match=words):
        Spec.model_validate(base | {"teacher": {"model": "x", **teacher}, "distill": {"match": match}})
