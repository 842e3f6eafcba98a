"""A teacher of another tokenizer, heard through the text that both read.

Where a token of the student and one of the teacher end at the same place, the teacher's next token is read as the
student's tokens that it is spelled with: each of the student's ids has the probability of all the teacher's tokens that
begin with it. Inside of a teacher's token, those count that go on as the text has so far. Where the student's next
token is several of the teacher's, the probability of just these is its own. (ULD, Boizard et al. 2024, compares sorted
probabilities instead; GOLD merges the tokens of such spans.)

It is no unbiased estimate: a token of the teacher that is shorter than the student would have cut counts for the
student's short token, but for the text that is really there. Where nothing is known, or the text itself would be
impossible, the text is the teacher.

Shapes: ``B`` windows of ``T`` tokens; ``V`` ids of the student, ``U`` of the teacher, spelled with at most ``M``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EdgekdError
from ..student import vocabulary_size
from ..tokenizer_file import BYTE_OF
from .losses import FLOOR, Teaching, log_probs
from .pack import documents
from .signals import OnlineTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LEAST = 0.01
"""Of the teacher's probability, that of the tokens which go on as the text has: below, the text alone is believed."""
NOTHING = 1e-9
"""A reading that gives the text itself no more is none."""
_END = b"\x00<end of text>"


