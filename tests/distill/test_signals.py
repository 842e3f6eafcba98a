"""The proof that teacher and student speak of the same tokens, and the online teacher."""

import json
import shutil

import pytest
import torch

from edgekd.distill.signals import OnlineTeacher, check_same_tokenizer
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
