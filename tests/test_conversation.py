"""The one renderer of chats, against transformers' own; and templates that mean no good."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from datetime import datetime

import pytest

from chats import ANSWER, CHATS, SPECIALS, TEMPLATES, TOOLS, USER
from edgekd.conversation import ChatTemplate, TemplateRefused, chat_ids, render_chat, text_ids
from edgekd.errors import BadArtifact, EdgekdError
from edgekd.manifest import Contract

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet)
    bpe.train_from_iterator(["the user asks the assistant"] * 9, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bpe.token_to_id("<s>")), ("</s>", bpe.token_to_id("</s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIALS[2:7],
    )


class Runtime:
    """A runtime that reads text as text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize(self, text, *, start=True):
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.fixture(scope="module")
def contract(tokenizer):
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Contract(
        context_length=99,
        vocab_size=300,
        bos_id=0,
        eos_ids=[1],
        add_bos=True,
        chat_template="",
        special_ids=special,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_what_transformers_makes_of_it(name, tokenizer, contract):
    """Text and ids, for every chat, with and without tools and the prompt; what one refuses the other refuses."""
    tokenizer.chat_template = TEMPLATES[name]
    ours = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map)
    rendered = 0
    for chat in CHATS.values():
        for options in ({}, {"add_generation_prompt": True}, {"tools": TOOLS}, {"documents": [{"title": "t"}]}):
            text, words = None, ""
            try:
                text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
            except Exception as error:
                words = str(error).rstrip(".")
            if text is None:
                with pytest.raises(TemplateRefused, match=re.escape(words)):
                    ours.render(chat, **options)
                continue
            ids = tokenizer.apply_chat_template(chat, return_dict=False, **options)
            got = ours.render(chat, **options).text
            assert got == text
            assert chat_ids(Runtime(tokenizer), contract, got) == ids
            rendered += 1
    assert rendered >= 12


def test_marks_are_where_transformers_sees_them(tokenizer):
    tokenizer.chat_template = TEMPLATES["generation"]
    chat = [USER, ANSWER, USER, {"role": "assistant", "content": "ja, é"}]
    rendered = ChatTemplate(tokenizer.chat_template, {}).render(chat)
    expected = ["<think>\nhm\n</think>\n\nHi </s><|im_end|>", "ja, é<|im_end|>"]
    assert [rendered.text[a:b] for a, b in rendered.generated] == expected
    mask = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    offsets = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert mask == [int(any(a <= start < b for a, b in rendered.generated)) for start, _ in offsets]


def test_a_special_token_is_placed_in_a_chat_and_is_text_in_a_text(tokenizer, contract):
    text = "hi</s> you<s>"
    placed = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat_ids(Runtime(tokenizer), contract, text) == placed and {0, 1} <= set(placed)
    ids = text_ids(Runtime(tokenizer), contract, text)
    assert ids[0] == 0 and not {0, 1} & set(ids[1:]) and tokenizer.decode(ids[1:]) == text
    assert text_ids(Runtime(tokenizer), contract, "hi") == tokenizer("hi")["input_ids"][:-1]  # no EOS to go on behind
    plain = contract.model_copy(update={"add_bos": False})
    assert text_ids(Runtime(tokenizer), plain, "hi") == tokenizer("hi")["input_ids"][1:-1]


@pytest.mark.parametrize(("left", "right"), [(True, False), (False, True), (True, True)])
def test_a_special_token_takes_its_white_space_along(left, right, tokenizer, contract):
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("<|end|>", lstrip=left, rstrip=right, normalized=False)])
    greedy = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = {**contract.special_ids, "<|end|>": backend.token_to_id("<|end|>")}
    side = "both" if left and right else "left" if left else "right"
    told = contract.model_copy(update={"special_ids": ids, "special_strips": {"<|end|>": side}})
    for text in ("a \n<|end|>\u00a0\n b", "<|end|><|end|>  <|end|>", "\x1c<|end|>\x1d", "<|end|", " </s> <|end|>"):
        expected = greedy(text, add_special_tokens=False)["input_ids"]
        assert chat_ids(Runtime(tokenizer), told, text) == expected, text


def test_the_longest_of_several_special_tokens_counts(tokenizer, contract):
    told = contract.model_copy(update={"special_ids": {"<a>": 0, "<a><b>": 1, "<b>": 2}})
    assert chat_ids(Runtime(tokenizer), told, "<a><b><b><a>") == [1, 2, 0]


def test_a_manifest_of_an_earlier_version_is_refused(tokenizer, contract):
    with pytest.raises(BadArtifact, match="Export the artifact again"):
        chat_ids(Runtime(tokenizer), contract.model_copy(update={"special_ids": None}), "a")


