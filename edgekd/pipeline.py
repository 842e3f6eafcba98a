"""A run as a chain of stages, each of which can die anywhere.

A stage's key is the hash of what it depends on: its section of the spec, the keys of the stages before it, the digests
of the files it reads, and the source of the code that does it. A stage fills a temporary folder, which is renamed into
place when whole; then its record is written. Run again, and a stage with a record of the same key is skipped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from glob import glob
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import plan
from .errors import EdgekdError, GateFailed, SpecError
from .files import atomic_folder, digest, file_sha256, write_json
from .manifest import Artifact, add_proof, load_artifact
from .spec import BenchSpec, Method, QadSpec, Spec, TargetSpec, VerifySpec
from .student import Checkpoint, init_student, load_model, load_tokenizer, resolve_model, save_model, student_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .quant.recipe import Recipe

_SOURCE = Path(__file__).parent
MOMENTS = "moments.safetensors"


class Watcher(Protocol):
    """Who is told how the work goes."""

    def begin(self, stage: str) -> None:
        """A stage starts."""

    def progress(self, stage: str, fraction: float, note: str) -> None:
        """A stage has done ``fraction`` of its work."""

    def end(self, stage: str, seconds: float, skipped: bool) -> None:
        """A stage is done, or was done before."""

    def warn(self, stage: str, words: str) -> None:
        """The user must see what a stage found."""


@dataclass(frozen=True)
class Stage:
    """One link of the chain."""

    name: str
    folder: str
    key: str
    cost: plan.Cost
    work: Callable[[Path, Callable[[float, str], None]], dict[str, Any]] = field(repr=False)
    """Fills an empty folder and returns figures for the record."""


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
    _ = Checkpoint(teacher).files
    _check_student(run)
    _check_lengths(run)
    _input_files(run)
    for target in spec.targets:
        check(run.student_config, teacher, target)
    return run


def _check_student(run: Run) -> None:
    """Refuse a student checkpoint whose tokenizer is not the teacher's, before any work."""
    if run.spec.student.init == "checkpoint":
        from .distill.signals import check_same_tokenizer

        folder = resolve_model(run.spec.student.model, run.base)
        load_tokenizer(folder)
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


def _input_files(run: Run) -> list[Path]:
    """The local files of the data source."""
    files: list[Path] = []
    for pattern in run.spec.data.paths:
        found = sorted(Path(p) for p in glob(str(run.base / pattern), recursive=True))
        if not found:
            raise SpecError(
                f"key 'data.paths': {run.base / pattern}: no such file.", "Paths start from the spec's folder."
            )
        files += found
    return files


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
            "files": [file_sha256(path) for path in _input_files(run)],
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
        "code": _code("distill", "student.py"),
    }
    distill = spec.distill.model_dump(exclude={"baseline"})
    labels = spec.distill.model_dump(exclude={"baseline", "loss", "temperature", "jsd_beta"})
    student_key = digest(training | {"distill": distill})
    baseline_key = digest(training | {"labels": labels})
    context = spec.data.context
    found = [
        Stage("data", "data", data_key, plan.Cost(2**30, 2**28, 15), partial(_prepare_data, run)),
        Stage(
            "student", "student", student_key,
            plan.training_cost(student, teacher.config, spec.distill, context, machine),
            partial(_train, run, True, student_key),
        ),
    ]  # fmt: skip
    if spec.distill.baseline:
        found.append(
            Stage(
                "baseline", "baseline", baseline_key,
                plan.training_cost(student, None, spec.distill, context, machine),
                partial(_train, run, False, baseline_key),
            )
        )  # fmt: skip
    compared = [teacher.config, *([teacher.config, student] * (1 + spec.distill.baseline))]
    quality_key = digest([student_key, baseline_key if spec.distill.baseline else None, _code("distill/train.py")])
    found.append(
        Stage("quality", "quality", quality_key, plan.inference_cost(compared, spec.data.max_test_tokens, machine),
              partial(_quality, run))
    )  # fmt: skip
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
        stages.append(Stage("calibrate", "calibration", key, cost, partial(_calibrate, run)))
    grids = _grids(run)
    for recipe, method, folder in grids:
        key = digest(
            [
                student_key, recipe.model_dump(), method, _code("quant"),
                calibration if method != "rtn" else None,
                [settings.qad.model_dump(), spec.seed, _code("distill")] if method == "qad" else None,
            ]
        )  # fmt: skip
        cost, work = plan.export_cost(student, 5), partial(_quantize, run, recipe, method)
        if method == "qad":
            work = partial(_quantize_aware, run, recipe, key)
            taught = student if settings.qad.teacher == "student" else Checkpoint(run.teacher).config
            cost = plan.training_cost(student, taught, settings.qad, spec.data.context, machine)
        elif method != "rtn":
            cost = plan.calibration_cost(student, tokens, machine)
        stages.append(Stage(f"quantize {recipe.name} {method}", folder, key, cost, work))
    verify = spec.verify.model_dump(include={"windows", "context"})
    key = digest([student_key, [stage.key for stage in stages], verify, _code("verify/parity.py")])
    models = [Checkpoint(run.teacher).config, *[student] * (1 + len(grids))]
    cost = plan.inference_cost(models, spec.verify.windows * spec.verify.context, machine)
    stages.append(Stage("ledger", "ledger", key, cost, partial(_measure_hops, run)))
    return stages


