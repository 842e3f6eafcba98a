"""The tokenizer of a GGUF file as a Hugging Face one, and the proof that both give the same ids.

The file names its pre-tokenizer, llama.cpp knows what that does: the name is looked up, and then proved on text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import EdgekdError, Unsupported
from ...files import Json, write_json
from ...student import load_tokenizer
from ..shared.tokenizer import ids_of_text
from .file import GgufFile
from .session import load_model, runtime, tokenize
from .vocab import PRE_TOKENIZERS, probe_texts, read_tokenizer

_SAME = {
    "qwen2": ("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "roberta-bpe"),
    "starcoder": ("smollm", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
"""Pre-tokenizer → further ones of llama.cpp that cut texts alike."""
_WHOLE_WORDS = ("llama-bpe", "tekken")
"""Those with which a word that is a token is taken for it, whatever the merges."""
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""What llama.cpp takes where a file with such a tokenizer is silent."""


def write_tokenizer(file: GgufFile, config: Json, folder: Path) -> int:
    """Write ``config.json``, the tokenizer's files and ``generation_config.json``.

    Args:
        config: ``config.json`` without the ids of special tokens.

    Returns:
        Number of texts whose ids were compared with llama.cpp's.

    Raises:
        EdgekdError: a key is missing or damaged.
        Unsupported: a tokenizer of another kind, or one whose ids no known pre-tokenizer gives.
    """
    tokens = file.need("tokenizer.ggml.tokens", list)
    if (rows := config["vocab_size"]) != len(tokens):
        raise EdgekdError(f"{file.path}: it has {len(tokens)} tokens, and {rows} rows of the embedding.")
    ids = {name: file.get(f"tokenizer.ggml.{name}_token_id", int) for name in [*_NAMES.values(), "eot", "eom"]}
    if (model := file.need("tokenizer.ggml.model", str)) not in ("gpt2", "llama"):
        raise Unsupported(f"{file.path}: a tokenizer of kind {model!r:.60} cannot be imported.", "Take another model.")
    if model == "llama":
        ids = {name: _SENTENCEPIECE_IDS.get(name) if index is None else index for name, index in ids.items()}
    for name, index in ids.items():
        if index is not None and not 0 <= index < rows:
            raise EdgekdError(f"{file.path}: key 'tokenizer.ggml.{name}_token_id' is {index}, of {rows} tokens.")
    _write_ids(config, ids, folder)
    write_json(folder / "tokenizer_config.json", _tokenizer_config(file, tokens, ids))
    complaint = ""
    with _llama_cpp(file) as vocab:
        for pre_tokenizer, whole_words in _candidates(file):
            write_json(folder / "tokenizer.json", _tokenizer(file, tokens, ids, vocab, pre_tokenizer, whole_words))
            texts, wrong = _compare(folder, rows, vocab)
            if not wrong:
                return texts
            complaint = complaint or wrong
    raise Unsupported(f"{file.path}: its tokenizer cannot be imported; {complaint}.", "Take another model.")


def _write_ids(config: Json, ids: Mapping[str, int | None], folder: Path) -> None:
    """``config.json`` and ``generation_config.json``."""
    ends = list(dict.fromkeys(i for name in ("eos", "eot", "eom") if (i := ids[name]) is not None))
    named = {"bos_token_id": ids["bos"], "eos_token_id": ends[0] if ends else None, "pad_token_id": ids["padding"]}
    write_json(folder / "config.json", {**config, **named})
    several = {**named, "eos_token_id": ends if ends[1:] else named["eos_token_id"]}
    write_json(folder / "generation_config.json", {k: v for k, v in several.items() if v is not None})


def _tokenizer_config(file: GgufFile, tokens: list[str], ids: Mapping[str, int | None]) -> Json:
    names = {name: tokens[i] for name, key in _NAMES.items() if (i := ids[key]) is not None}
    template = file.get("tokenizer.chat_template", str)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        **({"chat_template": template} if template else {}),
        "clean_up_tokenization_spaces": False,
    }


def _candidates(file: GgufFile) -> Iterator[tuple[Json | None, bool]]:
    """The pre-tokenizers that may be the file's, the likeliest first, and whether each takes whole words."""
    if file.need("tokenizer.ggml.model", str) == "llama":
        yield None, False
        return
    name = file.get("tokenizer.ggml.pre", str, "default")
    by_name = {known: steps for steps, known in PRE_TOKENIZERS.items()}
    alias = next((known for known, same in _SAME.items() if name in same), name)
    for known in [alias] if alias in by_name else by_name:
        yield _pre_tokenizer(by_name[known]), known in _WHOLE_WORDS


