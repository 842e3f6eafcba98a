"""What is refused before any work: in seconds, not after the training."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..architecture import read_architecture, read_decoder
from ..errors import EdgekdError, MissingExtra, SpecError
from ..spec import Spec
from ..student import check_model
from ..targets import check
from .run import Run, resolve


def open_run(
    spec: Spec, *, base: Path, out: Path | None = None, words: Sequence[str] = (), more_seeds: Sequence[int] = ()
) -> Run:
    """Resolve what a spec names, choose the run's folder (default ``runs/NAME``), and refuse what cannot be done.

    Args:
        words: the command that asked for it, but for the folder, for the report.
        more_seeds: to train student and baseline with, beside the spec's.

    Raises:
        EdgekdError: the folder exists and is not a run, a model is missing, or a target refuses the student.
    """
    folder = out or Path("runs") / spec.name
    _check_folder(folder)
    words = words or ["edgekd", "run", spec.name]
    run = resolve(spec, base=base, folder=folder, words=words, more_seeds=more_seeds)
    run.reader.check()
    _check_tokenizers(run)
    _check_memory(run)
    if more_seeds and not run.trains:
        raise SpecError("--seeds: the spec has no teacher, nothing is trained.", "Leave it out.")
    _check_lengths(run)
    _check_matched_layers(run)
    if spec.teacher and spec.teacher.served:
        from ..distill.served import access_key

        access_key(spec.teacher.served)
    _check_thresholds(run)
    for text in filter(None, (spec.data, spec.calibration)):
        for source in text.each.values():
            source.files(base)
    for target in spec.targets:
        check(run.student_config, run.reader.folder, target)
    return run


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise EdgekdError(f"{folder} exists and is a file.", "Choose another with --out.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ".edgekd").is_dir():
        raise EdgekdError(f"{folder} exists and is not a run of edgekd.", "Choose another with --out.")


def _check_tokenizers(run: Run) -> None:
    """Refuse a student checkpoint, or a further teacher, whose tokenizer is not the teacher's."""
    if not run.teacher:
        return
    if not run.same_ids:
        return _check_spelling(run)
    from ..distill.signals import check_same_tokenizer

    trusted = run.teacher.trust_remote_code
    for other in [*run.teachers[1:], *([run.initial] if run.initial else [])]:
        trusts = other.trust_remote_code
        check_model(other.folder, trust_remote_code=trusts)
        check_same_tokenizer(run.teacher.folder, other.folder, trust_remote_code=trusted, trust_student=trusts)


def _check_spelling(run: Run) -> None:
    """Refuse tokenizers whose tokens cannot be compared by their text."""
    from ..distill.aligned import check_byte_level

    for teacher in run.teachers:
        teacher.check()
    for model in (*run.teachers, run.reader):
        check_byte_level(model.tokenizer(), model.folder)


def _check_memory(run: Run) -> None:
    """Refuse adapters where the student has no matrix for them, and what is not installed."""
    memory = run.spec.distill.memory
    for package in ["peft"] * bool(memory.lora) + ["torchao"] * (memory.optimizer == "adamw8bit"):
        if find_spec(package) is None:
            raise MissingExtra(package, "train")
    if not memory.lora or not memory.lora.targets:
        return
    arch = read_architecture(run.student_config)
    there = arch.layer_matrices()
    for name in memory.lora.targets:
        if name not in there:
            why = "is the embedding too, and an adapter would part the two" if arch.tied else "takes no adapter"
            why = why if name in ("lm_head", "embed_tokens") else "is no matrix of the student's layers"
            raise SpecError(f"key 'distill.memory.lora.targets': {name} {why}.", f"There are: {', '.join(there)}.")


def _check_lengths(run: Run) -> None:
    """Refuse lengths that the student, or an artifact's context, cannot hold."""
    spec, longest = run.spec, read_decoder(run.student_config).max_position_embeddings
    contexts = [target.context_of(longest) if longest else target.context for target in spec.targets]
    shortest = min(filter(None, (longest, *contexts)), default=None)
    heard = [teacher.checkpoint.decoder.max_position_embeddings for teacher in run.teachers]
    wanted = {
        "data.context": (spec.data.context, min(filter(None, (longest, *heard)), default=None)),
        "calibration.context": (spec.calibration.context if spec.calibration else 0, longest),
        "verify.context": (spec.verify.context, shortest),
        "verify.greedy_tokens": (spec.verify.greedy_tokens + 1, shortest),
        "bench.prompt_tokens": (max(spec.bench.prompt_tokens) + spec.bench.decode_tokens, shortest),
    }
    for key, (tokens, most) in wanted.items():
        if most and tokens > most:
            raise SpecError(f"key '{key}': {tokens} tokens are more than the context of {most}.", "Lower it.")


def _check_matched_layers(run: Run) -> None:
    """Refuse layers that student or teacher do not have."""
    match = run.spec.distill.match
    if match is None or run.teacher is None:
        return
    there = [read_architecture(config).layers for config in (run.student_config, run.teacher.config)]
    for pair in match.layers:
        for layer, layers, whose in zip(pair, there, ("student", "teacher"), strict=True):
            if layer >= layers:
                said = f"the {whose} has no layer {layer}, its last is {layers - 1}"
                raise SpecError(f"key 'distill.match.layers': {said}.", "Layers are counted from 0.")


def _check_thresholds(run: Run) -> None:
    """Refuse thresholds of recipes that are not exported."""
    recipes = {export.recipe.name for export in run.exports}
    for recipe in run.spec.verify.thresholds.keys() - recipes - {"default"}:
        raise SpecError(
            f"key 'verify.thresholds.{recipe}': no target has that recipe; there are: {', '.join(sorted(recipes))}.",
            "Correct it, or use the key default.",
        )