def _artifact_stages(
    run: Run, target: TargetSpec, recipe: Recipe, student_key: str, keys: Mapping[str, str], machine: plan.Machine
) -> list[Stage]:
    from .targets import label as label_of
    from .targets import stand_in

    spec, student = run.spec, run.student_config
    label = label_of(target.target, recipe.name)
    upstream = [student_key]
    if recipe.on_grid:
        upstream.append(keys[f"quantize {recipe.name} {_exported_grid(run, recipe)[0]}"])
    if recipe.needs_moments:
        upstream.append(keys["calibrate"])
    export_key = digest(
        [
            upstream, target.target, target.context, target.providers, recipe.model_dump(),
            _code("targets", "manifest.py", "quant/folder.py"), _versions(),
        ]
    )  # fmt: skip
    verify_key = digest([export_key, spec.verify.model_dump(exclude={"thresholds"}), _code("verify", "targets")])
    bench_key = digest(
        [
            export_key,
            spec.bench.model_dump(),
            platform.node(),
            _code("benchmarks/harness.py", "benchmarks/metrics.py", "targets"),
        ]
    )
    tokens = spec.verify.windows * spec.verify.context
    size = sum(spec.bench.prompt_tokens) + spec.bench.decode_tokens
    found = [
        Stage(f"export {label}", f"artifacts/{label}", export_key, plan.export_cost(student, 16),
              partial(_export, run, target, recipe)),
        Stage(f"verify {label}", f"parity/{label}", verify_key, plan.inference_cost([student], 6 * tokens, machine),
              partial(_verify, run, label, recipe)),
        Stage(f"bench {label}", f"bench/{label}", bench_key,
              plan.Cost(plan.export_cost(student, 16).ram_bytes, 2**16,
                        plan.inference_cost([student], size * spec.bench.runs, machine).seconds + 2 * spec.bench.runs),
              partial(_bench, run, label)),
    ]  # fmt: skip
    return found[:-1] if stand_in(target.target) else found


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


