"""The runtimes a student is exported to. A target is a module that offers what ``shared.target.Target`` says, in a
package with all that it needs.

``TARGETS`` is the only table; entry points of the group ``edgekd.targets`` (name → module) extend it. A module is
imported when its target is first asked for.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from ..errors import BadArtifact, SpecError
from ..files import digest
from ..manifest import PROOF, Artifact, load_artifact
from ..session import Arithmetic, Session
from ..spec import Spec, TargetSpec, checked, nearest, spec_of
from ..tokenizer_file import hard_texts
from ..trial import mark, try_once
from .shared.artifact import installed
from .shared.recipes import load_recipe, recipe_names
from .shared.target import OFFERED, Target, TargetOptions

__all__ = [
    "TARGETS",
    "absent",
    "cache_value_bytes",
    "check",
    "code_of",
    "describe_gpus",
    "export",
    "gpu",
    "label",
    "load_recipe",
    "load_target",
    "names",
    "open_artifact",
    "recipe_names",
    "requirement",
    "runtime_build",
    "section",
    "spec_model",
    "stand_in",
    "try_artifact",
    "versions",
]

_LOG = logging.getLogger(__name__)
TOKENIZER = "tokenizer.json"
GROUP = "edgekd.targets"
TARGETS = {
    "gguf": "edgekd.targets.gguf.target",
    "onnx": "edgekd.targets.onnx.target",
    "coreml": "edgekd.targets.coreml.target",
    "executorch": "edgekd.targets.executorch.target",
}


def names() -> list[str]:
    """Every target, those of installed plug-ins last."""
    return [*TARGETS, *sorted(_plug_ins())]


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in TARGETS}


def load_target(name: str) -> Target:
    """A target's module.

    Raises:
        SpecError: no such target, or a plug-in that does not load or is not a target.
    """
    if name in TARGETS:
        return cast(Target, importlib.import_module(TARGETS[name]))
    module = _module_name(name)
    remedy = f"Update {_plug_ins()[name].value.partition('.')[0]}, or uninstall it."
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a stranger's module may raise anything
        raise SpecError(f"targets: {name} does not load: {type(error).__name__}: {error}.", remedy) from error
    if lacks := [offered for offered in OFFERED if not hasattr(found, offered)]:
        raise SpecError(f"targets: {name} is not a target of this version: it has no {', '.join(lacks)}.", remedy)
    return cast(Target, found)


def _module_name(name: str) -> str:
    modules = TARGETS | {plug_in: point.module for plug_in, point in _plug_ins().items()}
    if name not in modules:
        raise SpecError(f"targets: unknown target {name!r}; {nearest(name, names())}")
    return modules[name]


def spec_model() -> type[Spec]:
    """The spec with the keys of every target that loads."""
    sections = {}
    for name in names():
        try:
            sections[name] = load_target(name).Options
        except SpecError as error:
            _LOG.warning("%s", error)
    return spec_of(sections)


def section(spec: TargetSpec) -> TargetOptions:
    """A target's section of the spec as the target's own, its keys checked.

    Raises:
        SpecError: no such target, or a key that it does not have.
    """
    model = load_target(spec.target).Options
    return spec if isinstance(spec, model) else checked(model, spec.model_dump(), "targets")


def requirement(name: str) -> str:
    """What to ask an installer for to have a target's packages."""
    point, extra = _plug_ins().get(name), load_target(name).EXTRA
    distribution = point.dist.name if point and point.dist else "edgekd"
    return f"{distribution}[{extra}]" if extra else distribution


def absent(packages: Iterable[str]) -> list[str]:
    """Those of some distributions that are not installed."""
    here = installed(*packages)
    return [package for package in packages if package not in here]


def versions(targets: Iterable[str]) -> dict[str, str]:
    """The versions that artifacts of these targets depend on: edgekd's, training's, and those of each one's packages.

    Args:
        targets: names.
    """
    own = (package for target in targets for package in load_target(target).PACKAGES)
    return installed("edgekd", "torch", "transformers", *own)


def code_of(target: str) -> list[Path]:
    """The source files that make a target: those of its module's package, and what all targets share.

    A module without a package is one file.
    """
    found = find_spec(_module_name(target))
    assert found is not None and found.origin is not None
    own = Path(found.origin)
    below = [own] if not found.parent else sorted(own.parent.rglob("*.py"))
    return [*below, Path(__file__), *sorted(Path(__file__).with_name("shared").rglob("*.py"))]


def label(target: str, recipe: str) -> str:
    """An artifact's name: a native recipe bears its target's name already."""
    return recipe if recipe.startswith(f"{target}-") else f"{target}-{recipe}"


def stand_in(target: str, asked: Mapping[str, object] | None = None) -> str | None:
    """What opens a target's artifacts on this machine in place of their own runtime, which cannot run here; or None.

    Args:
        asked: of the artifact, by the target's section of the spec or the manifest's ``details``.
    """
    found: str | None = getattr(load_target(target), "stand_in", lambda _: None)(asked or {})
    return found


def gpu(artifact: Artifact) -> str | None:
    """What beside the CPU computes an artifact on this machine; or None."""
    module, details = load_target(artifact.manifest.target), artifact.manifest.details
    found: str | None = getattr(module, "gpu", lambda _: None)(details or {})
    return found


def describe_gpus(target: str) -> str:
    """The GPUs that a target's runtime has on this machine.

    Raises:
        NoGpu: there is none; how to get one.
    """
    found: str = load_target(target).describe_gpus()  # type: ignore[attr-defined]
    return found


