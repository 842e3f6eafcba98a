"""Reading, splitting, tokenizing and packing; chats and their loss masks."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgekd.distill.chat import Chat, ChatReader, Unusable
from edgekd.distill.corpus import stdlib_corpus
from edgekd.distill.data import _messages, _text_documents, load_windows, prepare
from edgekd.errors import EdgekdError, SpecError
from edgekd.spec import DataSpec
from edgekd.student import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_teacher):
    return load_tokenizer(tiny_teacher)


def _prepare(tmp_path, tokenizer, seed=0, **spec):
    shares = {"validation_share": 0.2, "test_share": 0.2, "context": 16}
    return prepare(
        DataSpec(**{**shares, **spec}),
        tokenizer,
        tmp_path / "out",
        seed=seed,
        base=tmp_path,
    )


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b\n" for i in range(60)]


def _texts_of(folder, tokenizer):
    """The documents of each split, read back from the windows."""
    found = {}
    for split in ("train", "validation", "test"):
        ids = load_windows(folder, split).ids.flatten().tolist()
        found[split] = tokenizer.decode(ids).split(tokenizer.eos_token)
    return found


def test_jsonl_parquet_and_text_give_the_same_windows(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    _jsonl(tmp_path / "a.jsonl", [{"id": i, "body": text} for i, text in enumerate(TEXTS)])
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    seen = []
    for source in (
        {"source": "jsonl", "paths": ["*.jsonl"], "column": "body"},
        {"source": "parquet", "paths": ["a.parquet"], "column": "body"},
        {"source": "text", "paths": ["texts/**/*.txt"]},
    ):
        figures = _prepare(tmp_path, tokenizer, **source)
        windows = {split: load_windows(tmp_path / "out", split) for split in ("train", "validation", "test")}
        seen.append((figures, {split: w.ids.tolist() for split, w in windows.items()}))
        for split, w in windows.items():
            assert w.ids.shape == w.loss_mask.shape == (figures[f"{split}_windows"], 16)
            assert w.ids.dtype == torch.uint16
            assert torch.equal(w.loss_mask, 1 - w.begins), "all is learned but how a document begins"
            assert figures[f"{split}_windows"] == figures[f"{split}_tokens"] // 16
    assert seen[0] == seen[1] == seen[2]
    assert sum(seen[0][0][f"{split}_documents"] for split in windows) == 60
    assert sum(seen[0][0][f"{split}_bytes"] for split in windows) == sum(len(text.encode()) for text in TEXTS)


def test_no_document_lies_in_two_splits_and_duplicates_go(tmp_path, tokenizer):
    _jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS * 3] + [{"text": ""}, {"text": None}])
    figures = _prepare(tmp_path, tokenizer, source="jsonl", paths=["a.jsonl"])
    assert figures["duplicates_dropped"] == 120
    splits = _texts_of(tmp_path / "out", tokenizer)
    whole = {split: set(TEXTS) & set(texts) for split, texts in splits.items()}
    assert all(whole.values())
    assert not whole["train"] & whole["test"] and not whole["train"] & whole["validation"]
    assert not whole["test"] & whole["validation"]
    # The order of the rows and their number do not move a document to another split.
    _jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[::-1]])
    _prepare(tmp_path, tokenizer, source="jsonl", paths=["a.jsonl"])
    again = _texts_of(tmp_path / "out", tokenizer)
    assert not set(again["train"]) & whole["test"] and not set(again["test"]) & whole["train"]


def test_packing_is_the_concatenation_of_the_documents(tmp_path, tokenizer):
    _jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    _prepare(tmp_path, tokenizer, source="jsonl", paths=["a.jsonl"])
    for split, texts in _texts_of(tmp_path / "out", tokenizer).items():
        flat = [i for text in texts[:-1] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        packed = load_windows(tmp_path / "out", split).ids.flatten().tolist()
        assert packed[: len(flat)] == flat and len(packed) - len(flat) < 64


def test_one_long_text_file_can_be_split(tmp_path, tokenizer):
    paragraphs = [f"paragraph {i} " + "word " * 120 for i in range(900)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    figures = _prepare(tmp_path, tokenizer, source="text", paths=["*.txt"])
    assert figures["not_utf8_skipped"] == 1 and figures["test_documents"] and figures["validation_documents"]
    lengths = [figures[f"{split}_bytes"] for split in ("train", "validation", "test")]
    assert sum(lengths) == pytest.approx(len("\n\n".join(paragraphs)), rel=1e-3)


def test_the_standard_library_keeps_its_own_split(tmp_path, tokenizer, monkeypatch):
    import edgekd.distill.data as data

    whole = stdlib_corpus()
    small = type(whole)(whole.train[:3], whole.validation[:2], whole.test[:2], whole.stats)
    monkeypatch.setattr(data, "stdlib_corpus", lambda include_tests: small)
    figures = _prepare(tmp_path, tokenizer, source="stdlib")
    assert [figures[f"{split}_documents"] for split in ("train", "validation", "test")] == [3, 2, 2]
    assert _texts_of(tmp_path / "out", tokenizer)["test"][0] == small.test[0]
    assert figures["near_duplicates_dropped"] == whole.stats["near_duplicates_dropped"]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6."},
]
TEMPLATES = {
    "chatml": None,
    "generation": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    ),
    "trims": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    # As Qwen3's: the last turn is wrapped in an empty thought, the earlier ones are not.
    "rewrites": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    ),
}


def render_chat(messages, tokenizer, tools=None):
    return ChatReader(tokenizer).read(Chat(messages, tools))


def _learned(text, spans):
    return [text[a:b] for a, b in spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_assistants_words_and_their_end_are_learned(tiny_teacher, name):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = TEMPLATES[name] or tokenizer.chat_template
    text, spans = render_chat(CHAT, tokenizer)
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert _learned(text, spans) == ["It is 4.<|im_end|>", "6.<|im_end|>"]
    spaced = [*CHAT[:-1], {"role": "assistant", "content": "  6.\n"}]
    assert "6." in _learned(*render_chat(spaced, tokenizer))[1]


def test_the_span_agrees_with_the_template_that_marks_it(tiny_teacher):
    """transformers' own mask, from {% generation %}, is the reference."""
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = TEMPLATES["generation"]
    reference = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    text, spans = render_chat(CHAT, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    from edgekd.distill.encode import _learned as learned_tokens

    assert encoded["input_ids"] == reference["input_ids"]
    assert learned_tokens(encoded["offset_mapping"], spans) == list(reference["assistant_masks"])


def test_reasoning_in_the_last_turn_is_learned_too(tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content and loop.last %}<think>"
        "{{ m.content.split('</think>')[0] }}</think>{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}"
    )
    chat = [CHAT[1], {"role": "assistant", "content": "2 and 2</think>It is 4."}]
    assert _learned(*render_chat(chat, tokenizer)) == ["<think>2 and 2</think>It is 4.<|im_end|>"]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4), st.text(max_size=20))
