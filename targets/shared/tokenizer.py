"""What every target must know of a Hugging Face tokenizer: how texts begin and end, strings that tell tokenizers apart,
and the tokenizer at work from its ``tokenizer.json`` alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...errors import BadArtifact, EdgekdError, MissingExtra, Unsupported
from ...files import Json, read_json
from ...manifest import Contract
from ...student import load_tokenizer
from ...tokenizer_file import BYTE_OF, read_tokenizer_file, tokenizer_errors
from .artifact import TokenizerProof

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"
PROBES = (
    "",
    " ",
    "  ",
    "\n",
    "\t\n \n\n   \n",
    "Hello, world!",
    " leading and trailing  ",
    "def f(x):\n    return x + 1\n",
    "if a:\n\t\tb = {'k': [1, 2]}  # why?\n\n\n",
    "1 12 123 1234 12345 123456 3.14159 1,000,000 0x1F 1e-5 ١٢٣ ½",
    "I've they'll we're it's I'D YOU'LL 'tis rock'n'roll don't",
    "camelCase snake_case SCREAMING_CASE HTMLParser",
    "naïve café Größe ÀÉÎ ñandú Straße İstanbul",
    "Привет, мир! Ελληνικά καλημέρα",
    "你好，世界。我想在apple工作1314天～ 日本語のテスト カタカナ",
    "안녕하세요 세계",
    "مرحبا بالعالم، كيف الحال؟",
    "नमस्ते दुनिया កាន់តែពិសេស ไทย",
    "🚀 😶‍🌫️ 👩‍👩‍👧‍👦 🇩🇪 ✅🦙🦙",
    "e\u0301 a\u0308 \u212b \ufb01",
    "a\u00a0b\u2003c\u200bd\u2028e\u3000f",
    "\x00\x01\x1b[0m\x7f\x85",
    "a\r\nb\r\r\nc\rd",
    "...!!!???---=== <tag/> </s> &amp; $x^2$ `code` ~~s~~ @user #1 a/b\\c |||",
    "http://a.b/c?d=e&f=g#h user@example.org",
    "''''''```````\"\"\"\"......!!!!!!?????? (normal) (multiple)",
    "x=1;y=2;z=x+y;print(f'{z:>10.2f}')",
    "ABCdefGHI aB Ab AB",
    "a  b   c    d     e        f                g",
    "word\n\nword\n \nword \n  word",
    "/* c */ //x\n/// y\n/\n",
    "x" * 300,
    "!" * 70,
    " " * 70,
    "\n" * 20,
    "9" * 40,
    *(f"a{chr(code)}b {chr(code)}" for code in range(1, 32)),
)
CHATS = (
    [{"role": "user", "content": "Hello!"}],
    [
        {"role": "user", "content": " naïve 世界 🚀 \n"},
        {"role": "assistant", "content": '{{ 7 }} "a\\b" '},
        {"role": "user", "content": ""},
    ],
)
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eot|>")


def check_has_tokenizer(folder: Path) -> None:
    """Refuse a folder that has none, before any work.

    Raises:
        EdgekdError: it has neither ``tokenizer.json`` nor a file that transformers makes it of.
    """
    if (folder / "tokenizer.json").is_file():
        return
    if not (folder / "tokenizer.model").is_file():
        raise EdgekdError(f"{folder}: it has no tokenizer.json.", "Save the tokenizer with the model.")
    load_tokenizer(folder)


def contract_of(tokenizer: PreTrainedTokenizerFast, folder: Path, vocab_size: int, context_length: int) -> Contract:
    """What the manifest says of a tokenizer whose own library runs it.

    Raises:
        Unsupported: no end-of-sequence token, or texts wrapped in more than a BOS and an EOS.
    """
    bos_id, add_bos, _ = added_ends(tokenizer, folder)
    return Contract(
        context_length=context_length,
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_ids=eos_ids(tokenizer, folder),
        add_bos=add_bos,
        chat_template=chat_template(tokenizer),
        special_tokens=tokenizer.special_tokens_map,
        special_ids=special_tokens(tokenizer),
        special_strips=special_strips(tokenizer),
    )


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The template, or the default of several."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Text → id of the tokens that render as nothing."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items() if token.special}


def special_strips(tokenizer: PreTrainedTokenizerFast) -> dict[str, Literal["left", "right", "both"]]:
    """The side on which a special token takes white space along, of those that do."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    special = [token for token in added if token.special]
    found: dict[str, Literal["left", "right", "both"]] = {token.content: "left" for token in special if token.lstrip}
    return found | {token.content: "both" if token.lstrip else "right" for token in special if token.rstrip}


