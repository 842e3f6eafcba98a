"""What a run measured: judged, written into the manifests, and told in ``results.json`` and ``report.html``."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime

from ..files import read_json, write_sealed
from ..manifest import Audit, add_proof, load_artifact
from ..targets import versions
from .records import Figures, Record
from .run import Run
from .work import MOMENTS

RESULTS = "results.json"


def failures(run: Run, records: Mapping[str, Record]) -> list[str]:
    """What missed its gate, artifact by artifact.

    Args:
        records: of the stages that are done, by their folder.
    """
    return [f"{label}: {text}" for label, parity in _parities(run, records).items() for text in parity["failures"]]


def write_results(run: Run, records: Mapping[str, Record]) -> Figures:
    """Write the proofs into the manifests, then ``results.json`` and ``report.html``; see ``results``."""
    from ..benchmarks.report import build

    for label, parity in _parities(run, records).items():
        artifact = load_artifact(run.path(f"artifacts/{label}"), check_files=False)
        benchmark, seen = (_measured(run, records, f"{kind}/{label}", f"{kind}.json") for kind in ("bench", "audit"))
        audit = None if seen is None else Audit.model_validate(seen)
        add_proof(artifact, parity=parity, benchmark=benchmark, audit=audit)
    found = results(run, records)
    write_sealed(run.folder / RESULTS, found)
    build(found, run.folder / "report.html")
    return found


def _measured(run: Run, records: Mapping[str, Record], stage_folder: str, name: str) -> Figures | None:
    """The figures in a file of a stage; None where the stage is not done."""
    return read_json(run.path(stage_folder) / name) if stage_folder in records else None


def _parities(run: Run, records: Mapping[str, Record]) -> dict[str, Figures]:
    """Every artifact's parity, judged, by its label."""
    from ..verify.parity import judge

    found = {}
    for export in run.exports:
        parity = _measured(run, records, f"parity/{export.label}", "parity.json")
        if parity is not None:
            gate = run.spec.verify.gate(export.recipe.name)
            found[export.label] = parity | {"failures": judge(parity, parity["tokens"], gate)}
    return found


def results(run: Run, records: Mapping[str, Record]) -> Figures:
    """Everything that was measured, in the form the report reads.

    Args:
        records: of the stages that are done, by their folder.
    """
    from ..verify.ledger import ledger

    made = {
        export.label: load_artifact(run.path(export.folder), check_files=False)
        for export in run.exports
        if export.folder in records
    }
    manifests = {label: artifact.manifest.model_dump() for label, artifact in made.items()}
    hops = [
        _measured(run, records, "ledger", f"{wanted.recipe.name}-{wanted.method}.json") for wanted in run.quantizations
    ]
    taught = _measured(run, records, "ledger", "student.json") if run.teacher else None
    return {
        "name": run.spec.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(run.folder),
        "spec": run.spec.model_dump(),
        "versions": {"python": platform.python_version()} | versions(target.target for target in run.spec.targets),
        "data": records["data"].figures,
        "quality": _measured(run, records, "quality", "quality.json"),
        "seeds": [
            {"seed": seed, **quality}
            for seed in run.seeds
            if (quality := _measured(run, records, run.of_seed(seed, "quality"), "quality.json"))
        ],
        "training": {
            name: records[name].figures.get("curve", []) if name in records else [] for name in ("student", "baseline")
        },
        "ledger": ledger(taught, list(filter(None, hops)), manifests),
        "artifacts": [
            {"manifest": manifests[label], "folder": str(artifact.folder), "size_bytes": artifact.size_bytes}
            for label, artifact in made.items()
        ],
        "stages": [{"name": record.name, "seconds": record.seconds} for record in records.values()],
        "commands": _commands(run),
    }


def _commands(run: Run) -> list[str]:
    """The commands that make each artifact by hand."""
    lines = [[*run.words, "--out", run.folder]]
    for export in run.exports:
        target = export.target
        line = ["edgekd", "export", run.student, "OUT"]
        line += ["--target", target.target, "--recipe", export.recipe.name]
        if export.packs:
            line += ["--grid", run.path(export.packs.folder)]
        elif export.recipe.needs_moments:
            line += ["--moments", run.path("calibration") / MOMENTS]
        line += ["--context", target.context] if target.context else []
        for key, value in target.own_keys.items():
            line += ["--option", f"{key}={json.dumps(value)}"]
        lines.append(line)
    return [shlex.join(map(str, line)) for line in lines]
