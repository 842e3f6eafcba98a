"""The artifact: a folder of files and one ``manifest.json`` that is its proof.

The manifest is written last and atomically, so a folder without a valid one is not an artifact. Exporters write it;
verification and benchmarks add what they measured; the report and the apps read it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import BadArtifact
from .files import file_sha256, inside, read_json, write_json
from .proof import Audit, Benchmark, Parity, TaskScore

MANIFEST = "manifest.json"
SCHEMA_VERSION: Literal[1] = 1
MAX_TOKENS = 2**24
"""More than any model's vocabulary or context."""
Id = Annotated[int, Field(ge=0, lt=MAX_TOKENS)]
PROOF = frozenset({"parity", "benchmark", "audit", "tasks"})
"""The keys that ``add_proof`` writes."""


class Contract(BaseModel):
    """What a program that runs the artifact must know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    context_length: int = Field(ge=1, le=MAX_TOKENS)
    vocab_size: int = Field(ge=1, le=MAX_TOKENS)
    bos_id: Id | None
    eos_ids: list[Id] = Field(max_length=1024)
    add_bos: bool
    chat_template: str | None
    normalizer: Literal["NFC"] | None = None
    """Unicode normal form that the caller must bring text to, because the runtime's tokenizer does not."""
    special_tokens: dict[str, str] = {}
    """``bos_token``, ``eos_token`` and their like: the values that the chat template may use, by these names."""
    special_ids: dict[str, Id] | None = None
    """Special tokens of a rendered chat, which the caller places by id: the text between them is text, whatever stands
    in it. None: an artifact of an earlier version."""
    special_strips: dict[str, Literal["left", "right", "both"]] = {}
    """The side on which one of them takes the white space along."""
    space_prefix: Literal["first", "every"] | None = None
    """The text before which the caller puts a space, unless it begins with one, because the runtime's tokenizer does
    not: that at the beginning of a sequence, or that behind every special token too."""

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> Self:
        special = (self.special_ids or {}).values()
        for index in [*self.eos_ids, *([] if self.bos_id is None else [self.bos_id]), *special]:
            if index >= self.vocab_size:
                raise ValueError(f"id {index} is outside the vocabulary of {self.vocab_size}")
        return self


class Traffic(BaseModel):
    """What decoding one token reads from memory, by the sizes of the artifact's own tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weight_bytes: int = Field(ge=0)
    """Of an embedding that is not the head too, one row."""
    kv_bytes_per_position: int = Field(ge=0)
    """Keys and values over all layers, in the type that the runtime keeps them in."""

    def bytes_per_token(self, position: float) -> float:
        """Bytes read to decode with ``position`` tokens in the cache."""
        return self.weight_bytes + self.kv_bytes_per_position * position


class Manifest(BaseModel):
    """``manifest.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    target: str
    target_title: str | None = None
    """The target as its makers write it."""
    recipe: str
    runtime: str
    main_file: str
    files: dict[str, str]
    """sha256 of every other file of the folder, by its relative POSIX path."""
    student_digest: str
    grid_digest: str | None = None
    method: str | None = None
    """How the integers were chosen."""
    int8_by_width: list[str] = []
    """int8 matrices whose input width is not divisible by 32."""
    dequantized_from: list[str] = Field(default=[], max_length=64)
    """Types in which the student's weights were quantized before: figures favour formats like them."""
    parameters: int = Field(ge=1, le=10**15)
    bits_per_weight: float = Field(gt=0, le=128, allow_inf_nan=False)
    traffic: Traffic | None = None
    """None: the exporter did not say."""
    contract: Contract
    versions: dict[str, str] = Field(max_length=64)
    details: Mapping[str, object] | None = None
    """What one target alone has to say, in its own model's form."""
    parity: Parity | None = None
    benchmark: Benchmark | None = None
    audit: Audit | None = None
    tasks: list[TaskScore] = Field(default=[], max_length=1024)


@dataclass(frozen=True)
class Artifact:
    """A folder whose manifest has been read."""

    folder: Path
    manifest: Manifest

    @property
    def main_file(self) -> Path:
        """The file the runtime opens."""
        return self.path(self.manifest.main_file)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(self.path(name).stat().st_size for name in self.manifest.files)

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists; what it does not list is never opened.

        Raises:
            BadArtifact: it is not listed, it leaves the folder, or it is missing.
        """
        if name not in self.manifest.files:
            raise BadArtifact(f"{self.folder / MANIFEST} does not list {name!r:.200}.", "Export the artifact again.")
        path = inside(self.folder, name, BadArtifact)
        if not path.is_file():
            raise BadArtifact(f"{path} is missing.", "Export the artifact again.")
        return path

    def check_nothing_else(self, below: str = "") -> None:
        """Refuse files that the manifest does not list, for a library that looks through a folder by itself.

        Args:
            below: relative name of the folder to look through; default: the artifact's own.

        Raises:
            BadArtifact: names one.
        """
        start = inside(self.folder, below, BadArtifact) if below else self.folder
        for folder, folders, names in os.walk(start):
            links = [name for name in folders if Path(folder, name).is_symlink()]
            for name in sorted([*names, *links]):
                found = Path(folder, name).relative_to(self.folder).as_posix()
                if found not in self.manifest.files and found != MANIFEST and not found.startswith("."):
                    raise BadArtifact(
                        f"{self.folder / MANIFEST} does not list {found!r:.200}, which the runtime may read.",
                        "Remove that file, or export the artifact again.",
                    )


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
    artifact: Artifact,
    *,
    parity: Parity | None = None,
    benchmark: Benchmark | None = None,
    audit: Audit | None = None,
    tasks: list[TaskScore] | None = None,
) -> Artifact:
    """Write measured figures into the manifest; what is not given stays."""
    given = {"parity": parity, "benchmark": benchmark, "audit": audit, "tasks": tasks}
    manifest = artifact.manifest.model_copy(update={name: proof for name, proof in given.items() if proof})
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
    path = inside(folder, MANIFEST, BadArtifact)
    if not path.is_file():
        raise BadArtifact(f"{folder} is not an artifact: it has no {MANIFEST}.", "Make one with: edgekd export")
    given = read_json(path, BadArtifact, "Export the artifact again.")
    version = given.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BadArtifact(
            f"{path} is of a newer version of edgekd (its schema is above {SCHEMA_VERSION}).", "Update edgekd."
        )
    try:
        manifest = Manifest.model_validate(given)
    except ValidationError as error:
        raise BadArtifact(f"{path}: {first_complaint(error)}.", "Export the artifact again.") from error
    artifact = Artifact(folder, manifest)
    if manifest.main_file not in manifest.files:
        raise BadArtifact(f"{path}: main_file {manifest.main_file!r:.200} is not among files.", "Export it again.")
    for name, expected in manifest.files.items():
        listed = artifact.path(name)
        if check_files and _sha256(listed) != expected:
            raise BadArtifact(f"{folder / name} is not the file its manifest names.", "Export the artifact again.")
    return artifact


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise BadArtifact(f"{path}: cannot be read: {error.strerror}.", "Copy it to a folder of your own.") from error
