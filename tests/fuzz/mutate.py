"""Damaged inputs made of valid ones: what a stranger, an older library or a slip of the finger would write.

Every choice is asked of ``pick``: a random generator's, hypothesis's, or a coverage-guided fuzzer's. So there is one
grammar of damage, whoever drives it, and the same answers give the same input.
"""

from __future__ import annotations

import json
import marshal
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import yaml

Pick = Callable[[int], int]
"""``pick(n)`` is an integer from 0 up to and without ``n``; 0 is the tamest choice."""


class Raw(str):
    """Text that stands in the file as it is, where a value would."""


HARMLESS = [None, True, False, 0, 1, 2, 3, 16, 64, 0.5, 1.0, "", "x", [], {}, "text", "default"]
NUMBERS = [
    -1,
    -2,
    127,
    128,
    255,
    256,
    4096,
    65535,
    65536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**9,
    10**30,
    10**400,
    -(2**31),
    -(2**63),
    -0.0,
    1e-300,
    -1e-300,
    0.999999,
    1.000001,
    1e38,
    1e39,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    Raw("1e999"),
    Raw("9" * 5000),
    Raw("-" + "9" * 4301),
    Raw("0." + "3" * 5000),
]
WORDS = [
    " ",
    "\0",
    "a\0b",
    "\n",
    "a\nb",
    "\t",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "\ufeff",
    "é" * 100,
    "a" * 256,
    "a" * 5000,
    ".",
    "..",
    "../x",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/",
    "~",
    "~/x",
    "a/",
    "./a",
    "a//b",
    "con",
    "NUL.txt",
    "C:\\x",
    "a\\..\\b",
    "file:///x",
    "*",
    "**",
    "[",
    "[a",
    "?",
    "{a}",
    "-1",
    "1",
    "1.5",
    "true",
    "null",
    "nan",
    "inf",
    "%s%n",
    "{}",
    "{{ 7 }}",
    "{% for",
    "$(x)",
    "builtin:x",
    "builtin:../..",
    "builtin:pycode-16m",
    "model.safetensors",
    "cuda",
    "float32",
    "bfloat16",
    "sliding_attention",
    "full_attention",
    "llama3",
    "yarn",
    "linear",
    "silu",
    "gelu",
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "fp16",
    "int8",
    "portable-int4",
    "gguf",
    "onnx",
    "coreml",
    "executorch",
    r"(a+)+$",
    r"(x+x+)+y",
    r"\p{L}+|.",
    r"(?=",
    r"(.*)*\1",
    r"\s+(?!\S)|\s+",
    "▁",
    "Ġ",
    "<0x41>",
    "cut",
    "config",
    "checkpoint",
    "jsonl",
    "stdlib",
    "system",
    "user",
    "assistant",
    "tool",
    "role",
    "content",
]
SHAPES = [
    [None],
    [0],
    [-1],
    [""],
    [[]],
    [{}],
    [1] * 300,
    ["x"] * 300,
    {"": 0},
    {"x": None},
    {"0": 0},
    {"a": {"b": {"c": {}}}},
    {str(i): i for i in range(300)},
    Raw("[" * 40 + "]" * 40),
    Raw("[" * 3000 + "]" * 3000),
    Raw("[" * 200_000),
    Raw('{"a":' * 3000 + "1" + "}" * 3000),
    Raw('{"a":' * 50_000),
]
YAML_ONLY = [
    Raw(text)
    for text in (
        "!!bool maybe",
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!binary '*'",
        "!!null x",
        "!!set {a, b}",
        "!!omap [a]",
        "!!pairs [a]",
        "!!python/object/apply:os.getpid []",
        "!!python/name:os.system",
        "!x y",
        "! y",
        "!<x> y",
        "!!str 5",
        "2026-99-99",
        "2026-11-24",
        "2026-11-24T99:99:99Z",
        "12:30:45",
        "190:20:30",
        "0x10",
        "0o17",
        "017",
        "0b1",
        "1_000",
        "+.inf",
        "-.INF",
        ".nan",
        ".NaN",
        "~",
        "yes",
        "No",
        "on",
        "<<",
        "=",
        "&a 1",
        "*a",
        "&a [*a]",
        "&a {a: *a}",
        '"\\UFFFFFFFF"',
        '"\\ud800"',
        '"\\x00"',
        "'it''s'",
        "? a",
        "{[1]: 2}",
        "{{}: 2}",
        "{? a : b}",
        "{<<: {a: 1}}",
        "{<<: [{a: 1}, 3]}",
        "{a: 1, a: 2}",
        "{1: 2, 1.0: 3, true: 4}",
        "{null: 1}",
        "@x",
        "`x",
        "%x",
        "|",
        ">",
        "- a",
        "a: b",
        "#x",
        "---",
        "...",
        "[a, ]",
        "[, ]",
        "{a}",
        "{a: }",
        "{: a}",
        '"',
        "'",
        "[",
        "]",
        "{",
        "}",
        ":",
        ",",
    )
]
JSON_ONLY = [Raw(text) for text in ("NaN", "-Infinity", '"\\ud800"', "'x'", "01", ".5", "1.", "//", "", "{", "]", '"')]
TEMPLATE_PIECES = [
    "{{ x }}",
    "{{ messages }}",
    "{{ messages[0]['content'] }}",
    "{{ messages[99] }}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
    "{% for i in range(99999999) %}x{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 999999999 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now('%') }}",
    "{% generation %}x{% endgeneration %}",
    "{% generation %}",
    "{% break %}",
    "{% continue %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum(99999999) }}",
    "{{ messages | tojson }}",
    "{{ messages | map('x') | list }}",
    "{{ tools | tojson(indent=4) }}",
    "{{ 1 / 0 }}",
    "{{ 'a' | int + 'b' }}",
    "{{ messages | sort }}",
    "{{ messages | attr('__len__') }}",
    "{{ '%99999999d' % 1 }}",
    "{{ '{:99999999d}'.format(1) }}",
    "{{ 'x'.center(99999999) }}",
    "{{ range(99999999) | list }}",
    "{% set x = namespace() %}",
    "{% set x.y = 1 %}",
    "{%- if add_generation_prompt %}a{%- endif %}",
    "{# x",
    "{{",
    "}}",
    "{%",
    "%}",
    "{{ undefined.x.y }}",
    "{% call x() %}{% endcall %}",
    "{% filter upper %}x{% endfilter %}",
    "{% raw %}{{{% endraw %}",
    "{{ self }}",
    "{{ loop }}",
    "{{ messages[0].content.split('x')[5] }}",
    "{{ (" * 500,
    "{% if a %}" * 2000,
    "\ud7ff",
    "\0",
    "{{ dict(a=1).b.c }}",
    "{{ 'a'.encode('x') }}",
    "{{ messages.append(1) }}",
    "{{ [1, 2] | random }}",
    "{% do x %}",
    "{{ joiner }}",
]


