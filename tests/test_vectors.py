"""The golden vectors, which the apps read too: what edgekd makes of them, and what others say of what they expect."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgekd.bundle import SIGNATURE, SUMS, check_folder
from edgekd.conversation import ChatTemplate, Stops, TooLong, check_prompt, fitted_chat, text_ids
from edgekd.errors import BadArtifact
from edgekd.manifest import Contract, load_artifact
from edgekd.targets.gguf.session import as_llama_cpp_reads
from make_vectors import Bytes, Letters, vectors
from scripted import spoken

FOLDER = Path(__file__).parent / "vectors"
SAID = {
    "no_manifest": "is not an artifact",
    "not_json": "not readable as JSON|holds a list",
    "bad_value": r"key '|is not among files",
    "newer_schema": "newer version of edgekd",
    "leaves_folder": "leaves the folder|no usable file name",
    "file_missing": "is missing",
    "file_changed": "is not the file its manifest names",
}
SAID_OF_BUNDLES = {
    "not_signed": "No such file",
    "bad_signature": "no signature of that key",
    "newer_schema": "newer version of edgekd",
    "not_json": "not readable",
    "bad_value": "not readable",
    "leaves_folder": "is missing, or not listed",
    "file_missing": "is missing, or not listed",
    "not_listed": "is missing, or not listed",
    "file_changed": "is not the file that the bundle lists",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text("utf-8"))


def cases(name: str) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in read(name)["cases"]])


def test_they_are_what_the_script_writes() -> None:
    made = vectors()
    assert {path.name for path in FOLDER.glob("*.json")} == set(made)
    for name, content in made.items():
        assert read(name) == json.loads(json.dumps(content)), f"{name}: run tests/make_vectors.py"
        names = [case["name"] for case in content["cases"]]
        assert len(set(names)) == len(names)


@cases("manifests.json")
def test_a_folder_is_read_or_refused(case: dict[str, Any], tmp_path: Path) -> None:
    for name, text in case["files"].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8", newline="")
    if case["manifest"] is not None:
        (tmp_path / "manifest.json").write_text(case["manifest"], "utf-8")
    refused = case["expect"].get("refused")
    if refused in SAID:
        with pytest.raises(BadArtifact, match=SAID[refused]):
            load_artifact(tmp_path)
        return
    artifact = load_artifact(tmp_path)
    manifest, contract = artifact.manifest, artifact.manifest.contract
    if refused == "other_target":
        assert manifest.target != case["target"]
        return
    cache = manifest.traffic and manifest.traffic.kv_bytes_per_position * contract.context_length
    told = {**manifest.model_dump(), **contract.model_dump(), "size_bytes": artifact.size_bytes, "cache_bytes": cache}
    assert {key: told[key] for key in case["expect"]["ok"]} == case["expect"]["ok"]


@cases("bundles.json")
def test_a_bundle_is_what_was_signed(case: dict[str, Any], tmp_path: Path) -> None:
    given = case["files"] | {SUMS: case["bundle"], SIGNATURE: case["signature"]}
    for name, text in given.items():
        if text is not None:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text, "utf-8", newline="")
    if refused := case["expect"].get("refused"):
        with pytest.raises(BadArtifact, match=SAID_OF_BUNDLES[refused]):
            check_folder(tmp_path, case["public_key"])
    else:
        assert set(check_folder(tmp_path, case["public_key"])["files"]) == set(case["files"])


def test_prompts_are_what_transformers_renders() -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, models

    given = read("prompts.json")
    words = Tokenizer(models.WordLevel(given["special_ids"], unk_token="<unk>"))
    sides = {"left": {"lstrip": True}, "right": {"rstrip": True}, "both": {"lstrip": True, "rstrip": True}}
    strips = {text: sides[side] for text, side in given["special_strips"].items()}
    words.add_special_tokens([AddedToken(t, normalized=False, **strips.get(t, {})) for t in given["special_ids"]])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **given["special_tokens"])
    refused = 0
    for case in given["cases"]:
        source, chat = given["templates"][case["template"]]["source"], given["chats"][case["chat"]]
        if "strftime_now" in source:  # transformers knows no other day than today
            source = source.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
        tokenizer.chat_template = source
        options = {"add_generation_prompt": case["add_generation_prompt"], "tokenize": False}
        options["tools"] = given["tools"] if case["tools"] else None
        if words_of_refusal := case["expect"].get("refused"):
            with pytest.raises(Exception, match=re.escape(words_of_refusal.split("Error: ")[-1])):
                tokenizer.apply_chat_template(chat, **options)
            refused += 1
            continue
        text = tokenizer.apply_chat_template(chat, **options)
        assert text == case["expect"]["text"]
        _check_parts(words, text, case["expect"]["parts"])
    assert 0 < refused < len(given["cases"]) / 3


def _check_parts(words: Any, text: str, parts: list[Any]) -> None:
    """Against the library's own search for special tokens."""
    found, end = [], 0
    encoding = words.encode(text, add_special_tokens=False)
    special = set(words.get_added_tokens_decoder())
    marks = [(i, at) for i, at in zip(encoding.ids, encoding.offsets, strict=True) if i in special]
    for index, (start, stop) in marks:
        # A text of one word that is in no vocabulary is <unk>: told from the token by its characters.
        if words.id_to_token(index) != text[start:stop].strip():
            continue
        found += [{"text": text[end:start], "start": end == 0}] if start > end else []
        found.append(index)
        end = stop
    found += [{"text": text[end:], "start": end == 0}] if end < len(text) else []
    assert found == parts


