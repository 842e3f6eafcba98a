"""A stranger's tokenizer.json ends in a sentence: what it asks for is bounded, and it is tried first."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import EdgekdError
from edgekd.tokenizer_file import check_tokenizer_file, read_tokenizer_file, try_tokenizer


@pytest.fixture
def content(tiny_teacher: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((tiny_teacher / "tokenizer.json").read_text("utf-8"))
    return value


def saved(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def padding(strategy: Any, multiple: int | None = None) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "direction": "Right",
        "pad_to_multiple_of": multiple,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }


DOUBLED = [replace({"String": "a"}, "aa")] * 40
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "40 replacements": ({"normalizer": {"type": "Sequence", "normalizers": DOUBLED}}, "times as long"),
    "nested": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": DOUBLED}]}},
        "times as long",
    ),
    "one long replacement": ({"normalizer": replace({"String": "a"}, "a" * 10**6)}, "times as long"),
    "every place": ({"normalizer": replace({"Regex": ""}, "a" * 100)}, "times as long"),
    "in the decoder": ({"decoder": {"type": "Sequence", "decoders": DOUBLED}}, "times as long"),
    "many steps": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}}, "1001 steps"),
    "padding": ({"padding": padding({"Fixed": 10**9})}, "asks for 1000000000 ids"),
    "padding to a multiple": ({"padding": padding("BatchLongest", 10**9)}, "asks for 1000000000 ids"),
    "no model": ({"model": None}, "holds no tokenizer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_it_may_ask_for_is_bounded(tmp_path: Path, content: dict[str, Any], name: str) -> None:
    change, said = HOSTILE[name]
    with pytest.raises(EdgekdError, match=said):
        try_tokenizer(saved(tmp_path, content | change))


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}},
        {"normalizer": replace({"Regex": "(Q|QQ)+[0-9]"}, "b")},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////////"}},
    ],
)
def test_what_fails_fails_in_the_trial(tmp_path: Path, content: dict[str, Any], change: dict[str, Any]) -> None:
    start = time.monotonic()
    with pytest.raises(EdgekdError, match=r"the tokenizer fails|tried in a process of its own|as it stands there"):
        try_tokenizer(saved(tmp_path, content | change))
    assert time.monotonic() - start < 60


UNKNOWN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a step": (lambda d: d.update(pre_tokenizer={"type": "Fancy"}), "key 'pre_tokenizer': 'Fancy'"),
    "a step among others": (
        lambda d: d.update(
            normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Shiny"}, {"type": "NFD"}]}
        ),
        "key 'normalizer': 'Shiny'",
    ),
    "a post-processor": (lambda d: d.update(post_processor={"type": "Wrap"}), "key 'post_processor': 'Wrap'"),
    "a decoder": (lambda d: d.update(decoder={"type": "Undo"}), "key 'decoder': 'Undo'"),
    "a model": (lambda d: d.update(model={"type": "of tomorrow"}), "key 'model': 'of tomorrow'"),
    "a key": (lambda d: d.update(quantum=3), "key 'quantum'"),
    "a version": (lambda d: d.update(version="2.0"), "version '2.0'"),
    "a setting": (
        lambda d: d.update(normalizer={"type": "Strip", "strip_left": "sideways", "strip_right": True}),
        "key 'normalizer': 'Strip'",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_file_of_a_newer_library_is_one_sentence(tmp_path: Path, content: dict[str, Any], name: str) -> None:
    change, said = UNKNOWN[name]
    change(content := json.loads(json.dumps(content)))
    with pytest.raises(EdgekdError, match=re.escape(said)) as error:
        try_tokenizer(saved(tmp_path, content))
    assert "nothing that tokenizers" in str(error.value) and "Update tokenizers" in str(error.value)


def test_a_panic_at_work_is_our_error(tmp_path: Path, content: dict[str, Any]) -> None:
    from edgekd.errors import BadArtifact
    from edgekd.targets.shared.tokenizer import JsonTokenizer

    split = {"type": "Split", "pattern": {"Regex": "(b+)+z$"}, "behavior": "Isolated", "invert": False}
    steps = [split, content["pre_tokenizer"]]
    path = saved(tmp_path, content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
    tokenizer = JsonTokenizer(path, "onnx")
    assert tokenizer.tokenize("abc")
    with pytest.raises(EdgekdError, match="the tokenizer fails"):
        tokenizer.tokenize("b" * 5000)
    with pytest.raises(BadArtifact, match="key 'model': 'BPE' as it stands there is nothing that tokenizers"):
        JsonTokenizer(saved(tmp_path, content | {"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}), "onnx")


def test_an_honest_file_passes_and_its_padding_is_not_used(tmp_path: Path, content: dict[str, Any]) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = saved(tmp_path, content | {"padding": padding({"Fixed": 128}), "truncation": truncation})
    try_tokenizer(path)
    assert check_tokenizer_file(path)["padding"]
    plain, _ = read_tokenizer_file(saved(tmp_path, content))
    tokenizer, _ = read_tokenizer_file(path)
    assert tokenizer.encode("def f(x):").ids == plain.encode("def f(x):").ids
