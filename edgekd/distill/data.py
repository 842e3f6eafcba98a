"""Text in, training windows out: read, split, tokenize, pack.

Shapes: ``N`` windows of ``T`` tokens; ``ids`` int32 ``(N, T)``, ``loss_mask`` uint8 ``(N, T)``, 1 where the token is
one to learn (so position t is trained on where ``loss_mask[t + 1]`` is 1).
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..errors import EdgekdError, SpecError
from ..files import atomic_file
from ..privacy import online
from .chat import Chat, ChatReader, Unusable
from .corpus import stdlib_corpus

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from ..spec import DataSpec

SPLITS = ("train", "validation", "test")
MOST_SKIPPED_SHARE = 0.05
Document = str | Chat
_BATCH_DOCUMENTS = 64
_SHOWN_REASONS = 3
_PIECE_CHARACTERS = 32_768
_LEAST_PIECE_CHARACTERS = 256
_PIECES = 40  # of a small text: enough that every split gets some
_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Windows:
    """The windows of one split, memory-mapped."""

    ids: Tensor
    """int32 ``(N, T)``."""
    loss_mask: Tensor
    """uint8 ``(N, T)``."""

    def __len__(self) -> int:
        return self.ids.shape[0]


def load_windows(folder: Path, split: str) -> Windows:
    """The windows that ``prepare`` wrote for ``split`` ("train", "validation" or "test").

    Raises:
        EdgekdError: the file is missing or truncated.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / f"{split}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return Windows(file.get_tensor("ids"), file.get_tensor("loss_mask"))
    except (OSError, SafetensorError) as error:
        raise EdgekdError(f"{path}: not readable ({error}).", "Prepare the data again.") from error


