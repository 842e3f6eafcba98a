"""What the command line does with one model or one artifact, outside a run. They are here, and not with their owners,
because each needs rooms that must not know each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EdgekdError
from ..files import atomic_folder, write_json
from ..manifest import Artifact
from ..matmul import fast_float32
from ..origin import ORIGIN, Origin
from ..proof import SOFTWARE_GPU, Benchmark, Comparison, Parity, TaskScore
from ..session import Arithmetic, Session
from ..spec import BenchSpec, QadSpec, TargetSpec, VerifySpec
from ..student import load_model, load_tokenizer, vocabulary_size
from .records import Figures

if TYPE_CHECKING:
    from ..benchmarks.children import Limits
    from ..distill.checkpoint import Event
    from ..quant.recipe import Recipe


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
) -> Figures:
    """Quantize one model folder, outside a run.

    Args:
        ids: training text ``(N, T)``; None for ``rtn``. Quantization-aware distillation takes one window in twenty for
            validation, and keeps its checkpoints in ``OUT.training``.

    Raises:
        EdgekdError: as ``quant.quantize.quantize`` and ``distill.qad.quantize_aware_distill``.
    """
    import torch

    from ..quant.quantize import quantize

    calibration = None if ids is None else torch.from_numpy(ids)
    if method != "qad":
        return quantize(student, out, recipe, method=method, ids=calibration, on_progress=tell)
    assert calibration is not None
    from ..distill.checkpoint import drop_checkpoints
    from ..distill.data import Windows
    from ..distill.evaluate import evenly_spaced
    from ..distill.qad import quantize_aware_distill
    from ..distill.signals import OnlineTeacher

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
        calibration=evenly_spaced(train, calibration_windows).ids.int(),
        signal=signal,
        seed=seed,
        work_dir=state,
        on_event=telling(tell),
    )
    drop_checkpoints(state)
    return figures


def export_model(
    student: Path,
    spec: TargetSpec,
    recipe: str,
    out: Path,
    *,
    quantized: Path | None,
    moments: Path | None,
    ids: np.ndarray | None,
) -> Artifact:
    """Export one model folder, outside a run.

    Args:
        ids: calibration text ``(N, T)``, read when the recipe wants moments and none are given.
    """
    from ..targets import export

    name = student.resolve().name
    if ids is None:
        return export(student, spec, recipe, out, name=name, quantized=quantized, moments=moments)
    import torch
    from safetensors.torch import save_file

    from ..quant.calibrate import second_moments

    with TemporaryDirectory() as folder:
        made = Path(folder) / "moments.safetensors"
        save_file(second_moments(student, torch.from_numpy(ids)), made)
        return export(student, spec, recipe, out, name=name, quantized=quantized, moments=made)


def verify_artifact(
    artifact: Artifact,
    reference: Path,
    windows: np.ndarray,
    spec: VerifySpec,
    tell: Callable[[float, str], None],
    quantized: Path | None = None,
) -> Parity:
    """Compare an artifact, run by its own runtime, with the Hugging Face model it was made from, in fp32.

    Args:
        reference: the model folder.
        windows: held-out ids ``(N, T)``.
        quantized: the quantized student that was packed, to tell what the runtime alone costs.

    Returns:
        Parity that is not judged yet.
    """
    from ..targets import arithmetic, load_recipe, open_artifact, stand_in
    from ..verify.golden import golden_answers
    from ..verify.parity import first_windows
    from ..verify.tokens import check_tokens

    tokenizer, manifest = load_tokenizer(reference), artifact.manifest
    session = open_artifact(artifact)
    try:
        tell(0.1, "tokens")
        tokens = check_tokens(session, tokenizer, manifest.contract)
        golden = golden_answers(session, manifest.contract.eos_ids, windows)
        tell(0.3, "logits")
        asked = arithmetic(artifact)
        parity, runtime, noise = _compared(session, reference, windows, spec, asked, tell, quantized)
    finally:
        session.close()
    recipe = load_recipe(manifest.recipe, manifest.target)
    # What quantization made of the weights is known where the quantized student is at hand.
    as_it_is = not recipe.on_grid and (recipe.native is None or recipe.native.type == "fp32")
    expected = runtime or (parity if as_it_is else None)
    return parity.model_copy(
        update={
            "stand_in": stand_in(manifest.target, manifest.details),
            "tokens": tokens,
            "golden": golden,
            "runtime": runtime,
            "arithmetic_kl_mean": noise,
            "runtime_kl_mean": first_windows(expected) if expected else None,
        }
    )


@fast_float32()
def _compared(
    session: Session,
    reference: Path,
    windows: np.ndarray,
    spec: VerifySpec,
    arithmetic: Arithmetic,
    tell: Callable[[float, str], None],
    quantized: Path | None,
) -> tuple[Parity, Comparison | None, float | None]:
    """An artifact against the reference; against the quantized student, on the first windows; and what rounding costs
    the model that it should compute."""
    from ..quant.store.reader import load_dequantized, open_quantized
    from ..verify.noise import noise_of
    from ..verify.parity import NOISE_WINDOWS, compare, measure, session_logits
    from ..verify.reference import logits_of, remembering

    first, runtime = windows[:NOISE_WINDOWS], None
    # One model after the other: beside the artifact, memory holds one of them.
    model = load_model(reference)
    logits, of_artifact = remembering(logits_of(model), first), remembering(session_logits(session), first)
    parity = measure(session, logits, windows, greedy_tokens=spec.greedy_tokens, whole=of_artifact)
    if quantized is not None:
        tell(0.7, "against the quantized student")
        del model, logits
        model = load_dequantized(open_quantized(quantized))
        logits = remembering(logits_of(model), first)
        runtime = compare(logits, of_artifact, first)
    tell(0.9, "rounding")
    return parity, runtime, noise_of(model, arithmetic, first, logits)


def bench_artifact(artifact: Artifact, spec: BenchSpec, tell: Callable[[float, str], None]) -> Benchmark:
    """Time an artifact in fresh processes.

    Raises:
        EdgekdError: the artifact's own runtime does not run here, or a process failed.
    """
    (measured,) = bench_artifacts([artifact], spec, tell)
    if isinstance(measured, EdgekdError):
        raise measured
    return measured


def bench_artifacts(
    artifacts: Sequence[Artifact],
    spec: BenchSpec,
    tell: Callable[[float, str], None],
    limits: Limits | None = None,
) -> list[Benchmark | EdgekdError]:
    """Time artifacts in turns; one that fails leaves the others alone.

    Args:
        limits: of the device that this machine stands for.

    Raises:
        EdgekdError: an artifact's own runtime does not run here.
    """
    from ..benchmarks.harness import bench_in_turns
    from ..targets import gpu, open_artifact, runtime_build, try_artifact

    for artifact in artifacts:
        refuse_stand_in(artifact)
        try_artifact(artifact)  # here, not in the processes that are timed
    return bench_in_turns(
        open_artifact,
        artifacts,
        spec,
        on_run=lambda run, runs: tell(run / runs, f"run {run} of {runs}"),
        builds=[runtime_build(artifact.manifest.target) for artifact in artifacts],
        gpus=[gpu(artifact) for artifact in artifacts],
        limits=limits,
    )


def bench_on_device(
    device: str, runner: Path, artifacts: Sequence[Artifact], spec: BenchSpec, tell: Callable[[float, str], None]
) -> list[Benchmark | EdgekdError]:
    """Time artifacts on a device; one that fails leaves the others alone.

    Args:
        device: ``adb``, ``adb:SERIAL`` or ``ssh:HOST``.
        runner: a program for it, that runs the artifacts.

    Raises:
        EdgekdError: the device or the runner cannot be used.
    """
    from ..benchmarks.devices.bench import bench_on_device as measure
    from ..targets import open_artifact

    tell(0, f"sending to {device}")
    return measure(
        device, runner, open_artifact, artifacts, spec, lambda run, runs: tell(run / runs, f"run {run} of {runs}")
    )


def refuse_stand_in(artifact: Artifact) -> None:
    """Refuse to time what is not the artifact's own runtime.

    Raises:
        EdgekdError: its runtime does not run here, or on a software GPU.
    """
    from ..targets import stand_in

    manifest = artifact.manifest
    instead = stand_in(manifest.target, manifest.details)
    if instead and instead.endswith(SOFTWARE_GPU):
        raise EdgekdError(
            f"{artifact.folder}: its layers are computed on {instead}, and no speed is told.",
            "Benchmark it on a machine with a GPU.",
        )
    if instead:
        raise EdgekdError(
            f"{manifest.runtime} does not run on this machine; {instead}, does, and its speed says nothing.",
            "Benchmark the artifact on a machine that has its runtime.",
        )


def evaluate_artifact(
    artifact: Artifact,
    tasks: Sequence[str],
    reference: str | None,
    threads: int | None,
    tell: Callable[[float, str], None],
    **options: Any,
) -> list[TaskScore]:
    """An artifact's scores, beside those of a reference of the same context where one is named.

    Args:
        options: as ``evaluation.run.score``.

    Raises:
        EdgekdError: as ``evaluation.run.score``; the reference is no model.
    """
    from ..evaluation.run import beside, check_harness, score
    from ..student import resolve_model
    from ..targets import open_artifact

    check_harness()
    folder = resolve_model(reference) if reference else None
    contract = artifact.manifest.contract
    with closing(open_artifact(artifact, threads=threads)) as session:
        ours = score(session, contract, tasks, tell=lambda share: tell(share, "artifact"), **options)
    if folder is None:
        return ours
    from ..evaluation.reference import open_reference

    model, contract = open_reference(folder, contract.context_length)
    with closing(model):
        theirs = score(model, contract, tasks, tell=lambda share: tell(share, "reference"), **options)
    return beside(ours, theirs, str(reference))


def telling(tell: Callable[[float, str], None]) -> Callable[[Event], None]:
    """Progress from a training loop's events."""

    def on_event(event: Event) -> None:
        if event.event == "step":
            loss, speed, mfu = (event.figures.get(key) for key in ("loss", "tokens_per_s", "mfu"))
            used = "" if mfu is None else f"  MFU {mfu:.0%}"
            tell(event.step / event.steps, f"loss {loss:.3f}  {speed:,.0f} tok/s{used}")

    return on_event


