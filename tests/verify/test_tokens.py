"""Golden strings, and that the comparison sees what is different."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest

from edgekd.verify.tokens import check_tokens, golden_chats, golden_strings

from .conftest import BYTE_OF

transformers = pytest.importorskip("transformers")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_golden_strings_are_many_distinct_and_the_same_every_time():
    strings = golden_strings(SPECIAL)
    assert len(strings) == len(set(strings)) >= 300
    assert strings == golden_strings(SPECIAL)
    assert len(golden_strings([])) >= 200
    for text in strings:
        text.encode()  # no lone surrogate


@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        ("zero-width joiner emoji", lambda s: "👨\u200d👩\u200d👧\u200d👦" in s),
        ("flags", lambda s: "🇩🇪" in s),
        ("not NFC", lambda s: unicodedata.normalize("NFC", s) != s),
        ("not NFD", lambda s: unicodedata.normalize("NFD", s) != s),
        ("right to left", lambda s: any(unicodedata.bidirectional(c) == "AL" for c in s)),
        ("beyond the basic plane", lambda s: any(ord(c) > 0xFFFF for c in s)),
        ("NUL", lambda s: "\x00" in s),
        ("escape", lambda s: "\x1b" in s),
        ("tab", lambda s: "\t" in s),
        ("CRLF", lambda s: "\r\n" in s),
        ("100 spaces", lambda s: s == " " * 100),
        ("empty", lambda s: s == ""),
        ("no-break space", lambda s: "\u00a0" in s),
        ("contraction", lambda s: "'ll" in s),
        ("URL", lambda s: "https://" in s),
        ("300 letters", lambda s: s == "a" * 300),
        ("special alone", lambda s: s in SPECIAL),
        ("specials adjacent", lambda s: "<|im_end|><|im_end|>" in s),
        ("special inside", lambda s: s == "a<|im_start|>b"),
        ("lookalike", lambda s: s == "<|im_start|"),
    ],
)
def test_golden_strings_hold(kind, holds):
    assert any(holds(text) for text in golden_strings(SPECIAL)), kind


def test_golden_chats_are_well_formed():
    chats = golden_chats()
    assert len(chats) >= 8
    assert any(chat[0]["role"] == "system" for chat in chats)
    assert any(len(chat) >= 5 for chat in chats)
    assert all(chat[-1]["role"] == "user" for chat in chats)


def test_the_same_tokenizer_passes(session, tokenizer, contract):
    result = check_tokens(session, tokenizer, contract)
    assert result.strings == result.strings_identical >= 300
    assert result.chats == result.chats_identical == len(golden_chats())
    assert result.round_trips == result.round_trips_identical >= 280
    assert result.differences == []
    json.dumps(result.model_dump())


def test_a_runtime_that_parses_special_tokens_in_text_is_caught(session, tokenizer, contract):
    session.tokenize = lambda text, start=True: tokenizer(text)["input_ids"]
    result = check_tokens(session, tokenizer, contract)
    assert 0 < result.strings_identical < result.strings
    assert result.chats_identical == result.chats  # their special tokens are placed, whatever the runtime parses
    first = result.differences[0]
    assert first.text == "<|endoftext|>" and first.runtime == [0] and len(first.expected) > 5
    assert len(result.differences) == 5


def test_a_contract_that_lacks_a_special_token_is_caught(session, tokenizer, contract):
    short = {text: index for text, index in contract.special_ids.items() if "im_end" not in text}
    result = check_tokens(session, tokenizer, contract.model_copy(update={"special_ids": short}))
    assert result.strings_identical == result.strings and result.chats_identical == 0


def test_a_bos_that_the_tokenizer_lacks_is_caught(session, tokenizer, contract):
    result = check_tokens(session, tokenizer, contract.model_copy(update={"add_bos": True, "bos_id": 1}))
    assert result.strings_identical == 0 and result.chats_identical == result.chats


def test_a_runtime_that_refuses_a_text_is_a_difference_not_a_crash(session, tokenizer, contract):
    plain = session.tokenize

    def tokenize(text, start=True):
        if "\x00" in text:
            raise ValueError("embedded null")
        return plain(text)

    session.tokenize = tokenize
    result = check_tokens(session, tokenizer, contract)
    assert result.strings - result.strings_identical == sum("\x00" in s for s in golden_strings(SPECIAL))
    assert result.differences[0].runtime == "ValueError: embedded null"
    json.dumps(result.model_dump())


def test_a_lossy_token_is_caught_by_the_round_trip_alone(session, tokenizer, contract):
    whole = session.token_bytes
    session.token_bytes = lambda token: whole(token).replace(b"\t", b" ")
    result = check_tokens(session, tokenizer, contract)
    assert result.strings == result.strings_identical
    assert result.round_trips - result.round_trips_identical >= 10
    assert {d.kind for d in result.differences} == {"round trip"}


def test_a_contract_without_the_template_fails_every_chat(session, tokenizer, contract):
    result = check_tokens(session, tokenizer, contract.model_copy(update={"chat_template": None}))
    assert result.chats == len(golden_chats())
    assert result.chats_identical == 0


def test_a_template_that_refuses_system_messages(session, tokenizer, contract):
    picky = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + contract.chat_template
    )
    plain = tokenizer.chat_template
    tokenizer.chat_template = picky
    try:
        result = check_tokens(session, tokenizer, contract.model_copy(update={"chat_template": picky}))
    finally:
        tokenizer.chat_template = plain
    refused = sum(chat[0]["role"] == "system" for chat in golden_chats())
    assert result.chats_refused == refused > 0
    assert result.chats == result.chats_identical == len(golden_chats()) - refused


def test_bos_is_not_doubled_in_chats(session, tokenizer, contract):
    """A template that writes BOS itself, as Llama 3's does, of a tokenizer that adds it to texts."""
    import copy

    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.bos_token = "<|endoftext|>"
    with_bos.chat_template = "{{ bos_token }}" + contract.chat_template
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    told = contract.model_copy(
        update={
            "add_bos": True,
            "bos_id": 0,
            "chat_template": with_bos.chat_template,
            "special_tokens": with_bos.special_tokens_map,
        }
    )
    result = check_tokens(session, with_bos, told)
    assert result.strings == result.strings_identical
    assert result.chats == result.chats_identical == len(golden_chats())
    plain = session.tokenize
    session.tokenize = lambda text, start=True: [0, *plain(text)]  # a runtime that adds it by itself
    doubled = check_tokens(session, with_bos, told)
    assert doubled.strings_identical == doubled.chats_identical == 0