def cache_value_bytes(spec: TargetSpec) -> int | None:
    """Bytes of a number in a target's key-value cache; None: it does not say before it has exported."""
    own: int | None = getattr(load_target(spec.target), "cache_value_bytes", lambda _: None)(section(spec))
    return own


def runtime_build(target: str) -> str:
    """Versions of what runs a target's artifacts, and for which instructions it was built, where the runtime says so:
    figures of another build are another runtime's."""
    module = load_target(target)
    packages = " ".join(f"{package} {here}" for package, here in installed(*module.PACKAGES).items())
    flags: str = getattr(module, "build_flags", lambda: "")()
    return f"{packages} ({flags})" if flags else packages


def arithmetic(artifact: Artifact) -> Arithmetic:
    """The precision in which an artifact's runtime multiplies with its matrices."""
    manifest = artifact.manifest
    own: Callable[..., Arithmetic] = getattr(load_target(manifest.target), "arithmetic", lambda *_: "float32")
    return own(load_recipe(manifest.recipe, manifest.target), manifest.details or {})


def check(config: Mapping[str, object], tokenizer_folder: Path, spec: TargetSpec) -> None:
    """Refuse, before any work, a model that the target cannot hold.

    Args:
        config: the student's ``config.json``.
        tokenizer_folder: the folder with its ``tokenizer.json``.

    Raises:
        SpecError: no such target or recipe.
        Unsupported: the architecture, a setting or the tokenizer has no place in the format.
        MissingExtra: the target's packages are not installed.
    """
    load_target(spec.target).check(config, tokenizer_folder, section(spec))


def export(
    student: Path,
    spec: TargetSpec,
    recipe: str,
    out_dir: Path,
    *,
    name: str,
    quantized: Path | None = None,
    moments: Path | None = None,
) -> Artifact:
    """Write one artifact of a student.

    Args:
        student: model folder.
        recipe: one of the target's recipes.
        out_dir: the artifact's folder; it must not exist yet, and appears only when whole.
        name: the artifact's name.
        quantized: folder of the quantized student; recipes on the portable grid pack its integers as they are. Without
            it the student is rounded to nearest.
        moments: safetensors of the activations' second moments by parameter name, for native recipes with an
            importance matrix.

    Raises:
        EdgekdError: and its children, as ``check``; also when ``out_dir`` exists or the runtime refuses the file.
    """
    target, own = load_target(spec.target), section(spec)
    artifact = target.export(student, own, recipe, out_dir, name=name, quantized=quantized, moments=moments)
    mark(_key(artifact))
    return artifact


def try_artifact(artifact: Artifact) -> None:
    """Open an artifact in a process of its own and run a token, unless this process, or the one that started it, has
    made it or tried it already. ``open_artifact`` does so by itself.

    Raises:
        BadArtifact: the process died, or did not answer in time.
        EdgekdError: and its children, as ``open_artifact``.
    """
    function = f"{__name__}:run_trial"
    try:
        try_once(_key(artifact), function, artifact.folder.absolute(), artifact.size_bytes, BadArtifact)
    except BadArtifact as error:
        raise BadArtifact(error.cause, f"{error.remedy} {_other_versions(artifact)}".strip()) from error


def run_trial(folder: Path) -> None:
    """What ``try_artifact`` runs: every call of a session, on little; the files' sums have been checked.

    Raises:
        BadArtifact: the logits are not one for each token of the vocabulary.
        EdgekdError: and its children, as ``open_artifact``.
    """
    artifact = load_artifact(folder, check_files=False)
    contract = artifact.manifest.contract
    module = load_target(artifact.manifest.target)
    getattr(module, "inspect", lambda artifact: None)(artifact)
    session = module.open(artifact, threads=1)
    for text in hard_texts(artifact.path(TOKENIZER) if TOKENIZER in artifact.manifest.files else None):
        session.tokenize(text)
    session.token_bytes(contract.vocab_size - 1)
    ids = [0] * min(2, contract.context_length)
    for all_logits in (True, False):
        session.reset()
        logits = session.prefill(ids, all_logits=all_logits)
        if logits.shape[-1:] != (contract.vocab_size,):
            raise BadArtifact(
                f"{folder}: the model gives {logits.shape[-1]} logits for a vocabulary of {contract.vocab_size}.",
                "Export the artifact again.",
            )
    if contract.context_length > len(ids):
        session.decode(0)


def _other_versions(artifact: Artifact) -> str:
    """What of the exporter's packages has another version here."""
    words = []
    for package, made in artifact.manifest.versions.items():
        with suppress(PackageNotFoundError, ValueError):  # ValueError: an empty name
            if (here := version(package)) != made:
                words.append(f"It was made with {package} {made}; this is {here}.")
    return " ".join(words)


def _key(artifact: Artifact) -> str:
    """Digest of an artifact's files and of what the manifest says of them."""
    return digest(artifact.manifest.model_dump(exclude={*PROOF}))


def open_artifact(artifact: Artifact | Path, *, threads: int | None = None) -> Session:
    """The artifact in its own runtime. Imports no transformers, and torch only where the runtime does: ExecuTorch.

    Args:
        artifact: taken as checked when it is an ``Artifact``; a folder is checked against its sha256 sums first. It is
            tried in a process of its own, see ``try_artifact``.
        threads: default: the physical cores.

    Raises:
        BadArtifact: the folder is no whole artifact, or the runtime refuses it.
        MissingExtra: the runtime is not installed.
    """
    if not isinstance(artifact, Artifact):
        artifact = load_artifact(artifact)
    module = load_target(artifact.manifest.target)
    try_artifact(artifact)
    return module.open(artifact, threads=threads)
