"""A run as a chain of stages, each of which can die anywhere.

A stage's key is the hash of what it depends on: its section of the spec, the keys of the stages before it, the digests
of the files it reads, and the source of the code that does it. A stage fills a temporary folder, which is renamed into
place when whole; then its record is written. Run again, and a stage is skipped that has a record of the same key, whose
files are as the record says, and which was made from the content that the stages before it still have.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from . import plan
from .checkpoint import Checkpoint
from .errors import EdgekdError, GateFailed, SpecError
from .files import (
    atomic_folder,
    check_writable,
    digest,
    file_sha256,
    read_json,
    remove,
    sweep,
    write_json,
    write_sealed,
)
from .manifest import Artifact, Audit, add_proof, load_artifact
from .records import Record, damage, outputs_of, read_record, write_record
from .spec import BenchSpec, Method, QadSpec, Spec, TargetSpec, VerifySpec
from .student import (
    check_model,
    generation_config,
    init_student,
    load_model,
    load_tokenizer,
    resolve_model,
    save_model,
    student_config,
    vocabulary_size,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .quant.recipe import Recipe

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).parent
MOMENTS = "moments.safetensors"
RESULTS = "results.json"


class Watcher(Protocol):
    """Who is told how the work goes."""

    def begin(self, stage: str) -> None:
        """A stage starts."""

    def progress(self, stage: str, fraction: float, note: str) -> None:
        """A stage has done ``fraction`` of its work."""

    def end(self, stage: str, seconds: float, skipped: bool) -> None:
        """A stage is done, or was done before."""


@dataclass(frozen=True)
class Stage:
    """One link of the chain."""

    name: str
    folder: str
    key: str
    cost: plan.Cost
    work: Callable[[Path, Callable[[float, str], None]], dict[str, Any]] = field(repr=False)
    """Fills an empty folder and returns figures for the record."""
    reads: tuple[str, ...] = ()
    """Folders of the stages whose files it reads."""
    state: Path | None = None
    """Where its training keeps checkpoints."""


@dataclass(frozen=True)
class Run:
    """A spec, the folder it runs in, and what was resolved from it."""

    spec: Spec
    folder: Path
    base: Path
    teacher: Path
    words: Sequence[str]
    """The command that began it, but for the folder."""

    def path(self, stage_folder: str) -> Path:
        """Where a stage's result lies."""
        return self.folder / stage_folder

    @property
    def state(self) -> Path:
        """Where records, the lock and the state of trainings lie."""
        return self.folder / ".edgekd"

    @property
    def student_config(self) -> dict[str, Any]:
        """The student's ``config.json``."""
        return student_config(self.spec.student, Checkpoint(self.teacher).config, self.base)