def prepare(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerFast,
    out_dir: Path,
    *,
    seed: int,
    base: Path,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, object]:
    """Write ``train.safetensors``, ``validation.safetensors`` and ``test.safetensors`` into ``out_dir``.

    Documents are joined by the end-of-text id and cut to windows of ``spec.context`` tokens; the rest of a split
    that fills no window, and windows without a token to learn, are dropped. A chat is rendered by the tokenizer's
    template, and only what the assistant gave, tool calls too, is learned, with its end token. Chats that the template
    refuses, and rows that are none, are counted by reason.

    Args:
        seed: with a document's own text, decides its split (the standard library is split by module).
        base: folder that relative paths start from.
        on_progress: called with the number of documents read so far.

    Returns:
        Figures: documents, tokens, windows and bytes per split; duplicates and skipped documents; under ``warnings``,
        sentences that the user must see.

    Raises:
        SpecError: a file is missing, there is no such column or it is of another type, a split fills no window, or
            more than 5 % of the rows are unusable and ``spec.allow_skipped`` is not set.
    """
    if tokenizer.eos_token_id is None:
        raise SpecError("teacher.model: its tokenizer has no end-of-text token to join documents with.")
    if spec.chat and not tokenizer.chat_template:
        raise SpecError("data.chat: the teacher's tokenizer has no chat template.", "Add chat_template.jinja to it.")
    skips: Counter[str] = Counter()
    packers = {split: _Packer(tokenizer, spec, skips) for split in SPLITS}
    dropped = Counter(not_utf8_skipped=0, duplicates_dropped=0)
    figures: dict[str, object] = {}
    if spec.source == "stdlib":
        corpus = stdlib_corpus(spec.include_tests)
        figures |= corpus.stats
        parts: Iterable[tuple[str, Document]] = ((s, text) for s in SPLITS for text in getattr(corpus, s))
    else:
        parts = _split(_documents(spec, base, dropped, skips), spec, seed, dropped)
    for count, (split, document) in enumerate(parts, 1):
        packers[split].add(document)
        if on_progress and count % _BATCH_DOCUMENTS == 0:
            on_progress(count)
    windows = {split: packer.windows() for split, packer in packers.items()}
    figures = {**dropped, **figures} | _skipped(skips, sum(packer.documents for packer in packers.values()), spec)
    for split, packer in packers.items():
        figures[f"{split}_documents"], figures[f"{split}_tokens"] = packer.documents, packer.tokens
        figures[f"{split}_bytes"], figures[f"{split}_windows"] = packer.bytes, len(windows[split][0])
        if not len(windows[split][0]):
            raise SpecError(
                f"data: the {split} split of {_named(spec)} has {packer.documents} documents with {packer.tokens} "
                f"tokens, less than one window of data.context {spec.context} to learn from.",
                "Give more text, a smaller data.context, or larger data.validation_share and data.test_share.",
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, (ids, mask) in windows.items():
        _write(out_dir / f"{split}.safetensors", ids, mask)
    return figures


def _skipped(skips: Counter[str], documents: int, spec: DataSpec) -> dict[str, object]:
    """Figures of the rows that nothing is learned from.

    Raises:
        SpecError: they are too many.
    """
    count = skips.total()
    reasons = "; ".join(f"{reason} ({number})" for reason, number in skips.most_common(_SHOWN_REASONS))
    words = f"{count} of {count + documents} rows of {_named(spec)} are unusable and were skipped: {reasons}."
    if count > MOST_SKIPPED_SHARE * (count + documents) and not spec.allow_skipped:
        raise SpecError(f"data: {words}", "Mend them, or go on with the rest: --allow-skipped.")
    if not documents:
        said = f" {words}" if count else ""
        raise SpecError(f"data: {_named(spec)} holds no usable document.{said}", "Check data.paths and data.column.")
    return {
        "unusable_chats_skipped": count,
        "skipped_by_reason": dict(skips.most_common()),
        "warnings": [words] if count else [],
    }


@dataclass
class _Packer:
    """One split on its way to windows; documents are tokenized in batches."""

    tokenizer: PreTrainedTokenizerFast
    spec: DataSpec
    skips: Counter[str]
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    waiting: list[Document] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = ChatReader(self.tokenizer)

    def add(self, document: Document) -> None:
        self.waiting.append(document)
        if len(self.waiting) == _BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        batch, self.waiting = self.waiting, []
        if not batch:
            return
        texts: list[str] = []
        spans: list[list[tuple[int, int]] | None] = []
        for document in batch:
            try:
                text, learned = (document, None) if isinstance(document, str) else self.reader.read(document)
            except Unusable as reason:
                self.skips[str(reason)] += 1
                continue
            texts.append(text)
            spans.append(learned)
        if not texts:
            return
        # A template writes its own BOS.
        encoded = self.tokenizer(
            texts, add_special_tokens=not self.spec.chat, return_offsets_mapping=self.spec.chat, verbose=False
        )
        eos = self.tokenizer.eos_token_id
        for i, (text, learned) in enumerate(zip(texts, spans, strict=True)):
            ids = encoded["input_ids"][i]
            mask = [1] * len(ids) if learned is None else _mask(encoded["offset_mapping"][i], learned)
            if not ids or ids[-1] != eos:
                ids, mask = [*ids, eos], [*mask, int(learned is None)]
            self.ids.append(np.array(ids, np.int32))
            self.masks.append(np.array(mask, np.uint8))
            self.documents += 1
            self.tokens += len(ids)
            self.bytes += len(text.encode("utf-8", "surrogatepass"))

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """``ids`` and ``loss_mask``, ``(N, T)``."""
        self.flush()
        width = self.spec.context
        count = self.tokens // width
        if not count:
            return np.zeros((0, width), np.int32), np.zeros((0, width), np.uint8)
        ids = np.concatenate(self.ids)[: count * width].reshape(count, width)
        mask = np.concatenate(self.masks)[: count * width].reshape(count, width)
        # The first token of a window follows nothing, so it cannot be learned.
        useful = mask[:, 1:].any(1)
        return ids[useful], mask[useful]


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that begins in a span; one that begins before it is the prompt's at run time too."""
    return [int(stop > start and any(a <= start < b for a, b in spans)) for start, stop in offsets]


def _split(
    documents: Iterable[Document], spec: DataSpec, seed: int, dropped: Counter[str]
) -> Iterator[tuple[str, Document]]:
    """The split of each document, by the hash of seed and text; exact duplicates are dropped and counted."""
    seen: set[bytes] = set()
    for document in documents:
        text = document if isinstance(document, str) else document.text
        digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
        if digest in seen:
            dropped["duplicates_dropped"] += 1
            continue
        seen.add(digest)
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < spec.test_share:
            yield "test", document
        elif place < spec.test_share + spec.validation_share:
            yield "validation", document
        else:
            yield "train", document


def _documents(spec: DataSpec, base: Path, dropped: Counter[str], skips: Counter[str]) -> Iterator[Document]:
    """The documents of every source but the standard library; empty texts are left out, empty chats counted."""
    if spec.source == "text":
        yield from _text_documents(spec.files(base), dropped)
        return
    for number, row in enumerate(_rows(spec, base), 1):
        if spec.column not in row and (number == 1 or spec.source == "parquet"):
            raise SpecError(
                f"data.column: {_named(spec)} has no column {spec.column!r}.", f"It has: {', '.join(map(str, row))}."
            )
        value = row.get(spec.column)
        if spec.chat:
            try:
                yield Chat(_messages(value, spec), _tools(row.get("tools")))
            except Unusable as reason:
                skips[str(reason)] += 1
        elif value is not None and value != "" and value != []:
            yield _text(value, spec, number)


def _rows(spec: DataSpec, base: Path) -> Iterator[dict[str, object]]:
    """The rows of every source, each with the keys that it really has."""
    files = spec.files(base) if spec.source != "hub" else []
    if spec.source == "jsonl":
        for path in files:
            yield from _json_rows(path)
    else:
        for row in _hub_rows(spec) if spec.source == "hub" else _parquet_rows(spec, files):
            # A table gives every row the keys of all rows; whether an empty one was there, it cannot tell.
            yield {key: _without_nulls(value) for key, value in row.items()}


def _json_rows(path: Path) -> Iterator[dict[str, object]]:
    """Objects, one a line or all in one list, as they stand; a byte order mark and compression are seen."""
    opener: Callable[..., IO[str]] = _OPENERS.get(path.suffix, open)
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the error names it
                if line.startswith("["):
                    yield from map(_json_object, json.loads(line + file.read()))
                elif line.strip():
                    yield _json_object(json.loads(line))
    except (OSError, EOFError, lzma.LZMAError, ValueError, RecursionError) as error:
        raise SpecError(f"data: {path} cannot be read as jsonl: line {number}: {error}.", "Mend the file.") from error


def _json_object(value: Any) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    json.dumps(value, ensure_ascii=False).encode()  # half a character is a ValueError
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _hub_rows(spec: DataSpec) -> Iterator[dict[str, object]]:
    try:
        import datasets
    except ImportError as error:
        from ..errors import MissingExtra

        raise MissingExtra("datasets", "train") from error
    try:
        with online():
            yield from datasets.load_dataset(spec.name, split="train", streaming=True)
    except Exception as error:  # datasets raises many kinds, some of its own, some of the network's
        raise _unreadable(spec, _named(spec), error) from error


def _parquet_rows(spec: DataSpec, files: Sequence[Path]) -> Iterator[dict[str, object]]:
    """The rows of each file by its own schema, and of its columns only those that are asked for: a column that is empty
    in one file and text in the next is nobody's business."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        from ..errors import MissingExtra

        raise MissingExtra("pyarrow", "train") from error
    for path in files:
        if not path.stat().st_size:
            continue
        try:
            with ParquetFile(path) as file:
                names = file.schema_arrow.names
                if spec.column not in names:
                    yield dict.fromkeys(names)
                    continue
                for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=[spec.column, *({"tools"} & {*names})]):
                    yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise _unreadable(spec, str(path), error) from error


def _unreadable(spec: DataSpec, what: str, error: Exception) -> SpecError:
    cause = error.__cause__ or error
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return SpecError(f"data: {what} cannot be read as {spec.source}: {reason}", "Mend the file.")


def _text_documents(files: Iterable[Path], dropped: Counter[str]) -> Iterator[str]:
    """A file is a document; a long one is cut, so that a single file can be split too."""
    files = list(files)
    most = sum(path.stat().st_size for path in files) // _PIECES
    most = min(max(most, _LEAST_PIECE_CHARACTERS), _PIECE_CHARACTERS)
    for path in files:
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError:
            dropped["not_utf8_skipped"] += 1
            continue
        yield from _pieces(text, most)


def _pieces(text: str, most: int) -> Iterator[str]:
    """A text cut at blank lines into pieces of about ``most`` characters; one without blank lines at its line ends,
    and one that is a single line where it must be."""
    start = 0
    while start < len(text):
        end = after = start + most
        for mark in ("\n\n", "\n", " "):
            found = text.find(mark, end, start + 4 * most)
            if found >= 0:
                end, after = found, found + len(mark)
                break
        if text[start:end].strip():
            yield text[start:end]
        start = after


def _text(value: Any, spec: DataSpec, number: int) -> str:
    if isinstance(value, str):
        return value
    hint = "Set data.chat: true for a chat." if isinstance(value, list) else "Name a column of text."
    raise SpecError(
        f"data.column: {spec.column!r} holds {type(value).__name__}, not text ({_named(spec)}, row {number}).", hint
    )


def _messages(value: Any, spec: DataSpec) -> list[dict[str, object]]:
    """The messages of a chat, without their empty keys, as transformers hands them to a template."""
    wanted = f"{spec.column!r} is not a chat, which is a list of mappings with role and content"
    if value is None or value == "" or value == []:
        raise Unusable(f"{spec.column!r} is empty")
    if not isinstance(value, list):
        raise Unusable(f"{wanted}: it is a {type(value).__name__}")
    return [_message(message, wanted) for message in value]


def _message(message: Any, wanted: str) -> dict[str, object]:
    """One turn; ShareGPT's ``from`` and ``value`` under the names that templates read."""
    if not isinstance(message, dict):
        raise Unusable(f"{wanted}: a message is a {type(message).__name__}")
    plain = {key: item for key, item in message.items() if item is not None}
    if "role" not in plain and {"from", "value"} <= plain.keys():
        role, content = plain.pop("from"), plain.pop("value")
        plain |= {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
    if not isinstance(plain.get("role"), str):
        raise Unusable(f"{wanted}: a message has {', '.join(map(str, message)) or 'nothing'}")
    return plain


def _tools(value: Any) -> list[dict[str, object]] | None:
    """The tools of a row, which some data sets hold as JSON in a string; None where it has none."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value else value
    except (ValueError, RecursionError) as error:
        raise Unusable("its tools are not JSON") from error
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise Unusable("its tools are not a list of JSON schemas")
    return tools or None


def _named(spec: DataSpec) -> str:
    return {"stdlib": "the standard library", "hub": str(spec.name)}.get(spec.source) or ", ".join(spec.paths)


def _write(path: Path, ids: np.ndarray, mask: np.ndarray) -> None:
    from safetensors.numpy import save_file

    with atomic_file(path) as temporary:
        save_file({"ids": ids, "loss_mask": mask}, temporary)
