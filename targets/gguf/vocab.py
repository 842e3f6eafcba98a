"""A Hugging Face tokenizer as llama.cpp's: the GGUF keys, and the proof that both give the same ids.

llama.cpp has no regex for the pre-tokenizer in its file, only the name of one that it knows. The name is guessed from
the tokenizer's regexes and then proved on ``PROBES``, on every special token and on text made of the vocabulary itself.
"""

from __future__ import annotations

import base64
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...errors import EdgekdError, Unsupported
from ...files import Json
from ...manifest import Contract
from ..shared.tokenizer import (
    PROBES,
    added_ends,
    chat_template,
    check_has_tokenizer,
    eos_ids,
    ids_of_text,
    marked_texts,
    prefix_of,
    special_strips,
    special_tokens,
    turn_end_id,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_SLASH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASH_REST}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizer steps, as ``_steps`` writes them, → llama.cpp's name.
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",): "qwen2",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    ("gpt2",): "gpt-2",
    ("digit", "gpt2"): "starcoder",
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3): "deepseek-v3",
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digit"): "deepseek-coder",
    (rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_REST}",): "tekken",
    (_GPT4O,): "gpt-4o",
}
# One name for each distinct behaviour; tried in this order when no regexes match, or the match fails its proof.
CANDIDATES = (
    "qwen2",
    "llama-bpe",
    "gpt-2",
    "starcoder",
    "smaug-bpe",
    "smollm",
    "tekken",
    "gpt-4o",
    "deepseek-v3",
    "deepseek-llm",
    "deepseek-coder",
    "falcon",
    "qwen35",
    "glm4",
    "bailingmoe",
    "seed-coder",
    "grok-2",
    "superbpe",
    "viking",
    "poro-chat",
    "exaone-moe",
    "minicpm5",
    "youtu",
    "spark2_5",
    "jais-2",
    "ufakzeka",
    "default",
)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """Everything the tokenizer's keys say; ``pre`` is only a guess until it is proved."""

    model: Literal["gpt2", "llama", "t5"]
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    bos_id: int | None
    eos_ids: list[int]
    turn_end_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    merges_spaces: bool
    """Runs of spaces become one, those at the end none: Unigram's alone."""
    charsmap: bytes | None
    """SentencePiece's precompiled normalizer, which llama.cpp applies for Unigram."""
    chat_template: str | None
    special_tokens: dict[str, str]
    special_ids: dict[str, int]
    special_strips: dict[str, Literal["left", "right", "both"]]
    space_prefix: Literal["first", "every"] | None
    normalizer: Literal["NFC"] | None


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer of a kind that llama.cpp lacks, by its ``tokenizer.json`` alone.

    Raises:
        EdgekdError: no readable tokenizer.
        Unsupported: its kind or its normalizer.
    """
    check_has_tokenizer(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_text("utf-8"))
        _kind(data, folder)
    except (ValueError, KeyError, TypeError) as error:
        raise EdgekdError(f"{path}: not a readable tokenizer ({error!r}).", "Save the tokenizer again.") from error


def _kind(data: Json, folder: Path) -> tuple[Literal["gpt2", "llama", "t5"], Literal["NFC"] | None]:
    """Which of llama.cpp's tokenizers it is, and the normal form that llama.cpp will not apply itself."""
    model, remedy = data["model"], "Use a byte-level BPE or a SentencePiece tokenizer."
    if model["type"] == "Unigram":
        for step in _normalizers(data):
            if step["type"] not in ("Precompiled", "Replace", "Strip"):
                raise Unsupported(f"{folder}: llama.cpp has no normalizer {step['type']!r}.", remedy)
        return "t5", None
    if model["type"] != "BPE":
        raise Unsupported(f"{folder}: a {model['type']} tokenizer has no GGUF export here.", remedy)
    normalizers = _normalizers(data)
    if model.get("byte_fallback"):
        for step in normalizers:
            if step["type"] not in ("Prepend", "Replace"):
                raise Unsupported(f"{folder}: llama.cpp has no normalizer {step['type']!r}.", remedy)
        return "llama", None
    if not any(step["type"] == "ByteLevel" for step in _flatten(data.get("pre_tokenizer"), "pretokenizers")):
        raise Unsupported(f"{folder}: a BPE tokenizer that is neither byte-level nor has byte fallback.", remedy)
    names = [step["type"] for step in normalizers]
    if names not in ([], ["NFC"]):
        raise Unsupported(f"{folder}: llama.cpp has no normalizer {', '.join(names)}.", "Only NFC can be carried.")
    return "gpt2", "NFC" if names else None


def _flatten(step: Json | None, key: str) -> list[Json]:
    """The steps of a normalizer or a pre-tokenizer, sequences opened."""
    if not step:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[key] for inner in _flatten(part, key)]
    return [step]


