"""``edgekd chat``: what reaches the session, and what a user sees."""

from __future__ import annotations

import os

import pytest

from edgekd import console
from edgekd.conversation import TemplateRefused
from edgekd.errors import EdgekdError
from edgekd.manifest import Contract
from scripted import Scripted

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role[0] + ']' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
CONTRACT = Contract(
    context_length=60,
    vocab_size=128,
    bos_id=2,
    eos_ids=[3],
    add_bos=True,
    chat_template=TEMPLATE,
    special_tokens={"bos_token": "\x02", "eos_token": "\x03"},
    special_ids={"\x02": 2, "\x03": 3},
)


@pytest.fixture
def talk(monkeypatch, capsys):
    """Lines in; what the session was given, stdout and stderr."""

    def run(lines, contract=CONTRACT, prompt=None, session=None, max_tokens=8, raw=False):
        waiting, session = iter(lines), session or Scripted()

        def read():
            line = next(waiting, None)
            if line is None:
                raise EOFError
            if isinstance(line, Exception):
                raise line
            return line

        if lines:
            monkeypatch.setattr(console, "_read_line", read)
        console.converse(session, contract, prompt, max_tokens, 0.0, 0, raw=raw)
        out = capsys.readouterr()
        return session.given, out.out, out.err

    return run


def test_a_conversation_is_rendered_with_bos_once_and_no_end_behind_it(talk):
    given, out, _ = talk(["hi", "and"])
    assert given == ["\x02[u]hi\x03[a]", "\x02[u]hi\x03[a]ok\x03[u]and\x03[a]"]
    assert out == "ok\nok\n"


def test_what_was_read_of_a_conversation_is_not_read_again(talk):
    session = Scripted()
    talk(["hi", "and"], session=session)
    first, second = "\x02[u]hi\x03[a]", "\x03[u]and\x03[a]"
    assert session.fed == [len(first), 1, 1, len(second), 1, 1]


def test_a_prompt_goes_through_the_template_unless_it_is_raw(talk):
    assert talk([], prompt="hi")[0] == ["\x02[u]hi\x03[a]"]
    assert talk([], prompt="hi", raw=True)[0] == ["\x02hi"]
    assert talk(["hi"], raw=True)[0] == ["\x02hi"]
    bare = CONTRACT.model_copy(update={"chat_template": None})
    assert talk(["hi", "and"], bare)[0] == ["\x02hi", "\x02and"]  # without a template each line stands alone


def test_a_line_that_is_too_long_is_said_and_forgotten(talk):
    given, _, err = talk(["x" * 99, "hi"])
    assert given == ["\x02[u]hi\x03[a]"]
    assert err.startswith("the text has 107 tokens, the context holds 60 with an answer. Give a text that fits.")
    with pytest.raises(EdgekdError, match="the text has 107 tokens"):
        talk([], prompt="x" * 99)


def test_a_conversation_that_grows_too_long_loses_its_beginning(talk):
    given, _, err = talk(["one " * 5, "two " * 5, "three"])
    assert "three" in given[-1] and all(len(text) <= 52 for text in given)
    assert "one" not in given[-1] and "The oldest question and its answer no longer fit" in err


def test_ctrl_c_ends_an_answer_and_not_the_conversation(talk):
    session = Scripted()
    session.interrupt = KeyboardInterrupt()
    given, out, _ = talk(["hi", "and"], session=session)
    assert given[1] == "\x02[u]hi\x03[a]o\x03[u]and\x03[a]" and out == "o\nok\n"
    session.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        talk([], prompt="hi", session=session)


@pytest.mark.parametrize("line", [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "a\udcff"])
def test_input_that_is_no_text(talk, line):
    with pytest.raises(EdgekdError, match="not UTF-8"):
        talk([line])
    if isinstance(line, str):
        with pytest.raises(EdgekdError, match="not UTF-8"):
            talk([], prompt=line)


@pytest.mark.parametrize(("said", "why"), [("", "ended it with its first token"), ("\2", "its 1 tokens have no text")])
def test_an_empty_answer_says_why(talk, said, why):
    session = Scripted(lambda prompt: said)
    _, out, err = talk(["hi"], session=session)
    assert out == "\n" and why in err


def test_piped_lines_are_answered_without_prompts(talk, monkeypatch, tmp_path):
    (tmp_path / "lines").write_text("hi\r\n\n  \nand", newline="")
    with open(tmp_path / "lines", newline="") as lines:
        monkeypatch.setattr("sys.stdin", lines)
        given, out, err = talk([])
    assert given == ["\x02[u]hi\x03[a]", "\x02[u]hi\x03[a]ok\x03[u]and\x03[a]"]
    assert out == "ok\nok\n" and err == "\n"


def test_a_template_that_refuses_says_why(talk):
    picky = CONTRACT.model_copy(update={"chat_template": "{{ raise_exception('Only at night') }}"})
    with pytest.raises(TemplateRefused, match="Only at night"):
        talk(["hi"], picky)


def test_an_empty_or_closed_input_is_said(talk, monkeypatch):
    with open(os.devnull) as nothing:  # what the command line puts in a closed one's place
        monkeypatch.setattr("sys.stdin", nothing)
        with pytest.raises(EdgekdError, match="empty or closed"):
            talk([])