def test_our_own_renderer_tells_the_day() -> None:
    from datetime import datetime

    given = read("prompts.json")
    now = datetime.fromisoformat(given["now"])
    for case in given["cases"]:
        if case["template"] == "llama" and "text" in case["expect"]:
            template = ChatTemplate(given["templates"]["llama"]["source"], given["special_tokens"], now)
            options = {"add_generation_prompt": case["add_generation_prompt"]}
            tools = given["tools"] if case["tools"] else None
            rendered = template.render(given["chats"][case["chat"]], tools=tools, **options).text
            assert rendered == case["expect"]["text"] and "26 Jul 2024" in rendered


@cases("texts.json")
def test_a_text_reaches_the_tokenizer(case: dict[str, Any]) -> None:
    plain = {"context_length": 9, "vocab_size": 9, "eos_ids": [], "chat_template": None}
    contract = Contract(**plain, **case["contract"])
    assert as_llama_cpp_reads(case["text"], contract, start=case["start"]) == case["expect"]["text"]
    session: Any = Letters(99)
    assert text_ids(session, contract, "") == case["expect"]["before"]


@cases("history.json")
def test_a_chat_that_is_too_long_loses_its_beginning(case: dict[str, Any]) -> None:
    plain = {"context_length": 9, "vocab_size": 9, "bos_id": None, "eos_ids": [], "add_bos": False, "special_ids": {}}
    contract = Contract(**plain, chat_template=read("history.json")["template"])
    session: Any = Letters(case["context_length"])
    given = (session, contract, case["messages"], case["max_tokens"])
    if "refused" in case["expect"]:
        with pytest.raises(TooLong):
            fitted_chat(*given)
        return
    ids, kept = fitted_chat(*given)
    assert kept == [case["messages"][place] for place in case["expect"]["keep"]]
    assert "".join(map(chr, ids)) == case["expect"]["text"]
    assert kept[-1] == case["messages"][-1] and len(ids) < case["context_length"]


@cases("room.json")
def test_a_prompt_leaves_room_for_an_answer(case: dict[str, Any]) -> None:
    plain = {"vocab_size": 9, "eos_ids": [], "chat_template": None}
    contract, expect = Contract(**plain, **case["contract"]), case["expect"]
    session: Any = Letters(contract.context_length)
    ids = text_ids(session, contract, "x" * case["length"])
    assert len(ids) == case["length"] + contract.add_bos
    if "refused" in expect:
        with pytest.raises(TooLong) as refusal:
            check_prompt(session, ids)
        assert [int(number) for number in re.findall(r"\d+", str(refusal.value))] == expect["numbers"]
    else:
        assert len(check_prompt(session, ids)) == expect["tokens"] < contract.context_length