def _normalizers(data: Json) -> list[Json]:
    return _flatten(data.get("normalizer"), "normalizers")


def _steps(data: Json) -> tuple[str, ...]:
    """The pre-tokenizer as a key of ``PRE_TOKENIZERS``."""
    keys = []
    for step in _flatten(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            keys.append(step["pattern"].get("Regex") or re.escape(step["pattern"].get("String", "")))
        elif step["type"] == "Digits":
            keys.append("digit" if step["individual_digits"] else "digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            keys += ["gpt2"] if step["use_regex"] else []
        else:
            keys.append(json.dumps(step, sort_keys=True))
    return tuple(keys)


def read_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: int) -> Vocabulary:
    """Read a tokenizer as it really behaves once loaded.

    Args:
        folder: its folder, for ``config.json`` and ``generation_config.json``.
        rows: rows of the embedding; ids without a token become unused ones.

    Raises:
        Unsupported: a kind that llama.cpp lacks, no end-of-sequence token, or an odd set of added special tokens.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = _kind(data, folder)
    tokens, types = _tokens(data, rows, model)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"].get("merges", [])]
    merges_spaces = model == "t5" and _merges_spaces(data)
    template = chat_template(tokenizer)
    ends = eos_ids(tokenizer, folder)
    bos_id, add_bos, add_eos = added_ends(tokenizer, folder)
    if add_eos and ends[0] != tokenizer("a")["input_ids"][-1]:
        raise Unsupported(f"{folder}: the tokenizer appends a token that is not its EOS.", "Change its post-processor.")
    return Vocabulary(
        model=model,
        pre=PRE_TOKENIZERS.get(_steps(data), CANDIDATES[0]) if model == "gpt2" else "default",
        tokens=tokens,
        types=types,
        scores=None if model == "gpt2" else _scores(data["model"], rows),
        merges=merges if model == "gpt2" else None,
        bos_id=bos_id,
        eos_ids=ends,
        turn_end_id=turn_end_id(tokenizer),
        unk_id=tokenizer.unk_token_id,
        pad_id=tokenizer.pad_token_id,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=merges_spaces or (model == "llama" and _adds_space_prefix(data)),
        merges_spaces=merges_spaces,
        charsmap=_charsmap(data) if model == "t5" else None,
        chat_template=template,
        special_tokens=tokenizer.special_tokens_map,
        special_ids=special_tokens(tokenizer),
        special_strips=special_strips(tokenizer),
        space_prefix=None if merges_spaces else prefix_of(data),
        normalizer=normalizer,
    )


def _tokens(data: Json, rows: int, model: str) -> tuple[list[str], list[int]]:
    vocab = data["model"]["vocab"]
    by_id = dict(enumerate(text for text, _ in vocab)) if model == "t5" else {i: text for text, i in vocab.items()}
    kinds = dict.fromkeys(by_id, _NORMAL)
    if model != "gpt2":
        kinds |= {i: _BYTE for i, text in by_id.items() if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text)}
        unknown = data["model"].get("unk_id") if model == "t5" else vocab.get(data["model"].get("unk_token"))
        kinds |= {} if unknown is None else {unknown: _UNKNOWN}
    for token in data["added_tokens"]:
        # llama.cpp renders a user-defined token as it stands, so SentencePiece's marks become spaces here.
        text = token["content"] if token["special"] or model == "gpt2" else token["content"].replace("▁", " ")
        by_id[token["id"]] = text
        if kinds.get(token["id"]) != _UNKNOWN:
            kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    taken = set(by_id.values())
    for i in set(range(rows)) - set(by_id):
        by_id[i] = next(text for n in range(rows) if (text := f"[PAD{i}]" + "_" * n) not in taken)
        kinds[i] = _UNUSED
    texts = [by_id[i] for i in range(rows)]
    if len(set(texts)) != rows:
        twice = Counter(texts).most_common(1)[0][0]
        raise Unsupported(f"tokenizer.json: two ids share the text {twice!r}.", "Rename one of them.")
    return texts, [kinds[i] for i in range(rows)]


def _scores(model: Json, rows: int) -> list[float]:
    """Unigram's scores, or such as order merges as their ranks do; what no merge makes comes last."""
    scores = [-1e6] * rows
    if model["type"] == "Unigram":
        return [float(score) for _, score in model["vocab"]] + scores[len(model["vocab"]) :]
    for rank, merge in reversed(list(enumerate(model["merges"]))):
        text = merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
        scores[model["vocab"][text]] = -1.0 - rank
    return scores


def _adds_space_prefix(data: Json) -> bool:
    """Whether every text gets one; that of a Metaspace, which leaves a space alone, is the caller's."""
    return any(step["type"] == "Prepend" for step in _normalizers(data))


def _merges_spaces(data: Json) -> bool:
    replaced = (step["pattern"] for step in _normalizers(data) if step["type"] == "Replace")
    return any(pattern.get("Regex") == " {2,}" for pattern in replaced)


def _charsmap(data: Json) -> bytes | None:
    maps = [step["precompiled_charsmap"] for step in _normalizers(data) if step["type"] == "Precompiled"]
    return base64.b64decode(maps[0]) if maps and maps[0] else None


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, pre: str) -> None:
    """Write the tokenizer's keys."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.model == "t5":
        writer.add_remove_extra_whitespaces(vocabulary.merges_spaces)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)
    if vocabulary.merges is not None:
        # A writer cannot type an empty array, and llama.cpp wants the key.
        writer.add_token_merges(vocabulary.merges or [""])
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_eos_token_id(vocabulary.eos_ids[0])
    turn_end, further = _further_ends(vocabulary)
    for value, add in (
        (vocabulary.bos_id, writer.add_bos_token_id),
        (turn_end, writer.add_eot_token_id),
        (further, writer.add_eom_token_id),
        (vocabulary.unk_id, writer.add_unk_token_id),
        (vocabulary.pad_id, writer.add_pad_token_id),
    ):
        if value is not None:
            add(value)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _further_ends(vocabulary: Vocabulary) -> tuple[int | None, int | None]:
    """The ends of a turn and of a message, at which llama.cpp stops too: the only places it has for a second and a
    third end."""
    turn_end = vocabulary.turn_end_id
    others = [i for i in vocabulary.eos_ids[1:] if i != turn_end]
    first, second, *_ = [*([] if turn_end is None else [turn_end]), *others, None, None]
    return first, second


def contract(vocabulary: Vocabulary, context_length: int) -> Contract:
    """What the manifest says of the tokenizer."""
    return Contract(
        context_length=context_length,
        vocab_size=len(vocabulary.tokens),
        bos_id=vocabulary.bos_id,
        eos_ids=vocabulary.eos_ids,
        add_bos=vocabulary.add_bos,
        chat_template=vocabulary.chat_template,
        special_tokens=vocabulary.special_tokens,
        special_ids=vocabulary.special_ids,
        special_strips=vocabulary.special_strips,
        normalizer=vocabulary.normalizer,
        space_prefix=vocabulary.space_prefix,
    )


def probe_texts(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """``PROBES``, every kind of special token between text, and runs of random tokens of the vocabulary."""
    marked = [
        text
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    texts = [*PROBES, *marked_texts(marked)]
    normal = [i for i, kind in enumerate(vocabulary.types) if kind == _NORMAL]
    drawn = random.Random(0).sample(normal, min(1000, len(normal)))
    if vocabulary.model == "gpt2":
        pieces = [tokenizer.backend_tokenizer.decode([i], skip_special_tokens=False) for i in drawn]
    else:
        pieces = [vocabulary.tokens[i].replace("▁", " ") for i in drawn]
    return texts + ["".join(pieces[i : i + 20]) for i in range(0, len(pieces), 20)]


def prove_tokenizer(
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerFast,
    runtime_ids: Callable[[str, Iterable[str]], list[list[int]]],
) -> str:
    """The name of the pre-tokenizer with which llama.cpp gives the tokenizer's ids on every probe, read as text.

    Args:
        runtime_ids: ids of texts as a session gives them with the pre-tokenizer of that name.

    Raises:
        Unsupported: there is none; names the first string on which the closest one differs.
    """
    # Unigram finds special tokens in text by itself, whatever it is told: such a text says nothing.
    special = vocabulary.special_ids if vocabulary.model == "t5" else ()
    texts = [text for text in probe_texts(vocabulary, tokenizer) if not any(token in text for token in special)]
    expected = [ids_of_text(tokenizer, text) for text in texts]
    candidates = dict.fromkeys([vocabulary.pre, *(CANDIDATES if vocabulary.model == "gpt2" else ())])
    closest: tuple[int, str, str, list[int], list[int]] | None = None
    for name in candidates:
        actual = runtime_ids(name, texts)
        wrong = [i for i in range(len(texts)) if actual[i] != expected[i]]
        if not wrong:
            return name
        if closest is None or len(wrong) < closest[0]:
            closest = (len(wrong), name, texts[wrong[0]], actual[wrong[0]], expected[wrong[0]])
    assert closest is not None
    count, name, text, ours, theirs = closest
    raise Unsupported(
        f"tokenizer.json: llama.cpp cannot give its ids; the closest pre-tokenizer, {name}, differs on {count} of "
        f"{len(texts)} strings, first on {text!r:.200}: {ours[:40]} instead of {theirs[:40]}.",
        "Use a tokenizer with the pre-tokenizer of Qwen2, Llama 3 or GPT-2."
        if vocabulary.model == "gpt2"
        else "Use one whose normalizer prepends ▁ to every text, as Llama 2's does, or prepends nothing.",
    )
