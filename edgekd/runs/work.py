"""The work of each stage: it fills an empty folder, tells how far it is, and returns figures for the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING

from ..errors import DoesNotFit
from ..files import digest, write_json
from ..manifest import load_artifact
from ..matmul import fast_float32
from ..plan import training_flops
from ..proof import ModelQuality, Quality, QuantizedComparison
from ..student import generation_config, init_student, load_model, save_model, vocabulary_size
from . import verbs
from .records import Figures
from .run import Export, Model, Quantization, Run

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ..distill.aligned import AlignedTeacher
    from ..distill.on_policy import Writing
    from ..distill.ranks import Ranks
    from ..distill.signals import OnlineTeacher, Teachers, TeacherSignal
    from ..spec import DataSpec, TeacherWeights

CUT = "cut"
CALIBRATION_TEXT = "calibration-text"
MOMENTS = "moments.safetensors"
Tell = Callable[[float, str], None]
"""Takes the share of the work that is done, and a note."""


def prepare_data(run: Run, spec: DataSpec, out: Path, tell: Tell) -> Figures:
    """Read, split and pack a text."""
    from ..distill.data import SPLITS, prepare

    return prepare(
        spec,
        run.reader.tokenizer(),
        out,
        seed=run.spec.seed,
        base=run.base,
        splits=SPLITS if spec is run.spec.data else ("train",),  # of a calibration text no other is read
        on_progress=lambda count: tell(0, f"{count} documents"),
    )


def choose_cut(run: Run, out: Path, tell: Tell) -> Figures:
    """Choose what a cut student keeps of the teacher."""
    from ..distill.cut import choose, sample, write_kept
    from ..distill.data import load_windows

    student = run.spec.student
    assert student.init == "cut"
    kept = choose(student, run.reader.model(), sample(load_windows(run.path("data"), "train")), tell)
    write_kept(out, kept)
    return {"layers": list(kept.layers)}


def train_student(run: Run, seed: int, distilled: bool, state: Path, out: Path, tell: Tell) -> Figures:
    """Train the student; on labels alone where it is not distilled. All processes that torchrun started do it
    together, and the first of them writes."""
    from ..distill.checkpoint import validation_curve
    from ..distill.cut import read_kept
    from ..distill.data import load_windows
    from ..distill.ranks import joined
    from ..distill.train import PRECISION, train

    spec, data, ranks = run.spec, run.path("data"), joined()
    teacher = run.reader
    tokenizer, trusted = teacher.tokenizer(), teacher.trust_remote_code
    kept = read_kept(run.path(CUT)) if run.chooses_cut else None
    model = init_student(spec.student, teacher.folder, seed, run.base, kept=kept, trust_remote_code=trusted)
    generation = generation_config(spec.student, teacher.folder, run.base)
    figures = train(
        model,
        load_windows(data, "train"),
        load_windows(data, "validation"),
        spec.distill,
        signal=_signal(run, seed, ranks, tell) if distilled else None,
        seed=seed,
        work_dir=state,
        on_event=verbs.telling(tell),
        precision_file=run.state / PRECISION,
        writing=_writing(run, tokenizer, generation) if distilled else None,
        match=spec.distill.match if distilled else None,
        memory=spec.distill.memory,
        flops_per_token=_operations(run, distilled),
        ranks=ranks,
    )
    if ranks.first:
        save_model(model, tokenizer, out, generation)
    return {**figures, "curve": validation_curve(state / "log.jsonl")}


def _writing(run: Run, tokenizer: PreTrainedTokenizerFast, generation: Path | None) -> Writing | None:
    """How the student writes text that it learns from too, which ends where an artifact's would."""
    from ..distill.on_policy import Writing
    from ..targets.shared.tokenizer import eos_ids

    spec = run.spec.distill.on_policy
    if spec is None:
        return None
    ends = eos_ids(tokenizer, generation.parent if generation else run.reader.folder)
    return Writing(spec, ends, run.spec.data.context)


