"""Where the teacher's knowledge comes from, and the proof that teacher and student speak of the same tokens.

Shapes: ``B`` windows, ``T`` tokens, ``V`` the ids that teacher and student share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from ..checkpoint import Checkpoint
from ..errors import EdgekdError
from ..student import load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .head import Outputs, WithHead
    from .losses import Teaching


class TeacherSignal(Protocol):
    """What the loop knows of a teacher."""

    @property
    def vocab_size(self) -> int:
        """``V``: rows beyond it are padding, and are cut from teacher and student alike."""
        ...

    def teach(self, ids: Tensor, index: Tensor | None, positions: Tensor | None = None) -> Teaching:
        """What it says of int64 ids ``(B, T)``, without gradient; see ``losses.Teaching``.

        Args:
            index: the numbers ``(B,)`` of the windows in the training split that these are, or go on from; None for
                text of another kind.
            positions: as ``pack.Batch`` has them.
        """
        ...


@dataclass(frozen=True)
class OnlineTeacher:
    """The teacher itself, run beside the student. The caller's autocast decides its precision.

    Args:
        model: the teacher; it is moved to the device of the ids.
        vocab_size: ids shared with the student, as ``check_same_tokenizer`` gives them.
    """

    model: PreTrainedModel
    vocab_size: int

    @cached_property
    def _with_head(self) -> WithHead:
        from .head import with_head

        return with_head(self.model)

    def teach(self, ids: Tensor, index: Tensor | None = None, positions: Tensor | None = None) -> Outputs:
        """Its hidden states and head; see ``TeacherSignal``."""
        import torch

        if self.model.device != ids.device:
            self.model.to(ids.device)  # type: ignore[arg-type]
        with torch.inference_mode():
            return replace(self._with_head.outputs(ids, positions), vocab_size=self.vocab_size)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` of int64 ids ``(B, T)``, without gradient."""
        import torch

        return self.teach(ids).rows(torch.arange(ids.numel(), device=ids.device)).unflatten(0, ids.shape)


class _Part(NamedTuple):
    """What one teacher says of some windows of a batch."""

    said: Teaching
    place: Tensor
    """int64 ``(B,)``: where it has each window; -1: it was not asked."""
    share: Tensor
    """``(B,)``: what it counts for."""


@dataclass(frozen=True)
class Averaged:
    """The mean of what several teachers say of a batch."""

    parts: Sequence[_Part]
    length: int
    """``T``."""

    def rows(self, index: Tensor) -> Tensor:
        """Logarithms of the mean distribution of some tokens, ``(len(index), V)``."""
        import torch

        from .losses import FLOOR, log_probs

        windows, tokens = index // self.length, index % self.length
        mean: Tensor | None = None
        for part in self.parts:
            mine = (part.place[windows] >= 0).nonzero().squeeze(-1)
            if not len(mine):
                continue
            of = windows[mine]
            found = log_probs(part.said.rows(part.place[of] * self.length + tokens[mine]))
            found += part.share[of].log().unsqueeze(-1)
            if mean is None:
                mean = torch.full((len(index), found.shape[1]), FLOOR, dtype=found.dtype, device=found.device)
            mean[mine] = torch.logaddexp(mean[mine], found)
        assert mean is not None  # every source has a teacher
        return mean


