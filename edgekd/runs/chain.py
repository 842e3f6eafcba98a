"""A run as a chain of stages.

A stage's key is the hash of what it depends on: the keys of the stages it reads, its section of the spec, the digests
of the files it reads, and what does the work: the source of the code, or, where the work takes long, the version of the
algorithm (``distill.versions``).
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import which
from typing import Literal

from .. import benchmarks, plan
from ..architecture import read_architecture
from ..distill import mixed
from ..distill import versions as algorithms
from ..files import digest, file_sha256
from ..memory import Proposal, proposals
from ..plan import Cost, Machine, PlannedCache, PlannedCapture
from ..spec import CUT_TOKENS, OF_TEACHER, DataSpec, Method, TrainingSpec
from ..targets import cache_value_bytes, code_of, versions
from . import work
from .records import Figures
from .run import Export, Quantization, Run

_SOURCE = Path(__file__).parent.parent
_BENCHMARKS = Path(benchmarks.__path__[0])
_HARNESS = [
    f"benchmarks/{name}.py"
    for name in (
        "children",
        "definitions",
        "energy",
        "gpu",
        "harness",
        "machine",
        "measure",
        "memory",
        "metrics",
        "sustained",
    )
]
_PROOF = "proof.py"
_CALIBRATION = ("matmul.py", "quant/calibrate.py")
_STORE = ("quant/store",)
_QUANTIZE = (*_STORE, "quant/grid.py", "quant/quantize.py", "quant/recipe.py")
_BUDGET = (*_CALIBRATION, "quant/sensitivity.py")
_METHODS: dict[Method, Sequence[str]] = {
    "rtn": _QUANTIZE,
    "search": (*_QUANTIZE, *_CALIBRATION, "quant/search.py"),
    "gptq": (*_QUANTIZE, *_CALIBRATION, "quant/gptq.py"),
    "qad": (),
}


@dataclass(frozen=True)
class Stage:
    """One link of the chain."""

    name: str
    folder: str
    key: str
    cost: Cost
    work: Callable[[Path, work.Tell], Figures] = field(repr=False)
    """Fills an empty folder and returns figures for the record."""
    reads: Sequence[str] = ()
    """Folders of the stages whose files it reads."""
    state: Path | None = None
    """Where its training keeps checkpoints."""
    together: bool = False
    """Whether all processes that torchrun started do it; the others are the first one's."""
    phase: Literal["work", "bench"] = "work"
    """Benchmarks come last: nothing else should run while they do, and a failed gate stops before them."""


def stages(run: Run, machine: Machine) -> list[Stage]:
    """Every stage of a run in the order of work, but the report."""
    data = _data(run)
    read = [data, *([_cut(run, data, machine)] if run.chooses_cut else [])]
    by_seed = [stage for seed in run.seeds for stage in _of_seed(run, seed, read, machine)] if run.trains else []
    student = by_seed[0] if by_seed else _taken(run)
    trained = by_seed or [student]
    read_first = _calibration_text(run, data)
    calibration = _calibration(run, read_first, student, machine)
    quantized = {wanted: _quantized(run, wanted, data, read_first, student, machine) for wanted in run.quantizations}
    chain = [*read, *[read_first] * (read_first is not data), *trained, *calibration, *quantized.values()]
    chain.append(_ledger(run, [data, student, *quantized.values()], machine))
    for export in run.exports:
        made_from = [student, *([quantized[export.packs]] if export.packs else [])]
        moments = calibration if export.recipe.needs_moments else []
        chain += _artifact(run, export, data, made_from, moments, machine)
    return sorted(chain, key=lambda stage: stage.phase == "bench")


def planned_caches(run: Run) -> list[PlannedCache]:
    """What each target's key-value cache will take, where the target says so before it exports."""
    longest, rows = read_architecture(run.student_config).context_length, []
    for target in run.spec.targets:
        if value_bytes := cache_value_bytes(target):
            context = target.context_of(longest)
            rows.append(PlannedCache.of(target.target, run.student_config, context, value_bytes))
    return rows