def _operations(run: Run, distilled: bool) -> int | None:
    """Of a training's token: the student's, and the teacher's where it runs beside it; None where it is not known how
    often several teachers, or the student's writing, run, how many tokens another tokenizer makes, or what adapters
    leave of the backward pass."""
    spec, distill = run.spec.teacher, run.spec.distill
    heard = [teacher.config for teacher in run.teachers] if distilled and spec and spec.beside else []
    if len(heard) > 1 or (heard and not run.same_ids) or (distilled and distill.on_policy) or distill.memory.lora:
        return None
    return training_flops(run.student_config, heard, run.spec.data.context)


def _signal(run: Run, seed: int, ranks: Ranks, tell: Tell) -> TeacherSignal:
    """The teacher as the training hears it; a cached one is captured first, or what of it is missing, by all
    processes."""
    from ..distill.cache import Cache, CachedTeacher, capture, key_of
    from ..distill.data import load_windows
    from ..distill.train import windows_of_step

    teacher, spec = run.reader, run.spec.distill
    tokenizer = teacher.tokenizer()
    vocab_size = vocabulary_size(tokenizer)
    assert run.spec.teacher is not None
    if run.spec.teacher.served:
        from ..distill.served import ServedTeacher

        return ServedTeacher(run.spec.teacher.served, run.spec.teacher.model, vocab_size)
    windows = load_windows(run.path("data"), "train")
    if run.spec.teacher.signal == "online":
        return _teachers(run, vocab_size, windows.sources, run.spec.teacher.weights)
    read = spec.steps * spec.windows_a_step
    if windows.sources is None:
        read = min(read, len(windows))  # no window is read again before all have been
    order = [*dict.fromkeys(windows_of_step(seed, 0, windows, read).tolist())]
    more = taught_by(run)
    named = digest([teacher.checkpoint.digest, *more]) if more else teacher.checkpoint.digest
    key = key_of(named, digest(tokenizer.get_vocab()), windows, order, spec.temperature, vocab_size)
    cache = Cache(run.state / f"teacher-{digest(key)[:12]}", key, windows, order)
    missing = sum(cache.damage(shard) is not None for shard in range(cache.shards))
    if missing:
        size_bytes = missing * cache.size_bytes // cache.shards
        if size_bytes > disk_usage(run.state).free:
            raise DoesNotFit(
                f"the teacher's cache needs {size_bytes / 2**30:.2f} GiB of disk in {run.state}.",
                "Free some, lower distill.steps, or set teacher.signal to online.",
            )
        tell(0, f"teacher: {size_bytes / 2**20:,.0f} MiB to capture")
        capture(cache, _teachers(run, vocab_size, windows.sources, run.spec.teacher.weights), tell)
    ranks.wait()
    told = CachedTeacher(cache)
    ranks.check_alike(cache.digest)
    return told


def taught_by(run: Run) -> list[object]:
    """What the student's training hangs on beside the first teacher: the others, who teaches what, and weights that
    are not the checkpoint's."""
    spec = run.spec.teacher
    return [*_others(run), *([spec.weights] if spec and spec.weights != "float32" else [])]


def _others(run: Run) -> list[object]:
    spec = run.spec.teacher
    if spec is not None and spec.served:
        return [[spec.served.url, spec.model, spec.served.top_logprobs]]
    if spec is not None and not run.same_ids:
        return [[run.teachers[0].checkpoint.digest, spec.alignment]]
    if spec is None or not spec.more:
        return []
    shares = [spec.shares(source) for source in run.spec.data.each]
    return [[[teacher.checkpoint.digest for teacher in run.teachers[1:]], shares]]


def _heard(teacher: Model, weights: TeacherWeights) -> PreTrainedModel:
    """A teacher with the weights that the student is to hear."""
    import torch

    from ..distill.head import layers_of
    from ..distill.narrow import narrowed

    if weights == "float32":
        return teacher.model()
    model = teacher.model(torch.bfloat16)
    return narrowed(model, layers_of(model)) if weights == "int4" else model


