"""Tokenizers: the ids that llama.cpp gives are those of Hugging Face, or the export refuses."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgekd import targets
from edgekd.conversation import chat_ids, text_ids
from edgekd.errors import Unsupported
from edgekd.session import Session
from edgekd.spec import TargetSpec
from edgekd.targets.gguf.session import load_model, runtime
from edgekd.targets.gguf.vocab import PRE_TOKENIZERS, check_tokenizer
from edgekd.verify.tokens import check_tokens

SPEC = TargetSpec(target="gguf", recipes=["fp16"])
REGEXES = {name: steps for steps, name in PRE_TOKENIZERS.items()}
TEXTS = [
    "",
    " ",
    "def f(x):\n\treturn x  # naïve\n\n\n",
    "<|im_start|>user\nHi <|im_end|>\n",
    "a\u0301 \u212b ﬁ",
    "  🚀👩‍👩‍👧 12345",
    "\x00\r\n\x7f",
    "</s><s> <unk> <tool>x<tool>",
    "IT'S we'LL",
    "[PAD701] <0x41>",
]


def export(factory: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, folder: Path, kind: str = "qwen3") -> Any:
    student = factory(folder / "student", kind, tokenizer, vocab_size=len(tokenizer) + 3, num_hidden_layers=1)
    return targets.export(student, SPEC, "fp16", folder / "out", name="t")


def of_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def written(artifact: Any, key: str) -> Any:
    field = gguf.GGUFReader(artifact.main_file).fields.get(f"tokenizer.ggml.{key}")
    return None if field is None else field.contents()


def pre_tokenizer(name: str, factory: Callable[..., Any]) -> pre_tokenizers.PreTokenizer:
    steps = REGEXES[name]
    regexes = [step for step in steps if step not in ("gpt2", "digit")]
    return factory(*regexes, digits="digit" in steps, use_regex="gpt2" in steps)


@pytest.mark.parametrize("name", [*REGEXES])
def test_a_custom_vocabulary_finds_its_pre_tokenizer(
    name: str, tmp_path: Path, student_factory: Any, tokenizer_factory: Any, byte_level_factory: Any
) -> None:
    tokenizer = tokenizer_factory(
        pre_tokenizer(name, byte_level_factory), ignore_merges=name in ("llama-bpe", "tekken"), extra=["<tool>", "\t\t"]
    )
    artifact = export(student_factory, tokenizer, tmp_path)
    assert written(artifact, "pre") == name
    session = targets.open_artifact(artifact, threads=1)
    for text in TEXTS:
        assert session.tokenize(text) == of_text(tokenizer, text), text
        assert chat_ids(session, artifact.manifest.contract, text) == tokenizer(text)["input_ids"], text
    session.close()


def test_an_unlisted_regex_is_matched_by_its_ids(
    tmp_path: Path, student_factory: Any, tokenizer_factory: Any, byte_level_factory: Any
) -> None:
    regex = REGEXES["llama-bpe"][0].replace("(?i:'s|'t|", "(?i:'t|'s|")
    assert (regex,) not in PRE_TOKENIZERS
    artifact = export(student_factory, tokenizer_factory(byte_level_factory(regex)), tmp_path)
    assert written(artifact, "pre") == "llama-bpe"


def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused_by_the_string_that_differs(
    tmp_path: Path, student_factory: Any, tokenizer_factory: Any, byte_level_factory: Any
) -> None:
    tokenizer = tokenizer_factory(byte_level_factory("[aeiou]+|[^aeiou]+"))
    with pytest.raises(Unsupported, match=r"differs on \d+ of \d+ strings, first on '.+': \[.+\] instead of \["):
        export(student_factory, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True), (False, True)])
def test_bos_and_eos_are_added_as_the_tokenizer_adds_them(
    bos: bool, eos: bool, tmp_path: Path, student_factory: Any, tokenizer_factory: Any
) -> None:
    tokenizer = tokenizer_factory(add_bos=bos, add_eos=eos)
    artifact = export(student_factory, tokenizer, tmp_path)
    session = targets.open_artifact(artifact, threads=1)
    ids = text_ids(session, artifact.manifest.contract, "hello")
    session.close()
    whole = tokenizer("hello")["input_ids"]
    assert (whole[0] == 1, whole[-1] == 0) == (bos, eos)
    assert ids == whole[: len(whole) - eos]
    assert (written(artifact, "add_bos_token"), written(artifact, "add_eos_token")) == (bos, eos)
    assert artifact.manifest.details["tokenizer"]["differ"] == 0  # llama.cpp by itself adds both
    assert artifact.manifest.contract.add_bos is bos and artifact.manifest.contract.bos_id == (1 if bos else None)


def test_nfc_stands_in_the_contract_and_is_applied(
    tmp_path: Path, student_factory: Any, tokenizer_factory: Any
) -> None:
    tokenizer = tokenizer_factory(nfc=True)
    artifact = export(student_factory, tokenizer, tmp_path)
    session = targets.open_artifact(artifact, threads=1)
    assert artifact.manifest.contract.normalizer == "NFC"
    text = "cafe\u0301 \u212b"
    assert (
        session.tokenize(text) == tokenizer(text)["input_ids"] == session.tokenize(unicodedata.normalize("NFC", text))
    )
    session.close()


def test_token_types_padding_ends_and_template(tmp_path: Path, student_factory: Any, tokenizer_factory: Any) -> None:
    tokenizer = tokenizer_factory(extra=["<tool>"])
    artifact = export(student_factory, tokenizer, tmp_path)
    tokens, types = written(artifact, "tokens"), written(artifact, "token_type")
    assert tokens[700:] == ["<tool>", "[PAD701]", "[PAD702]", "[PAD703]"]
    assert types[:3] == [gguf.TokenType.CONTROL] * 3
    assert types[700:] == [gguf.TokenType.USER_DEFINED] + [gguf.TokenType.UNUSED] * 3
    assert set(types[3:700]) == {gguf.TokenType.NORMAL}
    assert (written(artifact, "eos_token_id"), written(artifact, "eot_token_id")) == (0, 2)
    assert artifact.manifest.contract.eos_ids == [0, 2]
    template = gguf.GGUFReader(artifact.main_file).fields["tokenizer.chat_template"].contents()
    assert template == artifact.manifest.contract.chat_template == tokenizer.chat_template
    again = PreTrainedTokenizerFast.from_pretrained(artifact.folder)
    assert (
        again.chat_template == tokenizer.chat_template
        and again("<tool> x")["input_ids"] == tokenizer("<tool> x")["input_ids"]
    )


def test_llama_cpp_stops_at_three_ends_and_the_session_at_all(
    tmp_path: Path, student_factory: Any, tokenizer_factory: Any
) -> None:
    tokenizer = tokenizer_factory(extra=["<|done|>"])
    folder = student_factory(tmp_path / "student", tokenizer=tokenizer)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 700, 5]}))
    artifact = targets.export(folder, TargetSpec(target="gguf", recipes=["fp16"]), "fp16", tmp_path / "a", name="a")
    assert artifact.manifest.contract.eos_ids == [0, 700, 5, 2]
    ends = [written(artifact, f"{name}_token_id") for name in ("eos", "eot", "eom")]
    assert ends == [0, 2, 700]
    lib, model = runtime(), load_model(artifact.main_file, vocab_only=True)
    vocab = lib.llama_model_get_vocab(model)
    assert all(lib.llama_vocab_is_eog(vocab, token) for token in ends)
    lib.llama_model_free(model)


def test_a_vocabulary_of_bytes_alone(tmp_path: Path, student_factory: Any) -> None:
    vocab = {text: i for i, text in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    artifact = export(student_factory, wrapped, tmp_path)
    session = targets.open_artifact(artifact, threads=1)
    ids = chat_ids(session, artifact.manifest.contract, "é\n<eos>")
    assert ids == wrapped("é\n<eos>")["input_ids"] and len(ids) == 4
    assert [session.token_bytes(i) for i in ids] == [b"\xc3", b"\xa9", b"\n", b""]
    session.close()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path, student_factory: Any, sentencepiece_factory: Any) -> None:
    tokenizer = sentencepiece_factory(prefix=prefix, extra=["<tool>"])
    artifact = export(student_factory, tokenizer, tmp_path, "llama")
    assert written(artifact, "model") == "llama" and written(artifact, "add_space_prefix") is prefix
    types = written(artifact, "token_type")
    assert types[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert set(types[3:259]) == {gguf.TokenType.BYTE}
    session = targets.open_artifact(artifact, threads=1)
    for text in TEXTS:
        assert text_ids(session, artifact.manifest.contract, text) == [1, *of_text(tokenizer, text)], text
        assert chat_ids(session, artifact.manifest.contract, text) == tokenizer(text)["input_ids"][1:], text
    ids = session.tokenize("añb 🚀")
    assert b"".join(map(session.token_bytes, ids)).decode() == " " * prefix + "añb 🚀"
    session.close()


CHATS = ["<s>Hi there</s> and </s>\nmore", "Hi<s>there", " <s> x", "<s></s>", "a <tool> b<s><tool>c"]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_metaspace_prefix_is_the_callers(
    scheme: str, tmp_path: Path, student_factory: Any, sentencepiece_factory: Any
) -> None:
    tokenizer = sentencepiece_factory(metaspace=scheme)
    artifact = export(student_factory, tokenizer, tmp_path, "llama")
    contract = artifact.manifest.contract
    assert written(artifact, "add_space_prefix") is False
    assert contract.space_prefix == {"first": "first", "always": "every", "never": None}[scheme]
    session = targets.open_artifact(artifact, threads=1)
    for text in [*TEXTS, " a", "▁a", "  a"]:
        assert session.tokenize(text) == of_text(tokenizer, text), text
    for text in [*TEXTS, *CHATS]:
        assert chat_ids(session, contract, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    session.close()


def test_an_ordinary_entry_that_llama_cpp_takes_for_special_by_its_text(
    tmp_path: Path, student_factory: Any, tokenizer_factory: Any
) -> None:
    """As Qwen2.5's: no merges make it, so no text has its id, but llama.cpp by itself finds it in every ``</s>``."""
    data = json.loads(tokenizer_factory().backend_tokenizer.to_str())
    data["model"]["vocab"]["</s>"] = 700
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|endoftext|>"
    )
    text = "a</s>b"
    assert 700 not in tokenizer(text)["input_ids"]
    artifact = export(student_factory, tokenizer, tmp_path)
    told = artifact.manifest.details["tokenizer"]
    assert told["used"] == "llama.cpp" and told["differ"] > 0 and "</s>" in told["first"] and "700" in told["first"]
    session = targets.open_artifact(artifact, threads=1)
    assert session.tokenize(text) == tokenizer(text)["input_ids"]
    assert session.token_bytes(700) == b"</s>" and session.token_bytes(0) == b""
    assert (
        chat_ids(session, artifact.manifest.contract, f"<|im_start|>{text}")
        == tokenizer(f"<|im_start|>{text}")["input_ids"]
    )
    tokens = check_tokens(session, tokenizer, artifact.manifest.contract)
    assert tokens.strings_identical == tokens.strings and tokens.round_trips_identical == tokens.round_trips
    session.close()


def test_other_kinds_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for model, cause in ((models.WordLevel({"a": 0}, "a"), "WordLevel"), (models.BPE({"a": 0}, []), "neither")):
        Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(Unsupported, match=cause):
            check_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, student_factory: Any, tokenizer_factory: Any
) -> Iterator[tuple[Session, PreTrainedTokenizerFast]]:
    tokenizer = tokenizer_factory()
    session = targets.open_artifact(export(student_factory, tokenizer, tmp_path_factory.mktemp("pair")), threads=1)
    yield session, tokenizer
    session.close()


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
def test_any_text_has_the_same_ids_and_comes_back(pair: tuple[Session, PreTrainedTokenizerFast], text: str) -> None:
    session, tokenizer = pair
    # Case-insensitive contractions alone differ: Hugging Face's regex also folds ſ (U+017F), llama.cpp's does not.
    text = text.replace("ſ", "s")
    ids = session.tokenize(text)
    assert ids == of_text(tokenizer, text)
    assert b"".join(map(session.token_bytes, ids)).decode() == text