@cases("streams.json")
def test_a_stream_shows_whole_characters(case: dict[str, Any]) -> None:
    tokens = [bytes.fromhex(token) for token in case["tokens"]]
    expect = case["expect"]
    whole = b"".join(tokens).decode("utf-8", "replace")
    assert "".join(expect["shown"]) + expect["end"] == whole
    session: Any = Bytes(tokens)
    assert spoken(session, range(len(tokens))) == whole


def test_browsers_show_the_same() -> None:
    """By the TextDecoder of node, which is that of the WHATWG."""
    if not (node := shutil.which("node")):
        pytest.skip("node is not installed")
    program = (
        "const given = JSON.parse(require('fs').readFileSync(0));"
        "console.log(JSON.stringify(given.cases.map(({tokens}) => {"
        "const d = new TextDecoder('utf-8', {ignoreBOM: true});"
        "const shown = tokens.map(t => d.decode(Buffer.from(t, 'hex'), {stream: true}));"
        "return {shown, end: d.decode()}})))"
    )
    given = (FOLDER / "streams.json").read_bytes()
    done = subprocess.run([node, "-e", program], input=given, capture_output=True, check=True)
    assert json.loads(done.stdout) == [case["expect"] for case in read("streams.json")["cases"]]


@cases("stops.json")
def test_a_stop_ends_the_text(case: dict[str, Any]) -> None:
    """Against the whole text, looked at letter by letter."""
    text, found = "".join(case["pieces"]), None
    for end in range(len(text) + 1):
        if ended := [stop for stop in case["stops"] if text[:end].endswith(stop)]:
            found = max(ended, key=len)
            text = text[: end - len(found)]
            break
    expect = case["expect"]
    assert expect["found"] == found and "".join(expect["shown"]) + expect["end"] == text
    one_by_one = Stops(case["stops"])
    shown = [one_by_one.feed(letter) for letter in "".join(case["pieces"])]
    assert "".join(shown) + one_by_one.finish() == text and one_by_one.found == found


@cases("statistics.json")
def test_figures_are_as_the_standard_library_has_them(case: dict[str, Any]) -> None:
    runs, expect = case["runs"], case["expect"]

    def centile(samples: list[float], q: int) -> float:
        return statistics.quantiles(samples, n=100, method="inclusive")[q - 1]

    def median(samples: Any) -> float:
        return statistics.median(samples)

    every = [seconds for run in runs for seconds in run["inter_token_s"]]
    figures = {
        "load_s": median(run["load_s"] for run in runs),
        "decode_tokens_per_s": median(case["decode_tokens"] / sum(run["inter_token_s"]) for run in runs),
        "inter_token_s": median(every),
        "inter_token_p50_s": centile(every, 50),
        "inter_token_p95_s": centile(every, 95),
        "peak_rss_bytes": median(run["peak_rss_bytes"] for run in runs),
    }
    assert {key: expect[key] for key in figures} == pytest.approx(figures, rel=1e-9)
    for length in ("32", "256"):
        assert expect["ttft_s"][length] == pytest.approx(median(run["ttft_s"][length] for run in runs))
        rates = [int(length) / run["prefill_s"][length] for run in runs]
        assert expect["prefill_tokens_per_s"][length] == pytest.approx(median(rates))


def test_sums_are_those_of_the_system() -> None:
    if not (tool := shutil.which("sha256sum")):
        pytest.skip("sha256sum is not installed")
    for case in read("hashes.json")["cases"]:
        done = subprocess.run([tool], input=bytes.fromhex(case["hex"]) * case["times"], capture_output=True, check=True)
        assert re.match(rb"[0-9a-f]{64}", done.stdout)[0].decode() == case["expect"]  # type: ignore[index]