def planned_capture(run: Run, machine: Machine) -> PlannedCapture | None:
    """What a cached teacher will take, if the spec has one."""
    spec = run.spec
    if spec.teacher is None or spec.teacher.signal != "cached":
        return None
    from ..distill.cache import bytes_per_token

    rows = run.reader.checkpoint.architecture.vocab_size
    tokens = spec.distill.steps * spec.distill.windows_a_step * spec.data.context
    teachers = [teacher.config for teacher in run.teachers]
    disk_bytes = tokens * bytes_per_token(rows)
    return plan.capture_of(run.student_config, teachers, spec.teacher.weights, tokens, disk_bytes, machine)


def planned_trainings(run: Run, machine: Machine) -> list[Proposal]:
    """The student's training as the spec says it and as it could say, each with its peak memory."""
    spec = run.spec
    if not spec.teacher:
        return []
    student = read_architecture(run.student_config)
    teachers = [teacher.checkpoint.architecture for teacher in run.teachers]
    written = plan.training_of(spec.distill, spec.data, spec.teacher.beside, machine)
    budget = machine.gpu_bytes or machine.ram_bytes
    cacheable, shareable = spec.distill.cacheable, spec.distill.shareable(2)
    return proposals(student, teachers, written, machine.device, budget, cacheable=cacheable, shareable=shareable)


def _key(reads: Iterable[Stage], code: Iterable[str], *facts: object) -> str:
    """Digest of what a stage depends on.

    Args:
        code: files of the package, or folders of it, by their POSIX names.
        facts: whatever JSON holds.
    """
    return digest([[stage.key for stage in reads], _source(map(_file, code)), *facts])


def _file(part: str) -> Path:
    """A file of the package, wherever it is installed from."""
    of_benchmarks = part.removeprefix("benchmarks/")
    return (_SOURCE if of_benchmarks == part else _BENCHMARKS) / of_benchmarks


def _source(roots: Iterable[Path]) -> str:
    """Digest of source files, and of those below folders."""
    whole = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            whole.update(path.read_bytes())
    return whole.hexdigest()


def _data(run: Run) -> Stage:
    return _text(run, "data", run.spec.data)


def _calibration_text(run: Run, data: Stage) -> Stage:
    """What the integers are chosen on: a text of its own, or that of the training."""
    return _text(run, work.CALIBRATION_TEXT, run.spec.calibration) if run.spec.calibration else data


def _text(run: Run, name: str, spec: DataSpec) -> Stage:
    kinds = {source.source for source in spec.each.values()}
    key = _key(
        [],
        [],
        algorithms.TEXT,
        spec.model_dump(exclude={"allow_skipped", "processes"}),
        [file_sha256(path) for source in spec.each.values() for path in source.files(run.base)],
        [file_sha256(path) for path in mixed.FILES] if "mixed" in kinds else None,
        platform.python_version() if kinds & {"stdlib", "mixed"} else None,
        run.spec.seed,
        run.reader.checkpoint.digest,
    )
    return Stage(name, name, key, Cost(2**30, 2**28, 15), partial(work.prepare_data, run, spec))


def _cut(run: Run, data: Stage, machine: Machine) -> Stage:
    """What a cut student keeps of the teacher."""
    teacher, student = run.reader.checkpoint.architecture, read_architecture(run.student_config)
    key = _key([data], [], algorithms.CUT, run.spec.student.model_dump(), run.reader.checkpoint.digest)
    # Each layer that goes was tried with all that were left, half of them computed.
    passes = sum(kept / 2 + 1 for kept in range(student.layers + 1, teacher.layers + 1))
    cost = plan.inference_cost([run.reader.config], int(passes * CUT_TOKENS), machine)
    return Stage("cut", work.CUT, key, cost, partial(work.choose_cut, run), [data.folder])


def _of_seed(run: Run, seed: int, read: Sequence[Stage], machine: Machine) -> list[Stage]:
    """Training with a seed, the student first, and how good what it gave is.

    Args:
        read: what training reads, the data first.
    """
    data = read[0]
    trained = [_trained(run, seed, name, read, machine) for name in run.trained(seed)]
    teachers = [teacher.config for teacher in run.teachers]
    models, tokens = [*teachers, *[run.student_config] * len(trained)], run.spec.data.max_test_tokens
    asked = plan.inference_cost([*teachers, *models], tokens, machine)  # the teachers twice
    cost = replace(plan.inference_cost(models, tokens, machine), seconds=asked.seconds)
    reads, job = [data, *trained], partial(work.measure_quality, run, seed)
    name = _of("quality", run, seed)
    key = _key(reads, [_PROOF], algorithms.EVALUATION)
    return [
        *trained,
        Stage(name, run.of_seed(seed, "quality"), key, cost, job, _folders(reads)),
    ]


