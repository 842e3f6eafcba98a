"""Writes the golden vectors; ``vectors/README.md`` says what they are. Run: python tests/make_vectors.py"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from chats import CHATS, SPECIALS, TEMPLATES, TOOLS
from edgekd.benchmarks.metrics import median, percentile, tokens_per_s
from edgekd.conversation import (
    ChatTemplate,
    Stops,
    TemplateRefused,
    TooLong,
    check_prompt,
    fitted_chat,
    parts,
    text_ids,
)
from edgekd.files import file_sha256, write_json
from edgekd.manifest import Contract
from edgekd.session import Characters

FOLDER = Path(__file__).parent / "vectors"
NOW = datetime(2024, 7, 26)
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SPECIAL_IDS = {text: index for index, text in enumerate(SPECIALS)}
SPECIAL_STRIPS = {"[/INST]": "right", "<pad>": "both"}
FULL = ("qwen3", "deepseek", "generation", "macros, loop controls and a filter of HTML", "llama")
"""Templates that need more of Jinja than a program in an app may have."""


# --- manifests --------------------------------------------------------------------------------------------------------

FILES = {"model.gguf": "GGUF and weights", "tokenizer.json": "{}\n", "sub/ä b.txt": "Grüße"}
CONTRACT: dict[str, Any] = {
    "context_length": 1024,
    "vocab_size": 300,
    "bos_id": 0,
    "eos_ids": [1, 3],
    "add_bos": True,
    "chat_template": "{{ messages[0].content }}",
    "normalizer": None,
    "special_tokens": SPECIAL_TOKENS,
    "special_ids": SPECIAL_IDS,
    "special_strips": SPECIAL_STRIPS,
    "space_prefix": None,
}


def manifest(**changes: Any) -> dict[str, Any]:
    """A manifest of ``FILES``; ``contract`` changes the contract, None leaves a key out."""
    contract = CONTRACT | ({} if changes.get("contract") in (None, ...) else changes.pop("contract"))
    plain = {
        "schema_version": 1,
        "name": "tiny",
        "target": "gguf",
        "target_title": "GGUF",
        "recipe": "portable-int4",
        "runtime": "llama.cpp",
        "main_file": "model.gguf",
        "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()},
        "student_digest": "0" * 64,
        "parameters": 1000,
        "bits_per_weight": 5.25,
        "traffic": {"weight_bytes": 5000, "kv_bytes_per_position": 512},
        "contract": {key: value for key, value in contract.items() if value is not ...},
        "versions": {"edgekd": "0.1.0"},
        "parity": None,
    }
    return {key: value for key, value in (plain | changes).items() if value is not ...}


OK = {
    "name": "tiny",
    "target": "gguf",
    "main_file": "model.gguf",
    "context_length": 1024,
    "vocab_size": 300,
    "bos_id": 0,
    "eos_ids": [1, 3],
    "add_bos": True,
    "size_bytes": sum(len(text.encode()) for text in FILES.values()),
    "cache_bytes": 512 * 1024,
}


def manifests() -> Iterator[dict[str, Any]]:
    """Folders, and what is read from them."""

    def case(name: str, given: Any, expect: Any, files: dict[str, str] = FILES, target: str = "gguf") -> dict[str, Any]:
        text = json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given
        outcome = {"refused": expect} if isinstance(expect, str) else {"ok": expect}
        return {"name": name, "manifest": text, "files": files, "target": target, "expect": outcome}

    yield case("whole", manifest(), OK)
    yield case("an extra file that is not listed", manifest(), OK, FILES | {"note.txt": "mine"})
    bare = manifest(contract={"bos_id": None, "add_bos": False, "chat_template": None}, traffic=...)
    yield case("no BOS, no template, no traffic", bare, OK | {"bos_id": None, "add_bos": False, "cache_bytes": None})
    early = manifest(contract=dict.fromkeys(("special_tokens", "special_ids", "special_strips", "space_prefix"), ...))
    yield case("of an earlier version, without special ids", early, OK)
    yield case("no manifest", None, "no_manifest")
    whole = json.dumps(manifest())
    yield case("cut off", whole[: len(whole) // 2], "not_json")
    yield case("empty", "", "not_json")
    yield case("a list", "[]", "not_json")
    yield case("NaN", whole.replace("5.25", "NaN"), "not_json")
    yield case("of a newer schema", manifest(schema_version=2), "newer_schema")
    yield case("of a newer schema with other keys", {"schema_version": 7, "files": []}, "newer_schema")
    yield case("of another runtime", manifest(), "other_target", target="executorch")
    parity = {"windows": 0, "window_tokens": 0, "unusable_positions": 0}
    answer = {"prompt_ids": [1, 2], "tokens": [3]}
    named = [
        answer,
        answer | {"text": "hi", "messages": None},
        answer | {"text": "hi", "messages": CHATS["one"]},
    ]
    yield case("golden answers", manifest(parity=parity | {"golden": named}), OK)
    for golden in (3, [3], [{"tokens": [1]}], [answer | {"tokens": ["a"]}], [answer | {"text": 3}]):
        name = f"parity.golden is {json.dumps(golden)}"
        yield case(name, manifest(parity=parity | {"golden": golden}), "bad_value")
    for key in ("main_file", "files", "contract", "target"):
        yield case(f"without {key}", manifest(**{key: ...}), "bad_value")
    for key, value in (("schema_version", 0), ("schema_version", "1"), ("files", []), ("name", 3)):
        yield case(f"{key} is {json.dumps(value)}", manifest(**{key: value}), "bad_value")
    for key, value in (
        ("context_length", 0),
        ("context_length", "1024"),
        ("vocab_size", 10**9),
        ("eos_ids", [300]),
        ("eos_ids", 1),
        ("bos_id", -1),
        ("bos_id", 300),
        ("add_bos", "true"),
        ("context_length", ...),
        ("eos_ids", ...),
    ):
        said = "missing" if value is ... else json.dumps(value)
        yield case(f"contract.{key} is {said}", manifest(contract={key: value}), "bad_value")
    yield case("main_file is not among files", manifest(main_file="other.gguf"), "bad_value")
    for path in ("../model.gguf", "/etc/passwd", "sub/../../x", "..\\x", ""):
        listed = manifest()["files"] | {path: "0" * 64}
        yield case(f"a path {path!r}", manifest(files=listed), "leaves_folder")
    yield case("a missing file", manifest(), "file_missing", {k: v for k, v in FILES.items() if k != "tokenizer.json"})
    yield case("a truncated file", manifest(), "file_changed", FILES | {"model.gguf": "GGUF and weig"})
    yield case("a changed file", manifest(), "file_changed", FILES | {"sub/ä b.txt": "Grüsse"})
    wrong = manifest()["files"] | {"model.gguf": "0" * 64}
    yield case("a wrong sum", manifest(files=wrong), "file_changed")


# --- bundles ----------------------------------------------------------------------------------------------------------

KEY = bytes(range(32))
"""The private key that the vectors are signed with: known to everybody."""


def bundles() -> Iterator[dict[str, Any]]:
    """Folders under signed sums, and what becomes of one that is not what was signed."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(KEY)
    public = base64.b64encode(private.public_key().public_bytes_raw()).decode()
    files = FILES | {"manifest.json": json.dumps(manifest(), ensure_ascii=False), "LICENSE": "Do as you like.\n"}
    data = {name: text.encode() for name, text in files.items()}
    listed = {name: {"sha256": hashlib.sha256(one).hexdigest(), "bytes": len(one)} for name, one in data.items()}
    sums = {"schema_version": 1, "name": "tiny", "platform": "android", "files": listed}

    def sign(text: str) -> str:
        return base64.b64encode(private.sign(text.encode())).decode()

    def case(name: str, expect: str | None, **changes: Any) -> dict[str, Any]:
        given = changes.pop("sums", sums)
        text = json.dumps(given, indent=2, ensure_ascii=False) if isinstance(given, dict) else given
        signature = sign(text) + "\n" if isinstance(text, str) else None
        plain = {"name": name, "bundle": text, "signature": signature, "public_key": public, "files": files}
        return plain | changes | {"expect": {"ok": True} if expect is None else {"refused": expect}}

    whole = json.dumps(sums, indent=2, ensure_ascii=False)
    flipped = bytearray(private.sign(whole.encode()))
    flipped[40] ^= 1
    yield case("whole", None)
    yield case("keys in another order", None, sums=dict(reversed(sums.items())))
    yield case("no sums", "not_signed", sums=None)
    yield case("no signature", "not_signed", signature=None)
    yield case("a flipped bit in the sums", "bad_signature", sums=whole.replace("tiny", "tinx"), signature=sign(whole))
    yield case("a flipped bit in the signature", "bad_signature", signature=base64.b64encode(flipped).decode())
    yield case(
        "the sums on one line", "bad_signature", sums=json.dumps(sums, ensure_ascii=False), signature=sign(whole)
    )
    yield case("a signature that ends early", "bad_signature", signature=sign(whole)[:40])
    yield case("a signature that is not base64", "bad_signature", signature="Grüße")
    yield case("an empty signature", "bad_signature", signature="")
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
    for name, key in (("another", other), ("a short", other[:31]), ("no", b""), ("an all-zero", bytes(32))):
        yield case(f"{name} key", "bad_signature", public_key=base64.b64encode(key).decode())
    yield case("a key that is not base64", "bad_signature", public_key="key")
    yield case("signed, of a newer schema", "newer_schema", sums=sums | {"schema_version": 2})
    yield case("signed, but no JSON", "not_json", sums="{")
    yield case("signed, but without files", "bad_value", sums={"schema_version": 1})
    yield case("signed, but a size is missing", "bad_value", sums=sums | {"files": {"LICENSE": {"sha256": "0" * 64}}})
    for name, (old, new) in {
        "model.gguf": ("weights", "Weights"),
        "manifest.json": ('"tiny"', '"Tiny"'),
        "LICENSE": ("like", "love"),
    }.items():
        yield case(f"{name} is changed", "file_changed", files=files | {name: files[name].replace(old, new)})
        yield case(f"{name} is longer", "file_changed", files=files | {name: f"{files[name]} "})
    for name in ("model.gguf", "LICENSE"):
        yield case(f"{name} is missing", "file_missing", files={n: t for n, t in files.items() if n != name})
    yield case("a file that is not listed", "not_listed", files=files | {"sub/more.txt": "x"})
    outside = {"schema_version": 1, "files": listed | {"../x": listed["LICENSE"]}}
    yield case("signed, but a path leaves the folder", "leaves_folder", sums=outside)