def mutate(seeds: Sequence[bytes], form: str, pick: Pick) -> bytes:
    """A damaged input.

    Args:
        seeds: valid ones.
        form: what they are: "yaml", "json", "jsonl", "safetensors", "template" or "binary".
    """
    seed = seeds[pick(len(seeds))]
    if form == "template":
        return _edit_template(seed, pick)
    if form == "binary" or pick(8) == 7:
        return _edit_bytes(seed, pick)
    tree = marshal.loads(_tree(seed, form))
    for _ in range(1 + pick(2) * pick(4)):
        tree = _edit_tree(tree, form, pick)
    return _written(tree, form, seed, pick)


# --- trees ------------------------------------------------------------------------------------------------------------


@cache
def _tree(seed: bytes, form: str) -> bytes:
    """A seed's value, in marshal's form, which is the fastest to copy."""
    if form == "yaml":
        return marshal.dumps(yaml.safe_load(seed))
    if form == "jsonl":
        return marshal.dumps([json.loads(line) for line in seed.splitlines()])
    if form == "safetensors":
        return marshal.dumps(json.loads(seed[8 : 8 + struct.unpack("<Q", seed[:8])[0]]))
    return marshal.dumps(json.loads(seed))


def _written(tree: Any, form: str, seed: bytes, pick: Pick) -> bytes:
    if form == "jsonl":
        rows = tree if isinstance(tree, list) else [tree]
        return b"\n".join(_dump(row) for row in rows) + b"\n"
    text = _dump(tree)
    if form == "safetensors":
        body = seed[8 + struct.unpack("<Q", seed[:8])[0] :]
        length = [len(text), len(text), len(text), len(text) + 1, 0, 2**63, 2**64 - 1][pick(7)]
        return struct.pack("<Q", length) + text + body[: len(body) - pick(2) * pick(9)]
    return text


