"""Core ML for iOS 18 and macOS 15: fp16 from the student, the portable grid as it is, and 4-bit lookup tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ...architecture import Architecture
from ...checkpoint import Checkpoint
from ...errors import Unsupported
from ...files import file_sha256, write_json
from ...manifest import Artifact, Contract
from ...quant.source import Source
from ...session import Arithmetic, Session
from ...student import load_tokenizer
from ..shared.artifact import Details, Job, Written, build_artifact, check_installed, details_of, main_file
from ..shared.decoder import (
    DECODER_FEATURES,
    EMBEDDING,
    MAX_CACHE_BYTES,
    asked_for,
    check_features,
    check_head_dim,
    check_weights,
)
from ..shared.proto import messages
from ..shared.recipes import load_recipe
from ..shared.session import DecoderSession
from ..shared.source import plain_form
from ..shared.target import TargetOptions
from ..shared.tokenizer import TOKENIZER, SessionTokenizer, check_has_tokenizer, contract_of
from . import graph as graph_
from .selftest import self_test
from .session import CoremlEngine, stand_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ...quant.recipe import Recipe

__all__ = ["EXTRA", "FEATURES", "PACKAGES", "TITLE", "Options", "check", "export", "open", "self_test", "stand_in"]

TITLE, EXTRA = "Core ML", "coreml"
PACKAGES = ("coremltools",)
PACKAGE = "model.mlpackage"
FEATURES = DECODER_FEATURES
"""What the program has a place for."""
MINIMUM_IOS = 18
_CACHE_BYTES = 2  # float16


class Options(TargetOptions):
    """A Core ML target."""

    minimum_ios: Annotated[int, Field(gt=0, le=99)] = Field(
        18, description="The oldest iOS to run on; 18 (macOS 15) is the least."
    )


class CoremlDetails(Details):
    """What the manifest says of a Core ML artifact."""

    minimum: dict[str, str]
    """Version by system."""
    compute_units: dict[str, str]
    weight_bytes: int = Field(ge=0)


def arithmetic(recipe: Recipe, asked: Mapping[str, object]) -> Arithmetic:
    """The program computes in fp16 throughout; its compressed weights are fp16 when they are read."""
    return "float16 throughout"


def check(config: Mapping[str, object], tokenizer_folder: Path, spec: Options) -> None:
    """Refuse what the exporter cannot write, from ``config.json`` and the tokenizer's files alone.

    Raises:
        SpecError: an unknown recipe, or a context longer than the student's.
        Unsupported: an architecture or setting that the exporter does not write, an iOS without its operators, or a
            cache too large for a phone.
        EdgekdError: no tokenizer.
        MissingExtra: a package of the extra is not installed.
    """
    arch, context_length = asked_for(config, spec)
    if spec.minimum_ios < MINIMUM_IOS:
        needs = [f"int4 in blocks ({name})" for name in spec.recipes if load_recipe(name, "coreml").has_int4]
        needs.append("a key-value cache kept as state")
        raise Unsupported(
            f"targets: minimum_ios {spec.minimum_ios}: {' and '.join(needs)} came with iOS 18 and macOS 15.",
            "Set minimum_ios: 18.",
        )
    check_features(arch, FEATURES, TITLE, context_length)
    _check_sizes(arch, context_length)
    check_has_tokenizer(tokenizer_folder)
    check_installed("coreml", "coremltools", "tokenizers")


def _check_sizes(arch: Architecture, context_length: int) -> None:
    check_head_dim(arch)
    size = context_length * arch.kv_bytes(1, _CACHE_BYTES)  # a window saves nothing: all of it is kept
    if size > MAX_CACHE_BYTES:
        most = MAX_CACHE_BYTES // arch.kv_bytes(1, _CACHE_BYTES) // 256 * 256
        raise Unsupported(
            f"targets: a context of {context_length} makes a key-value cache of {size / 1e9:.1f} GB; the most for a "
            f"phone is {MAX_CACHE_BYTES / 1e9:.1f} GB.",
            f"Set context: {most} or less." if most else "Use a smaller student.",
        )


def export(
    student: Path,
    spec: Options,
    recipe: str,
    out_dir: Path,
    *,
    name: str,
    quantized: Path | None = None,
    moments: Path | None = None,  # of native recipes with an importance matrix: Core ML has none
) -> Artifact:
    """Write ``model.mlpackage``, the tokenizer, ``config.json`` and the manifest; see ``targets.export``.

    Needs memory for a tensor, not for the model.
    """
    check(Checkpoint(student).config, student, spec.model_copy(update={"recipes": [recipe]}))
    return build_artifact(
        student,
        spec,
        recipe,
        out_dir,
        quantized,
        lambda job: _write(job, spec),
        name=name,
        title=TITLE,
        packages=PACKAGES,
        runtime="Core ML",
        main_file=f"{PACKAGE}/Manifest.json",
    )


def open(artifact: Artifact, *, threads: int | None = None) -> Session:
    """The artifact in Core ML; where there is none, in the interpreter that ``stand_in`` names.

    Args:
        threads: not used: Core ML takes none, and the interpreter is not timed.

    Raises:
        BadArtifact: the package is damaged.
        Unsupported: it has an operator that the interpreter does not know.
        MissingExtra: coremltools is not installed.
    """
    details_of(artifact, CoremlDetails)
    contract, package = artifact.manifest.contract, main_file(artifact, f"{PACKAGE}/Manifest.json").parent
    artifact.check_nothing_else(PACKAGE)
    tokenizer = SessionTokenizer(artifact.path(TOKENIZER), "coreml")  # Core ML has none
    return DecoderSession(CoremlEngine(package, contract), tokenizer, contract)


def inspect(artifact: Artifact) -> None:
    """Read the package without Core ML, before it does.

    Raises:
        BadArtifact: its program names a weight file that is not the package's own.
        MissingExtra: coremltools is not installed.
    """
    from .mil.package import Package

    package = Package(main_file(artifact, f"{PACKAGE}/Manifest.json").parent)
    for value in messages(package.spec, "BlobFileValue"):
        package.weights(value.fileName)


def _forms(recipe: Recipe, source: Source) -> dict[str, graph_.Form]:
    """How each parameter is stored."""
    if not recipe.native:
        return dict(source.kinds)

    def form(name: str) -> graph_.Form:
        shape = source.shape(name)
        if len(shape) != 2 or shape[1] % 2:
            return "plain"
        return "palette4" if name.endswith("_proj.weight") else "int8"

    return {name: form(name) for name in source.kinds}


def cache_value_bytes(spec: Options) -> int:
    """Of a number in the cache, float16."""
    return _CACHE_BYTES


def _write(job: Job, spec: Options) -> Written:
    """Write everything but the manifest."""
    from .pack import WEIGHT_FILE, write_package

    checkpoint, folder = job.checkpoint, job.folder
    check_weights(checkpoint.architecture, job.source, TITLE)
    source, arch = plain_form(job.source, checkpoint.architecture)
    settings = graph_.Settings(_forms(job.recipe, source), source.tied, spec.context_of(arch.context_length))
    tokenizer = load_tokenizer(checkpoint.folder)
    contract = contract_of(tokenizer, checkpoint.folder, arch.vocab_size, settings.context_length)
    _save_tokenizer(tokenizer, contract, folder)
    shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")

    graph = graph_.build(arch, settings)
    description = graph_.describe(arch, settings, _metadata(contract, job.name, job.recipe.name, folder))
    write_package(folder / PACKAGE, graph, description, source)
    table = () if arch.tied else (stored for stored in graph.stored.values() if stored.source == EMBEDDING)
    return Written(
        contract=contract,
        weight_bytes=sum(stored.size_bytes for stored in graph.stored.values() if stored.source),
        table_bytes=sum(stored.size_bytes for stored in table),
        cache_value_bytes=_CACHE_BYTES,
        details=CoremlDetails(
            minimum={"ios": "18", "macos": "15"},
            compute_units={"cpuAndGPU": "not run", "cpuAndNeuralEngine": "not run"},
            weight_bytes=(folder / PACKAGE / WEIGHT_FILE).stat().st_size,
        ),
    )


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, contract: Contract, folder: Path) -> None:
    """``tokenizer.json`` and a ``tokenizer_config.json`` that swift-transformers reads.

    It looks for a class that it knows and for the chat template in that file, and cleans spaces up unless told not to.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": contract.chat_template}
    config.setdefault("clean_up_tokenization_spaces", False)
    write_json(path, {key: value for key, value in config.items() if value is not None})


def _metadata(contract: Contract, name: str, recipe: str, folder: Path) -> dict[str, str]:
    """What an app can read from the package alone."""
    return {
        "co.huggingface.exporters.name": name,  # swift-transformers' key
        "edgekd.recipe": recipe,
        "edgekd.contract": contract.model_dump_json(exclude={"special_tokens"}),  # tokenizer_config.json holds them
        "edgekd.tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
    }
