"""The proof that teacher and student speak of the same tokens, and the online teacher."""

import json
import shutil

import pytest
import torch

from edgekd.distill.signals import OnlineTeacher, Teachers, check_same_tokenizer
from edgekd.errors import EdgekdError
from edgekd.student import load_model


@pytest.fixture
def student_folder(tiny_teacher, tmp_path):
    """A folder with the teacher's configuration and tokenizer, free to change."""
    folder = tmp_path / "student"
    shutil.copytree(tiny_teacher, folder)
    return folder


def _edit(path, change):
    whole = json.loads(path.read_text("utf-8"))
    change(whole)
    path.write_text(json.dumps(whole), "utf-8")


def test_the_same_tokenizer_gives_the_shared_ids(tiny_teacher, student_folder):
    _edit(student_folder / "config.json", lambda config: config.update(vocab_size=384))  # padded rows may differ
    assert check_same_tokenizer(tiny_teacher, student_folder) == 320


def test_two_tokens_with_swapped_ids_are_named(tiny_teacher, student_folder):
    def swap(whole):
        vocab = whole["model"]["vocab"]
        a, b = (next(token for token, i in vocab.items() if i == n) for n in (100, 101))
        vocab[a], vocab[b] = vocab[b], vocab[a]

    _edit(student_folder / "tokenizer.json", swap)
    with pytest.raises(EdgekdError, match=r"token '.+' is id 101, but id 100 in"):
        check_same_tokenizer(tiny_teacher, student_folder)


def test_another_pre_tokenizer_is_named(tiny_teacher, student_folder):
    def digits(whole):
        split = whole["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")

    _edit(student_folder / "tokenizer.json", digits)
    with pytest.raises(EdgekdError, match=r"pre_tokenizer is .*\{1,3\}"):
        check_same_tokenizer(tiny_teacher, student_folder)


def test_another_normalizer_and_other_merges_are_named(tiny_teacher, student_folder):
    path = student_folder / "tokenizer.json"
    _edit(path, lambda whole: whole.update(normalizer={"type": "NFC"}))
    with pytest.raises(EdgekdError, match="normalizer"):
        check_same_tokenizer(tiny_teacher, student_folder)
    _edit(path, lambda whole: (whole.update(normalizer=None), whole["model"]["merges"].reverse()))
    with pytest.raises(EdgekdError, match="merges"):
        check_same_tokenizer(tiny_teacher, student_folder)


def test_an_added_token_is_a_difference(tiny_teacher, student_folder):
    def add(whole):
        whole["added_tokens"].append({**whole["added_tokens"][0], "id": 320, "content": "<|tool|>"})

    _edit(student_folder / "tokenizer.json", add)
    _edit(student_folder / "config.json", lambda config: config.update(vocab_size=321))
    with pytest.raises(EdgekdError, match=r"<\|tool\|>.* is id 320, but absent"):
        check_same_tokenizer(tiny_teacher, student_folder)


def test_online_teacher_gives_the_models_logits_without_gradient_and_without_padding(tiny_teacher):
    model = load_model(tiny_teacher)
    ids = torch.randint(0, 300, (2, 9))
    logits = OnlineTeacher(model, 300).logits(ids)
    assert logits.shape == (2, 9, 300) and not logits.requires_grad
    torch.testing.assert_close(logits, model(input_ids=ids).logits.detach()[..., :300], rtol=0, atol=0)


def teachers(tiny_teacher, count):
    """Models that differ."""
    models = [load_model(tiny_teacher) for _ in range(count)]
    for scale, model in enumerate(models, 1):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(10.0 * scale)
    models[-1].resize_token_embeddings(384)  # padded otherwise
    return [OnlineTeacher(model, 300) for model in models]


def test_several_teachers_are_the_mean_of_those_who_teach_the_source(tiny_teacher):
    each = teachers(tiny_teacher, 3)
    sources = torch.tensor([0, 1, 2, 1], dtype=torch.uint8)
    shares = [[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.2, 0.3, 0.5]]
    signal = Teachers(each, shares, sources)
    ids, index = torch.randint(0, 300, (3, 7)), torch.tensor([2, 0, 3])
    positions = torch.arange(7).expand(3, 7).clone()
    positions[1, 4:] -= 4
    rows = torch.tensor([20, 3, 8, 0, 13])
    found = signal.teach(ids, index, positions).rows(rows)
    p = torch.stack([t.teach(ids, None, positions).rows(torch.arange(21)).softmax(-1) for t in each])
    weights = torch.tensor(shares)[sources[index].long()].T.repeat_interleave(7, 1)
    torch.testing.assert_close(found.exp(), (weights[:, :, None] * p).sum(0)[rows], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5))
    of_one = signal.of(1).teach(ids, None, None).rows(rows)
    p = torch.stack([t.teach(ids).rows(rows).softmax(-1) for t in each])
    torch.testing.assert_close(of_one.exp(), 0.25 * p[0] + 0.75 * p[1], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="hangs on the source"):
        signal.teach(ids, None)


def test_a_teacher_is_not_run_where_it_teaches_nothing(tiny_teacher, monkeypatch):
    each, asked = teachers(tiny_teacher, 2), []
    original = OnlineTeacher.teach
    monkeypatch.setattr(
        OnlineTeacher, "teach", lambda self, ids, *a: asked.append((self, len(ids))) or original(self, ids, *a)
    )
    signal = Teachers(each, [[1.0, 0.0], [0.0, 1.0]], torch.tensor([0, 1, 1]))
    signal.teach(torch.zeros(3, 4, dtype=torch.int64), torch.tensor([1, 2, 1]))
    assert asked == [(each[1], 3)]