# --- prompts ----------------------------------------------------------------------------------------------------------


def parts_of(text: str) -> list[int | dict[str, Any]]:
    """A rendered chat as ids and text."""
    found = parts(text, SPECIAL_IDS, SPECIAL_STRIPS)
    return [part if isinstance(part, int) else {"text": part, "start": at == 0} for at, part in found]


def prompts() -> Iterator[dict[str, Any]]:
    """Every chat by every template."""
    options: list[dict[str, Any]] = [{}, {"add_generation_prompt": True}, {"tools": TOOLS}]
    for name, source in TEMPLATES.items():
        template = ChatTemplate(source, SPECIAL_TOKENS, NOW)
        for chat, messages in CHATS.items():
            for given in options:
                prompt, tools = given.get("add_generation_prompt", False), "tools" in given
                expect: dict[str, Any]
                try:
                    text = template.render(messages, **given).text
                    expect = {"text": text, "parts": parts_of(text)}
                except TemplateRefused as refusal:
                    expect = {"refused": refusal.words}
                yield {
                    "name": f"{name}: {chat}{', prompt' * prompt}{', tools' * tools}",
                    "template": name,
                    "chat": chat,
                    "tools": tools,
                    "add_generation_prompt": prompt,
                    "expect": expect,
                }


def texts() -> Iterator[dict[str, Any]]:
    """Texts to be gone on with."""
    for text in ("hi", "", " hi", "▁hi", "e\u0301 \u212b", "</s> <|im_end|>", "\n", "Grüße, 世界 👨‍👩‍👧‍👦"):
        for form, space, start in (
            (None, None, True),
            ("NFC", None, True),
            (None, "first", True),
            (None, "first", False),
            ("NFC", "every", False),
        ):
            for bos in (None, 0):
                given = unicodedata.normalize("NFC", text) if form else text
                spaced = space == "every" or (space == "first" and start)
                contract = {"add_bos": bos is not None, "bos_id": bos, "normalizer": form, "space_prefix": space}
                yield {
                    "name": f"{text!r} {form} {space} {start} {bos}",
                    "contract": contract,
                    "text": text,
                    "start": start,
                    "expect": {
                        "before": [] if bos is None else [bos],
                        "text": f" {given}" if spaced and given and given[0] not in " ▁" else given,
                    },
                }