def ids_of_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text, in which nothing is a special token and to which nothing is added."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def turn_end_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token with which the chat template ends a turn."""
    special, template = special_tokens(tokenizer), chat_template(tokenizer) or ""
    return next((special[text] for text in _TURN_ENDS if text in special and text in template), None)


def marked_texts(marked: Sequence[str]) -> list[str]:
    """Added tokens between text, each of the first 64 alone and all together."""
    return [*(f"a{text}b {text} c\n{text}\n {text}{text}" for text in marked[:64]), "x".join(marked)]


def added_ends(tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[int | None, bool, bool]:
    """The BOS id, and whether the tokenizer puts BOS before and EOS after a text: seen, not read from its settings.

    Raises:
        Unsupported: it puts more than that.
    """
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for before, after in ((0, 0), (1, 0), (0, 1), (1, 1)):
        if ids[before : len(ids) - after] == bare:
            return ids[0] if before else tokenizer.bos_token_id, bool(before), bool(after)
    raise Unsupported(
        f"{folder}: the tokenizer wraps texts as {ids} around {bare}; runtimes add one BOS and one EOS at most.",
        "Change its post-processor.",
    )


def eos_ids(tokenizer: PreTrainedTokenizerFast, folder: Path) -> list[int]:
    """Ids that end generation: the tokenizer's own EOS, those of ``generation_config.json``, the turn's end.

    Raises:
        EdgekdError: a file that names them is not readable.
        Unsupported: there is none.
    """
    named = _named_eos_ids(folder / "generation_config.json")
    if named is None:
        # An ordinary token there is a library's default that was never set for this vocabulary.
        special = special_tokens(tokenizer).values()
        named = [i for i in _named_eos_ids(folder / "config.json") or [] if i in special]
    known = tokenizer.get_vocab().values()
    ids = [tokenizer.eos_token_id, *(i for i in named if i in known), turn_end_id(tokenizer)]
    ids = [i for i in ids if i is not None]
    if not ids:
        raise Unsupported(
            f"{folder}: no end-of-sequence token; the runtime would take an ordinary one for it.",
            "Set eos_token in tokenizer_config.json.",
        )
    return list(dict.fromkeys(ids))


def _named_eos_ids(path: Path) -> list[int] | None:
    """``eos_token_id`` of a model's file, one or many; None where the file or the key is missing."""
    value = read_json(path, remedy="Save the model again.").get("eos_token_id") if path.is_file() else None
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise EdgekdError(f"{path}: key 'eos_token_id' is {value!r:.60}, not an id or a list of ids.", "Correct it.")
    return list(ids)


def compare_tokenizers(
    tokenizer: PreTrainedTokenizerFast, name: str, path: Path, load: Callable[[], Callable[[str], list[int]]]
) -> TokenizerProof:
    """Whether a runtime's own tokenizer gives the student's ids, id by id. Where it does not on a text that sessions
    would give it, they use ``tokenizer.json``.

    Args:
        name: the runtime.
        path: ``tokenizer.json``.
        load: makes its text → ids, special tokens parsed, BOS and EOS added as it does.
    """
    texts = [*PROBES, *marked_texts(list(special_tokens(tokenizer)))]
    try:
        encode = load()
    except EdgekdError as error:
        return TokenizerProof(used="tokenizers", texts=len(texts), differ=len(texts), first=error.cause)
    session = SessionTokenizer(path, name, lambda: encode)
    spoilt = any(_ids_of(session.tokenize, text) != ids_of_text(tokenizer, text) for text in PROBES)
    given = (_ids_of(encode, text) for text in texts)
    return compare_ids(tokenizer, "tokenizers" if spoilt else name, texts, given)


def _ids_of(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """A runtime's ids of a text; none where it fails."""
    try:
        return encode(text)
    except (RuntimeError, EdgekdError):
        return []


def compare_ids(
    tokenizer: PreTrainedTokenizerFast, used: str, texts: Sequence[str], given: Iterable[list[int]]
) -> TokenizerProof:
    """A runtime's own reading of texts against the student's.

    Args:
        given: its ids, special tokens parsed and BOS and EOS added.
    """
    differ, first = 0, ""
    for text, actual in zip(texts, given, strict=True):
        expected = list(tokenizer(text, verbose=False)["input_ids"])
        if actual != expected:
            differ += 1
            first = first or _difference(text, expected, actual)
    return TokenizerProof(used=used, texts=len(texts), differ=differ, first=first or None)


def _difference(text: str, expected: Sequence[int], actual: Sequence[int]) -> str:
    """Where two readings of a text part."""
    at = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), 0)
    return f"{text!r:.100}: {list(actual[at : at + 12])} instead of {list(expected[at : at + 12])}"


