"""Several sources: each is read as often as its weight says, and the windows know where they come from."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgekd.distill.data import load_windows, prepare
from edgekd.distill.evaluate import evenly_spaced
from edgekd.distill.mixture import mixed_indices
from edgekd.distill.pack import Windows
from edgekd.distill.train import windows_of_step
from edgekd.errors import SpecError
from edgekd.spec import DataSpec
from edgekd.student import load_tokenizer

SHARES = {"validation_share": 0.2, "test_share": 0.2, "context": 16}


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher):
    return load_tokenizer(tiny_teacher)


def write(path, word, count):
    rows = [{"text": f"def {word}_{i}(a):\n    return a * {i}\n" * (1 + i % 3)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def spec(**weights):
    sources = {
        name: {"source": "jsonl", "paths": [f"{name}.jsonl"]} | ({"weight": weight} if weight else {})
        for name, weight in weights.items()
    }
    return DataSpec.model_validate({"sources": sources, **SHARES})


def mixture(*sizes, weights):
    sources = torch.from_numpy(np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes))
    ids = torch.arange(sum(sizes), dtype=torch.int32)[:, None].expand(-1, 4)
    names = dict(zip("abcdefgh", weights, strict=False))
    return Windows(ids, torch.ones_like(ids, dtype=torch.uint8), None, sources, names)


def test_windows_know_their_source_and_hold_what_one_source_alone_gives(tmp_path, tokenizer):
    write(tmp_path / "code.jsonl", "code", 40)
    write(tmp_path / "law.jsonl", "law", 90)
    told = prepare(spec(law=2.0, code=None), tokenizer, tmp_path / "out", seed=3, base=tmp_path)
    assert list(told["sources"]) == ["law", "code"]
    for name in ("law", "code"):
        alone = DataSpec.model_validate({"source": "jsonl", "paths": [f"{name}.jsonl"], **SHARES})
        figures = prepare(alone, tokenizer, tmp_path / name, seed=3, base=tmp_path)
        assert told["sources"][name] == figures
        for split in ("train", "validation", "test"):
            mixed, one = load_windows(tmp_path / "out", split), load_windows(tmp_path / name, split)
            assert mixed.mixture == {"law": 2.0, "code": 1.0} and one.mixture == {} and one.by_source() == {}
            part = mixed.by_source()[name]
            assert torch.equal(part.ids, one.ids) and torch.equal(part.begins, one.begins)
    assert told["train_tokens"] == sum(told["sources"][name]["train_tokens"] for name in ("law", "code"))


def test_a_document_of_two_sources_is_the_first_ones(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", "same", 60)
    write(tmp_path / "b.jsonl", "same", 60)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"print({i} * 'other')\n" * 4}) + "\n" for i in range(60))
    told = prepare(spec(a=None, b=None), tokenizer, tmp_path / "out", seed=0, base=tmp_path)
    assert told["sources"]["b"]["duplicates_dropped"] == 60 == told["duplicates_dropped"]


def test_a_source_without_a_window_is_named(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", "a", 60)
    (tmp_path / "tiny.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(SpecError, match=r"split of tiny\.jsonl has"):
        prepare(spec(a=None, tiny=None), tokenizer, tmp_path / "out", seed=0, base=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_split_that_nobody_reads_may_be_empty(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", "a", 8)
    few = DataSpec.model_validate({"source": "jsonl", "paths": ["a.jsonl"], **SHARES | {"test_share": 0.01}})
    with pytest.raises(SpecError, match="the test split of"):
        prepare(few, tokenizer, tmp_path / "all", seed=0, base=tmp_path)
    prepare(few, tokenizer, tmp_path / "train", seed=0, base=tmp_path, splits=("train",))
    assert len(load_windows(tmp_path / "train", "train")) and not len(load_windows(tmp_path / "train", "test"))


@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.001, 1000)), min_size=1, max_size=5),
    st.integers(1, 9),
)
def test_each_is_read_by_its_weight_and_no_window_twice_before_the_others(seed, sizes_and_weights, size):
    sizes, weights = zip(*sizes_and_weights, strict=True)
    windows = mixture(*sizes, weights=weights)
    steps = -(-2000 // size)
    order = torch.cat([mixed_indices(seed, step, windows, size) for step in range(steps)])[:2000]
    shares = np.array(weights) / sum(weights)
    for source, count in enumerate(sizes):
        mine = order[windows.sources[order] == source].tolist()
        assert abs(len(mine) - 2000 * shares[source]) <= 2 * len(sizes) + 2
        for epoch in range(len(mine) // count):
            assert sorted(Counter(mine[epoch * count : (epoch + 1) * count]).values()) == [1] * count
    assert torch.equal(mixed_indices(seed, 7, windows, size), order[7 * size : 8 * size])


def test_a_step_sees_every_source_and_seeds_differ():
    windows = mixture(50, 500, weights=[3.0, 1.0])
    for step in range(20):
        index = windows_of_step(0, step, windows, 16)
        assert (windows.sources[index] == 0).sum() == 12
    assert not torch.equal(windows_of_step(0, 0, windows, 16), windows_of_step(1, 0, windows, 16))


def test_the_sample_has_as_many_of_each():
    sample = evenly_spaced(mixture(300, 20, 5, weights=[1, 1, 1]), 30)
    assert torch.bincount(sample.sources.long()).tolist() == [10, 10, 5]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give source, or several under sources"),
        ({"source": "stdlib", "sources": {"a": {"source": "stdlib"}}}, "give source, or several"),
        ({"sources": {"a": {}}}, "source is missing"),
        ({"sources": {"a": {"source": "jsonl"}}}, "source jsonl needs paths"),
        ({"sources": {"a": {"source": "stdlib"}}, "column": "x"}, "column stands beside sources"),
        ({"sources": {"a": {"source": "stdlib", "weight": 0.0}}}, "greater than or equal to 0.001"),
        ({"sources": {"a": {"source": "stdlib", "weight": float("nan")}}}, "finite number"),
        ({"sources": {"a\n": {"source": "stdlib"}}}, "pattern"),
    ],
)
def test_mistakes_are_named(given, words):
    with pytest.raises(ValidationError, match=words):
        DataSpec.model_validate(given)