def _pre_tokenizer(steps: tuple[str, ...]) -> Json:
    """A key of ``PRE_TOKENIZERS`` as ``tokenizer.json`` has it."""
    found: list[Json] = []
    for step in steps:
        if step == "digit":
            found.append({"type": "Digits", "individual_digits": True})
        elif step != "gpt2":
            found.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": [*found, _byte_level("gpt2" in steps)]}


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _tokenizer(
    file: GgufFile,
    tokens: list[str],
    ids: Mapping[str, int | None],
    vocab: Any,
    pre_tokenizer: Json | None,
    whole_words: bool,
) -> Json:
    """``tokenizer.json``.

    Args:
        vocab: llama.cpp's, which knows what the file leaves to it.
        pre_tokenizer: None: SentencePiece's.
    """
    from gguf import TokenType

    types = file.get("tokenizer.ggml.token_type", list, [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise EdgekdError(f"{file.path}: it has {len(tokens)} tokens, and types of {len(types)}.")
    used = {i: text for i, text in enumerate(tokens) if types[i] != TokenType.UNUSED}
    pieces = {text: i for i, text in used.items()}
    if len(pieces) < len(used):
        twice = next(text for i, text in used.items() if pieces[text] != i)
        raise Unsupported(f"{file.path}: two tokens share the text {twice!r:.60}.", "Take another model.")
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    added = [i for i in used if types[i] in (*special, TokenType.USER_DEFINED)]
    sentencepiece = pre_tokenizer is None
    plain = {text: i for text, i in pieces.items() if types[i] == TokenType.NORMAL}
    return {
        "version": "1.0",
        "added_tokens": [_added(i, tokens[i], types[i] in special, vocab) for i in added],
        "normalizer": _spaces(file) if sentencepiece else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _ends(tokens, vocab),
        "decoder": _DECODER if sentencepiece else _byte_level(True),
        "model": {
            "type": "BPE",
            "unk_token": tokens[ids["unknown"] or 0] if sentencepiece else None,
            "fuse_unk": sentencepiece,
            "byte_fallback": sentencepiece,
            "ignore_merges": whole_words,
            "vocab": pieces,
            "merges": _merges_by_score(file, plain) if sentencepiece else _merges(file),
        },
    }


_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def _added(index: int, text: str, special: bool, vocab: Any) -> Json:
    lib = runtime()
    attributes = lib.llama_vocab_get_attr(vocab, index)
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": bool(attributes & lib.LLAMA_TOKEN_ATTR_LSTRIP),
        "rstrip": bool(attributes & lib.LLAMA_TOKEN_ATTR_RSTRIP),
        "normalized": False,
        "special": special,
    }


def _spaces(file: GgufFile) -> Json:
    """What SentencePiece does to spaces."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = [{"type": "Prepend", "prepend": "▁"}] * file.get("tokenizer.ggml.add_space_prefix", bool, True)
    return {"type": "Sequence", "normalizers": [*prefix, replace]}


def _ends(tokens: list[str], vocab: Any) -> Json | None:
    """What is put before and behind every text."""
    lib = runtime()
    before = [lib.llama_vocab_bos(vocab)] * lib.llama_vocab_get_add_bos(vocab)
    after = [lib.llama_vocab_eos(vocab)] * lib.llama_vocab_get_add_eos(vocab)
    if not before + after:
        return None
    words = [{"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in before + after]
    single = [*words[: len(before)], {"Sequence": {"id": "A", "type_id": 0}}, *words[len(before) :]]
    named = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in before + after}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def _merges(file: GgufFile) -> list[list[str]]:
    found = [merge.split(" ") for merge in file.need("tokenizer.ggml.merges", list) if merge]
    if wrong := next((merge for merge in found if len(merge) != 2), None):
        raise EdgekdError(f"{file.path}: key 'tokenizer.ggml.merges': {' '.join(wrong)!r:.60} is no pair.")
    return found


def _merges_by_score(file: GgufFile, plain: Mapping[str, int]) -> list[list[str]]:
    """SentencePiece has no merges: of all neighbours it joins those that make the token of the highest score."""
    scores = file.need("tokenizer.ggml.scores", list)
    if len(scores) <= max(plain.values(), default=0):
        raise EdgekdError(f"{file.path}: key 'tokenizer.ggml.scores' has {len(scores)} scores, fewer than tokens.")
    found = []
    for text, index in plain.items():
        halves = ([text[:at], text[at:]] for at in range(1, len(text)))
        found += [(-scores[index], index, pair) for pair in halves if pair[0] in plain and pair[1] in plain]
    return [pair for *_, pair in sorted(found)]


@contextmanager
def _llama_cpp(file: GgufFile) -> Iterator[Any]:
    """llama.cpp's vocabulary of the file."""
    lib = runtime()
    model = load_model(file.path, vocab_only=True)
    try:
        yield lib.llama_model_get_vocab(model)
    finally:
        lib.llama_model_free(model)


def _compare(folder: Path, rows: int, vocab: Any) -> tuple[int, str]:
    """Number of texts, and how the first differs whose ids are not llama.cpp's; empty: none."""
    lib, tokenizer = runtime(), load_tokenizer(folder)
    texts = probe_texts(read_tokenizer(tokenizer, folder, rows), tokenizer)
    for text in texts:
        ours, theirs = ids_of_text(tokenizer, text), tokenize(lib, vocab, text)
        if ours != theirs:
            return len(texts), f"on {text!r:.100} llama.cpp gives {theirs[:20]}, the import {ours[:20]}"
    return len(texts), ""