class JsonTokenizer:
    """``tokenizer.json`` by the tokenizers package.

    Raises:
        MissingExtra: the package is not installed.
        BadArtifact: the file is not a tokenizer.
        Unsupported: tokens that stand for no bytes: not byte-level, without byte fallback, and not pieces of Unigram.
    """

    def __init__(self, path: Path, extra: str) -> None:
        try:
            self._tokenizer, data = read_tokenizer_file(path, BadArtifact)
        except ModuleNotFoundError as error:
            raise MissingExtra("tokenizers", extra) from error
        self._path = path
        self._level = _byte_level(data)
        model = data["model"]
        assert isinstance(model, dict)  # checked as it was read
        if not self._level and not model.get("byte_fallback") and model.get("type") != "Unigram":
            raise Unsupported(
                f"{path}: tokens of a {model.get('type')} tokenizer without bytes cannot be streamed.",
                "Use a byte-level BPE or a SentencePiece BPE tokenizer.",
            )
        self._later = self._tokenizer
        if prefix_of(data) == "first":
            self._later = type(self._tokenizer).from_str(json.dumps(_without_prefix(data)))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = [token.content for token in added.values() if token.special]
        vocabulary = self._tokenizer.get_vocab()
        self._lost = {byte for char, byte in BYTE_OF.items() if self._level and char not in vocabulary}
        self._added = {index: (token.content, token.special) for index, token in added.items()}

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a text, in which nothing is a special token and to which nothing is added."""
        tokenizer = self._tokenizer if start else self._later
        tokenizer.encode_special_tokens = True
        with tokenizer_errors(self._path):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def is_plain(self, text: str, *, start: bool = True) -> bool:
        """Whether every library reads a text alike: not one with the text of a special token, with NUL, which ends the
        strings of C, or with a byte that no token stands for; nor behind a special token what begins otherwise there.
        """
        alike = start or self._later is self._tokenizer
        return (
            alike and not any(token in text for token in ("\0", *self._special)) and not self._lost & {*text.encode()}
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; nothing for a special one and for an id without a token."""
        if token in self._added:
            content, special = self._added[token]
            return b"" if special else content.encode()
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._level:
            return bytes(BYTE_OF[char] for char in text) if BYTE_OF.keys() >= set(text) else text.encode()
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()


class SessionTokenizer:
    """A session's tokenizer, loaded when first asked.

    Args:
        path: ``tokenizer.json``, which gives the bytes of tokens.
        encoder: makes the runtime's own text → ids, special tokens parsed and BOS and EOS added, where these were
            proved at export.
    """

    def __init__(self, path: Path, extra: str, encoder: Callable[[], Callable[[str], list[int]]] | None = None) -> None:
        self._path, self._extra, self._encoder = path, extra, encoder

    @cached_property
    def _json(self) -> JsonTokenizer:
        return JsonTokenizer(self._path, self._extra)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]] | None:
        return self._encoder() if self._encoder else None

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a text, in which nothing is a special token and to which nothing is added: by the runtime's own
        tokenizer, unless it would read this text otherwise."""
        if self._encode is None or not self._json.is_plain(text, start=start):
            return self._json.tokenize(text, start=start)
        before, after = self._ends
        try:
            ids = self._encode(text)
        except RuntimeError as error:  # of a runtime's own tokenizer
            raise EdgekdError(f"{self._path}: the runtime's tokenizer fails: {error!s:.200}.") from error
        return ids[before : len(ids) - after]

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """How many ids the runtime puts before and behind a text."""
        assert self._encode is not None
        ids, bare = self._encode("a"), self._json.tokenize("a")
        before = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
        return before, len(ids) - before - len(bare)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for."""
        return self._json.token_bytes(token)


def prefix_of(data: Json) -> Literal["first", "every"] | None:
    """Before which texts a ``tokenizer.json``'s Metaspace puts a space."""
    step = data.get("pre_tokenizer") or {}
    if step.get("type") != "Metaspace":
        return None
    schemes: dict[str, Literal["first", "every"]] = {"first": "first", "always": "every"}
    return schemes.get(step.get("prepend_scheme", "always"))


def _without_prefix(data: Json) -> Json:
    """The ``tokenizer.json`` with a Metaspace that puts no space anywhere."""
    return {**data, "pre_tokenizer": {**data["pre_tokenizer"], "prepend_scheme": "never"}}


def _byte_level(data: Any) -> bool:
    """Whether the tokens are written in GPT-2's alphabet of bytes."""
    steps = json.dumps([data.get("decoder"), data.get("pre_tokenizer")])
    return '"ByteLevel"' in steps
