"""Golden strings, and that the comparison sees what is different."""

from __future__ import annotations

import json
import unicodedata

import pytest

from edgekd.verify.tokens import check_tokens, golden_chats, golden_strings

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
    assert result["strings"] == result["strings_identical"] >= 300
    assert result["chats"] == result["chats_identical"] == len(golden_chats())
    assert result["round_trips"] == result["round_trips_identical"] >= 280
    assert result["differences"] == []
    json.dumps(result)


def test_a_runtime_that_does_not_parse_special_tokens_is_caught(session, tokenizer, contract):
    session.tokenize = lambda text: tokenizer.backend_tokenizer.encode(text.replace("<|im", "<\u200b|im")).ids
    result = check_tokens(session, tokenizer, contract)
    assert 0 < result["strings_identical"] < result["strings"]
    assert result["chats_identical"] == 0
    first = result["differences"][0]
    assert "<|im" in first["text"]
    assert first["expected"] == tokenizer(first["text"])["input_ids"] != first["runtime"]
    assert len(result["differences"]) == 5


def test_a_runtime_that_refuses_a_text_is_a_difference_not_a_crash(session, tokenizer, contract):
    def tokenize(text):
        if "\x00" in text:
            raise ValueError("embedded null")
        return tokenizer(text)["input_ids"]

    session.tokenize = tokenize
    result = check_tokens(session, tokenizer, contract)
    assert result["strings"] - result["strings_identical"] == sum("\x00" in s for s in golden_strings(SPECIAL))
    assert result["differences"][0]["runtime"] == "ValueError: embedded null"
    json.dumps(result)


def test_a_lossy_token_is_caught_by_the_round_trip_alone(session, tokenizer, contract):
    whole = session.token_bytes
    session.token_bytes = lambda token: whole(token).replace(b"\t", b" ")
    result = check_tokens(session, tokenizer, contract)
    assert result["strings"] == result["strings_identical"]
    assert result["round_trips"] - result["round_trips_identical"] >= 10
    assert {d["kind"] for d in result["differences"]} == {"round trip"}


def test_a_contract_without_the_template_fails_every_chat(session, tokenizer, contract):
    result = check_tokens(session, tokenizer, contract.model_copy(update={"chat_template": None}))
    assert result["chats"] == len(golden_chats())
    assert result["chats_identical"] == 0


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
    assert result["chats_refused"] == refused > 0
    assert result["chats"] == result["chats_identical"] == len(golden_chats()) - refused


def test_bos_is_not_doubled_in_chats(session, tokenizer, contract):
    """A template that writes BOS itself, as Llama 3's does, and a runtime that adds it."""
    import copy

    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.bos_token = "<|endoftext|>"
    with_bos.chat_template = "{{ bos_token }}" + contract.chat_template
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    session.tokenize = lambda text: [0, *tokenizer(text)["input_ids"]]
    told = contract.model_copy(
        update={
            "add_bos": True,
            "bos_id": 0,
            "chat_template": with_bos.chat_template,
            "special_tokens": with_bos.special_tokens_map,
        }
    )
    result = check_tokens(session, with_bos, told)
    assert result["strings"] == result["strings_identical"]
    assert result["chats"] == result["chats_identical"] == len(golden_chats())


def test_nfc_contract_compares_the_normal_form(session, tokenizer, contract):
    import copy

    from tokenizers.normalizers import NFC

    normal = copy.deepcopy(tokenizer)
    normal.backend_tokenizer.normalizer = NFC()
    plain = check_tokens(session, normal, contract)
    assert plain["strings_identical"] < plain["strings"]  # the runtime did not normalize
    session.tokenize = lambda text: tokenizer(unicodedata.normalize("NFC", text))["input_ids"]
    result = check_tokens(session, normal, contract.model_copy(update={"normalizer": "NFC"}))
    assert result["strings"] == result["strings_identical"]
    assert result["round_trips"] == result["round_trips_identical"] >= 280
