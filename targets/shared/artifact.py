"""What the targets share that concerns the artifact's folder and how it is opened."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...checkpoint import Checkpoint
from ...errors import BadArtifact, EdgekdError, MissingExtra
from ...files import atomic_folder
from ...manifest import MANIFEST, Artifact, Contract, Traffic, first_complaint, write_artifact
from ...quant.recipe import Recipe
from ...quant.source import Source
from ...spec import TargetSpec
from .recipes import load_recipe
from .source import open_source


@dataclass(frozen=True)
class Job:
    """An artifact to write."""

    checkpoint: Checkpoint
    """The student."""
    source: Source
    """What its tensors are read from: the student, or its quantized form."""
    recipe: Recipe
    name: str
    folder: Path
    """Where every file but the manifest goes."""


@dataclass(frozen=True)
class Written:
    """What a target says of the files that it wrote."""

    contract: Contract
    weight_bytes: int
    """Of all weights, as the runtime's file holds them."""
    table_bytes: int
    """Of them, an embedding's whose bytes are not the head's too: one row of it is read for a token."""
    cache_value_bytes: int
    """Of a number in the runtime's key-value cache."""
    details: Details | None = None


def build_artifact(
    student: Path,
    spec: TargetSpec,
    recipe: str,
    out_dir: Path,
    quantized: Path | None,
    write: Callable[[Job], Written],
    *,
    name: str,
    title: str,
    packages: Sequence[str],
    runtime: str,
    main_file: str,
) -> Artifact:
    """Make an artifact that appears only when whole; what the target's ``check`` refuses must have been refused.

    Args:
        out_dir: its folder, which must not exist.
        quantized: the quantized student's folder, for a recipe on the grid; None rounds the student to nearest.
        write: writes every file but the manifest.
        packages: whose versions decide what is made.

    Raises:
        EdgekdError: ``out_dir`` exists, or cannot be written; ``quantized`` is of another student or recipe.
    """
    if out_dir.exists():
        raise EdgekdError(f"{out_dir} exists already.", "Remove it, or choose another folder.")
    checkpoint, chosen = Checkpoint(student), load_recipe(recipe, spec.target)
    try:
        with atomic_folder(out_dir) as folder:
            source, told = open_source(checkpoint, chosen, quantized, folder / "quantized")
            written = write(Job(checkpoint, source, chosen, name, folder))
            shutil.rmtree(folder / "quantized", ignore_errors=True)
            artifact = write_artifact(
                folder,
                name=name,
                target=spec.target,
                target_title=title,
                recipe=recipe,
                runtime=runtime,
                main_file=main_file,
                **told,
                bits_per_weight=round(8 * written.weight_bytes / checkpoint.parameters, 4),
                traffic=_traffic(checkpoint, written),
                contract=written.contract,
                versions=installed("edgekd", *packages),
                details=written.details and written.details.model_dump(),
            )
    except OSError as error:
        raise EdgekdError(f"{out_dir}: cannot be written: {error}.", "Free disk space, or check the folder.") from error
    return Artifact(out_dir, artifact.manifest)


def _traffic(checkpoint: Checkpoint, written: Written) -> Traffic:
    """What decoding a token reads."""
    arch = checkpoint.architecture
    read = written.weight_bytes - written.table_bytes + written.table_bytes // arch.vocab_size
    return Traffic(weight_bytes=read, kv_bytes_per_position=arch.kv_bytes(1, written.cache_value_bytes))


def check_installed(extra: str, *packages: str) -> None:
    """Refuse to begin without a package that the target will import.

    Raises:
        MissingExtra: one is not installed.
    """
    for package in packages:  # by the module: some packages come in variants of other names
        if find_spec(package.replace("-", "_")) is None:
            raise MissingExtra(package, extra)


def installed(*packages: str) -> dict[str, str]:
    """The version of each distribution; those that are not installed are left out.

    A package that comes in variants of other names (``onnxruntime-gpu``) is found by its module, and keeps its name.
    """
    return {package: here for package in dict.fromkeys(packages) if (here := _version(package))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        variants = packages_distributions().get(package.replace("-", "_"), [])
        return next(map(version, variants), None)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what libraries remark on themselves: absent parts, newer packages, their own future."""
    previous = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def check_size(path: Path, size: int) -> None:
    """Refuse a file that is not whole.

    Raises:
        BadArtifact: it is of another size.
    """
    if (found := path.stat().st_size) != size:
        raise BadArtifact(f"{path} has {found} bytes, not {size}.", "Export the artifact again.")


def main_file(artifact: Artifact, name: str) -> Path:
    """The file that the target's runtime opens, which apps find by the manifest's ``main_file``.

    Raises:
        BadArtifact: the manifest names another, or does not list it.
    """
    if artifact.manifest.main_file != name:
        raise BadArtifact(
            f"{artifact.folder}: main_file is {artifact.manifest.main_file!r:.200}, not {name!r}.",
            "Export the artifact again.",
        )
    return artifact.main_file


class Details(BaseModel):
    """What a target's manifests have to say; each target adds its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


D = TypeVar("D", bound=Details)


class TokenizerProof(Details):
    """Whether a runtime's own tokenizer gives the student's ids."""

    used: str
    """The runtime where it does, else ``tokenizers``."""
    texts: int = Field(ge=0)
    differ: int = Field(ge=0)
    first: str | None
    """The first text that differs, and how."""


def details_of(artifact: Artifact, kind: type[D]) -> D:
    """What the exporter told of its artifact.

    Raises:
        BadArtifact: a key is missing, unknown or of another type.
    """
    try:
        return kind.model_validate(artifact.manifest.details)
    except ValidationError as error:
        raise BadArtifact(
            f"{artifact.folder / MANIFEST}: details: {first_complaint(error)}.", "Export the artifact again."
        ) from error


def check_contract(path: Path, contract: Contract, vocab_size: int, context_length: int) -> None:
    """Compare the manifest's numbers with the model's own, before memory is taken for them.

    Args:
        vocab_size, context_length: what the model file says.

    Raises:
        BadArtifact: another vocabulary, or a longer context.
    """
    if contract.vocab_size != vocab_size:
        what = f"a vocabulary of {vocab_size}, the manifest one of {contract.vocab_size}"
    elif contract.context_length > context_length:
        what = f"a context of {context_length}, the manifest one of {contract.context_length}"
    else:
        return
    raise BadArtifact(f"{path} has {what}.", "Export the artifact again.")


def cores(threads: int | None = None) -> int:
    """Threads to run with: as asked, else one for each physical core."""
    return threads or psutil.cpu_count(logical=False) or 1
