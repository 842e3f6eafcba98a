"""The shipped text: whole, split by its own content, rendered by the model's own template."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from edgekd.distill import mixed
from edgekd.distill.data import load_windows, prepare
from edgekd.spec import DataSpec

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_teacher: Path):
    return AutoTokenizer.from_pretrained(tiny_teacher)


def test_every_chat_alternates_and_ends_with_an_answer():
    chats = mixed.read_chats()
    assert len(chats) == 51
    for chat in chats:
        roles = [message["role"] for message in chat]
        assert roles[0] in ("system", "user") and roles[-1] == "assistant"
        turns = roles[roles[0] == "system" :]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message["content"] and "=====" not in message["content"] for message in chat)
    assert chats[0][0]["content"] == "What is the capital of Australia, and why is it not Sydney?"


def test_each_split_has_all_three_kinds_and_no_document_is_in_two(tokenizer):
    tokenizer.chat_template = TEMPLATE
    documents = list(mixed.mixed_documents(tokenizer))
    texts = [text for _, text in documents]
    assert len(set(texts)) == len(texts) and all(text.strip() for text in texts)
    sizes: dict[str, Counter[str]] = {split: Counter() for split in ("train", "validation", "test")}
    prose = (mixed._TEXTS / "prose.txt").read_text("utf-8")
    for split, text in documents:
        kind = "chat" if text.startswith("<|") else "prose" if text in prose else "code"
        sizes[split][kind] += len(text)
    for split in ("train", "test"):
        assert set(sizes[split]) == {"chat", "prose", "code"}
        assert sizes[split]["chat"] > 2000 and 0.3 < sizes[split]["code"] / sizes[split]["prose"] < 3


def test_nothing_of_the_prose_is_lost(tokenizer):
    pieces = list(mixed._paragraphs("a\n\nb\n\n" + "c" * 3000 + "\n\nd\n"))
    assert pieces == ["a\n\nb\n\n" + "c" * 3000, "d"]
    prose = (mixed._TEXTS / "prose.txt").read_text("utf-8")
    assert "\n\n".join(mixed._paragraphs(prose)) == prose.strip()


def test_a_template_renders_the_chats_and_one_that_refuses_does_not_stop_it(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    tokenizer.chat_template = TEMPLATE
    assert mixed.rendered(chat, tokenizer) == f"<|system|>Be brief.{tokenizer.eos_token}<|user|>hi{tokenizer.eos_token}"
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    assert mixed.rendered(chat, tokenizer) == f"<|user|>hi{tokenizer.eos_token}"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert mixed.rendered(chat, tokenizer) == "System: Be brief.\n\nUser: hi"
    tokenizer.chat_template = None
    assert mixed.rendered(chat, tokenizer) == "System: Be brief.\n\nUser: hi"
    tokenizer.chat_template, tokenizer.bos_token = "{{ bos_token }}" + TEMPLATE, "<s>"
    assert mixed.rendered(chat[1:], tokenizer) == f"<|user|>hi{tokenizer.eos_token}", "the tokenizer puts its own"


def test_as_a_source_of_data(tmp_path, tokenizer):
    figures = prepare(DataSpec(source="mixed", context=128), tokenizer, tmp_path / "data", seed=0, base=tmp_path)
    assert not figures["warnings"]
    windows = load_windows(tmp_path / "data", "train")
    text = tokenizer.decode(windows.ids.flatten().long().tolist())
    assert "<|im_start|>assistant\nThe c" in text and "Alice" in text and "def " in text
    assert len(windows) >= 64 and len(load_windows(tmp_path / "data", "test")) >= 16