def test_the_clock_is_todays_or_the_given():
    template = "{{ strftime_now('%Y-%m-%d %H') }}"
    assert ChatTemplate(template, {}, datetime(2024, 7, 26)).render([]).text == "2024-07-26 00"
    assert ChatTemplate(template, {}).render([]).text[:4] == str(datetime.now().year)


HOSTILE = {
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "nested ranges": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
    "a long string": ("{{ 'a' * 10**10 }}", "MiB of memory"),
    "a long list": ("{{ [1] * 10**9 }}", "MiB of memory"),
    "a wide percent": ("{{ '%1000000000d' % 3 }}", "MiB of memory"),
    "a wide format": ("{{ '{:>1000000000}'.format(1) }}", "MiB of memory"),
    "a wide filter": ("{{ 'a' | center(10**9) }}", "MiB of memory"),
    "a wide indent": ("{{ messages | tojson(indent=10**9) }}", "MiB of memory"),
    "a filter of filters": ("{{ ('a' * 99999) | replace('a', 'b' * 99999) }}", "MiB of memory"),
    "a doubling": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "MiB of memory",
    ),
    "much text": ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "more than 16,777,216 characters"),
    "a slow filter": ("{{ ('a ' * 3000000) | urlize }}", "does not end"),
    "a macro of itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion depth"),
    "a loop of itself": ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursion depth"),
    "deep blocks": ("{% if 1 %}" * 50_000 + "{% endif %}" * 50_000, "recursion depth"),
    "blocks too deep for Python": ("{% if 1 %}" * 150 + "{% endif %}" * 150, "too many levels"),
    "deep brackets": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "recursion depth"),
    "its own words": ("{{ raise_exception('No system\nturn here.') }}", "No system turn here"),
    "no such name": ("{{ nothing.at_all }}", "'nothing' is undefined"),
    "no such tag": ("{% nothing %}", "unknown tag 'nothing'"),
    "an error": ("{{ 1 / 0 }}", "division by zero"),
    "an open bracket": ("{{ x ", "unexpected end of template"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "the inside of Python": ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    "a private name": ("{% set n = namespace(_x=1) %}", "underscore"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_gets_a_sentence_and_the_next_one_works(name):
    template, words = HOSTILE[name]
    with pytest.raises(EdgekdError, match=words) as refused:
        render_chat(template, [USER])
    assert len(str(refused.value)) < 1200 and "\n" not in str(refused.value)
    assert render_chat("{{ messages[0].role }}", [USER]) == "user"


def test_values_that_json_has_not():
    """As transformers: a template sees no object but plain ones."""
    message = {"role": "user", "content": datetime(2024, 1, 1)}
    assert render_chat("{{ messages[0].content }}", [message]) == "<datetime>"
    deep: list = []
    for _ in range(10**5):
        deep = [deep]
    with pytest.raises(TemplateRefused, match="JSON"):
        render_chat("{{ messages }}", [{"role": "user", "content": deep}])
    assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": "\ud800"}]) == "\ud800"


def test_an_interrupted_render_does_not_answer_the_next(monkeypatch):
    from edgekd import conversation

    exchange = conversation._Worker._exchange

    def interrupted(process, line):
        process.stdin.write(line)
        process.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation._Worker, "_exchange", staticmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        render_chat("stale", [USER])
    monkeypatch.setattr(conversation._Worker, "_exchange", staticmethod(exchange))
    assert render_chat("fresh", [USER]) == "fresh"


def test_threads_and_forked_processes_get_their_own_answers():
    found = {}

    def work(name):
        found[name] = {render_chat("{{ messages[0].content }}", [{"role": "u", "content": name}]) for _ in range(50)}

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == {str(i): {str(i)} for i in range(4)}
    child = os.fork()
    if not child:
        os._exit(0 if render_chat("{{ messages[0].content }}", [{"role": "u", "content": "f"}]) == "f" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render_chat("still here", [USER]) == "still here"


def test_thousands_of_chats_a_second():
    """Training data has millions; a process for each would take days."""
    template = ChatTemplate(TEMPLATES["chatml"], {})
    template.render([USER])
    began = time.monotonic()
    for _ in range(1000):
        template.render([USER, ANSWER] * 3)
    assert time.monotonic() - began < 5


def test_messages_reach_the_template_as_they_are():
    """What JSON between the two processes might change: keys' order, numbers, escapes."""
    message = {"role": "user", "content": "\u2028 \\u0041 \x00 \x7f", "z": 1.0, "a": 10**20, "n": None}
    text = render_chat("{{ messages[0] | tojson }}", [message])
    assert json.loads(text) == {key: value for key, value in message.items() if value is not None}
    assert text.index('"z"') < text.index('"a"')
