"""Chats, prose and code, for who names no text: a model that talks with people is not calibrated on code alone.

The chats are rendered by the model's own template. Chats and part of the prose were written for edgekd; the rest of
the prose is in the public domain (``texts/README.md``); the code is the running interpreter's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..conversation import ChatTemplate, TemplateRefused
from .chat import TRAINING_TIME
from .corpus import SPLITS, stdlib_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEXTS = Path(__file__).parent / "texts"
FILES = tuple(_TEXTS / name for name in ("chats.txt", "prose.txt"))
_PIECE_CHARACTERS = 2048
_CODE_PIECES = {"train": 40, "validation": 4, "test": 8}
"""As many characters as there are of prose, roughly."""
_BUCKETS = ("test", "test", "validation", *["train"] * 9)
_TURN, _END = "### ", "=====\n"


def mixed_documents(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, str]]:
    """Each document with its split, which its own text decides; no document lies in two."""
    for chat in read_chats():
        yield _split_of(chat[-1]["content"]), rendered(chat, tokenizer)
    for piece in _paragraphs(_read("prose.txt")):
        yield _split_of(piece), piece
    corpus = stdlib_corpus()
    for split in SPLITS:
        for module in _spread(getattr(corpus, split), _CODE_PIECES[split]):
            yield split, _middle(module)


def read_chats() -> list[list[dict[str, str]]]:
    """The messages of each chat."""
    return [
        [{"role": role, "content": content.strip()} for role, content in map(_turn, chat.split(_TURN)[1:])]
        for chat in _read("chats.txt").split(_END)
    ]


def _turn(text: str) -> tuple[str, str]:
    role, _, content = text.partition("\n")
    return role, content


def rendered(chat: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> str:
    """A chat as the model's template writes it, without its system message where the template wants none, and as
    plain lines where there is no template or it takes no such chat."""
    if tokenizer.chat_template:
        template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map, TRAINING_TIME)
        for messages in (chat, [message for message in chat if message["role"] != "system"]):
            try:
                text = template.render(messages).text
            except TemplateRefused:
                continue
            # Who tokenizes puts its own in front.
            return text.removeprefix(str(tokenizer.bos_token or ""))
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in chat)


def _read(name: str) -> str:
    return (_TEXTS / name).read_text("utf-8")


def _split_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return _BUCKETS[int.from_bytes(digest[:4], "big") % len(_BUCKETS)]


def _paragraphs(text: str) -> Iterator[str]:
    """Whole paragraphs, put together to pieces."""
    piece: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= _PIECE_CHARACTERS:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def _spread(modules: Sequence[str], count: int) -> list[str]:
    """Some modules that are long enough, evenly spaced."""
    long = [module for module in modules if len(module) > 2 * _PIECE_CHARACTERS]
    return [long[i * len(long) // count] for i in range(min(count, len(long)))]


def _middle(module: str) -> str:
    """A piece from about the middle of a module, whole lines: the beginnings are much alike."""
    start = module.find("\n", len(module) // 2 - _PIECE_CHARACTERS // 2) + 1
    return module[start : module.find("\n", start + _PIECE_CHARACTERS) + 1] or module[start:]