def test_any_content_is_found_again(tokenizer, answers, question):
    chat = []
    for answer in answers:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text, spans = render_chat(chat, tokenizer)
    assert _learned(text, spans) == [answer + "<|im_end|>" for answer in answers]


def test_chats_become_windows_with_masks(tmp_path, tokenizer):
    rows = [{"messages": [*CHAT[:3], {"role": "user", "content": f"{i}"}, CHAT[-1]]} for i in range(60)]
    rows += [{"messages": [CHAT[1]]}, {"messages": []}]  # nobody answers, nobody asks
    _jsonl(tmp_path / "a.jsonl", rows)
    figures = _prepare(tmp_path, tokenizer, source="jsonl", paths=["a.jsonl"], chat=True, column="messages", context=32)
    assert figures["skipped_by_reason"] == {
        "no turn of the role assistant says anything (roles: user)": 1,
        "'messages' is empty": 1,
    }
    (words,) = figures["warnings"]
    assert words.startswith("2 of 62 rows of a.jsonl are unusable and were skipped: ")
    windows = load_windows(tmp_path / "out", "train")
    assert windows.loss_mask[:, 1:].any(1).all() and not windows.loss_mask.all()
    ids, mask = windows.ids.numpy().ravel(), windows.loss_mask.numpy().ravel().astype(bool)
    learned = tokenizer.decode(ids[mask])
    assert set(learned.split("<|im_end|>")) >= {"It is 4.", "6."}
    assert not np.isin(ids[mask], [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")]).any()


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        (None, {}, r"a\.jsonl: no such file"),
        ([], {}, "holds no usable document"),
        ([{"body": "x"}], {}, r"no column 'text'\. It has: body"),
        ([{"text": 3}], {}, r"'text' holds int, not text .*row 1"),
        ([{"text": [{"role": "user", "content": "x"}]}], {}, r"holds list.*data\.chat: true"),
        ([{"text": "x"}], {"chat": True}, "is not a chat"),
        (
            [{"text": [{"role": "user", "content": "x"}]}],
            {"chat": True},
            r"1 of 1 rows .* says anything \(roles: user\) \(1\)\. .*--allow-skipped",
        ),
        (
            [{"text": [{"role": "user", "content": "x"}]}],
            {"chat": True, "allow_skipped": True},
            r"holds no usable document\. 1 of 1 rows",
        ),
        ([{"text": [{"from": "human", "value": "x"}]}], {"chat": True}, r"says anything \(roles: user\)"),
        ([{"text": [{"who": "human", "value": "x"}]}], {"chat": True}, "role and content: a message has who, value"),
        ([{"text": [{"role": "gpt", "content": "x"}]}], {"chat": True}, r"roles: gpt"),
        ([{"text": ["x"]}], {"chat": True}, "a message is a str"),
        ([{"text": None}, {"text": ""}], {"chat": True}, r"'text' is empty \(2\)"),
        ([{"text": CHAT, "tools": "{"}], {"chat": True}, "its tools are not JSON"),
        ([{"text": CHAT, "tools": [3]}], {"chat": True}, "its tools are not a list of JSON schemas"),
        ([3], {}, "cannot be read as jsonl: line 1: a int, not an object"),
        ([{"text": "x"}, {"text": "\ud800"}], {}, "cannot be read as jsonl: line 2: .*surrogates"),
        ('{"text": "x"}\n{"text": ', {}, "cannot be read as jsonl: line 2: "),
        ("[" * 10**5, {}, "cannot be read as jsonl: line 1: "),
        ([{"text": "x"}], {}, r"split of a\.jsonl has .* less than one window of data\.context 16"),
        ("not json", {}, "cannot be read as jsonl"),
    ],
)
def test_bad_data_is_said_in_one_sentence_and_leaves_nothing(tmp_path, tokenizer, rows, spec, message):
    if isinstance(rows, str):
        (tmp_path / "a.jsonl").write_text(rows)
    elif rows is not None:
        _jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(SpecError, match=message):
        _prepare(tmp_path, tokenizer, source="jsonl", paths=["a.jsonl"], **spec)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_or_a_template(tiny_teacher, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    bare = load_tokenizer(tiny_teacher)
    bare.chat_template = None
    with pytest.raises(SpecError, match="no chat template"):
        _prepare(tmp_path, bare, source="text", paths=["a.txt"], chat=True)
    bare.eos_token = None
    with pytest.raises(SpecError, match="no end-of-text token"):
        _prepare(tmp_path, bare, source="text", paths=["a.txt"])


def test_a_truncated_file_of_windows_is_named(tmp_path, tokenizer):
    _jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    _prepare(tmp_path, tokenizer, source="jsonl", paths=["a.jsonl"])
    path = tmp_path / "out" / "train.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(EdgekdError, match=r"train\.safetensors: not readable"):
        load_windows(tmp_path / "out", "train")


PICKY = "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn, please.') }}{% endif %}"
CALLING = (
    "{% if tools %}<|im_start|>system\nTOOLS {{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _calling_rows(count):
    arguments = [{"city": "Ulm"}, {"path": "/tmp", "mode": 7}, {"query": None, "limit": 3}]
    return [
        {
            "messages": [
                {"role": "user", "content": f"task {i}"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments[i % 3]}}],
                },
                {"role": "tool", "name": "f", "content": f"result {i}"},
                {"role": "assistant", "content": f"Done with {i}."},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        }
        for i in range(count)
    ]