def _teachers(
    run: Run, vocab_size: int, sources: torch.Tensor | None, weights: TeacherWeights = "float32"
) -> OnlineTeacher | Teachers | AlignedTeacher:
    """The teacher, or all of them, in memory.

    Args:
        sources: of the windows that they are to be asked of; None: of the first alone, or ``Teachers.of`` one.
    """
    from ..distill.signals import OnlineTeacher, Teachers

    spec = run.spec.teacher
    assert spec is not None
    if not run.same_ids:
        from ..distill.aligned import AlignedTeacher

        (one,) = run.teachers
        return AlignedTeacher(_heard(one, weights), one.tokenizer(), run.reader.tokenizer(), one.folder)
    models = [OnlineTeacher(_heard(teacher, weights), vocab_size) for teacher in run.teachers]
    if len(models) == 1:
        return models[0]
    return Teachers(models, [spec.shares(source) for source in run.spec.data.each], sources)


def take_student(run: Run, out: Path, tell: Tell) -> Figures:
    """Write down which model the run deploys; its files stay where they are."""
    write_json(out / "student.json", {"folder": str(run.student), "digest": run.reader.checkpoint.digest})
    return {}


def measure_quality(run: Run, seed: int, out: Path, tell: Tell) -> Figures:
    """Perplexity, accuracy and distance from the teacher, on the test split, of what was trained with a seed; with the
    spec's own seed, of the teacher too."""
    from ..distill.data import load_windows
    from ..distill.evaluate import evaluate_all, evaluate_signal, evenly_spaced
    from ..distill.signals import Teachers

    spec = run.spec.data
    windows = evenly_spaced(load_windows(run.path("data"), "test"), max(1, spec.max_test_tokens // spec.context))
    signal = _teachers(run, vocabulary_size(run.reader.tokenizer()), None) if run.teacher else None
    parts = windows.by_source() or {"": windows}
    heard = [signal.of(place) if isinstance(signal, Teachers) else signal for place in range(len(parts))]
    measured: dict[str, ModelQuality] = {}
    if seed == run.spec.seed and signal:
        tell(0, "teacher")
        said = [evaluate_signal(of_part, part) for of_part, part in zip(heard, parts.values(), strict=True) if of_part]
        teachers = signal.teachers if isinstance(signal, Teachers) else [signal]
        measured["teacher"] = _quality(
            sum(t.model.num_parameters() for t in teachers), dict(zip(parts, said, strict=True))
        )
    trained = run.trained(seed)
    tell(1 / 3, ", ".join(trained))
    models = {name: load_model(run.path(folder)) for name, folder in trained.items()}
    found = [evaluate_all(models, part, teacher=s) for part, s in zip(parts.values(), heard, strict=True)]
    for name, model in models.items():
        measured[name] = _quality(model.num_parameters(), {s: f[name] for s, f in zip(parts, found, strict=True)})
    quality = Quality.model_validate(measured).model_dump()
    write_json(out / "quality.json", quality)
    return quality


def _quality(parameters: int, by_source: Mapping[str, Mapping[str, float]]) -> ModelQuality:
    """Of a model on all sources, and on each where there are several."""
    from ..distill.evaluate import pooled

    each = by_source if len(by_source) > 1 else {}
    return ModelQuality.model_validate(
        {"parameters": parameters, **pooled(list(by_source.values())), "by_source": each}
    )


def _calibration_ids(run: Run) -> torch.Tensor:
    """Windows of calibration text ``(N, T)``, evenly spaced."""
    from ..distill.data import load_windows
    from ..distill.evaluate import evenly_spaced

    text = run.path(CALIBRATION_TEXT if run.spec.calibration else "data")
    return evenly_spaced(load_windows(text, "train"), run.spec.quantize.calibration_windows).ids.int()


def calibrate(run: Run, out: Path, tell: Tell) -> Figures:
    """Measure the second moments of the activations."""
    from safetensors.torch import save_file

    from ..quant.calibrate import second_moments

    moments = second_moments(run.student, _calibration_ids(run), lambda done, total: tell(done / total, ""))
    save_file(moments, out / MOMENTS)
    return {}


def quantize(run: Run, quantization: Quantization, out: Path, tell: Tell) -> Figures:
    """Make a quantized student without training."""
    from ..quant.quantize import quantize as quantize_folder

    out.rmdir()
    method = quantization.method
    ids = None if method == "rtn" and quantization.recipe.bits is None else _calibration_ids(run)
    return quantize_folder(run.student, out, quantization.recipe, method=method, ids=ids, on_progress=tell)


def quantize_aware(run: Run, quantization: Quantization, state: Path, out: Path, tell: Tell) -> Figures:
    """Make a quantized student by training."""
    from ..distill.data import load_windows
    from ..distill.qad import quantize_aware_distill
    from ..distill.signals import OnlineTeacher
    from ..distill.train import PRECISION

    out.rmdir()
    spec, data = run.spec, run.path("data")
    windows, vocab_size = load_windows(data, "train"), vocabulary_size(run.reader.tokenizer())
    signal: TeacherSignal = (
        _teachers(run, vocab_size, windows.sources)
        if spec.quantize.qad.teacher == "teacher"
        else OnlineTeacher(load_model(run.student), vocab_size)
    )
    return quantize_aware_distill(
        run.student,
        out,
        quantization.recipe,
        windows,
        load_windows(data, "validation"),
        spec.quantize.qad,
        calibration=_calibration_ids(run),
        signal=signal,
        seed=spec.seed,
        work_dir=state,
        on_event=verbs.telling(tell),
        precision_file=run.state / PRECISION,
    )


def _verify_windows(run: Run) -> np.ndarray:
    from ..distill.data import load_windows
    from ..verify.reference import held_out_windows

    spec = run.spec.verify
    return held_out_windows(load_windows(run.path("data"), "test").ids.int().numpy(), spec.windows, spec.context)


@fast_float32()
def measure_hops(run: Run, out: Path, tell: Tell) -> Figures:
    """The hops without a runtime, in fp32: from the teacher to the student, and on to each quantized student."""
    from ..quant.store.reader import load_dequantized, open_quantized
    from ..verify.parity import compare
    from ..verify.reference import logits_of

    student, windows = load_model(run.student), _verify_windows(run)
    if run.hops_from_teacher:
        tell(0, "student")
        shared = vocabulary_size(run.reader.tokenizer())
        taught = compare(logits_of(run.reader.model(), shared), logits_of(student, shared), windows)
        write_json(out / "student.json", taught.model_dump())
    for number, quantization in enumerate(run.quantizations, 1):
        tell(number / (1 + len(run.quantizations)), quantization.name)
        quantized = open_quantized(run.path(quantization.folder))
        figures = compare(logits_of(student), logits_of(load_dequantized(quantized)), windows)
        recipe, method = quantization.recipe.name, quantization.method
        hop = QuantizedComparison(
            recipe=recipe, method=method, bits_per_weight=quantized.record.bits_per_weight, **figures.model_dump()
        )
        write_json(out / f"{recipe}-{method}.json", hop.model_dump())
    return {}


def export(run: Run, wanted: Export, out: Path, tell: Tell) -> Figures:
    """Write an artifact."""
    from ..targets import export as export_artifact

    out.rmdir()
    artifact = export_artifact(
        run.student,
        wanted.target,
        wanted.recipe.name,
        out,
        name=run.spec.name,
        quantized=run.path(wanted.packs.folder) if wanted.packs else None,
        moments=run.path("calibration") / MOMENTS if wanted.recipe.needs_moments else None,
    )
    return {"size_bytes": artifact.size_bytes, "bits_per_weight": artifact.manifest.bits_per_weight}


def verify(run: Run, exported: Export, out: Path, tell: Tell) -> Figures:
    """Compare an artifact with the student."""
    artifact = load_artifact(run.path(exported.folder))
    packed = run.path(exported.packs.folder) if exported.packs else None
    parity = verbs.verify_artifact(artifact, run.student, _verify_windows(run), run.spec.verify, tell, packed)
    write_json(out / "parity.json", parity.model_dump())
    return {}


def audit(run: Run, exported: Export, out: Path, tell: Tell) -> Figures:
    """Watch what an artifact does to the machine."""
    from ..audit import audit as watch

    write_json(out / "audit.json", watch(load_artifact(run.path(exported.folder))).model_dump())
    return {}


def bench(run: Run, exported: Export, out: Path, tell: Tell) -> Figures:
    """Time an artifact."""
    artifact = load_artifact(run.path(exported.folder))
    benchmark = verbs.bench_artifact(artifact, run.spec.bench, tell)
    write_json(out / "bench.json", benchmark.model_dump())
    return {}