def _trained(run: Run, seed: int, name: str, read: Sequence[Stage], machine: Machine) -> Stage:
    """The student, or the baseline, whose outcome no setting of the teacher's losses touches."""
    spec, distilled = run.spec, name == "student"
    settings = spec.distill.outcome(*() if distilled else OF_TEACHER)
    initial = run.initial and run.initial.checkpoint.digest
    algorithm = [algorithms.STUDENT, algorithms.TRAINING]
    if distilled and spec.teacher and spec.teacher.signal == "cached":
        algorithm.append(algorithms.CACHE)
    taught_by = work.taught_by(run) if distilled else []
    reader = run.reader.checkpoint.digest
    key = _key(read, [], algorithm, spec.student.model_dump(), initial, seed, reader, settings, *taught_by)
    heard = spec.teacher.beside if distilled and spec.teacher else None
    training = plan.training_of(spec.distill, spec.data, heard, machine)
    teachers = [teacher.config for teacher in run.teachers]
    cost = plan.training_cost(run.student_config, teachers, spec.distill, training, machine)
    if distilled and (capture := planned_capture(run, machine)):
        cost = replace(
            cost,
            ram_bytes=max(cost.ram_bytes, capture.ram_bytes),
            gpu_bytes=max(cost.gpu_bytes, capture.gpu_bytes),
            disk_bytes=cost.disk_bytes + capture.disk_bytes,
            seconds=cost.seconds + capture.seconds,
        )
    state = run.state / f"{name}-{key[:12]}"
    cost = _with_measured_time(cost, spec.distill, run, state)
    job = partial(work.train_student, run, seed, distilled, state)
    folder = run.trained(seed)[name]
    return Stage(_of(name, run, seed), folder, key, cost, job, _folders(read), state, together=True)


def _taken(run: Run) -> Stage:
    """A student that exists: the run reads it where it lies."""
    key = _key([], [], run.reader.checkpoint.digest)
    return Stage("student", "student", key, Cost(2**28, 2**12, 1), partial(work.take_student, run))


def _with_measured_time(cost: Cost, spec: TrainingSpec, run: Run, state: Path) -> Cost:
    log = state / "log.jsonl"
    if not log.is_file():
        return cost
    from ..distill.checkpoint import read_log

    steps = [event for event in read_log(log) if event.event == "step"]
    done = steps[-1].step if steps else 0
    tokens_left = (spec.steps - done) * spec.windows_a_step * run.spec.data.context
    return plan.with_measured_time(cost, [step.figures["tokens_per_s"] for step in steps], tokens_left)


def _of(name: str, run: Run, seed: int) -> str:
    return name if seed == run.spec.seed else f"{name}, seed {seed}"


def _folders(stages: Iterable[Stage]) -> list[str]:
    return [stage.folder for stage in stages]


def _calibration(run: Run, text: Stage, student: Stage, machine: Machine) -> list[Stage]:
    """The second moments, where a recipe wants them."""
    if not any(export.recipe.needs_moments for export in run.exports):
        return []
    windows, reads = run.spec.quantize.calibration_windows, [text, student]
    cost = plan.inference_cost([run.student_config], windows * _calibration_context(run), machine)
    job = partial(work.calibrate, run)
    return [Stage("calibrate", "calibration", _key(reads, _CALIBRATION, windows), cost, job, _folders(reads))]


def _calibration_context(run: Run) -> int:
    return (run.spec.calibration or run.spec.data).context


