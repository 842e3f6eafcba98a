"""The cached teacher: nothing of its loss is biased, and what is damaged or another's is not read."""

import errno
import os
import threading

import pytest
import torch
from random_models import random_qwen3

from edgekd.distill import cache as module
from edgekd.distill.cache import Cache, CachedTeacher, bytes_per_token, capture, decode, encode, key_of
from edgekd.distill.head import Outputs
from edgekd.distill.losses import summed_losses
from edgekd.distill.pack import Windows
from edgekd.distill.signals import OnlineTeacher
from edgekd.distill.train import evaluate, train
from edgekd.errors import EdgekdError
from edgekd.spec import DistillSpec, Spec

VOCAB = 300


def model(seed, layers=2):
    return random_qwen3(seed, vocab=VOCAB, layers=layers, mlp=64)


def windows(count=12, seed=7):
    ids = torch.randint(0, VOCAB, (count, 24), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    mask, begins = torch.ones_like(ids, dtype=torch.uint8), torch.zeros_like(ids, dtype=torch.uint8)
    mask[::3, :7] = 0
    begins[::2, 9] = 1
    return Windows(ids, mask, begins)


@pytest.mark.parametrize(("vocab", "most"), [(8192, 92), (65536, 104), (151_936, 112), (262_144, 112)])
def test_a_token_takes_so_many_bytes(vocab, most):
    assert bytes_per_token(vocab) == most <= 114
    rows = encode(torch.randn(3, vocab), 1.0, torch.rand(3, dtype=torch.float64))
    assert rows.shape == (3, most) and rows.dtype == torch.uint8


def test_the_likeliest_are_told_for_certain_and_all_weights_are_one():
    logits = 3 * torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(1))
    ids, logs, weights = decode(encode(logits, 1.0, torch.rand(50, dtype=torch.float64)), VOCAB)
    p = logits.double().softmax(-1)
    top = p.topk(8)
    assert torch.equal(ids[:, :8], top.indices)
    torch.testing.assert_close(weights[:, :8].double(), top.values, rtol=0, atol=1e-3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50), rtol=0, atol=1e-6)
    drawn = ids[:, 8:]
    assert not (drawn[:, :, None] == ids[:, None, :8]).any(), "a draw is none of the likeliest"
    torch.testing.assert_close(logs[:, 8:].double(), p.gather(1, drawn).log(), rtol=0, atol=0.07)


def test_a_distribution_without_a_tail_and_one_of_padding():
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[0, 5], logits[1, :4] = 0.0, 1.0
    ids, logs, weights = decode(encode(logits, 1.0, torch.tensor([0.0, 0.999999], dtype=torch.float64)), VOCAB)
    assert ids[0, 0] == 5 and weights[0].tolist() == [1.0] + [0.0] * 31
    assert torch.isfinite(logs).all() and (ids < VOCAB).all()
    torch.testing.assert_close(weights[1, :4], torch.full((4,), 0.25), rtol=0, atol=1e-3)


def losses(student, said, labels):
    hidden = student.clone().requires_grad_()
    total, _ = summed_losses(Outputs(hidden), said, labels, torch.ones_like(labels), {"forward_kl": 1.0})
    total.backward()
    return total.item(), hidden.grad


def test_loss_and_gradient_are_the_teachers_in_the_mean():
    """Against the whole distribution; the error of the mean falls as one over the root of the draws."""
    generator = torch.Generator().manual_seed(3)
    teacher, student = (2 * torch.randn(1, 40, VOCAB, generator=generator) for _ in range(2))
    labels = torch.zeros(1, 40, dtype=torch.int64)
    exact, slope = losses(student, Outputs(teacher), labels)
    mean_loss, mean_slope, errors = 0.0, torch.zeros_like(slope), {}
    for draw in range(1, 257):
        told = decode(encode(teacher[0], 1.0, torch.rand(40, generator=generator, dtype=torch.float64)), VOCAB)
        found, by_student = losses(student, module.Sparse(*(t[None] for t in told)), labels)
        mean_loss, mean_slope = mean_loss + (found - mean_loss) / draw, mean_slope.lerp(by_student, 1 / draw)
        errors[draw] = ((mean_slope - slope).norm() / slope.norm()).item()
    assert mean_loss == pytest.approx(exact, rel=5e-3)
    assert errors[1] < 0.6 and errors[16] < 0.4 * errors[1] and errors[256] < 0.12 * errors[1]


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 4 * 24 * bytes_per_token(VOCAB))
    text, order = windows(), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    found = Cache(tmp_path / "cache", key_of("t", "k", text, order, 1.0, VOCAB), text, order)
    return found, OnlineTeacher(model(9), VOCAB)


def bytes_of(cache):
    return [cache.path(shard).read_bytes() for shard in range(cache.shards)]