def _train(run: Run, distilled: bool, key: str, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    from .distill.data import load_windows
    from .distill.signals import OnlineTeacher
    from .distill.train import train

    spec = run.spec
    tokenizer = load_tokenizer(run.teacher, trust_remote_code=spec.teacher.trust_remote_code)
    model = init_student(spec.student, run.teacher, spec.seed, run.base)
    signal = None
    if distilled:
        teacher = load_model(run.teacher, trust_remote_code=spec.teacher.trust_remote_code)
        signal = OnlineTeacher(teacher, len(tokenizer))
    name = "student" if distilled else "baseline"
    work = run.folder / ".edgekd" / f"{name}-{key[:12]}"

    data = run.path("data")
    figures = train(
        model, load_windows(data, "train"), load_windows(data, "validation"), spec.distill,
        signal=signal, seed=spec.seed, work_dir=work, on_event=_telling(tell),
    )  # fmt: skip
    save_model(model, tokenizer, out)
    return figures | {"log": str((work / "log.jsonl").relative_to(run.folder))}


def _quality(run: Run, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    from .distill.data import load_windows
    from .distill.signals import OnlineTeacher
    from .distill.train import evaluate, evenly_spaced

    spec = run.spec
    windows = evenly_spaced(
        load_windows(run.path("data"), "test"), max(1, spec.data.max_test_tokens // spec.data.context)
    )
    teacher = load_model(run.teacher, trust_remote_code=spec.teacher.trust_remote_code)
    signal = OnlineTeacher(teacher, len(load_tokenizer(run.teacher)))
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
    run: Run, recipe: Recipe, key: str, out: Path, tell: Callable[[float, str], None]
) -> dict[str, Any]:
    from .distill.data import load_windows
    from .distill.qad import quantize_aware_distill
    from .distill.signals import OnlineTeacher

    out.rmdir()
    spec, data = run.spec, run.path("data")
    settings = spec.quantize.qad
    trusted = spec.teacher.trust_remote_code
    vocab_size = len(load_tokenizer(run.teacher, trust_remote_code=trusted))
    if settings.teacher == "teacher":
        signal = OnlineTeacher(load_model(run.teacher, trust_remote_code=trusted), vocab_size)
    else:
        signal = OnlineTeacher(load_model(run.path("student")), vocab_size)
    work = run.folder / ".edgekd" / f"qad-{recipe.name}-{key[:12]}"
    figures = quantize_aware_distill(
        run.path("student"), out, recipe, load_windows(data, "train"), load_windows(data, "validation"), settings,
        calibration_windows=spec.quantize.calibration_windows, signal=signal, seed=spec.seed, work_dir=work,
        on_event=_telling(tell),
    )  # fmt: skip
    return figures | {"log": str((work / "log.jsonl").relative_to(run.folder))}


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
    shared = len(load_tokenizer(run.teacher, trust_remote_code=trusted))
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
        run.path("student"), target, recipe.name, out, name=run.spec.name,
        grid=run.path(_exported_grid(run, recipe)[1]) if recipe.on_grid else None,
        moments=moments if recipe.needs_moments else None,
    )  # fmt: skip
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
    from .distill.data import Windows
    from .distill.qad import quantize_aware_distill
    from .distill.signals import OnlineTeacher

    held = torch.arange(len(calibration)) % 20 == 19
    train, validation = (
        Windows(part, torch.ones_like(part, dtype=torch.uint8)) for part in (calibration[~held], calibration[held])
    )
    if not len(validation):
        raise EdgekdError(f"quantize: qad needs 20 windows of text, there are {len(calibration)}.", "Give more text.")
    signal = OnlineTeacher(load_model(student), len(load_tokenizer(student)))
    return quantize_aware_distill(
        student, out, recipe, train, validation, qad, calibration_windows=calibration_windows, signal=signal, seed=seed,
        work_dir=out.with_name(out.name + ".training"), on_event=_telling(tell),
    )  # fmt: skip


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
    from .targets import open_artifact, stand_in

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

    return bench(open_artifact, artifact, spec, traffic=traffic, on_event=on_event)


def _bench(run: Run, label: str, out: Path, tell: Callable[[float, str], None]) -> dict[str, Any]:
    artifact = load_artifact(run.path(f"artifacts/{label}"))
    result = bench_artifact(artifact, run.spec.bench, tell, Checkpoint(run.path("student")).config)
    write_json(out / "bench.json", result)
    return {}


# --- running ----------------------------------------------------------------------------------------------------------


def is_done(run: Run, stage: Stage) -> bool:
    """Whether the stage's result is there and was made from the same inputs."""
    record = _record(run, stage)
    return record.get("key") == stage.key and run.path(stage.folder).is_dir()


def _record(run: Run, stage: Stage) -> dict[str, Any]:
    try:
        return json.loads(_record_path(run, stage).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _record_path(run: Run, stage: Stage) -> Path:
    return run.folder / ".edgekd" / f"{stage.folder.replace('/', '-')}.json"


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Hold the run's folder: two processes must not work in it at once."""
    state = run.folder / ".edgekd"
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EdgekdError(f"{run.folder}: another edgekd is at work in it.", "Wait, or choose --out.") from error
        yield


def _do(run: Run, stage: Stage, watcher: Watcher) -> None:
    """Do one stage: temporary folder, rename, record."""
    if is_done(run, stage):
        watcher.end(stage.name, _record(run, stage)["seconds"], skipped=True)
        return
    watcher.begin(stage.name)
    began = time.monotonic()
    with atomic_folder(run.path(stage.folder), replace=True) as folder:
        figures = stage.work(folder, partial(watcher.progress, stage.name))
        _record_path(run, stage).unlink(missing_ok=True)
    seconds = time.monotonic() - began
    write_json(_record_path(run, stage), {"key": stage.key, "name": stage.name, "seconds": seconds, "figures": figures})
    watcher.end(stage.name, seconds, skipped=False)
    for words in figures.get("warnings", ()):
        watcher.warn(stage.name, words)


def run_stages(run: Run, watcher: Watcher, *, until: str | None = None, report_only: bool = False) -> dict[str, Any]:
    """Do every stage that is not done, then write ``results.json`` and ``report.html``.

    Args:
        until: stop after the stage of that name, without a report.
        report_only: measure the gates but do not fail on them.

    Raises:
        GateFailed: an artifact missed a threshold; the report is written all the same.
        DoesNotFit: a stage cannot fit the machine; nothing was done.
    """
    machine = plan.measure_machine(run.folder)
    chain = stages(run, machine)
    names = [stage.name for stage in chain]
    chain = chain[: names.index(until) + 1] if until else chain
    plan.refuse_what_cannot_fit({s.name: s.cost for s in chain if not is_done(run, s)}, machine, run.folder)
    with _locked(run):
        write_json(run.folder / ".edgekd" / "spec.json", run.spec.model_dump())
        benches = [stage for stage in chain if stage.name.startswith("bench")]
        for stage in chain[: len(chain) - len(benches)]:
            _do(run, stage, watcher)
        if report_only or not _failures(run):
            for stage in benches:
                _do(run, stage, watcher)
        if until:
            return _results(run, chain)
        results = write_results(run, chain)
        failures = _failures(run)
    if failures and not report_only:
        raise GateFailed(
            f"{len(failures)} gate{'s' * (len(failures) > 1)} failed: " + "; ".join(failures) + ".",
            f"See {run.folder / 'report.html'}, or go on with --report-only.",
        )
    return results


def _labels(run: Run) -> list[tuple[str, str]]:
    from .targets import label

    return [(label(target.target, recipe.name), recipe.name) for target, recipe in _pairs(run)]


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _failures(run: Run) -> list[str]:
    """What missed its gate, artifact by artifact."""
    from .verify.parity import judge

    found = []
    for label, recipe in _labels(run):
        parity = _read(run.path(f"parity/{label}") / "parity.json")
        if parity is not None:
            found += [f"{label}: {text}" for text in judge(parity, parity["tokens"], run.spec.verify.gate(recipe))]
    return found


def write_results(run: Run, chain: Sequence[Stage]) -> dict[str, Any]:
    """Write the proofs into the manifests, then ``results.json`` and ``report.html``."""
    from .benchmarks.report import build
    from .verify.parity import judge

    for label, recipe in _labels(run):
        artifact = load_artifact(run.path(f"artifacts/{label}"), check_files=False)
        parity = _read(run.path(f"parity/{label}") / "parity.json")
        if parity is not None:
            parity["failures"] = judge(parity, parity["tokens"], run.spec.verify.gate(recipe))
        add_proof(artifact, parity=parity, benchmark=_read(run.path(f"bench/{label}") / "bench.json"))
    results = _results(run, chain)
    write_json(run.folder / "results.json", results)
    build(results, run.folder / "report.html")
    return results


def _results(run: Run, chain: Sequence[Stage]) -> dict[str, Any]:
    """Everything that was measured, in the form the report reads."""
    from .verify.ledger import ledger

    quality = _read(run.path("quality") / "quality.json") or {}
    folders = {label: run.path(f"artifacts/{label}") for label, _ in _labels(run)}
    made = {
        label: load_artifact(folder, check_files=False)
        for label, folder in folders.items()
        if (folder / "manifest.json").is_file()
    }
    artifacts = [
        {"manifest": artifact.manifest.model_dump(), "folder": str(artifact.folder), "size_bytes": artifact.size_bytes}
        for artifact in made.values()
    ]
    measured = (_read(run.path("ledger") / f"{recipe.name}-{method}.json") for recipe, method, _ in _grids(run))
    grids = [figures for figures in measured if figures]
    records: dict[str, dict[str, Any]] = {stage.name: _record(run, stage) for stage in chain if is_done(run, stage)}
    return {
        "name": run.spec.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(run.folder),
        "spec": run.spec.model_dump(),
        "versions": {"python": platform.python_version()} | _versions(),
        "data": (records.get("data") or {}).get("figures"),
        "quality": quality,
        "training": {name: _curve(run, records.get(name)) for name in ("student", "baseline")},
        "ledger": ledger(
            _read(run.path("ledger") / "student.json"),
            grids,
            {label: artifact.manifest.model_dump() for label, artifact in made.items()},
        ),
        "artifacts": artifacts,
        "stages": [{"name": name, "seconds": record["seconds"]} for name, record in records.items()],
        "commands": _commands(run),
    }


def _curve(run: Run, record: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Validation perplexity by step, from a training log."""
    if record is None:
        return []
    events = map(json.loads, (run.folder / record["figures"]["log"]).read_text("utf-8").splitlines())
    return [
        {"step": event["step"], "validation_perplexity": event["perplexity"]}
        for event in events
        if event["event"] == "validation"
    ]


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