def _texts_and_learned(folder, tokenizer):
    windows = [load_windows(folder, split) for split in ("train", "validation", "test")]
    ids = np.concatenate([w.ids.numpy().ravel() for w in windows])
    mask = np.concatenate([w.loss_mask.numpy().ravel() for w in windows]).astype(bool)
    return tokenizer.decode(ids), tokenizer.decode(ids[mask])


@pytest.mark.parametrize("kind", ["plain", "bom", "crlf", "list", "gz", "tools as text", "parquet"])
def test_tool_calls_are_learned_and_hold_what_the_row_has(tmp_path, tiny_teacher, kind):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = CALLING
    rows = _calling_rows(90)
    if kind == "tools as text":
        rows = [row | {"tools": json.dumps(row["tools"])} for row in rows]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = tmp_path / {"parquet": "a.parquet", "gz": "a.jsonl.gz"}.get(kind, "a.jsonl")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "list":
        path.write_text(json.dumps(rows))
    else:
        written = text.replace("\n", "\r\n") if kind == "crlf" else text
        path.write_bytes(b"\xef\xbb\xbf" * (kind == "bom") + written.encode())
    source = "parquet" if kind == "parquet" else "jsonl"
    figures = _prepare(tmp_path, tokenizer, source=source, paths=[path.name], column="messages", chat=True, context=256)
    assert figures["unusable_chats_skipped"] == 0 and figures["warnings"] == []
    whole, learned = _texts_and_learned(tmp_path / "out", tokenizer)
    assert "TOOLS [" in whole and "result 7" in whole
    for call in ('{"city": "Ulm"}', '{"path": "/tmp", "mode": 7}'):
        assert f'<call>{{"name": "f", "arguments": {call}}}</call><|im_end|>' in learned
    assert ('"query": null' in whole) == (kind != "parquet")  # a table cannot tell an empty key from none
    assert len(re.findall(r"Done with \d+\.<\|im_end\|>", learned)) > 60
    assert not any(words in learned for words in ("task", "result", "TOOLS", "<|im_start|>"))