def test_what_is_captured_is_read_back_by_window(made):
    cache, teacher = made
    capture(cache, teacher)
    assert cache.shards == 3 and sum(map(len, bytes_of(cache))) == pytest.approx(cache.size_bytes, rel=0.2)
    index = torch.tensor([9, 3])
    batch = cache.windows.batch(index)
    said = CachedTeacher(cache).teach(batch.ids, index, batch.positions)
    exact = teacher.teach(batch.ids, index, batch.positions).rows(torch.arange(48)).softmax(-1).view(2, 24, VOCAB)
    learned = batch.mask.bool()
    assert torch.equal(said.ids[..., :8][learned], exact.topk(8).indices[learned])
    assert not said.weights[~learned].any() and not learned.all()
    with pytest.raises(EdgekdError, match="no window 11"):
        CachedTeacher(cache).teach(batch.ids, torch.tensor([11]))


DAMAGES = {
    "cut": lambda cache: os.truncate(cache.path(1), 100),
    "a flipped bit": lambda cache: flip(cache.path(1)),
    "missing": lambda cache: cache.path(1).unlink(),
    "its seal": lambda cache: cache.path(1).with_suffix(".json").write_text("{}"),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_seen_and_captured_again(made, caplog, damage):
    cache, teacher = made
    capture(cache, teacher)
    before = bytes_of(cache)
    DAMAGES[damage](cache)
    with pytest.raises(EdgekdError, match="shard-00001"):
        CachedTeacher(cache)
    seen = []
    original = teacher.teach
    object.__setattr__(
        teacher, "teach", lambda ids, index, positions: seen.append(index) or original(ids, index, positions)
    )
    capture(cache, teacher)
    assert bytes_of(cache) == before and len(seen) == 4 and "shard-00001" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "other"}, "another teacher"),
        ({"tokenizer": "other"}, "another tokenizer"),
        ({"data": "other"}, "other data"),
        ({"order": "other"}, "another order of windows"),
        ({"temperature": 2.0}, "distill.temperature"),
    ],
)
def test_a_cache_of_something_else_is_refused(made, change, words):
    cache, teacher = made
    capture(cache, teacher)
    other = Cache(cache.folder, {**cache.key, **change}, cache.windows, cache.order)
    for use in (lambda: CachedTeacher(other), lambda: capture(other, teacher)):
        with pytest.raises(EdgekdError, match=words):
            use()


def test_the_key_hangs_on_the_windows_and_their_order():
    text = windows()
    key = key_of("t", "k", text, [1, 2], 1.0, VOCAB)
    assert key_of("t", "k", text, [2, 1], 1.0, VOCAB)["order"] != key["order"]
    text.begins[0, 3] = 1
    assert key_of("t", "k", text, [1, 2], 1.0, VOCAB)["data"] != key["data"]


def test_a_full_disk_leaves_whole_shards_and_the_same_command_goes_on(made, monkeypatch):
    cache, teacher = made
    written, original = [], module.save_file

    def save_file(tensors, path):
        if len(written) == 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        original(tensors, path)

    monkeypatch.setattr(module, "save_file", save_file)
    with pytest.raises(OSError, match="No space"):
        capture(cache, teacher)
    assert cache.damage(0) is None and cache.damage(1) == "" and not list(cache.folder.glob(".*tmp"))
    monkeypatch.setattr(module, "save_file", original)
    capture(cache, teacher)
    CachedTeacher(cache)


def test_several_capture_at_once_what_one_would(made, tmp_path):
    cache, teacher = made
    capture(cache, teacher)
    shared = Cache(tmp_path / "shared", cache.key, cache.windows, cache.order)
    workers = [threading.Thread(target=capture, args=(shared, OnlineTeacher(model(9), VOCAB))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert bytes_of(shared) == bytes_of(cache)


def test_training_from_a_cache_ends_where_training_beside_the_teacher_does(tmp_path):
    text, teacher = windows(48), OnlineTeacher(model(9), VOCAB)
    order = list(range(48))
    cache = Cache(tmp_path / "cache", key_of("t", "k", text, order, 1.0, VOCAB), text, order)
    capture(cache, teacher)
    spec = DistillSpec(
        loss={"forward_kl": 1.0},
        steps=60,
        batch_size=8,
        learning_rate=5e-3,
        warmup_steps=5,
        validate_every=60,
        precision="float32",
    )
    found = {}
    for name, signal in (("online", teacher), ("cached", CachedTeacher(cache))):
        student = model(0)
        before = evaluate(student, text, teacher=teacher)["kl_to_teacher"]
        train(
            student,
            text,
            windows(4, 8),
            spec,
            signal=signal,
            seed=0,
            work_dir=tmp_path / name,
            on_event=lambda event: None,
        )
        found[name] = evaluate(student, text, teacher=teacher)["kl_to_teacher"] / before
    assert found["online"] < 0.8
    assert found["cached"] == pytest.approx(found["online"], abs=0.05)


def test_losses_that_need_all_of_the_teacher_are_refused():
    spec = {"name": "a", "student": {"init": "cut", "layers": 2}, "data": {"source": "stdlib"}}
    spec |= {"teacher": {"model": "builtin:pycode-16m", "signal": "cached"}}
    spec |= {"targets": [{"target": "gguf", "recipes": ["fp16"]}]}
    Spec.model_validate(spec)
    with pytest.raises(ValueError, match=r"distill\.loss: jsd, reverse_kl cannot be had of a cached teacher"):
        Spec.model_validate(spec | {"distill": {"loss": {"jsd": 1.0, "reverse_kl": 1.0}}})
