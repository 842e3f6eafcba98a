"""A teacher of another tokenizer: what its tokens say of the student's, place by place."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from transformers import Qwen3Config, Qwen3ForCausalLM

from edgekd.distill.aligned import LEAST, AlignedTeacher, Spelling, check_byte_level, spelled
from edgekd.distill.corpus import stdlib_corpus
from edgekd.distill.head import Outputs
from edgekd.distill.losses import summed_losses
from edgekd.distill.signals import OnlineTeacher
from edgekd.errors import EdgekdError
from edgekd.spec import Spec
from edgekd.teachers import train_pycode

TEXT = "import os\n\ndef näme(x, *rest):\n    '''Résumé → ok'''\n    return os.path.join(x, *rest) + '日本語'\n"


def tokenizer(size, texts):
    return train_pycode.train_tokenizer(texts, vocab_size=size, context=128)


@pytest.fixture(scope="module")
def pair():
    """Tokenizers trained on different texts: a large one and a small one."""
    texts = stdlib_corpus().validation
    return tokenizer(600, texts[:3]), tokenizer(320, texts[5:8])


def model(vocab, seed=0, context=256):
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": context}
    made = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True, bos_token_id=None)).eval()
    with torch.no_grad():
        made.get_input_embeddings().weight.mul_(15)
    return made


def size(of):
    return max(of.get_vocab().values()) + 1


def ids_of(tokenizer, *texts):
    return torch.tensor([[i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]])


def test_a_tokenizers_bytes_are_its_texts(pair):
    for one in pair:
        spelling = Spelling(one)
        ids = one(TEXT).input_ids
        assert b"".join(spelling.bytes[i] for i in ids) == TEXT.encode() and spelling.ids(TEXT.encode()) == ids
        assert spelling.bytes[one.eos_token_id] == Spelling(pair[0]).bytes[pair[0].eos_token_id]


@pytest.mark.parametrize("turn", [0, 1])
def test_each_token_is_spelled_with_the_others(pair, turn):
    teacher, student = (Spelling(pair[turn]), Spelling(pair[1 - turn]))
    table = spelled(teacher, student)
    for token, row in enumerate(table.tolist()):
        ids = [i for i in row if i >= 0]
        assert b"".join(student.bytes[i] for i in ids) == teacher.bytes[token]
        assert row[len(ids) :] == [-1] * (len(row) - len(ids))
    assert table[pair[turn].eos_token_id, 0] == pair[1 - turn].eos_token_id


def test_one_tokenizer_gives_the_teacher_itself(pair):
    of_one, ids = model(320), ids_of(pair[1], TEXT, "x = 1\n")
    assert pair[1](TEXT).input_ids.count(pair[1].eos_token_id) == 0
    said = AlignedTeacher(of_one, pair[1], pair[1], "t").teach(ids, None)
    rows = torch.arange(ids.shape[1])
    exact = OnlineTeacher(of_one, 320).teach(ids).rows(rows).log_softmax(-1)
    torch.testing.assert_close(said.rows(rows).exp(), exact.exp(), rtol=1e-4, atol=1e-6)


def by_hand(of, teacher, student, ids):
    """Every place's distribution, one token of the teacher after the other."""
    theirs_bytes, ours_bytes = Spelling(teacher), Spelling(student)
    theirs, ends, at = [], [], 0
    text = b"".join(ours_bytes.bytes[i] for i in ids[:-1]).decode()
    for token in [*teacher(text).input_ids, teacher.eos_token_id]:
        at += len(theirs_bytes.bytes[token])
        theirs.append(token)
        ends.append(at)
    with torch.no_grad():
        p = of(input_ids=torch.tensor([theirs])).logits[0].softmax(-1).double().tolist()
    words = [ours_bytes.ids(text) if text else [] for text in theirs_bytes.bytes]
    found, end, base, since = [], 0, None, []
    for place, token in enumerate(ids):
        end += len(ours_bytes.bytes[token])
        since.append(token)
        if end in ends:
            base, since = ends.index(end), []
        mass = [0.0] * size(student)
        follows = ids[place + 1] if place + 1 < len(ids) else ids[0]
        if base is not None:
            for word, probability in zip(words, p[base], strict=True):
                if word[: len(since)] == since and len(word) > len(since):
                    mass[word[len(since)]] += probability
            stop = end + len(ours_bytes.bytes[follows])
            if not since and place + 1 < len(ids) and stop in ends and (last := ends.index(stop)) > base + 1:
                together = math.prod(p[row][theirs[row + 1]] for row in range(base, last))
                mass[words[theirs[base + 1]][0]] -= together
                mass[follows] += together
        if sum(mass) < LEAST or mass[follows] < 1e-9:
            mass = [0.0] * len(mass)
            mass[follows] = 1.0
        found.append([x / sum(mass) for x in mass])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("turn", [0, 1])
def test_every_place_against_a_reading_by_hand(pair, turn):
    """A student of smaller tokens, and one of larger."""
    teacher, student = pair[turn], pair[1 - turn]
    of, ids = model(size(teacher)), ids_of(student, TEXT)
    found = AlignedTeacher(of, teacher, student, "t").teach(ids, None).rows(torch.arange(ids.shape[1])).exp()
    expected = by_hand(of, teacher, student, ids[0].tolist())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(found)))
    one_hot = (found.max(-1).values > 0.999).float().mean()
    assert one_hot < 0.5, "the teacher is heard at most places"


