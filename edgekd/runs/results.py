"""What a run measured: judged, written into the manifests, and told in ``results.json`` and ``report.html``."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import EdgekdError
from ..files import read_json, read_sealed, write_sealed
from ..manifest import add_proof, first_complaint, load_artifact
from ..proof import Audit, Benchmark, Comparison, Parity, Quality, QuantizedComparison, SeedQuality
from ..results import MadeArtifact, Results, StageFigures, StageTime, Training
from ..targets import versions
from .records import Record
from .run import Run
from .work import MOMENTS

RESULTS = "results.json"
M = TypeVar("M", bound=BaseModel)


def failures(run: Run, records: Mapping[str, Record]) -> list[str]:
    """What missed its gate, artifact by artifact.

    Args:
        records: of the stages that are done, by their folder.
    """
    judged = _parities(run, records)
    return [f"{label}: {text}" for label, parity in judged.items() for text in parity.failures or ()]


def write_results(run: Run, records: Mapping[str, Record]) -> Results:
    """Write the proofs into the manifests, then ``results.json`` and ``report.html``; see ``results``."""
    from ..benchmarks.report import build

    for label, parity in _parities(run, records).items():
        artifact = load_artifact(run.path(f"artifacts/{label}"), check_files=False)
        benchmark = _measured(run, records, f"bench/{label}", "bench.json", Benchmark)
        audit = _measured(run, records, f"audit/{label}", "audit.json", Audit)
        add_proof(artifact, parity=parity, benchmark=benchmark, audit=audit)
    told = results(run, records)
    write_sealed(run.folder / RESULTS, told.model_dump())
    build(told, run.folder / "report.html")
    return told


def read_results(path: Path) -> Results:
    """What ``write_results`` wrote.

    Raises:
        EdgekdError: it is damaged, or not of this version.
    """
    remedy = "Write it again: edgekd run SPEC."
    return _typed(Results, read_sealed(path, remedy=remedy), path, remedy)


def _measured(run: Run, records: Mapping[str, Record], stage_folder: str, name: str, kind: type[M]) -> M | None:
    """The figures in a file of a stage; None where the stage is not done."""
    if stage_folder not in records:
        return None
    path = run.path(stage_folder) / name
    return _typed(kind, read_json(path), path, "Remove its folder, and run again.")


def _typed(kind: type[M], value: object, path: Path, remedy: str) -> M:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise EdgekdError(f"{path}: {first_complaint(error)}.", remedy) from error


def _parities(run: Run, records: Mapping[str, Record]) -> dict[str, Parity]:
    """Every artifact's parity, judged, by its label."""
    from ..verify.parity import judge

    judged = {}
    for export in run.exports:
        parity = _measured(run, records, f"parity/{export.label}", "parity.json", Parity)
        if parity is not None:
            failures = judge(parity, parity.tokens, run.spec.verify.gate(export.recipe.name))
            judged[export.label] = parity.model_copy(update={"failures": failures})
    return judged


def results(run: Run, records: Mapping[str, Record]) -> Results:
    """Everything that was measured.

    Args:
        records: of the stages that are done, by their folder.
    """
    from ..verify.ledger import ledger

    made = {
        export.label: load_artifact(run.path(export.folder), check_files=False)
        for export in run.exports
        if export.folder in records
    }
    quantized = [
        _measured(run, records, "ledger", f"{wanted.recipe.name}-{wanted.method}.json", QuantizedComparison)
        for wanted in run.quantizations
    ]
    by_seed = {
        seed: _measured(run, records, run.of_seed(seed, "quality"), "quality.json", Quality) for seed in run.seeds
    }
    curves = {name: records[name].figures.get("curve", []) for name in ("student", "baseline") if name in records}
    taught = _measured(run, records, "ledger", "student.json", Comparison) if run.hops_from_teacher else None
    return Results(
        name=run.spec.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        folder=str(run.folder),
        spec=run.spec.model_dump(),
        versions={"python": platform.python_version()} | versions(target.target for target in run.spec.targets),
        data=StageFigures.model_validate(records["data"].figures),
        quality=by_seed[run.spec.seed],
        seeds=[SeedQuality(seed=seed, **dict(quality)) for seed, quality in by_seed.items() if quality],
        training=Training.model_validate(curves),
        ledger=ledger(
            taught,
            list(filter(None, quantized)),
            {label: artifact.manifest for label, artifact in made.items()},
        ),
        artifacts=[
            MadeArtifact(manifest=artifact.manifest, folder=str(artifact.folder), size_bytes=artifact.size_bytes)
            for artifact in made.values()
        ],
        stages=[StageTime(name=record.name, seconds=record.seconds) for record in records.values()],
        commands=_commands(run),
    )


def _commands(run: Run) -> list[str]:
    """The commands that make each artifact by hand."""
    lines = [[*run.words, "--out", run.folder]]
    for export in run.exports:
        target = export.target
        line = ["edgekd", "export", run.student, "OUT"]
        line += ["--target", target.target, "--recipe", export.recipe.name]
        if export.packs:
            line += ["--quantized", run.path(export.packs.folder)]
        elif export.recipe.needs_moments:
            line += ["--moments", run.path("calibration") / MOMENTS]
        line += ["--context", target.context] if target.context else []
        for key, value in target.own_keys.items():
            line += ["--option", f"{key}={json.dumps(value)}"]
        lines.append(line)
    return [shlex.join(map(str, line)) for line in lines]
