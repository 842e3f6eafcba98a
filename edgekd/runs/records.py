"""What a finished stage of a run leaves beside its folder: a record that knows its files, and finds damage in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import EdgekdError
from ..files import digest, file_sha256, read_json, read_sealed, write_sealed
from ..manifest import MANIFEST, PROOF

Figures = Mapping[str, object]
"""What a stage tells of itself, as JSON."""
SMALL_BYTES = 2**20
"""A file up to this size is always compared with its sha256: it costs nothing."""


class Output(BaseModel):
    """One file of a stage's folder, as the stage left it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    """Of its bytes; of a manifest, of everything but the proof, which is added later."""
    size_bytes: int
    mtime_ns: int


class Record(BaseModel):
    """A stage that is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    name: str
    seconds: float
    figures: Figures
    inputs: dict[str, str]
    """``digest`` of the records of the stages it read, by their folder."""
    outputs: dict[str, Output]
    """Every file of its folder, by its relative POSIX path."""

    @property
    def digest(self) -> str:
        """Of the content of its files."""
        return digest({name: output.sha256 for name, output in self.outputs.items()})


def read_record(path: Path) -> Record:
    """The record that ``write_record`` wrote.

    Raises:
        EdgekdError: it is missing, damaged, or another version's.
    """
    try:
        return Record.model_validate(read_sealed(path))
    except ValidationError as error:
        raise EdgekdError(f"{path}: is not a record of this version.") from error


def write_record(path: Path, record: Record) -> None:
    """Write it whole or not at all."""
    write_sealed(path, record.model_dump())


def outputs_of(folder: Path) -> dict[str, Output]:
    """Every file below a folder that has just been made."""
    return {
        path.relative_to(folder).as_posix(): Output(
            sha256=_content(path), size_bytes=path.stat().st_size, mtime_ns=path.stat().st_mtime_ns
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damage(folder: Path, outputs: Mapping[str, Output], *, every: bool) -> str | None:
    """What is missing or not what it was, in words; None where all is well. Files beside them are nobody's business.

    Args:
        every: read every file, even those whose size and time of change tell nothing.
    """
    for name, output in outputs.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{path} is missing"
            if _looks_changed(path, output, every) and _content(path) != output.sha256:
                return f"{path} is not what was written"
        except (OSError, ValueError, EdgekdError):
            return f"{path} cannot be read"
    return None


def _looks_changed(path: Path, output: Output, every: bool) -> bool:
    stat = path.stat()
    same = (stat.st_size, stat.st_mtime_ns) == (output.size_bytes, output.mtime_ns)
    return every or not same or stat.st_size <= SMALL_BYTES


def _content(path: Path) -> str:
    if path.name != MANIFEST:
        return file_sha256(path)
    return digest({key: value for key, value in read_json(path).items() if key not in PROOF})