def check_byte_level(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Refuse a tokenizer whose tokens are no bytes.

    Raises:
        EdgekdError: says so.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = whole["decoder"] or {}
    if not any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", []))):
        raise EdgekdError(
            f"{folder}: its tokenizer is not byte-level: its tokens cannot be compared with another's by their text.",
            "Use a student with the teacher's tokenizer.",
        )


class Spelling:
    """What each token of a byte-level tokenizer stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.size = tokenizer, vocabulary_size(tokenizer)
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self.bytes: list[bytes] = [b""] * self.size
        for token, i in tokenizer.get_vocab().items():
            plain = token in special or not set(token) <= BYTE_OF.keys()
            self.bytes[i] = token.encode() if plain else bytes(BYTE_OF[c] for c in token)
        self.special = {self.bytes[i]: i for i in special.values()}
        if tokenizer.eos_token_id is not None:
            self.special = {text: i for text, i in self.special.items() if i != tokenizer.eos_token_id}
            self.special[_END] = int(tokenizer.eos_token_id)  # whatever it is called
            self.bytes[self.special[_END]] = _END
        self.is_special = {i: text for text, i in self.special.items()}

    def ids(self, text: bytes) -> list[int]:
        """The ids of a piece of text, or of a special token; none where there is no way to write it."""
        if text in self.special:
            return [self.special[text]]
        try:
            found: list[int] = self.tokenizer.backend_tokenizer.encode(text.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError:
            char_of = {byte: c for c, byte in BYTE_OF.items()}
            try:
                pieces = self.tokenizer.backend_tokenizer.model.tokenize("".join(char_of[b] for b in text))
            except Exception:  # tokenizers' own, where a byte has no token
                return []
            found = [piece.id for piece in pieces]
        return found if b"".join(self.bytes[i] for i in found) == text else []


def spelled(teacher: Spelling, student: Spelling) -> Tensor:
    """Each of the teacher's tokens in the student's, int64 ``(U, M)``; -1 behind its end."""
    rows = [student.ids(text) if text else [] for text in teacher.bytes]
    table = torch.full((len(rows), max(map(len, rows))), -1)
    for row, ids in enumerate(rows):
        table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return table


class _Text(NamedTuple):
    """A document as the teacher reads it."""

    ids: list[int]
    ends: list[int]
    """Behind which byte of the student's text each ends."""


@dataclass(frozen=True)
class Aligned:
    """What the teacher says of a batch, as distributions over the student's ids."""

    said: Teaching
    table: Tensor
    """Of ``spelled``."""
    vocab_size: int
    labels: Tensor
    """int64 ``(B T,)``."""
    at: Tensor
    """int64 ``(B T,)``: the teacher's row behind the last end that both share; -1: there is none."""
    behind: Tensor
    """int64 ``(B T, M)``: the student's tokens since; -1 behind the last."""
    path: Tensor
    """int64 ``(B T, P, 2)``: row and id of the teacher's tokens that are the student's next one, where they are
    several; -1 behind the last."""

    def rows(self, index: Tensor) -> Tensor:
        """Logarithms of the distributions of some tokens, ``(len(index), V)``."""
        at = self.at[index]
        p = log_probs(self.said.rows(at.clamp_min(0))).exp()
        found = torch.zeros(len(index), self.vocab_size, dtype=p.dtype, device=p.device)
        levels = (self.behind[index] >= 0).sum(-1)
        for level in levels.unique().tolist():
            mine = (levels == level).nonzero().squeeze(-1)
            found[mine] = self._pushed(p[mine], self.behind[index[mine], :level])
        self._merge(found, index)
        found.clamp_min_(0)
        mass = found.sum(-1, keepdim=True)
        of_text = found.gather(-1, self.labels[index, None]).squeeze(-1)
        told = (mass.squeeze(-1) >= LEAST) & (of_text > NOTHING) & (at >= 0)
        text = nn.functional.one_hot(self.labels[index], self.vocab_size).to(found)
        return torch.where(told[:, None], found / mass.clamp_min(1e-9), text).log().clamp_min(FLOOR)

    def _pushed(self, p: Tensor, behind: Tensor) -> Tensor:
        """Probabilities ``(n, U)`` of the teacher's tokens that begin with the ids ``behind`` ``(n, L)``, as those of
        the student's ids that follow there."""
        level = behind.shape[1]
        found = torch.zeros(len(p), self.vocab_size, dtype=p.dtype, device=p.device)
        if level >= self.table.shape[1]:
            return found
        if level:
            p = p * (self.table[:, :level] == behind[:, None]).all(-1)
        follows = (self.table[:, level] >= 0).nonzero().squeeze(-1)
        return found.index_add_(1, self.table[follows, level], p[:, follows])

    def _merge(self, found: Tensor, index: Tensor) -> None:
        """Give the student's next token the probability of the teacher's that are it together, which was counted for
        what the first of them begins with."""
        several = (self.path[index, :, 0] >= 0).any(-1).nonzero().squeeze(-1)
        if not len(several):
            return
        path = self.path[index[several]]
        there = path[..., 0] >= 0
        logs = log_probs(self.said.rows(path[..., 0][there])).gather(-1, path[..., 1][there][:, None]).squeeze(-1)
        together = torch.zeros(there.shape, dtype=logs.dtype, device=logs.device)
        together[there] = logs
        mass = together.sum(-1).exp().to(found.dtype)
        first = self.table[path[:, 0, 1], 0]
        found[several, self.labels[index[several]]] += mass
        known = first >= 0
        found[several[known], first[known]] -= mass[known]


class AlignedTeacher:
    """A teacher signal by the text.

    Args:
        folder: the teacher's, for messages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedTokenizerFast,
        student: PreTrainedTokenizerFast,
        folder: Path,
    ) -> None:
        self._ours, self._theirs = Spelling(student), Spelling(teacher)
        self._teacher = OnlineTeacher(model, self._theirs.size)
        self._table = spelled(self._theirs, self._ours)
        self._folder = folder
        first = teacher("a").input_ids[0]
        self._before = [first] if first == teacher.bos_token_id else []

    @property
    def vocab_size(self) -> int:
        """``V``; see ``TeacherSignal``."""
        return self._ours.size

    @property
    def model(self) -> PreTrainedModel:
        """The teacher."""
        return self._teacher.model

    def teach(self, ids: Tensor, index: Tensor | None, positions: Tensor | None = None) -> Aligned:
        """See ``TeacherSignal``.

        Raises:
            EdgekdError: a document has more of the teacher's tokens than its context.
        """
        device, (rows, length) = ids.device, ids.shape
        given = [*documents(ids, positions)]
        texts = [self._read(ids[row, start:end].tolist()) for row, start, end in given]
        width = max(1, *(len(text.ids) for text in texts))
        self._check_room(width)
        theirs = torch.zeros(len(texts), width, dtype=torch.int64)
        at, deep = torch.full((rows * length,), -1), self._table.shape[1]
        behind, paths = torch.full((rows * length, deep), -1), dict[int, list[tuple[int, int]]]()
        for document, (text, (row, start, end)) in enumerate(zip(texts, given, strict=True)):
            theirs[document, : len(text.ids)] = torch.tensor(text.ids, dtype=torch.int64)
            for place, (base, since, path) in enumerate(self._places(ids[row, start:end].tolist(), text)):
                flat = row * length + start + place
                if base >= 0 and len(since) < deep:
                    at[flat] = document * width + base
                    behind[flat, : len(since)] = torch.tensor(since, dtype=torch.int64)
                if len(path) > 1:
                    paths[flat] = [(document * width + base + i, token) for i, token in enumerate(path)]
        together = torch.full((rows * length, max(map(len, paths.values()), default=1), 2), -1)
        for flat, steps in paths.items():
            together[flat, : len(steps)] = torch.tensor(steps)
        said = self._teacher.teach(theirs.to(device))
        table, *of_places = (t.to(device) for t in (self._table, ids.roll(-1, 1).flatten(), at, behind, together))
        return Aligned(said, table, self.vocab_size, *of_places)

    def _check_room(self, width: int) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None) or width
        if width > most:
            raise EdgekdError(
                f"{self._folder}: a text has {width} of the teacher's tokens, its context holds {most}.",
                "Lower data.context.",
            )

    def _read(self, ids: Sequence[int]) -> _Text:
        """A document of the student's ids in the teacher's; what cannot be written in them is left out."""
        text = _Text([*self._before], [0] * len(self._before))
        for start, piece in _pieces(ids, self._ours):
            end = start
            for token in self._theirs.ids(piece):
                end += len(self._theirs.bytes[token])
                text.ids.append(token)
                text.ends.append(end)
        return text

    def _places(self, ids: Sequence[int], text: _Text) -> Iterator[tuple[int, list[int], list[int]]]:
        """Of each token of the student: the teacher's row behind the last end that both share, the student's tokens
        since, and the teacher's tokens that are the student's next one."""
        row_of = {end: row for row, end in enumerate(text.ends)}
        base, since, end = -1, list[int](), 0
        for place, token in enumerate(ids):
            end += len(self._ours.bytes[token])
            since.append(token)
            if end in row_of:
                base, since = row_of[end], []
            path: list[int] = []
            if not since and place + 1 < len(ids):
                last = row_of.get(end + len(self._ours.bytes[ids[place + 1]]))
                path = [] if last is None else text.ids[base + 1 : last + 1]
            yield base, [*since], path


def _pieces(ids: Sequence[int], spelling: Spelling) -> Iterator[tuple[int, bytes]]:
    """The text of some ids between special tokens, and these, each with its first byte; whole characters alone."""
    at, begun, text = 0, 0, b""
    for token in [*ids, None]:
        if token is not None and token not in spelling.is_special:
            text += spelling.bytes[token]
            continue
        if text:
            yield _whole(begun, text)
        at = begun + len(text)
        if token is not None:
            yield at, spelling.bytes[token]
            at += len(spelling.bytes[token])
        begun, text = at, b""


def _whole(at: int, text: bytes) -> tuple[int, bytes]:
    """Without the parts of characters at both ends, which a window has cut."""
    while text and text[0] & 0xC0 == 0x80:
        at, text = at + 1, text[1:]
    return at, text.decode("utf-8", "ignore").encode() if _is_cut(text) else text


def _is_cut(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.end == len(text)
    return False
