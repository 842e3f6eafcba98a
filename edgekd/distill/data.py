"""Text in, training windows out: read, split, tokenize, pack."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from ..errors import SpecError
from ..privacy import online
from ..student import vocabulary_size
from .chat import Chat, Unusable
from .corpus import stdlib_corpus
from .encode import Document, Labelled, encode_all
from .mixed import mixed_documents
from .pack import Packer, Windows, load_windows, save_windows

__all__ = ["SPLITS", "Windows", "load_windows", "prepare"]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ..spec import DataSpec, TextSource

SPLITS = ("train", "validation", "test")
MOST_SKIPPED_SHARE = 0.05
_BATCH_ROWS = 64
_BYTES_WORTH_PROCESSES = 64 * 2**20  # below, starting them takes longer than they save
_SHOWN_REASONS = 3
_PIECE_CHARACTERS = 32_768
_LEAST_PIECE_CHARACTERS = 256
_PIECES = 40  # of a small text: enough that every split gets some
_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def prepare(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerFast,
    out_dir: Path,
    *,
    seed: int,
    base: Path,
    splits: Collection[str] = SPLITS,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, object]:
    """Write ``train.safetensors``, ``validation.safetensors`` and ``test.safetensors`` into ``out_dir``.

    Texts are joined by the end-of-text id and cut to windows of ``spec.context`` tokens; the rest of a split that
    fills no window, and windows without a token to learn, are dropped. A chat is rendered by the tokenizer's template
    and cut between an answer and the next question, unless the two are longer than a window; only what the assistant
    gave, tool calls too, is learned, with its end token. Chats that the template refuses, and rows that are none, are
    counted by reason. Windows of a mixture hold text of one source each.

    Args:
        seed: with a document's own text, decides its split (the standard library is split by module).
        base: folder that relative paths start from.
        splits: those that will be read, of which none may be empty.
        on_progress: called with the number of documents read so far.

    Returns:
        Figures: documents, tokens, windows and bytes per split; duplicates and skipped documents; under ``sources``
        the same of each source of a mixture; under ``warnings``, sentences that the user must see.

    Raises:
        SpecError: a file is missing, there is no such column or it is of another type, one of ``splits`` fills no
            window, or more than 5 % of the rows are unusable and ``spec.allow_skipped`` is not set.
    """
    if tokenizer.eos_token_id is None:
        raise SpecError("teacher.model: its tokenizer has no end-of-text token to join documents with.")
    if any(source.chat for source in spec.each.values()) and not tokenizer.chat_template:
        raise SpecError("data.chat: the teacher's tokenizer has no chat template.", "Add chat_template.jinja to it.")
    reading = _Reading(spec, tokenizer, seed, base, splits, on_progress)
    with ExitStack() as opened:
        of_sources = {name: {s: _packer(spec, tokenizer, out_dir.parent) for s in SPLITS} for name in spec.each}
        for packers in of_sources.values():
            for packer in packers.values():
                opened.callback(packer.close)
        figures = {name: reading.read(source, of_sources[name]) for name, source in spec.each.items()}
        out_dir.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            packed = [packers[split] for packers in of_sources.values()]
            save_windows(out_dir / f"{split}.safetensors", packed, spec.weights)
    if not spec.sources:
        return next(iter(figures.values()))
    return _summed(figures.values()) | {"sources": figures}


class _Reading:
    """What reads one source after another, of which none gets a document that another gave."""

    def __init__(
        self,
        spec: DataSpec,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        base: Path,
        splits: Collection[str],
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self._spec, self._tokenizer, self._seed, self._base = spec, tokenizer, seed, base
        self._splits, self._on_progress = splits, on_progress
        self._seen: set[bytes] = set()
        self._before = 0

    def read(self, source: TextSource, packers: Mapping[str, Packer]) -> dict[str, object]:
        """Pack a source; its figures."""
        spec, skips = self._spec, Counter[str]()
        dropped = Counter(not_utf8_skipped=0, duplicates_dropped=0)
        figures: dict[str, object] = {}
        if source.source == "stdlib":
            corpus = stdlib_corpus(source.include_tests)
            figures |= corpus.stats
            documents: Iterable[Labelled] = ((s, text) for s in SPLITS for text in getattr(corpus, s))
        elif source.source == "mixed":
            documents = mixed_documents(self._tokenizer)
        else:
            read = _documents(source, self._base, dropped, skips)
            documents = _split(read, spec, self._seed, self._seen, dropped)
        self._pack(documents, source, packers, skips)
        count = sum(packer.documents for packer in packers.values())
        self._before += count
        warnings = _warnings(skips, count, source, spec.allow_skipped)
        figures = {**dropped, **figures, "unusable_chats_skipped": skips.total()}
        figures["skipped_by_reason"] = dict(skips.most_common())
        for split, packer in packers.items():
            figures |= _of_split(split, packer, source, spec.context, needed=split in self._splits)
        return figures | {"warnings": warnings}

    def _pack(
        self, documents: Iterable[Labelled], source: TextSource, packers: Mapping[str, Packer], skips: Counter[str]
    ) -> None:
        """Tokenize the documents, each into the packer of its split."""
        processes = self._spec.processes or _processes(source, self._base)
        for batch in encode_all(documents, self._tokenizer, chat=source.chat, processes=processes):
            for split, document in batch.documents:
                packers[split].add(document)
            skips.update(batch.skips)
            if self._on_progress:
                self._on_progress(self._before + sum(packer.documents for packer in packers.values()))
        for packer in packers.values():
            packer.finish()


def _summed(figures: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all sources: counts added, warnings one after another."""
    sums: dict[str, Any] = {}
    for of_source in figures:
        for name, value in of_source.items():
            if name == "skipped_by_reason":
                sums[name] = dict(Counter(sums.get(name, {})) + Counter(value))
            elif not isinstance(value, float):  # a share of one source says nothing of all
                sums[name] = sums[name] + value if name in sums else value
    return sums


