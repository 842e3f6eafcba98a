"""The artifact: a folder of files and one ``manifest.json`` that is its proof.

The manifest is written last and atomically, so a folder without a valid one is not an artifact. Exporters write it;
verification and benchmarks add what they measured; the report and the apps read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import BadArtifact
from .files import file_sha256, write_json

MANIFEST = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1


class Contract(BaseModel):
    """What a program that runs the artifact must know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context_length: int
    vocab_size: int
    bos_id: int | None
    eos_ids: list[int]
    add_bos: bool
    chat_template: str | None
    normalizer: Literal["NFC"] | None = None
    """Unicode normal form that the caller must bring text to, because the runtime's tokenizer does not."""
    special_tokens: dict[str, str] = {}
    """``bos_token``, ``eos_token`` and their like: the values that the chat template may use, by these names."""


class Manifest(BaseModel):
    """``manifest.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    target: str
    recipe: str
    runtime: str
    main_file: str
    files: dict[str, str]
    """sha256 of every other file of the folder, by its relative POSIX path."""
    student_digest: str
    grid_digest: str | None = None
    method: str | None = None
    """How the grid's integers were chosen."""
    int8_by_width: list[str] = []
    """int8 matrices of the grid whose input width is not divisible by 32."""
    parameters: int
    bits_per_weight: float
    contract: Contract
    versions: dict[str, str]
    details: dict[str, Any] | None = None
    """What one target alone has to say."""
    parity: dict[str, Any] | None = None
    benchmark: dict[str, Any] | None = None


@dataclass(frozen=True)
class Artifact:
    """A folder whose manifest has been read."""

    folder: Path
    manifest: Manifest

    @property
    def main_file(self) -> Path:
        """The file the runtime opens."""
        return self.folder / self.manifest.main_file

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum((self.folder / name).stat().st_size for name in self.manifest.files)


def first_complaint(error: ValidationError) -> str:
    """The first thing that pydantic found wrong in a JSON file, as ``key 'a.b': what``."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "(top level)"
    return f"key {key!r}: {first['msg']}"


def write_artifact(folder: Path, **fields: Any) -> Artifact:
    """Hash every file of ``folder`` and write its manifest, which makes it an artifact.

    Args:
        fields: the manifest's fields but ``files``.
    """
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = Manifest(files=files, **fields)
    write_json(folder / MANIFEST, manifest.model_dump())
    return Artifact(folder, manifest)


def add_proof(
    artifact: Artifact, *, parity: Mapping[str, Any] | None = None, benchmark: Mapping[str, Any] | None = None
) -> Artifact:
    """Write measured figures into the manifest; what is not given stays."""
    update = {k: dict(v) for k, v in (("parity", parity), ("benchmark", benchmark)) if v is not None}
    manifest = artifact.manifest.model_copy(update=update)
    write_json(artifact.folder / MANIFEST, manifest.model_dump())
    return Artifact(artifact.folder, manifest)


def load_artifact(folder: str | Path, *, check_files: bool = True) -> Artifact:
    """Read an artifact.

    Args:
        folder: the artifact's folder.
        check_files: compare every file with its sha256.

    Raises:
        BadArtifact: no manifest, an invalid one, a path outside the folder, a missing or changed file.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise BadArtifact(f"{folder} is not an artifact: it has no {MANIFEST}.", "Make one with: edgekd export")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadArtifact(f"{path}: {first_complaint(error)}.", "Export the artifact again.") from error
    for name in [manifest.main_file, *manifest.files]:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise BadArtifact(f"{path}: {name!r} leaves the artifact's folder.", "Do not use this artifact.")
    if manifest.main_file not in manifest.files:
        raise BadArtifact(f"{path}: main_file {manifest.main_file!r} is not among files.", "Export it again.")
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            raise BadArtifact(f"{folder / name} is missing.", "Export the artifact again.")
        if check_files and file_sha256(folder / name) != expected:
            raise BadArtifact(f"{folder / name} is not the file its manifest names.", "Export the artifact again.")
    return Artifact(folder, manifest)