TOOL_TEMPLATES = {
    "chatml": CALLING,
    # As Mistral's: an answer without a call in its place is refused, and there is no prompt to go on from.
    "refuses": (
        "{{ bos_token }}{% set n = namespace(turn=0) %}{% for m in messages %}{% if m.role == 'user' or "
        "(m.role == 'assistant' and m.tool_calls is not defined) %}{% if (m.role == 'user') != (n.turn % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% set n.turn = n.turn + 1 %}{% endif %}"
        "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls is defined %}"
        "[CALLS]{{ m.tool_calls | tojson }}<|im_end|>{% elif m.role == 'tool' %}[RESULTS]{{ m.content }}[/RESULTS]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    # A tool's answer is headed by the name that the call gave.
    "looks back": (
        "{% set n = namespace(name='?') %}{% for m in messages %}<|im_start|>{{ m.role }}"
        "{% if m.role == 'tool' %}={{ n.name }}{% endif %}{{ '\n' }}{% if m.tool_calls %}{% set n.name = "
        "m.tool_calls[0].function.name %}<call>{{ n.name }}</call>{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # As Qwen3's: an earlier turn's text depends on whether it is the last.
    "rewrites": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}"
        "</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "marks": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@pytest.mark.parametrize("words", [None, "", "I look."])
def test_a_call_is_the_assistants_whatever_the_template_does(tiny_teacher, name, words):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = TOOL_TEMPLATES[name]
    messages = [dict(message) for message in _calling_rows(1)[0]["messages"]]
    messages[1]["content"] = words
    text, spans = render_chat(messages, tokenizer)
    call, answer = _learned(text, spans)
    assert answer == "Done with 0.<|im_end|>"
    begin = {"refuses": "[CALLS]", "looks back": "<call>f"}.get(name, (words or "") + "<call>")
    assert call.startswith(begin) and call.endswith("<|im_end|>") and call.count("<|im_end|>") == 1
    assert "f" in call and "result" not in call


def test_reasoning_of_its_own_field_is_learned(tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
        "</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    chat = [CHAT[1], {"role": "assistant", "reasoning": "2 and 2", "content": "It is 4."}]
    assert _learned(*render_chat(chat, tokenizer)) == ["<think>2 and 2</think>It is 4.<|im_end|>"]


def test_the_templates_own_words_stop_the_run(tmp_path, tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = PICKY + tokenizer.chat_template
    rows = [{"m": [*CHAT[bool(i % 10) :], {"role": "user", "content": f"{i}"}]} for i in range(200)]
    _jsonl(tmp_path / "a.jsonl", rows)
    spec = {"source": "jsonl", "paths": ["a.jsonl"], "column": "m", "chat": True, "context": 32}
    with pytest.raises(SpecError, match=r"20 of 200 rows of a\.jsonl .* refuses them: No system turn, please \(20\)"):
        _prepare(tmp_path, tokenizer, **spec)
    assert not (tmp_path / "out").exists()
    figures = _prepare(tmp_path, tokenizer, **spec, allow_skipped=True)
    assert figures["unusable_chats_skipped"] == 20 and "20 of 200 rows" in figures["warnings"][0]
    _jsonl(tmp_path / "a.jsonl", [row for i, row in enumerate(rows) if i % 10 or i < 100])
    with pytest.raises(SpecError, match="10 of 190 rows"):  # 5.3 %
        _prepare(tmp_path, tokenizer, **spec)
    _jsonl(tmp_path / "a.jsonl", [row for i, row in enumerate(rows) if i % 10 or i < 90])
    assert _prepare(tmp_path, tokenizer, **spec)["unusable_chats_skipped"] == 9


def test_a_template_that_does_not_end_stops_at_once(tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(EdgekdError, match="does not end") as stopped:
        render_chat(CHAT, tokenizer)
    assert not isinstance(stopped.value, Unusable)


def test_training_text_is_the_same_on_every_day(tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert render_chat(CHAT, tokenizer)[0].startswith("26 Jul 2024")


def test_chats_that_differ_in_their_tools_are_not_duplicates(tmp_path, tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = CALLING
    tools = _calling_rows(1)[0]["tools"]
    rows = [{"m": [{"role": "user", "content": f"{i}"}, CHAT[2]], "tools": t} for i in range(40) for t in (None, tools)]
    _jsonl(tmp_path / "a.jsonl", [*rows, *rows])
    spec = {"source": "jsonl", "paths": ["a.jsonl"], "column": "m", "chat": True, "context": 16}
    assert _prepare(tmp_path, tokenizer, **spec)["duplicates_dropped"] == 80


def chat_rows(how):
    """Forty exchanges as people hold them."""
    for i in range(40):
        question, answer = f"What is {i} and {i}? " * 4, f"It is {2 * i}. " * 6
        match how:
            case "sharegpt":
                yield {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
            case "parts":
                parts = [{"type": "text", "text": answer[:9]}, {"type": "text", "text": answer[9:]}]
                yield {
                    "conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]
                }
            case _:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                yield {"conversations": turns}


@pytest.mark.parametrize("how", ["sharegpt", "parts"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}",
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}",
    ],
)
def test_chats_of_other_shapes_are_the_same_chats(tmp_path, tiny_teacher, how, template):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = template
    spec, reader = DataSpec(source="jsonl", paths=["x"], column="conversations", chat=True), ChatReader(tokenizer)
    read = {
        kind: [reader.read(Chat(_messages(row["conversations"], spec))) for row in chat_rows(kind)]
        for kind in (how, "plain")
    }
    assert read[how] == read["plain"]
    _jsonl(tmp_path / "a.jsonl", chat_rows(how))
    figures = _prepare(tmp_path, tokenizer, **spec.model_dump() | {"paths": ["a.jsonl"], "context": 16})
    assert not figures["unusable_chats_skipped"] and figures["train_windows"]


def test_a_template_that_wants_lists_gets_them(tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    turns = [{"role": role, "content": [{"type": "text", "text": role * 2}]} for role in ("user", "assistant")]
    text, spans = ChatReader(tokenizer).read(Chat(turns))
    assert text == "<user>useruser<assistant>assistantassistant"
    assert [text[a:b] for a, b in spans] == ["assistantassistant"]


def test_a_column_that_nobody_reads_may_change_its_type(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, notes in enumerate(([None] * len(TEXTS), ["x"] * len(TEXTS), [1] * len(TEXTS))):
        texts = [f"{text} {number}" for text in TEXTS]
        pq.write_table(pa.table({"body": texts, "note": notes}), tmp_path / f"{number}.parquet")
    spec = DataSpec(source="parquet", paths=["*.parquet"], column="body", context=16)
    figures = prepare(spec, tokenizer, tmp_path / "out", seed=0, base=tmp_path)
    assert sum(figures[f"{split}_documents"] for split in ("train", "validation", "test")) == 3 * len(TEXTS)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "3.parquet")
    with pytest.raises(SpecError, match="no column 'body'"):
        prepare(spec, tokenizer, tmp_path / "out2", seed=0, base=tmp_path)


@pytest.mark.parametrize("between", [" ", "", "\r\n", "\r\n\r\n"])
def test_any_text_can_be_split(tmp_path, tokenizer, between):
    text = between.join(f"word{i}" for i in range(5000))
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8", newline="")
    spec = DataSpec(source="text", paths=["a.txt"], context=16, validation_share=0.2, test_share=0.2)
    figures = {"not_utf8_skipped": 0}
    pieces = list(_text_documents([tmp_path / "a.txt"], figures))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert len(pieces) >= 25 and max(map(len, pieces)) <= 4 * max(map(len, pieces[:1]))
    assert pieces[0][0] != "\ufeff"
    assert prepare(spec, tokenizer, tmp_path / "out", seed=0, base=tmp_path)
