"""Documents as tokens, by this process or by several."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .chat import Chat, ChatReader, Unusable
from .pack import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Document = str | Chat
Labelled = tuple[str, Document]
"""A document and where it goes."""
_BATCH = 64
_AHEAD = 4  # batches that each process may be ahead of who packs them


class EncodedBatch(NamedTuple):
    """Some documents as tokens, in order."""

    documents: list[tuple[str, Encoded]]
    """With where they go."""
    skips: dict[str, int]
    """How many were left out, by the reason."""


class Encoder:
    """Tokenizes documents, and ends each with the end-of-text id.

    Args:
        chat: whether they are chats, whose template writes its own BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
        self._tokenizer, self._chat, self._reader = tokenizer, chat, ChatReader(tokenizer)

    def encode(self, batch: Sequence[Labelled]) -> EncodedBatch:
        """Tokens of each document that something can be learned from."""
        skips: Counter[str] = Counter()
        read: list[tuple[str, str, list[tuple[int, int]] | None]] = []
        for label, document in batch:
            try:
                text, learned = (document, None) if isinstance(document, str) else self._reader.read(document)
            except Unusable as reason:
                skips[str(reason)] += 1
                continue
            read.append((label, text, learned))
        if not read:
            return EncodedBatch([], dict(skips))
        texts = [text for _, text, _ in read]
        encoded = self._tokenizer(
            texts, add_special_tokens=not self._chat, return_offsets_mapping=self._chat, verbose=False
        )
        offsets = encoded["offset_mapping"] if self._chat else [None] * len(read)
        rows = zip(read, encoded["input_ids"], offsets, strict=True)
        return EncodedBatch(
            [(label, self._one(ids, at, text, spans)) for (label, text, spans), ids, at in rows], dict(skips)
        )

    def _one(
        self,
        ids: list[int],
        offsets: Sequence[tuple[int, int]] | None,
        text: str,
        spans: Sequence[tuple[int, int]] | None,
    ) -> Encoded:
        learned: list[int] = [1] * len(ids)
        turns: list[int] | None = None
        if spans is not None and offsets is not None:
            learned, turns = _learned(offsets, spans), _turns(offsets, text, spans)
        eos = self._tokenizer.eos_token_id
        if not ids or ids[-1] != eos:
            ids, learned = [*ids, eos], [*learned, int(spans is None)]
        size = len(text.encode("utf-8", "surrogatepass"))
        return Encoded(np.array(ids, np.int32), np.array(learned, np.uint8), turns, size)


def _learned(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that begins in a span; one that begins before it is the prompt's at run time too."""
    return [int(stop > start and any(a <= start < b for a, b in spans)) for start, stop in offsets]


def _turns(offsets: Sequence[tuple[int, int]], text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The first token behind each answer and the blanks after it, where there is one."""
    behind = [len(text) - len(text[end:].lstrip()) for _, end in spans]
    firsts = [next((i for i, (start, _) in enumerate(offsets) if start >= place), None) for place in behind]
    return [first for first in firsts if first is not None]


def encode_all(
    documents: Iterable[Labelled], tokenizer: PreTrainedTokenizerFast, *, chat: bool, processes: int
) -> Iterator[EncodedBatch]:
    """Every document as tokens, in order, whatever the number of processes; few batches are in memory at a time."""
    rest = iter(documents)
    batches = iter(lambda: list(islice(rest, _BATCH)), [])
    if processes == 1:
        yield from map(Encoder(tokenizer, chat).encode, batches)
        return
    # Spawned, because threads of the tokenizers library do not survive a fork.
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(tokenizer, chat)
    ) as pool:
        waiting: deque[Future[EncodedBatch]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) >= _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_encoder: Encoder | None = None


def _begin(tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    """Of a process that encodes: it has one core."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer, chat)


def _encode(batch: list[Labelled]) -> EncodedBatch:
    assert _encoder is not None
    return _encoder.encode(batch)