def open_run(spec: Spec, *, base: Path, out: Path | None = None, words: Sequence[str] = ()) -> Run:
    """Resolve what a spec names and choose the run's folder (default ``runs/NAME``).

    Args:
        words: the command that asked for it, but for the folder, for the report.

    Raises:
        EdgekdError: the folder exists and is not a run, a model is missing, or a target refuses the student.
    """
    from .targets import check

    folder = out or Path("runs") / spec.name
    if folder.exists() and not folder.is_dir():
        raise EdgekdError(f"{folder} exists and is a file.", "Choose another with --out.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ".edgekd").is_dir():
        raise EdgekdError(f"{folder} exists and is not a run of edgekd.", "Choose another with --out.")
    teacher = resolve_model(spec.teacher.model, base)
    run = Run(spec, folder, base, teacher, words or ["edgekd", "run", spec.name])
    load_tokenizer(teacher, trust_remote_code=spec.teacher.trust_remote_code)
    check_model(teacher, trust_remote_code=spec.teacher.trust_remote_code)
    _check_student(run)
    _check_lengths(run)
    spec.data.files(base)
    for target in spec.targets:
        check(run.student_config, teacher, target)
    return run


def _check_student(run: Run) -> None:
    """Refuse a student checkpoint whose tokenizer is not the teacher's, before any work."""
    if run.spec.student.init == "checkpoint":
        from .distill.signals import check_same_tokenizer

        folder = resolve_model(run.spec.student.model, run.base)
        check_model(folder)
        check_same_tokenizer(run.teacher, folder)


def _check_lengths(run: Run) -> None:
    """Refuse lengths that the student cannot hold, and thresholds of recipes that are not exported."""
    spec, most = run.spec, run.student_config.get("max_position_embeddings")
    wanted = {"data.context": spec.data.context}
    for target in spec.targets:
        most = min(filter(None, (most, target.context)), default=None)
    wanted["verify.context"] = spec.verify.context
    wanted["verify.greedy_tokens"] = spec.verify.greedy_tokens + 1
    wanted["bench.prompt_tokens"] = max(spec.bench.prompt_tokens) + spec.bench.decode_tokens
    for key, tokens in wanted.items():
        if most and tokens > most:
            raise SpecError(f"key '{key}': {tokens} tokens are more than the context of {most}.", "Lower it.")
    recipes = {recipe for target in spec.targets for recipe in target.recipes}
    for recipe in spec.verify.thresholds.keys() - recipes - {"default"}:
        raise SpecError(
            f"key 'verify.thresholds.{recipe}': no target has that recipe; there are: {', '.join(sorted(recipes))}.",
            "Correct it, or use the key default.",
        )


def _code(*parts: str) -> str:
    """Digest of the source files below these parts of the package."""
    from . import benchmarks, targets

    roots = {"targets": Path(targets.__path__[0]), "benchmarks": Path(benchmarks.__path__[0])}
    whole = hashlib.sha256()
    for part in parts:
        first, _, rest = part.partition("/")
        root = roots[first] / rest if first in roots else _SOURCE / part
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            whole.update(path.read_bytes())
    return whole.hexdigest()


def stages(run: Run, machine: plan.Machine) -> list[Stage]:
    """Every stage of a run in the order of work, but the report."""
    spec, teacher = run.spec, Checkpoint(run.teacher)
    student = run.student_config
    data_key = digest(
        {
            "data": spec.data.model_dump(exclude={"allow_skipped"}),
            "files": [file_sha256(path) for path in spec.data.files(run.base)],
            "python": platform.python_version() if spec.data.source == "stdlib" else None,
            "seed": spec.seed,
            "teacher": teacher.digest,
            "code": _code(
                "distill/data.py", "distill/corpus.py", "distill/chat.py", "conversation.py", "template_process.py"
            ),
        }
    )
    training = {
        "student": spec.student.model_dump(),
        "initial": Checkpoint(resolve_model(spec.student.model, run.base)).digest
        if spec.student.init == "checkpoint"
        else None,
        "seed": spec.seed,
        "data": data_key,
        "teacher": teacher.digest,
        "code": _code("distill", "student.py", "checkpoint.py", "architecture.py"),
    }
    distill = spec.distill.model_dump(exclude={"baseline"})
    labels = spec.distill.model_dump(exclude={"baseline", "loss", "temperature", "jsd_beta"})
    student_key = digest(training | {"distill": distill})
    baseline_key = digest(training | {"labels": labels})
    context = spec.data.context
    found = [Stage("data", "data", data_key, plan.Cost(2**30, 2**28, 15), partial(_prepare_data, run))]
    trained: dict[str, tuple[str, dict[str, Any] | None]] = {"student": (student_key, teacher.config)}
    if spec.distill.baseline:
        trained["baseline"] = (baseline_key, None)
    for name, (key, taught) in trained.items():
        cost = plan.training_cost(student, taught, spec.distill, context, machine)
        state = run.state / f"{name}-{key[:12]}"
        work = partial(_train, run, taught is not None, state)
        found.append(Stage(name, name, key, cost, work, reads=("data",), state=state))
    compared = [teacher.config, *([teacher.config, student] * len(trained))]
    quality_key = digest([student_key, baseline_key if spec.distill.baseline else None, _code("distill/train.py")])
    cost = plan.inference_cost(compared, spec.data.max_test_tokens, machine)
    found.append(Stage("quality", "quality", quality_key, cost, partial(_quality, run), reads=("data", *trained)))
    quantizing = _quantize_stages(run, student_key, data_key, machine)
    found += quantizing
    keys = {stage.name: stage.key for stage in quantizing}
    for target, recipe in _pairs(run):
        found += _artifact_stages(run, target, recipe, student_key, keys, machine)
    # Benchmarks last: nothing else should run while they do, and a failed gate stops before them.
    return sorted(found, key=lambda stage: stage.name.startswith("bench"))


def _pairs(run: Run) -> list[tuple[TargetSpec, Recipe]]:
    """Every artifact to make."""
    from .targets import load_recipe

    return [(target, load_recipe(recipe)) for target in run.spec.targets for recipe in target.recipes]


def _grids(run: Run) -> list[tuple[Recipe, Method, str]]:
    """Every quantized student to make: recipe, method and folder. The exported one of a recipe comes last."""
    recipes = {recipe.name: recipe for _, recipe in _pairs(run) if recipe.on_grid}
    rounded: list[Method] = ["rtn"]
    return [
        (recipe, method, f"quantized/{recipe.name}-{method}")
        for recipe in recipes.values()
        for method in (run.spec.quantize.methods if recipe.has_int4 else rounded)
    ]


def _exported_grid(run: Run, recipe: Recipe) -> tuple[Method, str]:
    """Method and folder of the quantized student that a recipe's artifacts pack."""
    return [(method, folder) for of, method, folder in _grids(run) if of == recipe][-1]


def _quantize_stages(run: Run, student_key: str, data_key: str, machine: plan.Machine) -> list[Stage]:
    spec, student = run.spec, run.student_config
    settings = spec.quantize
    calibration = [data_key, settings.calibration_windows]
    tokens = settings.calibration_windows * spec.data.context
    stages = []
    if any(recipe.needs_moments for _, recipe in _pairs(run)):
        key = digest([student_key, calibration, _code("quant/calibrate.py")])
        cost = plan.inference_cost([student], tokens, machine)
        work = partial(_calibrate, run)
        stages.append(Stage("calibrate", "calibration", key, cost, work, reads=("data", "student")))
    grids = _grids(run)
    for recipe, method, folder in grids:
        key = digest(
            [
                student_key,
                recipe.model_dump(),
                method,
                _code("quant"),
                calibration if method != "rtn" else None,
                [settings.qad.model_dump(), spec.seed, _code("distill")] if method == "qad" else None,
            ]
        )
        cost, work, state = plan.export_cost(student, 5), partial(_quantize, run, recipe, method), None
        if method == "qad":
            state = run.state / f"qad-{recipe.name}-{key[:12]}"
            work = partial(_quantize_aware, run, recipe, state)
            taught = student if settings.qad.teacher == "student" else Checkpoint(run.teacher).config
            cost = plan.training_cost(student, taught, settings.qad, spec.data.context, machine)
        elif method != "rtn":
            cost = plan.calibration_cost(student, tokens, machine)
        reads: tuple[str, ...] = ("student",) if method == "rtn" else ("data", "student")
        stages.append(Stage(f"quantize {recipe.name} {method}", folder, key, cost, work, reads, state))
    verify = spec.verify.model_dump(include={"windows", "context"})
    key = digest([student_key, [stage.key for stage in stages], verify, _code("verify/parity.py")])
    models = [Checkpoint(run.teacher).config, *[student] * (1 + len(grids))]
    cost = plan.inference_cost(models, spec.verify.windows * spec.verify.context, machine)
    reads = ("data", "student", *(folder for _, _, folder in grids))
    stages.append(Stage("ledger", "ledger", key, cost, partial(_measure_hops, run), reads))
    return stages


def _artifact_stages(
    run: Run, target: TargetSpec, recipe: Recipe, student_key: str, keys: Mapping[str, str], machine: plan.Machine
) -> list[Stage]:
    from .targets import label as label_of
    from .targets import stand_in

    spec, student = run.spec, run.student_config
    label = label_of(target.target, recipe.name)
    upstream, weights = [student_key], ["student"]
    if recipe.on_grid:
        method, grid = _exported_grid(run, recipe)
        upstream.append(keys[f"quantize {recipe.name} {method}"])
        weights.append(grid)
    moments = ["calibration"] if recipe.needs_moments else []
    if moments:
        upstream.append(keys["calibrate"])
    export_key = digest(
        [
            upstream,
            target.target,
            target.context,
            target.providers,
            recipe.model_dump(),
            _code("targets", "manifest.py", "quant/folder.py"),
            _versions(),
        ]
    )
    verify_key = digest([export_key, spec.verify.model_dump(exclude={"thresholds"}), _code("verify", "targets")])
    bench_key = digest(
        [
            export_key,
            spec.bench.model_dump(),
            platform.node(),
            _code("benchmarks/harness.py", "benchmarks/metrics.py", "targets"),
        ]
    )
    # A tool that was installed since sees more.
    audit_key = digest(
        [
            [export_key, platform.node(), [which(tool) for tool in ("strace", "unshare")]],
            _code("audit.py", "strace.py", "privacy.py", "targets"),
        ]
    )
    tokens = spec.verify.windows * spec.verify.context
    size = sum(spec.bench.prompt_tokens) + spec.bench.decode_tokens
    exported = f"artifacts/{label}"
    export_cost = plan.export_cost(student, 16)
    verify_cost = plan.inference_cost([student], 6 * tokens, machine)
    bench_s = plan.inference_cost([student], size * spec.bench.runs, machine).seconds + 2 * spec.bench.runs
    bench_cost = plan.Cost(export_cost.ram_bytes, 2**16, bench_s)
    audit_cost = plan.Cost(export_cost.ram_bytes, 2**16, 10)
    export, verify = partial(_export, run, target, recipe), partial(_verify, run, label, recipe)
    audit, compared = partial(_audit, run, label), ("data", *weights, exported)
    found = [
        Stage(f"export {label}", exported, export_key, export_cost, export, reads=(*weights, *moments)),
        Stage(f"verify {label}", f"parity/{label}", verify_key, verify_cost, verify, reads=compared),
        Stage(f"audit {label}", f"audit/{label}", audit_key, audit_cost, audit, reads=(exported,)),
    ]
    if not stand_in(target.target):
        bench, reads = partial(_bench, run, label), ("student", exported)
        found.append(Stage(f"bench {label}", f"bench/{label}", bench_key, bench_cost, bench, reads=reads))
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in (
        "edgekd",
        "torch",
        "transformers",
        "gguf",
        "llama-cpp-python",
        "onnx",
        "onnxruntime",
        "onnxruntime-genai",
        "coremltools",
        "executorch",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- the work of each stage -------------------------------------------------------------------------------------------


def _prepare_data(run: Run, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    from .distill.data import prepare

    tokenizer = load_tokenizer(run.teacher, trust_remote_code=run.spec.teacher.trust_remote_code)
    spec, base = run.spec, run.base
    return prepare(
        spec.data, tokenizer, out, seed=spec.seed, base=base, on_progress=lambda n: tell(0, f"{n} documents")
    )


def _train(run: Run, distilled: bool, state: Path, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    from .distill.checkpoint import validation_curve
    from .distill.data import load_windows
    from .distill.signals import OnlineTeacher
    from .distill.train import train

    spec = run.spec
    tokenizer = load_tokenizer(run.teacher, trust_remote_code=spec.teacher.trust_remote_code)
    model = init_student(spec.student, run.teacher, spec.seed, run.base)
    generation = generation_config(spec.student, run.teacher, run.base)
    signal = None
    if distilled:
        teacher = load_model(run.teacher, trust_remote_code=spec.teacher.trust_remote_code)
        signal = OnlineTeacher(teacher, vocabulary_size(tokenizer))
    data = run.path("data")
    figures = train(
        model,
        load_windows(data, "train"),
        load_windows(data, "validation"),
        spec.distill,
        signal=signal,
        seed=spec.seed,
        work_dir=state,
        on_event=_telling(tell),
    )
    save_model(model, tokenizer, out, generation)
    return figures | {"curve": validation_curve(state / "log.jsonl")}


def _quality(run: Run, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    from .distill.data import load_windows
    from .distill.signals import OnlineTeacher
    from .distill.train import evaluate, evenly_spaced

    spec = run.spec
    windows = evenly_spaced(
        load_windows(run.path("data"), "test"), max(1, spec.data.max_test_tokens // spec.data.context)
    )
    teacher = load_model(run.teacher, trust_remote_code=spec.teacher.trust_remote_code)
    signal = OnlineTeacher(teacher, vocabulary_size(load_tokenizer(run.teacher)))
    names = ["teacher", "student", *(["baseline"] if run.spec.distill.baseline else [])]
    quality: dict[str, Any] = {"baseline": None}
    for i, name in enumerate(names):
        tell(i / len(names), name)
        model = teacher if name == "teacher" else load_model(run.path(name))
        figures = evaluate(model, windows, teacher=None if name == "teacher" else signal)
        quality[name] = {"parameters": model.num_parameters()} | figures
    write_json(out / "quality.json", quality)
    return quality


def _calibration_ids(run: Run) -> torch.Tensor:
    """Windows of training text ``(N, T)``, evenly spaced."""
    from .distill.data import load_windows
    from .distill.train import evenly_spaced

    return evenly_spaced(load_windows(run.path("data"), "train"), run.spec.quantize.calibration_windows).ids


def _calibrate(run: Run, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    from safetensors.torch import save_file

    from .quant.calibrate import second_moments

    moments = second_moments(run.path("student"), _calibration_ids(run), lambda done, total: tell(done / total, ""))
    save_file(moments, out / MOMENTS)
    return {}


def _quantize(
    run: Run, recipe: Recipe, method: Method, out: Path, tell: Callable[[float, str], None]
) -> dict[str, Any]:
    from .quant.quantize import quantize

    out.rmdir()
    ids = None if method == "rtn" else _calibration_ids(run)
    return quantize(run.path("student"), out, recipe, method=method, ids=ids, on_progress=tell)


def _quantize_aware(
    run: Run, recipe: Recipe, state: Path, out: Path, tell: Callable[[float, str], None]
) -> dict[str, Any]:
    from .distill.data import load_windows
    from .distill.qad import quantize_aware_distill
    from .distill.signals import OnlineTeacher

    out.rmdir()
    spec, data = run.spec, run.path("data")
    settings = spec.quantize.qad
    trusted = spec.teacher.trust_remote_code
    vocab_size = vocabulary_size(load_tokenizer(run.teacher, trust_remote_code=trusted))
    if settings.teacher == "teacher":
        signal = OnlineTeacher(load_model(run.teacher, trust_remote_code=trusted), vocab_size)
    else:
        signal = OnlineTeacher(load_model(run.path("student")), vocab_size)
    return quantize_aware_distill(
        run.path("student"),
        out,
        recipe,
        load_windows(data, "train"),
        load_windows(data, "validation"),
        settings,
        calibration_windows=spec.quantize.calibration_windows,
        signal=signal,
        seed=spec.seed,
        work_dir=state,
        on_event=_telling(tell),
    )


def _telling(tell: Callable[[float, str], None]) -> Callable[[dict[str, Any]], None]:
    """Progress from a training loop's events."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            tell(event["step"] / event["steps"], f"loss {event['loss']:.3f}  {event['tokens_per_s']:,.0f} tok/s")

    return on_event


def _measure_hops(run: Run, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    """The hops that no runtime takes part in, in fp32: from the teacher to the student, and on to each grid."""
    from .quant.folder import load_dequantized, open_grid
    from .verify.parity import compare

    trusted = run.spec.teacher.trust_remote_code
    shared = vocabulary_size(load_tokenizer(run.teacher, trust_remote_code=trusted))
    student, windows, grids = load_model(run.path("student")), _verify_windows(run), _grids(run)
    tell(0, "student")
    teacher = load_model(run.teacher, trust_remote_code=trusted)
    write_json(out / "student.json", compare(_logits_of(teacher, shared), _logits_of(student, shared), windows))
    for number, (recipe, method, folder) in enumerate(grids, 1):
        tell(number / (1 + len(grids)), f"{recipe.name} {method}")
        grid = open_grid(run.path(folder))
        figures = compare(_logits_of(student), _logits_of(load_dequantized(grid)), windows)
        told = {"recipe": recipe.name, "method": method, "bits_per_weight": grid.bits_per_weight}
        write_json(out / f"{recipe.name}-{method}.json", told | figures)
    return {}


def _export(
    run: Run, target: TargetSpec, recipe: Recipe, out: Path, tell: Callable[[float, str], None]
) -> dict[str, Any]:
    from .targets import export

    out.rmdir()
    moments = run.path("calibration") / MOMENTS
    artifact = export(
        run.path("student"),
        target,
        recipe.name,
        out,
        name=run.spec.name,
        grid=run.path(_exported_grid(run, recipe)[1]) if recipe.on_grid else None,
        moments=moments if recipe.needs_moments else None,
    )
    return {"size_bytes": artifact.size_bytes, "bits_per_weight": artifact.manifest.bits_per_weight}


def quantize_model(
    student: Path,
    out: Path,
    recipe: Recipe,
    method: str,
    ids: np.ndarray | None,
    qad: QadSpec,
    calibration_windows: int,
    seed: int,
    tell: Callable[[float, str], None],
) -> dict[str, Any]:
    """Quantize one model folder, outside a run.

    Args:
        ids: training text ``(N, T)``; None for ``rtn``. Quantization-aware distillation takes one window in twenty for
            validation, and keeps its checkpoints in ``OUT.training``.

    Raises:
        EdgekdError: as ``quant.quantize.quantize`` and ``distill.qad.quantize_aware_distill``.
    """
    import torch

    from .quant.quantize import quantize

    calibration = None if ids is None else torch.from_numpy(ids)
    if method != "qad":
        return quantize(student, out, recipe, method=method, ids=calibration, on_progress=tell)
    assert calibration is not None
    from .distill.checkpoint import drop_checkpoints
    from .distill.data import Windows
    from .distill.qad import quantize_aware_distill
    from .distill.signals import OnlineTeacher

    held = torch.arange(len(calibration)) % 20 == 19
    train, validation = (
        Windows(part, torch.ones_like(part, dtype=torch.uint8)) for part in (calibration[~held], calibration[held])
    )
    if not len(validation):
        raise EdgekdError(f"quantize: qad needs 20 windows of text, there are {len(calibration)}.", "Give more text.")
    signal = OnlineTeacher(load_model(student), vocabulary_size(load_tokenizer(student)))
    state = out.with_name(out.name + ".training")
    figures = quantize_aware_distill(
        student,
        out,
        recipe,
        train,
        validation,
        qad,
        calibration_windows=calibration_windows,
        signal=signal,
        seed=seed,
        work_dir=state,
        on_event=_telling(tell),
    )
    drop_checkpoints(state)
    return figures


def export_model(
    student: Path,
    spec: TargetSpec,
    recipe: str,
    out: Path,
    *,
    grid: Path | None,
    moments: Path | None,
    ids: np.ndarray | None,
) -> Artifact:
    """Export one model folder, outside a run.

    Args:
        ids: calibration text ``(N, T)``, read when the recipe wants moments and none are given.
    """
    from .targets import export

    name = student.resolve().name
    if ids is None:
        return export(student, spec, recipe, out, name=name, grid=grid, moments=moments)
    import torch
    from safetensors.torch import save_file

    from .quant.calibrate import second_moments

    with TemporaryDirectory() as folder:
        made = Path(folder) / MOMENTS
        save_file(second_moments(student, torch.from_numpy(ids)), made)
        return export(student, spec, recipe, out, name=name, grid=grid, moments=made)


def held_out_windows(ids: np.ndarray, count: int, context: int) -> np.ndarray:
    """``count`` windows ``(count, context)`` spread evenly over packed ``(N, T)``; fewer where the text is short."""
    flat = np.ascontiguousarray(ids).reshape(-1)
    whole = flat[: len(flat) // context * context].reshape(-1, context)
    if not len(whole):
        raise SpecError(f"the text has {len(flat)} tokens, a window needs {context}.", "Give more text.")
    return whole[np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)]


def _logits_of(
    model: PreTrainedModel, vocab_size: int | None = None
) -> Callable[[Sequence[int] | np.ndarray], np.ndarray]:
    """Ids ``(T,)`` to logits float32 ``(T, V)``, rows of the vocabulary's padding cut off."""
    import torch

    def logits(ids: Sequence[int] | np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found = model(torch.as_tensor(np.asarray(ids), dtype=torch.long)[None], use_cache=False).logits
        return found[0, :, :vocab_size].numpy()

    return logits


def verify_artifact(
    artifact: Artifact,
    reference: Path,
    windows: np.ndarray,
    spec: VerifySpec,
    tell: Callable[[float, str], None],
    grid: Path | None = None,
) -> dict[str, Any]:
    """Compare an artifact, run by its own runtime, with the Hugging Face model it was made from, in fp32.

    Args:
        reference: the model folder.
        windows: held-out ids ``(N, T)``.
        grid: the quantized student that was packed, to tell what the runtime alone costs.

    Returns:
        The figures of ``verify.parity.measure``; under ``tokens``, of ``verify.tokens.check_tokens``; and, with a grid,
        under ``runtime``, those of ``verify.parity.compare`` against the dequantized grid; under ``stand_in``, what ran
        the artifact where its own runtime cannot.
    """
    from .quant.folder import load_dequantized, open_grid
    from .targets import open_artifact, stand_in
    from .verify.parity import compare, measure, session_logits
    from .verify.tokens import check_tokens

    model, tokenizer = load_model(reference), load_tokenizer(reference)
    session = open_artifact(artifact)
    try:
        tell(0.1, "tokens")
        figures: dict[str, Any] = {
            "stand_in": stand_in(artifact.manifest.target),
            "tokens": check_tokens(session, tokenizer, artifact.manifest.contract),
        }
        tell(0.3, "logits")
        figures |= measure(session, _logits_of(model), windows, greedy_tokens=spec.greedy_tokens)
        if grid is not None:
            tell(0.8, "against the grid")
            dequantized = load_dequantized(open_grid(grid))
            figures["runtime"] = compare(_logits_of(dequantized), session_logits(session), windows)
    finally:
        session.close()
    return figures


def _verify_windows(run: Run) -> np.ndarray:
    from .distill.data import load_windows

    spec = run.spec.verify
    return held_out_windows(load_windows(run.path("data"), "test").ids.numpy(), spec.windows, spec.context)


def _verify(run: Run, label: str, recipe: Recipe, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    artifact = load_artifact(run.path(f"artifacts/{label}"))
    grid = run.path(_exported_grid(run, recipe)[1]) if recipe.on_grid else None
    figures = verify_artifact(artifact, run.path("student"), _verify_windows(run), run.spec.verify, tell, grid)
    write_json(out / "parity.json", figures)
    return {}


def _audit(run: Run, label: str, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    from .audit import audit

    write_json(out / "audit.json", audit(load_artifact(run.path(f"artifacts/{label}"))).model_dump())
    return {}


def bench_artifact(
    artifact: Artifact, spec: BenchSpec, tell: Callable[[float, str], None], config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Time an artifact in fresh processes.

    Args:
        config: the student's ``config.json``; with it the roofline counts the key-value cache too.

    Raises:
        EdgekdError: the artifact's own runtime does not run here.
    """
    from .benchmarks.harness import bench
    from .benchmarks.metrics import Traffic, kv_bytes_per_position
    from .targets import open_artifact, stand_in, try_artifact

    manifest = artifact.manifest
    if instead := stand_in(manifest.target):
        raise EdgekdError(
            f"{manifest.runtime} does not run on this machine; {instead}, does, and its speed says nothing.",
            "Benchmark the artifact on a machine that has its runtime.",
        )
    weight_bytes = round(manifest.parameters * manifest.bits_per_weight / 8)
    traffic = Traffic(weight_bytes, kv_bytes_per_position(config)) if config else None

    def on_event(event: dict[str, Any]) -> None:
        tell(event["run"] / event["runs"], f"run {event['run']} of {event['runs']}")

    try_artifact(artifact)  # here, not in the processes that are timed
    return bench(open_artifact, artifact, spec, traffic=traffic, on_event=on_event)


def _bench(run: Run, label: str, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    artifact = load_artifact(run.path(f"artifacts/{label}"))
    result = bench_artifact(artifact, run.spec.bench, tell, Checkpoint(run.path("student")).config)
    write_json(out / "bench.json", result)
    return {}


# --- running ----------------------------------------------------------------------------------------------------------


def to_do(run: Run, chain: Sequence[Stage], *, check: bool = False) -> dict[str, str]:
    """Why each stage that is not done is not, by its name; empty words where nothing of its key was made before.

    A file is compared with its sha256 where a stage that is to be done will read it, where its size or time of change
    differ, and where it is small.

    Args:
        check: compare every file.
    """
    faults: dict[str, str] = {}
    used: set[str] = set()
    # From the last: whether a stage's files will be read is known once all that might read them are judged.
    for stage in reversed(chain):
        fault = _fault(run, stage, every=check or stage.folder in used)
        if fault is not None:
            faults[stage.name] = fault
            used |= set(stage.reads)
    return faults


def _fault(run: Run, stage: Stage, *, every: bool) -> str | None:
    """Why a stage is to be done; None where it is done."""
    path = _record_path(run, stage.folder)
    if not os.path.lexists(path):
        return ""
    try:
        record = read_record(path)
    except EdgekdError as error:
        return error.cause
    if record.key != stage.key:
        return ""
    return damage(run.path(stage.folder), record.outputs, every=every) or _changed_input(run, record)


def _changed_input(run: Run, record: Record) -> str | None:
    """Names a stage that has other files now than those that the recorded stage read."""
    for folder, made_from in record.inputs.items():
        try:
            now = read_record(_record_path(run, folder)).digest
        except EdgekdError:  # that stage is to be done: its files will tell
            continue
        if now != made_from:
            return f"{run.path(folder)} is not what it was made from"
    return None


def _record_path(run: Run, stage_folder: str) -> Path:
    return run.state / f"{stage_folder.replace('/', '-')}.json"


@contextmanager
def _held(run: Run) -> Iterator[None]:
    """Hold the run's folder: two processes must not work in it at once. What killed ones left in it is removed."""
    if run.state.is_symlink():
        raise EdgekdError(f"{run.state} is a link.", "Remove it, or choose --out.")
    run.state.mkdir(parents=True, exist_ok=True)
    check_writable(run.state)
    if links := [entry for entry in run.state.iterdir() if entry.is_symlink()]:
        raise EdgekdError(f"{links[0]} is a link.", "Remove it, or choose --out.")
    try:
        with FileLock(run.state / "lock", timeout=0):
            sweep(run.folder)
            yield
    except Timeout as error:
        raise EdgekdError(f"{run.folder}: another edgekd is at work in it.", "Wait, or choose --out.") from error


def _do(run: Run, stage: Stage, faults: Mapping[str, str], watcher: Watcher) -> Record:
    """The record of a stage, which is done now if it was not."""
    path = _record_path(run, stage.folder)
    fault = faults[stage.name] if stage.name in faults else _changed_input(run, read_record(path))
    if fault:
        _LOG.warning("%s. Doing again: %s.", fault.removesuffix("."), stage.name)
    record = read_record(path) if fault is None else _make(run, stage, watcher)
    watcher.end(stage.name, record.seconds, skipped=fault is None)
    if stage.state:
        from .distill.checkpoint import drop_checkpoints

        drop_checkpoints(stage.state)
    return record


def _make(run: Run, stage: Stage, watcher: Watcher) -> Record:
    """Temporary folder, rename, record: killed between any two, the stage is not done."""
    path = _record_path(run, stage.folder)
    watcher.begin(stage.name)
    began = time.monotonic()
    with atomic_folder(run.path(stage.folder), replace=True) as folder:
        figures = stage.work(folder, partial(watcher.progress, stage.name))
        outputs = outputs_of(folder)
        remove(path)
    record = Record(
        key=stage.key,
        name=stage.name,
        seconds=time.monotonic() - began,
        figures=figures,
        inputs={folder: read_record(_record_path(run, folder)).digest for folder in stage.reads},
        outputs=outputs,
    )
    write_record(path, record)
    for words in figures.get("warnings", ()):
        _LOG.warning("%s: %s", stage.name, words)
    return record


def run_stages(
    run: Run, watcher: Watcher, *, until: str | None = None, report_only: bool = False, check: bool = False
) -> dict[str, Any]:
    """Do every stage that is not done, then write ``results.json`` and ``report.html``.

    Args:
        until: stop after the stage of that name, without a report.
        report_only: measure the gates but do not fail on them.
        check: compare every file of the stages that are done with its sha256.

    Raises:
        GateFailed: an artifact missed a threshold; the report is written all the same.
        DoesNotFit: a stage cannot fit the machine; nothing was done.
    """
    machine = plan.measure_machine(run.folder)
    chain = stages(run, machine)
    names = [stage.name for stage in chain]
    chain = chain[: names.index(until) + 1] if until else chain
    for folder in sorted({run.path(stage.folder).parent for stage in chain}):
        check_writable(folder)
    with _held(run):
        faults = to_do(run, chain, check=check)
        plan.refuse_what_cannot_fit({s.name: s.cost for s in chain if s.name in faults}, machine, run.folder)
        write_json(run.state / "spec.json", run.spec.model_dump())
        benches = [stage for stage in chain if stage.name.startswith("bench")]
        others = chain[: len(chain) - len(benches)]
        records = {stage.folder: _do(run, stage, faults, watcher) for stage in others}
        failures = _failures(run, records)
        if report_only or not failures:
            records |= {stage.folder: _do(run, stage, faults, watcher) for stage in benches}
        if until:
            return _results(run, records)
        results = write_results(run, records)
    if failures and not report_only:
        raise GateFailed(
            f"{len(failures)} gate{'s' * (len(failures) > 1)} failed: " + "; ".join(failures) + ".",
            f"See {run.folder / 'report.html'}, or go on with --report-only.",
        )
    return results


def _labels(run: Run) -> list[tuple[str, str]]:
    from .targets import label

    return [(label(target.target, recipe.name), recipe.name) for target, recipe in _pairs(run)]


def _measured(run: Run, records: Mapping[str, Record], stage_folder: str, name: str) -> dict[str, Any] | None:
    """The figures in a file of a stage; None where the stage is not done."""
    return read_json(run.path(stage_folder) / name) if stage_folder in records else None


def _parities(run: Run, records: Mapping[str, Record]) -> dict[str, dict[str, Any]]:
    """Every artifact's parity, judged, by its label."""
    from .verify.parity import judge

    found = {}
    for label, recipe in _labels(run):
        parity = _measured(run, records, f"parity/{label}", "parity.json")
        if parity is not None:
            found[label] = parity | {"failures": judge(parity, parity["tokens"], run.spec.verify.gate(recipe))}
    return found


def _failures(run: Run, records: Mapping[str, Record]) -> list[str]:
    """What missed its gate, artifact by artifact."""
    return [f"{label}: {text}" for label, parity in _parities(run, records).items() for text in parity["failures"]]


def write_results(run: Run, records: Mapping[str, Record]) -> dict[str, Any]:
    """Write the proofs into the manifests, then ``results.json`` and ``report.html``.

    Args:
        records: of the stages that are done, by their folder.
    """
    from .benchmarks.report import build

    for label, parity in _parities(run, records).items():
        artifact = load_artifact(run.path(f"artifacts/{label}"), check_files=False)
        benchmark, seen = (_measured(run, records, f"{kind}/{label}", f"{kind}.json") for kind in ("bench", "audit"))
        audit = None if seen is None else Audit.model_validate(seen)
        add_proof(artifact, parity=parity, benchmark=benchmark, audit=audit)
    results = _results(run, records)
    write_sealed(run.folder / RESULTS, results)
    build(results, run.folder / "report.html")
    return results


def _results(run: Run, records: Mapping[str, Record]) -> dict[str, Any]:
    """Everything that was measured, in the form the report reads."""
    from .verify.ledger import ledger

    folders = {label: f"artifacts/{label}" for label, _ in _labels(run)}
    made = {
        label: load_artifact(run.path(folder), check_files=False)
        for label, folder in folders.items()
        if folder in records
    }
    manifests = {label: artifact.manifest.model_dump() for label, artifact in made.items()}
    measured = (_measured(run, records, "ledger", f"{recipe.name}-{method}.json") for recipe, method, _ in _grids(run))
    return {
        "name": run.spec.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(run.folder),
        "spec": run.spec.model_dump(),
        "versions": {"python": platform.python_version()} | _versions(),
        "data": records["data"].figures,
        "quality": _measured(run, records, "quality", "quality.json"),
        "training": {
            name: records[name].figures["curve"] if name in records else [] for name in ("student", "baseline")
        },
        "ledger": ledger(
            _measured(run, records, "ledger", "student.json"), [figures for figures in measured if figures], manifests
        ),
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
    for target, recipe in _pairs(run):
        line = ["edgekd", "export", run.path("student"), "OUT", "--target", target.target, "--recipe", recipe.name]
        if recipe.on_grid:
            line += ["--grid", run.path(_exported_grid(run, recipe)[1])]
        elif recipe.needs_moments:
            line += ["--moments", run.path("calibration") / MOMENTS]
        line += ["--context", target.context] if target.context else []
        line += [word for name in target.providers if target.providers != ["cpu"] for word in ("--provider", name)]
        lines.append(line)
    return [shlex.join(map(str, line)) for line in lines]