def _dump(tree: Any) -> bytes:
    """JSON, which is YAML too, with the raw pieces as they are."""
    raws: list[str] = []

    def held(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {held(k): held(v) for k, v in value.items()}
        return [held(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(held(tree))
    for i, raw in enumerate(raws):
        text = text.replace(f'"@raw{i}@"', raw)
    return text.encode("utf-8", "surrogatepass")


def _edit_tree(tree: Any, form: str, pick: Pick) -> Any:
    """The tree with one thing changed, at a place of any depth."""
    places = list(_places(tree))
    if not places:
        return _nasty(tree, form, pick)
    parent, key = places[pick(len(places))]
    old = parent[key]
    action = pick(12)
    if action < 5:
        parent[key] = _nasty(old, form, pick)
    elif action == 5:
        del parent[key]
    elif action == 6:  # what stands elsewhere
        other, name = places[pick(len(places))]
        parent[key] = marshal.loads(_copied(other[name]))
    elif action == 7:
        parent[key] = [[old], {"x": old}, [old, old], {str(key): old}][pick(4)]
    elif action == 8 and isinstance(parent, dict):
        name = [f"{key}x", str(key)[:-1], str(key).upper(), Raw(json.dumps(str(key))), "", "\ud800", "0"][pick(7)]
        parent[name] = old if pick(2) else _nasty(old, form, pick)
    elif action == 9 and isinstance(old, (list, dict)):
        _grow(old, form, pick)
    elif isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 2**60:
        parent[key] = [old + 1, old - 1, old * 2, -old, old + 0.5, str(old), [old], old * 1000, old // 3][pick(9)]
    else:
        parent[key] = _nasty(old, form, pick)
    return tree


def _grow(value: Any, form: str, pick: Pick) -> None:
    new = _nasty(None, form, pick)
    if isinstance(value, list):
        value.insert(pick(len(value) + 1), new)
    else:
        value[WORDS[pick(len(WORDS))]] = new


def _nasty(old: Any, form: str, pick: Pick) -> Any:
    """A value to put in place of another, of its kind more often than not."""
    if isinstance(old, (int, float)) and pick(2):
        return NUMBERS[pick(len(NUMBERS))]
    if isinstance(old, str) and pick(2):
        return WORDS[pick(len(WORDS))]
    own = YAML_ONLY if form == "yaml" else JSON_ONLY
    group = [HARMLESS, NUMBERS, WORDS, SHAPES, own][pick(5)]
    value = group[pick(len(group))]
    return value if isinstance(value, Raw) else marshal.loads(_copied(value))


def _copied(value: Any) -> bytes:
    """``value`` for ``marshal``, its raw pieces become plain text."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {plain(k): plain(v) for k, v in part.items()}
        if isinstance(part, list):
            return [plain(item) for item in part]
        return str(part) if isinstance(part, Raw) else part

    return marshal.dumps(plain(value))


def _places(tree: Any) -> Any:
    """Every (container, key or index) of a tree, the containers before what they hold."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


# --- texts and bytes --------------------------------------------------------------------------------------------------


def _edit_template(seed: bytes, pick: Pick) -> bytes:
    text = seed.decode()
    for _ in range(1 + pick(4)):
        at, piece = pick(len(text) + 1), TEMPLATE_PIECES[pick(len(TEMPLATE_PIECES))]
        text = [text[:at] + piece + text[at:], text[:at] + text[at + 1 + pick(20) :], piece, text[:at] + piece][pick(4)]
    return text.encode("utf-8", "surrogatepass")


def _edit_bytes(seed: bytes, pick: Pick) -> bytes:
    data = bytearray(seed)
    for _ in range(1 + pick(4)):
        at, many = pick(len(data) + 1), 1 + pick(64)
        action = pick(8)
        if action == 0 and at < len(data):
            data[at] ^= 1 << pick(8)
        elif action == 1:
            del data[at : at + many]
        elif action == 2:
            del data[at:]
        elif action == 3:
            data[at:at] = data[at : at + many]
        elif action == 4:
            data[at:at] = bytes([pick(256)]) * many
        elif action == 5:
            number = [0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1][pick(9)]
            data[at : at + 8] = struct.pack("<Q", number)[: (4, 8)[pick(2)]]
        elif action == 6:
            source = pick(len(data) + 1)
            data[at : at + many] = data[source : source + many]
        else:
            data[at : at + many] = bytes(pick(256) for _ in range(min(many, 8)))
    return bytes(data)
