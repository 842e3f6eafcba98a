"""``tokenizer.json`` at work without transformers, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from edgekd.errors import BadArtifact, EdgekdError, Unsupported
from edgekd.targets.shared.tokenizer import (
    PROBES,
    JsonTokenizer,
    added_ends,
    contract_of,
    eos_ids,
    marked_texts,
    special_tokens,
)


def test_a_byte_level_tokenizer_gives_every_byte_back(tmp_path: Path, tokenizer_factory: Any) -> None:
    tokenizer = tokenizer_factory(extra=["<tool>"])
    tokenizer.save_pretrained(tmp_path)
    ours = JsonTokenizer(tmp_path / "tokenizer.json", "onnx")
    for text in [*PROBES, *marked_texts(list(special_tokens(tokenizer)))]:
        ids = ours.tokenize(text)
        assert ids == tokenizer(text, split_special_tokens=True)["input_ids"]
        assert b"".join(map(ours.token_bytes, ids)) == text.encode()
    assert ours.token_bytes(tokenizer.convert_tokens_to_ids("<tool>")) == b"<tool>"
    assert [ours.token_bytes(i) for i in special_tokens(tokenizer).values()] == [b""] * 3
    assert ours.token_bytes(5000) == b""  # a row of the embedding without a token


def test_byte_fallback_gives_every_byte_back(tmp_path: Path, sentencepiece_factory: Any) -> None:
    tokenizer = sentencepiece_factory()
    tokenizer.save_pretrained(tmp_path)
    ours = JsonTokenizer(tmp_path / "tokenizer.json", "onnx")
    for text in PROBES:
        ids = ours.tokenize(text)
        assert [1, *ids] == tokenizer(text, split_special_tokens=True)["input_ids"]
        if text:
            assert b"".join(map(ours.token_bytes, ids)) == f" {text}".encode()


def test_the_ends_of_a_text(tmp_path: Path, tokenizer_factory: Any) -> None:
    both = tokenizer_factory(add_bos=True, add_eos=True)
    both.save_pretrained(tmp_path)
    assert added_ends(both, tmp_path) == (1, True, True)
    assert eos_ids(both, tmp_path) == [0, 2]  # <|im_end|>, with which the template ends a turn
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [1, 300]}))
    assert eos_ids(both, tmp_path) == [0, 1, 2]  # 300 is an ordinary token, and the file says nothing of generation
    contract = contract_of(both, tmp_path, 700, 64)
    assert (contract.bos_id, contract.add_bos, contract.vocab_size, contract.context_length) == (1, True, 700, 64)
    assert "im_start" in (contract.chat_template or "")
    assert contract.special_tokens == both.special_tokens_map


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [1, 300]}, [0, 1, 300, 2]),  # special or not
        ({"eos_token_id": 300}, [0, 300, 2]),
        ({"eos_token_id": [300, 0, 300]}, [0, 300, 2]),
        ({"eos_token_id": [-1, 10**6]}, [0, 2]),  # outside the vocabulary, so never given
        ({"eos_token_id": []}, [0, 2]),
        ({"eos_token_id": None}, [0, 1, 2]),  # then the model's file is asked
        ({}, [0, 1, 2]),
    ],
)
def test_every_end_that_generation_config_names(
    tmp_path: Path, tokenizer_factory: Any, generation: Any, expected: list[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_ids(tokenizer_factory(), tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds a list"),
        ("null", "holds a NoneType"),
        ("\ufeff{}", "not readable as JSON"),
        ('{"eos_token_id": NaN}', "not readable as JSON"),
        ("[" * 10**5, "not readable as JSON"),
        ('{"eos_token_id": "2"}', "key 'eos_token_id' is '2', not an id"),
        ('{"eos_token_id": [true]}', "not an id or a list of ids"),
        ('{"eos_token_id": [2.0]}', "not an id or a list of ids"),
        ('{"eos_token_id": {"a": 1}}', "not an id or a list of ids"),
    ],
)
def test_a_damaged_generation_config_is_named(tmp_path: Path, tokenizer_factory: Any, text: str, words: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(EdgekdError, match=words) as error:
        eos_ids(tokenizer_factory(), tmp_path)
    assert "generation_config.json" in str(error.value)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path))
    with pytest.raises(Unsupported, match="WordLevel tokenizer without bytes"):
        JsonTokenizer(path, "onnx")
    for text in ("", "{}", '{"model": 3}'):
        path.write_text(text)
        with pytest.raises(BadArtifact, match=r"not readable|no tokenizer"):
            JsonTokenizer(path, "onnx")