# --- history ----------------------------------------------------------------------------------------------------------

HISTORY_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Letters:
    """A session whose tokens are characters, of so long a context."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


def history() -> Iterator[dict[str, Any]]:
    """Chats that do not fit."""

    def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
        head = [] if system is None else [{"role": "system", "content": system}]
        return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]

    long = turns("one " * 5, "an answer", "two " * 5, "another", "three")
    chats = {
        "short": turns("hi"),
        "long": long,
        "with a system message": turns("one " * 5, "an answer", "two " * 5, "another", "three", system="Be brief."),
        "two questions in a row": turns("a" * 30) + turns("b" * 30, "c", "d"),
        "one question": turns("x" * 90),
    }
    for name, messages in chats.items():
        for context, tokens in ((200, 20), (120, 20), (120, 1000), (109, 20), (108, 20), (80, 20), (60, 1000)):
            contract = Contract(**{**CONTRACT, "special_ids": {}, "chat_template": HISTORY_TEMPLATE})
            session: Any = Letters(context)
            expect: dict[str, Any]
            try:
                ids, kept = fitted_chat(session, contract, messages, tokens)
                places = [i for i, message in enumerate(messages) if any(message is k for k in kept)]
                expect = {"keep": places, "text": "".join(map(chr, ids))}
            except TooLong:
                expect = {"refused": "too_long"}
            yield {
                "name": f"{name}: {context}, {tokens}",
                "messages": messages,
                "context_length": context,
                "max_tokens": tokens,
                "expect": expect,
            }


def room() -> Iterator[dict[str, Any]]:
    """Texts that leave an answer room, and such that do not."""
    for context in (1, 2, 9, 1024):
        for bos in (None, 0):
            contract = Contract(**{**CONTRACT, "add_bos": bos is not None, "bos_id": bos})
            for length in sorted({0, 1, max(context - 2, 0), context - 1, context, 2000}):
                session: Any = Letters(context)
                ids = text_ids(session, contract, "x" * length)
                expect: dict[str, Any]
                try:
                    expect = {"tokens": len(check_prompt(session, ids))}
                except TooLong:
                    expect = {"refused": "too_long" if ids else "empty", "numbers": [len(ids), context]}
                yield {
                    "name": f"{length} characters in {context}{', BOS' * (bos is not None)}",
                    "contract": {"add_bos": bos is not None, "bos_id": bos, "context_length": context},
                    "length": length,
                    "expect": expect,
                }


# --- streams ----------------------------------------------------------------------------------------------------------


class Bytes:
    """A session whose tokens are these bytes."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]