_MOST_KL_NATS = 1e-3
"""Between two runtimes in float32, llama.cpp's cache in fp16: 1e-6 on real models; a matrix out of order gives 0.1."""


def import_gguf(path: Path, out: Path, tell: Callable[[float, str], None]) -> Origin:
    """Make a model folder of a GGUF file, proved: its tokenizer's ids are llama.cpp's on the file, and so are its
    logits.

    Args:
        out: must not exist; appears only when whole.

    Raises:
        EdgekdError: the file is damaged, or its tokenizer or its logits come out otherwise.
        Unsupported: an architecture, feature, tokenizer or quantization that is not read.
    """
    from ..targets.gguf.importer import try_file, write_folder

    sha256 = try_file(path)
    with atomic_folder(out) as folder:
        tell(0.1, "tokenizer and weights")
        file, texts = write_folder(path, folder)
        tell(0.5, "logits")
        logits = _imported_logits(path, folder)
        origin = Origin(
            format="gguf",
            file=path.name,
            file_sha256=sha256,
            name=file.get("general.name", str),
            license=file.get("general.license", str),
            dequantized_from=file.dequantized,
            tokenizer_texts=texts,
            logits=logits,
        )
        write_json(folder / ORIGIN, origin.model_dump())
    return origin


def _imported_logits(path: Path, folder: Path) -> Comparison:
    """An imported model's logits in float32 against the file's in llama.cpp.

    Raises:
        EdgekdError: they differ by more than rounding.
    """
    from ..targets.gguf.importer import open_dequantized
    from ..verify.parity import compare, session_logits
    from ..verify.reference import held_out_windows, logits_of
    from ..verify.tokens import golden_strings

    tokenizer = load_tokenizer(folder)
    ids = np.asarray(tokenizer("\n".join(golden_strings([])), verbose=False)["input_ids"])
    windows = held_out_windows(ids, 4, min(64, len(ids)))
    scratch = folder / "dequantized.gguf"
    session = open_dequantized(path, folder, scratch, windows.shape[1])
    try:
        found = compare(logits_of(load_model(folder)), session_logits(session), windows)
    finally:
        session.close()
        scratch.unlink()
    if found.unusable_positions or found.kl_mean is None or found.kl_mean > _MOST_KL_NATS:
        kl = "no KL" if found.kl_mean is None else f"a KL of {found.kl_mean:.3g} nats"
        raise EdgekdError(
            f"{path}: the import's logits are not llama.cpp's on the file ({kl}, at most {_MOST_KL_NATS:g}).",
            "Report the file: it holds something that edgekd reads otherwise.",
        )
    return found