def test_documents_and_windows_that_cut_a_character(pair):
    """Documents are read apart, and what hangs over at a window's ends is left out."""
    teacher, student = pair
    of = model(600)
    whole = ids_of(student, "'日本語日本語'\n" + TEXT, "y = 2\nfor i in x:\n    pass\n")
    begin = next(i for i, token in enumerate(whole[0].tolist()) if Spelling(student).bytes[token][0] & 0xC0 == 0x80)
    ids = whole[:, begin:]
    cut = int((ids[0] == student.eos_token_id).nonzero()[0]) + 1
    positions = torch.arange(ids.shape[1])[None].clone()
    positions[0, cut:] -= cut
    signal = AlignedTeacher(of, teacher, student, "t")
    said = signal.teach(ids, None, positions).rows(torch.arange(ids.shape[1]))
    alone = signal.teach(ids[:, cut:], None).rows(torch.arange(ids.shape[1] - cut))
    torch.testing.assert_close(said[cut:-1].exp(), alone[:-1].exp(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(said.exp().sum(-1), torch.ones(len(said)))
    assert (said[:cut].exp().max(-1).values < 0.999).float().mean() > 0.3


def test_a_loss_reads_it(pair):
    teacher, student = pair
    ids = ids_of(student, TEXT)
    said = AlignedTeacher(model(600), teacher, student, "t").teach(ids, None)
    logits = torch.randn(1, ids.shape[1], size(student), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for name in ("forward_kl", "jsd", "skewed_kl", "total_variation"):
        total, _ = summed_losses(Outputs(logits.requires_grad_()), said, ids.roll(-1, 1), mask, {name: 1.0})
        total.backward()
        assert math.isfinite(total.item()) and total.item() > 0 and torch.isfinite(logits.grad).all()
        logits.grad = None


def test_a_text_beyond_the_teachers_context_is_refused(pair):
    teacher, student = pair[1], pair[0]
    signal = AlignedTeacher(model(320, context=16), teacher, student, "folder")
    with pytest.raises(EdgekdError, match=r"folder: a text has \d+ of the teacher's tokens, its context holds 16"):
        signal.teach(ids_of(student, TEXT), None)


def test_a_tokenizer_that_is_not_byte_level_is_refused(pair, tmp_path):
    from transformers import PreTrainedTokenizerFast

    pair[0].save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    whole["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    check_byte_level(pair[0], tmp_path)
    with pytest.raises(EdgekdError, match="is not byte-level"):
        check_byte_level(PreTrainedTokenizerFast.from_pretrained(tmp_path), tmp_path)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(pair, tiny_teacher, tmp_path_factory):
    """A student with a tokenizer of its own, and text."""
    folder = tmp_path_factory.mktemp("aligned")
    model(600).save_pretrained(folder / "student")
    pair[0].save_pretrained(folder / "student")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    return folder


def spec_of(folder, **changes):
    return {
        "name": "tiny",
        "teacher": {"model": str(folder), "alignment": "text"},
        "student": {"init": "checkpoint", "model": "student"},
        "data": {"source": "text", "paths": ["text/*.txt"], "context": 32, "validation_share": 0.2, "test_share": 0.2},
        "distill": {"loss": {"forward_kl": 1.0}, "steps": 2, "batch_size": 2, "warmup_steps": 1, "baseline": False},
        "targets": [{"target": "gguf", "recipes": ["fp16"]}],
        "verify": {"windows": 1, "context": 32, "greedy_tokens": 2},
        "bench": {"prompt_tokens": [8], "decode_tokens": 2, "runs": 1},
        **changes,
    }


def test_another_tokenizer_is_refused_with_the_reason_and_heard_when_asked(project, tiny_teacher):
    from test_cli import edgekd, refused

    (project / "ids.yaml").write_text(json.dumps(spec_of(tiny_teacher, teacher={"model": str(tiny_teacher)})))
    refused(edgekd("distill", "ids.yaml", cwd=project), "needs one vocabulary", "set teacher.alignment to text")
    (project / "text.yaml").write_text(json.dumps(spec_of(tiny_teacher)))
    done = edgekd("distill", "text.yaml", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    quality = json.loads(done.stdout)["quality"]
    assert quality["teacher"]["tokens"] == quality["student"]["tokens"] and quality["student"]["kl_to_teacher"] > 0
    assert json.loads((project / "runs/tiny/student/config.json").read_text())["vocab_size"] == 600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": {"init": "cut", "layers": 2}}, "with its own tokenizer is a checkpoint"),
        ({"distill": {"loss": {"reverse_kl": 1.0}}}, r"distill\.loss: .* reverse_kl is infinite"),
        ({"distill": {"on_policy": {"max_new_tokens": 8}}}, r"distill\.on_policy\.loss: .* reverse_kl is infinite"),
        ({"distill": {"loss": {"forward_kl": 1.0}, "match": {}}}, "cannot be compared"),
        ({"teacher": {"model": "x", "alignment": "text", "more": [{"model": "y"}]}}, "stands alone"),
        ({"quantize": {"qad": {"teacher": "teacher"}}}, "teaches the student alone"),
    ],
)
def test_mistakes_are_named(change, words):
    Spec.model_validate(spec_of("x"))
    with pytest.raises(ValidationError, match=words):
        Spec.model_validate(spec_of("x", **change))
