"""What the student writes: drawn as its distribution says, judged there alone, the same after a crash."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from random_models import random_qwen3

from edgekd.distill.evaluate import evaluate
from edgekd.distill.on_policy import Writing, generate
from edgekd.distill.pack import Windows
from edgekd.distill.ranks import Ranks
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import train
from edgekd.errors import Agreed, EdgekdError
from edgekd.runs import work
from edgekd.spec import DistillSpec, OnPolicySpec, Spec
from edgekd.student import load_tokenizer

VOCAB, END = 64, 5


def model(seed, layers=1, scale=4):
    return random_qwen3(seed, vocab=VOCAB, layers=layers, scale=scale)


def windows(count=24, width=32, seed=7):
    ids = torch.randint(0, VOCAB, (count, width), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    return Windows(ids, torch.ones_like(ids, dtype=torch.uint8), torch.zeros_like(ids, dtype=torch.uint8))


def writing(**spec):
    return Writing(OnPolicySpec(**{"max_new_tokens": 12, "drop": [], **spec}), {END}, 32)


@torch.no_grad()
def by_hand(student, prompt, uniform, temperature, vocab_size=VOCAB):
    """Without a cache, a batch or padding."""
    ids = prompt.tolist()
    for u in uniform.tolist():
        logits = student(input_ids=torch.tensor([ids])).logits[0, -1, :vocab_size].double() / temperature
        ids.append(int(np.searchsorted(logits.softmax(-1).cumsum(-1).numpy(), u, side="right")))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_batch_with_a_cache_writes_what_each_text_alone_would(temperature):
    student = model(3, 2)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (1, 9, 4, 17)]
    uniform = torch.rand(4, 20, generator=generator, dtype=torch.float64)
    student.train()
    found = generate(student, prompts, uniform, temperature, {END}, 60)
    assert student.training
    student.eval()
    expected = [by_hand(student, p, u, temperature, 60) for p, u in zip(prompts, uniform, strict=True)]
    assert [text.tolist() for text in found] == expected
    assert any(text[-1] == END for text in expected) or temperature < 1


def test_tokens_are_drawn_as_the_distribution_says():
    student = model(3, 2, scale=2)
    uniform = (torch.arange(2000, dtype=torch.float64)[:, None] + 0.5) / 2000
    prompt = torch.tensor([7, 8, 9])
    found = torch.cat(generate(student, [prompt] * 2000, uniform, 2.0, set()))
    p = (student(input_ids=prompt[None]).logits[0, -1].double() / 2).softmax(-1)
    torch.testing.assert_close(torch.bincount(found, minlength=VOCAB) / 2000.0, p.float(), rtol=0, atol=1.01 / 2000)


def test_a_text_hangs_on_seed_step_and_window_alone():
    student, text = model(3), windows()
    write = writing().write

    def texts(index, seed=0, step=0):
        batch = write(student, text, torch.tensor(index), None, seed, step).batch
        return [ids[: 16 + int(mask.sum())].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]

    together = texts([4, 9, 2])
    assert texts([9]) == together[1:2] and texts([2, 4]) == [together[2], together[0]]
    assert texts([9], seed=1) != texts([9]) != texts([9], step=1)
    assert [ids[:16] for ids in together] == text.ids[[4, 9, 2], :16].tolist()


def test_only_what_was_written_is_learned():
    found = writing().write(model(3), windows(), torch.arange(5), None, 0, 0).batch
    assert found.positions is None
    for ids, labels, mask in zip(found.ids, found.labels, found.mask, strict=True):
        learned = mask.nonzero().squeeze(-1)
        assert learned[0] == 15 and torch.equal(learned, torch.arange(15, 15 + len(learned)))
        assert torch.equal(labels[learned], ids[16 : 16 + len(learned)]) and 0 < len(learned) <= 12


def test_it_goes_on_from_its_own_document_and_where_an_answer_begins():
    text = windows(3)
    text.begins[0, 10] = 1  # a document in the window
    text.loss_mask[1, :19] = 0  # a question up to token 18
    text.loss_mask[2, 8:] = 0  # nothing to answer
    begun = [writing(prompt_tokens=14)._beginning(text, i).tolist() for i in range(3)]
    assert begun == [text.ids[0, 10:14].tolist(), text.ids[1, :19].tolist(), []]
    assert not len(writing(prompt_tokens=14, max_new_tokens=14)._beginning(text, 1)), "no room behind the question"
    found = writing(prompt_tokens=14).write(model(3), text, torch.arange(3), None, 0, 0).batch
    assert not found.mask[2].any() and found.mask[0, 3] == found.mask[1, 18] == 1


FLAWS = {
    "empty": [[], [END]],
    "repeated": [[1, 2, 3] * 6, [9] * 16],
    "unended": [[1, 2, 3], list(range(6, 26))],
    "": [[1, 2, END], [*range(6, 26), END], [7, 7, 7, END]],
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_flaws_of_a_text(flaw):
    for text in FLAWS[flaw]:
        assert writing()._flaw(torch.tensor(text, dtype=torch.int64)) == flaw


def test_a_dropped_text_is_not_learned_and_counted():
    text, student = windows(), model(3)
    kept = writing().write(student, text, torch.arange(24), None, 0, 0)
    some = writing(drop=["unended"]).write(student, text, torch.arange(24), None, 0, 0)
    unended = [i for i in range(24) if END not in kept.batch.ids[i, 16:].tolist()]
    assert kept.dropped == 0 and some.dropped == len(unended) and 0 < len(unended) < 24
    assert [i for i in range(24) if not some.batch.mask[i].any()] == unended


def trained(work_dir, student, teacher, share=0.5, on_event=lambda event: None, ranks=None, **spec):
    on_policy = {"share": share, "max_new_tokens": 12, "drop": ["empty"], **spec.pop("on_policy", {})}
    settings = {"steps": 8, "batch_size": 4, "warmup_steps": 1, "validate_every": 4, "precision": "float32"} | spec
    settings = DistillSpec(**settings, on_policy=on_policy, checkpoint_every=2)
    train(
        student,
        windows(),
        windows(4, seed=8),
        settings,
        signal=teacher,
        seed=0,
        work_dir=work_dir,
        on_event=on_event,
        writing=Writing(settings.on_policy, {END}, 32),
        **({"ranks": ranks} if ranks else {}),
    )
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_a_step_is_the_mean_divergence_over_what_was_written(tmp_path):
    """Against plain torch on the texts that ``by_hand`` writes."""
    teacher, events = model(9, 2), []
    trained(tmp_path, model(0), OnlineTeacher(teacher, VOCAB), 1.0, events.append, steps=1, validate_every=1)
    from edgekd.distill.train import batch_indices

    student, text = model(0), windows()
    total, count = 0.0, 0
    for window in batch_indices(0, 0, 24, 4).tolist():
        prompt = text.ids[window, :16].long()
        said = by_hand(student, prompt, torch.from_numpy(np.random.default_rng([0, 0, 2, window]).random(12)), 1.0)
        if said == [END]:
            continue
        ids = torch.cat([prompt, torch.tensor(said)])[None]
        with torch.no_grad():
            q, p = (m(input_ids=ids).logits[0, 15:-1].double().log_softmax(-1) for m in (student, teacher))
        total, count = total + float((q.exp() * (q - p)).sum()), count + len(said)
    assert events[0].figures["loss"] == pytest.approx(total / count, rel=1e-4)
    assert events[0].figures["written_tokens"] == count


def test_an_interrupted_training_writes_the_same_texts(tmp_path):
    teacher, events = OnlineTeacher(model(9, 2), VOCAB), []
    whole = trained(tmp_path / "whole", model(0), teacher, on_event=events.append)
    written = ["written_tokens" in event.figures for event in events if event.event == "step"]
    assert 0 < sum(written) < 8, "steps of both kinds"

    def stop(event):
        if event.event == "step" and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", model(0), teacher, on_event=stop)
    assert torch.equal(trained(tmp_path / "cut", model(0), teacher), whole)


def test_accumulation_changes_nothing(tmp_path):
    teacher = OnlineTeacher(model(9, 2), VOCAB)
    whole = trained(tmp_path / "a", model(0), teacher, 1.0, steps=2, batch_size=6)
    parts = trained(tmp_path / "b", model(0), teacher, 1.0, steps=2, batch_size=2, gradient_accumulation=3)
    assert (whole - parts).abs().max() < 1e-3


def test_it_learns_from_its_own_text(tmp_path):
    teacher, student = OnlineTeacher(model(9, 2, scale=3), VOCAB), model(0, 2, scale=2)
    before = evaluate(student, windows(8, seed=8), teacher=teacher)["kl_to_teacher"]
    spec = {"steps": 60, "learning_rate": 5e-3, "validate_every": 60}
    trained(tmp_path, student, teacher, 1.0, on_policy={"loss": {"jsd": 1.0}}, **spec)
    assert evaluate(student, windows(8, seed=8), teacher=teacher)["kl_to_teacher"] < 0.8 * before


def test_another_way_of_writing_is_another_run(tmp_path):
    teacher = OnlineTeacher(model(9), VOCAB)
    trained(tmp_path, model(0), teacher)
    with pytest.raises(Exception, match="another spec"):
        trained(tmp_path, model(0), teacher, on_policy={"temperature": 0.7})


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(Agreed, match="they train in one process"):
        trained(tmp_path, model(0), OnlineTeacher(model(9), VOCAB), ranks=Ranks(0, 2))


BASE = {
    "name": "a",
    "student": {"init": "cut", "layers": 2},
    "data": {"source": "stdlib", "context": 64},
    "teacher": {"model": "builtin:pycode-16m"},
    "targets": [{"target": "gguf", "recipes": ["fp16"]}],
}


@pytest.mark.parametrize(
    ("on_policy", "words"),
    [
        ({"loss": {"cross_entropy": 1.0}}, "their own words|student's own words"),
        ({"loss": {}}, "needs a divergence"),
        ({"share": 0.0}, "greater than 0"),
        ({"max_new_tokens": 33}, "32 prompt_tokens and 33 max_new_tokens are more than data.context 64"),
        ({"drop": ["long"]}, "drop"),
    ],
)
def test_mistakes_are_named(on_policy, words):
    Spec.model_validate(BASE | {"distill": {"on_policy": {"max_new_tokens": 32}}})
    with pytest.raises(ValidationError, match=words):
        Spec.model_validate(BASE | {"distill": {"on_policy": {"max_new_tokens": 32, **on_policy}}})


def test_a_cached_teacher_cannot_judge():
    spec = BASE | {"teacher": {"model": "builtin:pycode-16m", "signal": "cached"}}
    with pytest.raises(ValidationError, match="cannot judge what the student writes"):
        Spec.model_validate(spec | {"distill": {"loss": {"forward_kl": 1.0}, "on_policy": {"max_new_tokens": 8}}})


def test_a_text_ends_where_an_artifacts_does(tiny_teacher, tmp_path):
    spec = Spec.model_validate(BASE | {"distill": {"on_policy": {"max_new_tokens": 8}}})
    run, tokenizer = SimpleNamespace(spec=spec), load_tokenizer(tiny_teacher)
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 9]}')
    assert {*work._writing(run, tokenizer, generation).eos_ids} >= {tokenizer.eos_token_id, 7, 9}
    generation.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(EdgekdError, match="not an id or a list of ids"):
        work._writing(run, tokenizer, generation)