def _quantized(run: Run, wanted: Quantization, data: Stage, text: Stage, student: Stage, machine: Machine) -> Stage:
    """A quantized student.

    Args:
        text: what the integers are chosen on.
    """
    settings, config, method = run.spec.quantize, run.student_config, wanted.method
    budget = wanted.recipe.bits is not None
    reads = [text, student] if budget or method != "rtn" else [student]
    if method == "qad" and text is not data:
        reads.insert(0, data)
    facts = [
        wanted.recipe.model_dump(),
        method,
        settings.calibration_windows if text in reads else None,
        [algorithms.QAD, algorithms.TRAINING, settings.qad.outcome(), run.spec.seed] if method == "qad" else None,
    ]
    code = dict.fromkeys([*_METHODS[method], *(_BUDGET if budget else ())])
    key = _key(reads, code, facts)
    job, state = partial(work.quantize, run, wanted), None
    if method == "rtn" and not budget:
        cost = plan.export_cost(config, 5)
    elif method == "qad":
        state = run.state / f"qad-{wanted.recipe.name}-{key[:12]}"
        job = partial(work.quantize_aware, run, wanted, state)
        heard = [config] if settings.qad.teacher == "student" else [teacher.config for teacher in run.teachers]
        training = plan.training_of(settings.qad, run.spec.data, "float32", machine)
        cost = plan.training_cost(config, heard, settings.qad, training, machine)
        cost = _with_measured_time(cost, settings.qad, run, state)
    else:
        cost = plan.calibration_cost(config, settings.calibration_windows * _calibration_context(run), machine)
    return Stage(f"quantize {wanted.name}", wanted.folder, key, cost, job, _folders(reads), state)


def _ledger(run: Run, reads: Sequence[Stage], machine: Machine) -> Stage:
    spec = run.spec.verify
    key = _key(reads, ["matmul.py", "verify/parity.py", "verify/reference.py", _PROOF], spec.windows, spec.context)
    models = [run.reader.config, *[run.student_config] * (1 + len(run.quantizations))]
    cost = plan.inference_cost(models, spec.windows * spec.context, machine)
    return Stage("ledger", "ledger", key, cost, partial(work.measure_hops, run), _folders(reads))


def _artifact(
    run: Run, export: Export, data: Stage, made_from: Sequence[Stage], moments: Sequence[Stage], machine: Machine
) -> list[Stage]:
    """The stages of one artifact; nothing is timed where another runtime stands in for its own."""
    student, label = run.student_config, export.label
    made = [*made_from, *moments]
    export_key = _key(
        made,
        ["manifest.py", *_STORE],
        _source(code_of(export.target.target)),
        versions([export.target.target]),
        export.target.model_dump(exclude={"recipes"}),
        export.recipe.model_dump(),
    )
    export_cost = plan.export_cost(student, 16)
    exported = Stage(
        f"export {label}", export.folder, export_key, export_cost, partial(work.export, run, export), _folders(made)
    )
    verified, audited = _verified(run, export, [data, *made_from, exported], machine), _audited(run, export, exported)
    if export.stand_in:
        return [exported, verified, audited]
    return [exported, verified, audited, _timed(run, export, [exported], machine)]


def _verified(run: Run, export: Export, reads: Sequence[Stage], machine: Machine) -> Stage:
    spec = run.spec.verify
    key = _key(reads, ["matmul.py", "verify", _PROOF], spec.model_dump(exclude={"thresholds"}))
    # In memory are the artifact and what it is compared with.
    cost = plan.inference_cost([run.student_config] * 2, 3 * spec.windows * spec.context, machine)
    job = partial(work.verify, run, export)
    return Stage(f"verify {export.label}", f"parity/{export.label}", key, cost, job, _folders(reads))


def _audited(run: Run, export: Export, exported: Stage) -> Stage:
    tools = [which(tool) for tool in ("strace", "unshare")]  # one that was installed since sees more
    key = _key([exported], ["audit.py", "strace.py", "privacy.py", _PROOF], platform.node(), tools)
    cost, job = Cost(exported.cost.ram_bytes, 2**16, 10), partial(work.audit, run, export)
    return Stage(f"audit {export.label}", f"audit/{export.label}", key, cost, job, [exported.folder])


def _timed(run: Run, export: Export, reads: Sequence[Stage], machine: Machine) -> Stage:
    spec = run.spec.bench
    key = _key(reads, [*_HARNESS, _PROOF], spec.model_dump(), platform.node())
    tokens = (sum(spec.prompt_tokens) + spec.decode_tokens) * spec.runs
    processes = spec.runs + spec.cold_runs + (spec.curve_seconds > 0)
    spent = 60 * spec.sustained_minutes
    seconds = spent + plan.inference_cost([run.student_config], tokens, machine).seconds + 2 * processes
    cost, job = Cost(reads[-1].cost.ram_bytes, 2**16, seconds), partial(work.bench, run, export)
    return Stage(f"bench {export.label}", f"bench/{export.label}", key, cost, job, _folders(reads), phase="bench")