def streams() -> Iterator[dict[str, Any]]:
    """Tokens that end inside characters, and such that are none."""
    word = "Grüße, 世界 👨‍👩‍👧‍👦 e\u0301 🇩🇪 \U00020000!"
    data = word.encode()
    given = {
        "whole characters": [letter.encode() for letter in word],
        "single bytes": [bytes([byte]) for byte in data],
        "pairs of bytes": [data[i : i + 2] for i in range(0, len(data), 2)],
        "three bytes each": [data[i : i + 3] for i in range(0, len(data), 3)],
        "all at once": [data],
        "nothing": [],
        "tokens without text": [b"", b"a", b"", b"", b"b", b""],
        "an emoji that does not end": [b"ok ", b"\xf0", b"\x9f", b"\x98"],
        "an emoji that another follows": [b"\xf0\x9f", b"\xf0\x9f\x98\x80"],
        "a character broken by a letter": [b"\xe4\xb8", b"x", b"\x96"],
        "continuation bytes alone": [b"\x80", b"\xbf\xbf", b"a"],
        "bytes that are never UTF-8": [b"\xff", b"a\xfe", b"\xc0\x80", b"\xc1\xbf", b"\xf5\x80\x80\x80"],
        "overlong forms": [b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xe0\x9f", b"\xbf"],
        "half characters of UTF-16": [b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\x9f", b"\xbf"],
        "beyond the last character": [b"\xf4\x8f\xbf\xbf", b"\xf4\x90\x80\x80"],
        "NUL and other controls": [b"a\x00b", b"\x1b[0m", b"\r\n", b"\x7f"],
        "a byte order mark is a character": [b"\xef\xbb", b"\xbf", b"a", b"\xef\xbb\xbf"],
    }
    for name, tokens in given.items():
        session: Any = Bytes(tokens)
        stream = Characters(session)
        expect = {"shown": [stream.feed(i) for i in range(len(tokens))], "end": stream.finish()}
        yield {"name": name, "tokens": [token.hex() for token in tokens], "expect": expect}


def stops() -> Iterator[dict[str, Any]]:
    """Texts that end answers."""
    given: list[tuple[str, list[str], list[str]]] = [
        ("none", ["Hello, ", "you."], []),
        ("in one piece", ["Hello\nYou: no"], ["\nYou:"]),
        ("over three pieces", ["Hello", "\nY", "ou", ": no", "more"], ["\nYou:"]),
        ("a beginning that is none", ["Hello\nYou", "th"], ["\nYou:"]),
        ("held back at the end", ["Hello\nYo"], ["\nYou:"]),
        ("at once", ["</s>", "a"], ["</s>"]),
        ("two, the one that ends first", ["abcd"], ["abcd", "bc"]),
        ("two, the one that ends first, by pieces", ["a", "b", "c", "d"], ["abcd", "bc"]),
        ("two that end together", ["x", "ab", "c"], ["bc", "abc"]),
        ("its beginning repeats", ["aaa", "ab", "!"], ["aab"]),
        ("an emoji", ["ok 👨", "\u200d👩 no"], ["👨\u200d👩"]),
        ("white space", ["a\n", "\n", "b"], ["\n\n"]),
        ("empty pieces", ["", "a", "", "STOP"], ["STOP"]),
    ]
    for name, pieces, texts in given:
        stream = Stops(texts)
        each = [stream.feed(piece) for piece in pieces]
        expect = {"shown": each, "end": stream.finish(), "found": stream.found}
        yield {"name": name, "pieces": pieces, "stops": texts, "expect": expect}


# --- figures ----------------------------------------------------------------------------------------------------------

LENGTHS = ("32", "256")


def statistics() -> Iterator[dict[str, Any]]:
    """Samples of benchmarks, and their figures."""

    def run(scale: float, intervals: list[float]) -> dict[str, Any]:
        return {
            "load_s": 0.5 * scale,
            "prefill_s": {"32": 0.04 * scale, "256": 0.3 * scale},
            "ttft_s": {"32": 0.041 * scale, "256": 0.302 * scale},
            "inter_token_s": [interval * scale for interval in intervals],
            "peak_rss_bytes": round(1e8 * scale),
        }

    even = [0.01, 0.012, 0.011, 0.05]
    for name, runs in {
        "one run": [run(1.0, even)],
        "three runs": [run(1.0, even), run(1.5, even[::-1]), run(0.9, [0.02] * 4)],
        "four runs, the mean of the middle two": [run(scale, even) for scale in (1.0, 1.3, 1.1, 4.0)],
    }.items():
        figures = _figures(runs)
        yield {"name": name, "decode_tokens": 4, "runs": runs, "expect": figures}


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By the functions that the harness sums its samples up with."""
    gaps = [gap for run in runs for gap in run["inter_token_s"]]

    def rate(tokens: int, seconds: list[float]) -> float:
        return median([tokens_per_s(tokens, s) for s in seconds])

    return {
        "load_s": median([run["load_s"] for run in runs]),
        "ttft_s": {n: median([run["ttft_s"][n] for run in runs]) for n in LENGTHS},
        "prefill_tokens_per_s": {n: rate(int(n), [run["prefill_s"][n] for run in runs]) for n in LENGTHS},
        "decode_tokens_per_s": rate(len(runs[0]["inter_token_s"]), [sum(run["inter_token_s"]) for run in runs]),
        "inter_token_s": median(gaps),
        "inter_token_p50_s": percentile(gaps, 50),
        "inter_token_p95_s": percentile(gaps, 95),
        "peak_rss_bytes": median([run["peak_rss_bytes"] for run in runs]),
    }


def hashes() -> Iterator[dict[str, Any]]:
    """Lengths around the blocks of SHA-256."""
    given = [(b"a", n) for n in (0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1_000_000)]
    for data, times in [*given, (b"abc", 1), (bytes(range(256)), 3)]:
        expect = hashlib.sha256(data * times).hexdigest()
        yield {"name": f"{data[:4].hex()} x {times}", "hex": data.hex(), "times": times, "expect": expect}


def vectors() -> dict[str, dict[str, Any]]:
    """Every file's content, by its name."""
    templates = {n: {"source": s, "level": "full" if n in FULL else "core"} for n, s in TEMPLATES.items()}
    shared = {
        "special_tokens": SPECIAL_TOKENS,
        "special_ids": SPECIAL_IDS,
        "special_strips": SPECIAL_STRIPS,
        "now": NOW.isoformat(),
        "templates": templates,
        "chats": CHATS,
        "tools": TOOLS,
    }
    return {
        "manifests.json": {"about": "folders, and what is read from them", "cases": list(manifests())},
        "bundles.json": {"about": "folders under signed sums", "cases": list(bundles())},
        "prompts.json": {"about": "chats as their templates render them", **shared, "cases": list(prompts())},
        "texts.json": {"about": "texts to be gone on with", "cases": list(texts())},
        "history.json": {"about": "chats too long", "template": HISTORY_TEMPLATE, "cases": list(history())},
        "room.json": {"about": "prompts at the edge of the context", "cases": list(room())},
        "streams.json": {"about": "tokens as text", "cases": list(streams())},
        "stops.json": {"about": "texts that end answers", "cases": list(stops())},
        "statistics.json": {"about": "figures of benchmarks", "cases": list(statistics())},
        "hashes.json": {"about": "SHA-256", "cases": list(hashes())},
    }


def main() -> None:
    """Write them."""
    for name, content in vectors().items():
        write_json(FOLDER / name, content)
        print(f"{name}: {len(content['cases'])} cases, sha256 {file_sha256(FOLDER / name)[:12]}")


if __name__ == "__main__":
    main()