def test_nfc_contract_compares_the_normal_form(session, tokenizer, contract):
    import copy

    from tokenizers.normalizers import NFC

    normal = copy.deepcopy(tokenizer)
    normal.backend_tokenizer.normalizer = NFC()
    plain = check_tokens(session, normal, contract)
    assert plain.strings_identical < plain.strings  # the runtime did not normalize
    plain_ids = session.tokenize
    session.tokenize = lambda text, start=True: plain_ids(unicodedata.normalize("NFC", text))
    result = check_tokens(session, normal, contract.model_copy(update={"normalizer": "NFC"}))
    assert result.strings == result.strings_identical
    assert result.round_trips == result.round_trips_identical >= 280


def test_bytes_that_the_vocabulary_lacks_are_lost_in_the_reference_too(session, tokenizer, contract):
    """As SmolLM2's, which has no token for some control characters."""
    from tokenizers import Tokenizer

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    lost = [char for char, byte in BYTE_OF.items() if byte in (0x00, 0x07, 0x1B, 0xA9)]
    kept = [text for text in data["model"]["vocab"] if not set(text) & set(lost)]
    merges = [merge for merge in data["model"]["merges"] if not set("".join(merge)) & set(lost)]
    data["model"] |= {"vocab": {text: i for i, text in enumerate(kept)}, "merges": merges}
    small = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token=SPECIAL[0]
    )
    small.chat_template = tokenizer.chat_template
    assert small("a\x07b")["input_ids"] == small("ab")["input_ids"]
    session.tokenizer = small
    result = check_tokens(session, small, contract)
    assert result.strings == result.strings_identical
    assert result.round_trips == result.round_trips_identical >= 300
    whole = session.token_bytes
    session.token_bytes = lambda token: whole(token).replace(b"\t", b" ")
    result = check_tokens(session, small, contract)
    assert result.round_trips - result.round_trips_identical >= 10
    assert result.differences[0].kind == "round trip"


@pytest.mark.parametrize("decoder", ["Strip", "Metaspace"])
def test_the_space_before_a_sentencepiece_text_is_no_difference(session, contract, decoder):
    """The runtime streams it; the reference's decoder drops it at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "▁a"])}
    bpe = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if decoder == "Metaspace":
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        steps = [decoders.Metaspace(prepend_scheme="always"), decoders.ByteFallback(), decoders.Fuse()]
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(steps)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = contract.chat_template

    def token_bytes(token):
        piece = tokenizer.convert_ids_to_tokens(token)
        byte = re.fullmatch("<0x(..)>", piece)
        return bytes([int(byte[1], 16)]) if byte else b"" if token < 3 else piece.replace("▁", " ").encode()

    session.tokenizer, session.token_bytes = tokenizer, token_bytes
    result = check_tokens(session, tokenizer, contract)
    assert result.strings == result.strings_identical
    assert result.round_trips == result.round_trips_identical >= 300, result.differences
    session.token_bytes = lambda token: token_bytes(token).lstrip(b" ")
    result = check_tokens(session, tokenizer, contract)
    assert result.round_trips - result.round_trips_identical >= 100


def test_chats_are_rendered_by_the_contract_as_edgekd_chat_renders_them(session, tokenizer, contract):
    """A contract without the special tokens that the template prints is caught; transformers is the reference."""
    template = "{{ strftime_now('%H:%M:%S') }}" + contract.chat_template.replace("'<|im_end|>\n'", "eos_token")
    plain, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        told = contract.model_copy(update={"chat_template": template})
        whole = told.model_copy(update={"special_tokens": tokenizer.special_tokens_map})
        result = check_tokens(session, tokenizer, whole)
        assert result.chats == result.chats_identical == len(golden_chats())
        result = check_tokens(session, tokenizer, told)
        assert result.chats == len(golden_chats()) and result.chats_identical == 0
        assert "eos_token" in result.differences[0].text
    finally:
        tokenizer.chat_template = plain