@dataclass(frozen=True)
class Teachers:
    """Several teachers: of a window the mean of those who teach its source.

    Args:
        teachers: of one vocabulary.
        shares: of each source, what each teacher counts for; together one.
        sources: int ``(N,)``, that of each window of the training split; None: all are the first.
    """

    teachers: Sequence[OnlineTeacher]
    shares: Sequence[Sequence[float]]
    sources: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """``V``; see ``TeacherSignal``."""
        return self.teachers[0].vocab_size

    def of(self, source: int) -> Self:
        """Them on text of one source."""
        return replace(self, shares=[self.shares[source]], sources=None)

    def teach(self, ids: Tensor, index: Tensor | None, positions: Tensor | None = None) -> Averaged:
        """See ``TeacherSignal``."""
        import torch

        sources = torch.zeros(len(ids), dtype=torch.int64)
        if self.sources is not None:
            if index is None:
                raise ValueError("which teacher teaches hangs on the source: ask those of one")
            sources = self.sources[index.cpu()].long()
        shares = torch.tensor(self.shares)[sources].to(ids.device)
        return Averaged([*self._parts(ids, positions, shares)], ids.shape[1])

    def _parts(self, ids: Tensor, positions: Tensor | None, shares: Tensor) -> Iterator[_Part]:
        import torch

        for teacher, share in zip(self.teachers, shares.T, strict=True):
            mine = share.nonzero().squeeze(-1)
            if len(mine):
                place = torch.full_like(share, -1, dtype=torch.int64)
                place[mine] = torch.arange(len(mine), device=ids.device)
                said = teacher.teach(ids[mine], None, None if positions is None else positions[mine])
                yield _Part(said, place, share)


def check_same_tokenizer(
    teacher_folder: Path, student_folder: Path, *, trust_remote_code: bool = False, trust_student: bool = False
) -> int:
    """Prove that both models read text as the same ids: a student's, or another teacher's.

    Compared are the id of every token string, the merges, the normalizer and the pre-tokenizer. Embedding rows
    beyond the ids (padding) may differ.

    Args:
        trust_remote_code: of the teacher.
        trust_student: of the other.

    Returns:
        The number ``V`` of shared ids: one more than the largest.

    Raises:
        EdgekdError: names the first difference, or an embedding with fewer rows than ids.
    """
    teacher = load_tokenizer(teacher_folder, trust_remote_code=trust_remote_code)
    student = load_tokenizer(student_folder, trust_remote_code=trust_student)
    remedy = (
        "Distilling on logits needs one vocabulary: use models with one tokenizer, or set teacher.alignment to text, "
        "by which a student that is a checkpoint keeps its own."
    )
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    for token in sorted(ours.keys() | theirs.keys(), key=lambda t: (ours.get(t, theirs.get(t)), t)):
        if ours.get(token) != theirs.get(token):
            raise EdgekdError(
                f"{student_folder}: token {token!r} is {_id(theirs, token)}, "
                f"but {_id(ours, token)} in {teacher_folder}.",
                remedy,
            )
    rules, other = _rules(teacher, teacher_folder), _rules(student, student_folder)
    for key, rule in rules.items():
        if rule != other[key]:
            shown = [json.dumps(value, ensure_ascii=False)[:80] for value in _first_difference(rule, other[key])]
            raise EdgekdError(
                f"{student_folder}: the tokenizer's {key} is {shown[1]}, but {shown[0]} in {teacher_folder}.", remedy
            )
    shared = vocabulary_size(teacher)
    for folder in (teacher_folder, student_folder):
        rows = Checkpoint(folder).decoder.vocab_size
        if rows is not None and rows < shared:
            raise EdgekdError(
                f"{folder}: the embedding has {rows} rows for {shared} ids of the tokenizer (config.json: vocab_size).",
                "Resize the embedding.",
            )
    return shared


def _id(vocab: dict[str, int], token: str) -> str:
    return f"id {vocab[token]}" if token in vocab else "absent"


def _rules(tokenizer: Any, folder: Path) -> dict[str, object]:
    """How text becomes tokens, beside the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EdgekdError(f"{folder}: its tokenizer has no tokenizer.json form.", "Convert it to a fast tokenizer.")
    whole = json.loads(backend.to_str())
    return {
        "normalizer": whole["normalizer"],
        "pre_tokenizer": whole["pre_tokenizer"],
        "merges": whole["model"].get("merges"),
    }


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    """The innermost first pair of values in which two JSON documents differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next(_first_difference(a[key], b[key]) for key in a if a[key] != b[key])
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next(_first_difference(x, y) for x, y in zip(a, b, strict=True) if x != y)
    return a, b