def _packer(spec: DataSpec, tokenizer: PreTrainedTokenizerFast, beside: Path) -> Packer:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    below = vocabulary_size(tokenizer)
    return Packer(spec.context, below, isolate=spec.isolate, pad=eos, beside=beside)


def _processes(spec: TextSource, base: Path) -> int:
    """One for each core where there is much to read, else one."""
    files = spec.files(base) if spec.paths else []
    much = spec.source == "hub" or sum(path.stat().st_size for path in files) > _BYTES_WORTH_PROCESSES
    return (psutil.cpu_count(logical=False) or 1) if much else 1


def _of_split(split: str, packer: Packer, spec: TextSource, context: int, *, needed: bool) -> dict[str, object]:
    """Figures of a split.

    Raises:
        SpecError: it fills no window.
    """
    if needed and not packer.windows:
        raise SpecError(
            f"data: the {split} split of {_named(spec)} has {packer.documents} documents with {packer.tokens} "
            f"tokens, less than one window of data.context {context} to learn from.",
            "Give more text, a smaller data.context, or larger data.validation_share and data.test_share.",
        )
    names = ("documents", "tokens", "bytes", "windows", *(("padding", "cut_exchanges") if spec.chat else ()))
    figures = {name: getattr(packer, name) for name in names}
    return {f"{split}_{name}": value for name, value in figures.items()}


def _warnings(skips: Counter[str], documents: int, spec: TextSource, allow_skipped: bool) -> list[str]:
    """What the user must know of the rows that nothing is learned from.

    Raises:
        SpecError: they are too many.
    """
    count = skips.total()
    reasons = "; ".join(f"{reason} ({number})" for reason, number in skips.most_common(_SHOWN_REASONS))
    words = f"{count} of {count + documents} rows of {_named(spec)} are unusable and were skipped: {reasons}."
    if count > MOST_SKIPPED_SHARE * (count + documents) and not allow_skipped:
        raise SpecError(f"data: {words}", "Mend them, or go on with the rest: --allow-skipped.")
    if not documents:
        said = f" {words}" if count else ""
        raise SpecError(f"data: {_named(spec)} holds no usable document.{said}", "Check data.paths and data.column.")
    return [words] if count else []


def _split(
    documents: Iterable[Document], spec: DataSpec, seed: int, seen: set[bytes], dropped: Counter[str]
) -> Iterator[tuple[str, Document]]:
    """The split of each document, by the hash of seed and text; exact duplicates are dropped and counted."""
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


def _documents(spec: TextSource, base: Path, dropped: Counter[str], skips: Counter[str]) -> Iterator[Document]:
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


def _rows(spec: TextSource, base: Path) -> Iterator[dict[str, object]]:
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


def _hub_rows(spec: TextSource) -> Iterator[dict[str, object]]:
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


def _parquet_rows(spec: TextSource, files: Sequence[Path]) -> Iterator[dict[str, object]]:
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
                for batch in file.iter_batches(_BATCH_ROWS, columns=[spec.column, *({"tools"} & {*names})]):
                    yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise _unreadable(spec, str(path), error) from error


def _unreadable(spec: TextSource, what: str, error: Exception) -> SpecError:
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


def _text(value: Any, spec: TextSource, number: int) -> str:
    if isinstance(value, str):
        return value
    hint = "Set data.chat: true for a chat." if isinstance(value, list) else "Name a column of text."
    raise SpecError(
        f"data.column: {spec.column!r} holds {type(value).__name__}, not text ({_named(spec)}, row {number}).", hint
    )


def _messages(value: Any, spec: TextSource) -> list[dict[str, object]]:
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


def _named(spec: TextSource) -> str:
    named = {"stdlib": "the standard library", "mixed": "the shipped text", "hub": str(spec.name)}
    return named.get(spec.source or "") or ", ".join(spec.paths)
