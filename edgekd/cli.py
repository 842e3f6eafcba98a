"""The command line. One subcommand a verb; each imports only what it needs, so that --help stays instant.

Figures and results go to stdout, progress and errors to stderr. With --json, stdout holds one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

from . import cli_bench
from .cli_options import ArtifactArgument, JsonOption, ThreadsOption, print_json
from .errors import EdgekdError, Fault, SpecError, as_error

if TYPE_CHECKING:
    from .runs.run import Run

app = typer.Typer(
    name="edgekd",
    help="Distil a large language model into a small one, export it to on-device runtimes, and prove what it does.",
    epilog="Start with: edgekd run quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, or the name of a shipped spec.")]
ModelArgument = Annotated[str, typer.Argument(help="A model folder, builtin:NAME or hub:ORGANISATION/NAME.")]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", help="Calibration text, UTF-8. Default: shipped chats, prose and code."),
]
BitsOption = Annotated[
    float | None, typer.Option(min=4, max=16, help="Most bits per weight of portable-mixed. Default: 6.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="The run's folder. Default: runs/NAME.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the spec's seed.")]
SeedsOption = Annotated[
    str | None,
    typer.Option("--seeds", metavar="0,1,2", help="Train with each; export the first's student, compare them all."),
]
SkippedOption = Annotated[
    bool, typer.Option("--allow-skipped", help="Go on when more than 5 % of the data's rows are unusable.")
]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Compare every file of the finished stages with its sha256, not only its size.")
]
ReportOnlyOption = Annotated[bool, typer.Option("--report-only", help="Do not fail on a missed threshold.")]


def _open(
    spec: str, out: Path | None, seed: int | None = None, allow_skipped: bool = False, seeds: str | None = None
) -> Run:
    from .runs.preflight import open_run
    from .spec import builtin_spec, load_spec
    from .targets import spec_model

    first, more = seed, list[int]()
    if seeds is not None:
        if seed is not None:
            raise SpecError("--seed and --seeds are both given.", "Give --seeds alone: its first counts as --seed.")
        first, *more = _numbers(seeds)
    shipped = not Path(spec).is_file() and builtin_spec(spec) is not None
    words = ["edgekd", "run", spec, *(["--seed", str(seed)] if seed is not None else [])]
    words += ["--seeds", seeds] if seeds else []
    words += ["--allow-skipped"] * allow_skipped
    base = Path() if shipped else Path(spec).parent
    with _in_turn():
        loaded = load_spec(spec, seed=first, model=spec_model())
        if allow_skipped:
            texts = {name: text for name in ("data", "calibration") if (text := getattr(loaded, name))}
            allowed = {name: text.model_copy(update={"allow_skipped": True}) for name, text in texts.items()}
            loaded = loaded.model_copy(update=allowed)
        return open_run(loaded, base=base, out=out, words=words, more_seeds=more)


def _in_turn() -> contextlib.AbstractContextManager[None]:
    """Of several processes that torchrun started, the first does the body before the others."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return contextlib.nullcontext()
    from .distill.ranks import joined

    return joined().in_turn()


def _numbers(seeds: str) -> list[int]:
    """What ``--seeds`` says."""
    from .spec import MAX_SEED

    words = seeds.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,10}\s*", word) and int(word) <= MAX_SEED for word in words):
        raise SpecError(f"--seeds {seeds:.200}: not whole numbers from 0 to {MAX_SEED}.", "Write it as 0,1,2.")
    numbers = [*map(int, words)]
    if len(set(numbers)) < len(numbers):
        raise SpecError(f"--seeds {seeds:.200}: one stands twice.", "Give each once.")
    return numbers


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"edgekd {version('edgekd')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: edgekd run quickstart --out runs/first")
def run(
    spec: SpecArgument,
    out: OutOption = None,
    seed: SeedOption = None,
    report_only: ReportOnlyOption = False,
    check: CheckOption = False,
    allow_skipped: SkippedOption = False,
    seeds: SeedsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Do a whole run: distil, quantize, export, verify, benchmark, report. Run it again to go on after a stop."""
    _do(_open(spec, out, seed, allow_skipped, seeds), report_only, check, as_json)


@app.command(epilog="Example: edgekd deploy runs/quickstart/student --targets gguf,onnx --out runs/deployed")
def deploy(
    model: ModelArgument,
    targets: Annotated[
        str | None,
        typer.Option(metavar="gguf,onnx", help="Default: every target that is installed and takes the model."),
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="For every target; repeatable. Default: portable-int4.")
    ] = None,
    bits: BitsOption = None,
    method: Annotated[Literal["rtn", "search", "gptq", "qad"], typer.Option(help="Chooses the integers.")] = "gptq",
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Calibration and held-out text. Default: shipped chats, prose, code."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Context of the artifacts. Default: the model's, 4096 at most.")
    ] = None,
    out: OutOption = None,
    report_only: ReportOnlyOption = False,
    check: CheckOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take a model that exists to devices: quantize, export, verify, benchmark, report. Nothing is trained."""
    from .runs.deploy import deployment
    from .runs.preflight import open_run

    named = None if targets is None else targets.split(",")
    spec = deployment(model, targets=named, recipes=recipe, bits=bits, method=method, text=text, context=context)
    words = ["edgekd", "deploy", model, *(["--targets", targets] if targets else [])]
    words += [word for name in recipe or [] for word in ("--recipe", name)]
    words += ["--bits", str(bits)] if bits else []
    words += ["--method", method, *(["--text", str(text)] if text else [])]
    words += ["--context", str(context)] if context else []
    _do(open_run(spec, base=Path(), out=out, words=words), report_only, check, as_json)


def _do(opened: Run, report_only: bool, check: bool, as_json: bool) -> None:
    """Do a run and tell what came of it."""
    from .console import artifact_lines, watching
    from .runs import do_run

    with watching() as watcher:
        results = do_run(opened, watcher, report_only=report_only, check=check)
    if results is None:
        return
    if as_json:
        return print_json(results.model_dump())
    for line in artifact_lines(results):
        typer.echo(line)
    typer.echo(f"report: {opened.folder / 'report.html'}")


@app.command(epilog="Example: edgekd plan quickstart")
def plan(
    spec: SpecArgument,
    out: OutOption = None,
    seed: SeedOption = None,
    seeds: SeedsOption = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="24GB", help="Plan the training for a GPU of so much memory.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the stages, what is done already, and the RAM, disk and time each will need; and which ways of training
    would fit. Does no work."""
    from dataclasses import asdict, replace

    from .benchmarks.pick import limit_of
    from .console import plan_table, training_table
    from .plan import PlannedStage, measure_machine, refuse_what_cannot_fit
    from .runs.chain import planned_caches, planned_capture, planned_trainings, stages
    from .runs.runner import to_do

    opened = _open(spec, out, seed, seeds=seeds)
    machine = measure_machine(opened.folder)
    if gpu is not None:
        machine = replace(machine, gpu_bytes=round(limit_of("memory", gpu)))
    chain = stages(opened, machine)
    left = to_do(opened, chain)
    rows = [PlannedStage.of(stage.name, stage.name not in left, stage.cost) for stage in chain]
    caches, ways, capture = planned_caches(opened), planned_trainings(opened, machine), planned_capture(opened, machine)
    if as_json:
        stage_rows, cache_rows, way_rows = ([asdict(row) for row in part] for part in (rows, caches, ways))
        told = {"stages": stage_rows, "caches": cache_rows, "trainings": way_rows, "device": machine.device}
        print_json({"folder": str(opened.folder), **told, "capture": asdict(capture) if capture else None})
    else:
        plan_table(opened.folder, rows, caches)
        training_table(ways, capture, machine)
    refuse_what_cannot_fit({s.name: s.cost for s in chain if s.name in left}, machine, opened.folder)


@app.command(epilog="Example: edgekd distill quickstart")
def distill(
    spec: SpecArgument,
    out: OutOption = None,
    seed: SeedOption = None,
    check: CheckOption = False,
    allow_skipped: SkippedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the student (and the label-only baseline), measure both, and stop there."""
    from .console import quality_table, watching
    from .runs import do_run

    opened = _open(spec, out, seed, allow_skipped)
    if not opened.trains:
        raise SpecError(f"{spec}: it has no teacher, nothing is distilled.", f"Go on with: edgekd run {spec}")
    with watching() as watcher:
        results = do_run(opened, watcher, until="quality", check=check)
    if results is None:
        return
    quality = results.quality
    assert quality is not None
    if as_json:
        return print_json({"student": str(opened.student), "quality": quality.model_dump()})
    quality_table(quality)
    typer.echo(f"student: {opened.student}")


@app.command(epilog="Example: edgekd student builtin:pycode-16m --target-parameters 8M --fits iphone-15-pro")
def student(
    teacher: ModelArgument,
    target_parameters: Annotated[str, typer.Option(metavar="1.2B", help="Weights that the student is to have.")],
    fits: Annotated[str, typer.Option(metavar="NAME", help="A device: a profile's name, or a YAML file of one.")],
    recipe: Annotated[str, typer.Option(help="On the portable grid: how the weights are stored.")] = "portable-int4",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that its cache holds. Default: the teacher's, 4096 at most.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Search depth and widths of a student for a device's memory, by the teacher's config.json alone, and print the
    lines of the spec that cut it."""
    from dataclasses import asdict

    from .checkpoint import Checkpoint
    from .console import shapes_table
    from .runs.fits import search, written
    from .spec import CutStudent, of_options
    from .student import resolve_model

    wanted = {"profile": fits, "recipe": recipe} | ({} if context is None else {"context": context})
    spec = of_options(CutStudent, init="cut", parameters=target_parameters, fits=wanted)
    found = search(spec, Checkpoint(resolve_model(teacher, files=["config.json"])).config, Path())
    if as_json:
        rows = [
            {**asdict(shape), "spare_bytes": found.spare_bytes(shape), "chosen": shape == found.chosen}
            for shape in found.shapes
        ]
        told = {"device": found.device, "budget_bytes": found.budget_bytes, "context": found.context}
        lines = written(spec, found).model_dump(exclude_defaults=True) if found.chosen else None
        print_json({**told, "shapes": rows, "student": lines})
    else:
        shapes_table(found)
    found.taken()


@app.command(epilog="Example: edgekd quantize runs/quickstart/student student-int4 --method gptq --text notes.txt")
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write the quantized student to.")],
    recipe: Annotated[
        str, typer.Option(help="int8, portable-int4, portable-int4-head4 or portable-mixed.")
    ] = "portable-int4",
    bits: BitsOption = None,
    method: Annotated[Literal["rtn", "search", "gptq", "qad"], typer.Option(help="How to choose.")] = "gptq",
    text: TextOption = None,
    windows: Annotated[int, typer.Option(min=1, max=2**20, help="Calibration windows, for search, gptq, qad.")] = 64,
    context: Annotated[int, typer.Option(min=2, max=2**24, help="Tokens of a window.")] = 256,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, for qad.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="For qad.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose the integers once, for every target. A stopped qad goes on when the command is given again."""
    from .console import watching
    from .files import check_writable
    from .quant.store.writer import check_quantizes
    from .runs.verbs import quantize_model
    from .spec import QadSpec, of_options
    from .student import resolve_model
    from .targets import load_recipe

    training = of_options(QadSpec, steps=steps)
    chosen = load_recipe(recipe).with_bits(bits)
    check_quantizes(out, chosen)
    check_writable(out)
    folder = resolve_model(model)
    count = None if method == "qad" else windows
    ids = None if method == "rtn" and chosen.bits is None else _windows(folder, text, "train", count, context)
    with watching() as watcher:
        watcher.begin("quantize")
        figures = quantize_model(
            folder,
            out,
            chosen,
            method,
            ids,
            training,
            windows,
            seed,
            lambda fraction, note: watcher.progress("quantize", fraction, note),
        )
    if as_json:
        return print_json({"folder": str(out), **figures})
    typer.echo(f"quantized student: {out}, {figures['bits_per_weight']:.2f} bits per weight")


class _NamesTargets(TyperCommand):
    """A command whose help names the targets there are, plug-ins included; they are looked for when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from .targets import names

        for parameter in self.params:
            if isinstance(parameter, TyperOption) and parameter.name == "target":
                parameter.help = ", ".join(names())
        super().format_help(ctx, formatter)


@app.command(
    cls=_NamesTargets,
    epilog="Example: edgekd export runs/quickstart/student model-int4 --target gguf --recipe portable-int4",
)
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write the artifact to; must not exist.")],
    target: Annotated[str, typer.Option()] = "gguf",
    recipe: Annotated[
        str, typer.Option(help="fp16, int8, portable-int4, portable-int4-head4, or one such as gguf-q4_k_m.")
    ] = "portable-int4",
    context: Annotated[
        int | None, typer.Option(min=1, help="Context length. Default: the model's, 4096 at most.")
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Execution provider, the preferred first, for a target that has them: its key providers."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A key of the target's section of the spec.")
    ] = None,
    quantized: Annotated[
        Path | None,
        # --grid is what it was called in scripts that people have.
        typer.Option("--quantized", "--grid", help="A quantized student to pack. Default: round to nearest."),
    ] = None,
    moments: Annotated[
        Path | None, typer.Option(help="Second moments from a run's calibration. Default: calibrate on --text.")
    ] = None,
    text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an artifact for one runtime from a model folder."""
    from .checkpoint import Checkpoint
    from .files import check_writable
    from .runs.verbs import export_model
    from .spec import key_values, of_options
    from .student import resolve_model
    from .targets import check, load_recipe, load_target

    if out.exists():
        raise EdgekdError(f"{out} exists.", "Remove it, or name another folder.")
    check_writable(out)
    given = {"context": context, "providers": provider or None} | key_values(option or [])
    spec = of_options(load_target(target).Options, **given | {"target": target, "recipes": [recipe]})
    folder = resolve_model(model)
    check(Checkpoint(folder).config, folder, spec)
    needs_text = load_recipe(recipe, target).needs_moments and moments is None
    ids = _windows(folder, text, "train", 64, 256) if needs_text else None
    artifact = export_model(folder, spec, recipe, out, quantized=quantized, moments=moments, ids=ids)
    if as_json:
        return print_json({"folder": str(out), "size_bytes": artifact.size_bytes, **artifact.manifest.model_dump()})
    typer.echo(f"{out}: {artifact.size_bytes / 1e6:.1f} MB, {artifact.manifest.bits_per_weight:.2f} bits per weight")
    if traffic := artifact.manifest.traffic:
        each, context = traffic.kv_bytes_per_position, artifact.manifest.contract.context_length
        typer.echo(
            f"cache: {each / 1e3:.1f} MB for 1,000 tokens, {each * context / 1e6:.1f} for its context of {context:,}"
        )


@app.command("import", epilog="Example: edgekd import SmolLM2-135M-Instruct.Q4_1.gguf smollm2")
def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the model to; must not exist.")],
    as_json: JsonOption = False,
) -> None:
    """Make a model folder of a GGUF file, dequantized; prove its ids and logits through llama.cpp on the file."""
    from .console import watching
    from .files import check_writable
    from .runs.verbs import import_gguf

    if os.path.lexists(out):
        raise EdgekdError(f"{out} exists.", "Remove it, or name another folder.")
    check_writable(out)
    with watching() as watcher:
        watcher.begin("import")
        origin = import_gguf(path, out, lambda fraction, note: watcher.progress("import", fraction, note))
    if as_json:
        return print_json({"folder": str(out), **origin.model_dump()})
    typer.echo(f"{out}: ids as llama.cpp's on {origin.tokenizer_texts} texts, KL {origin.logits.kl_mean:.2g} nats")
    if origin.remark:
        typer.echo(f"weights: {origin.remark}")


@app.command(epilog="Example: edgekd verify model-q4 --reference runs/quickstart/student --text notes.txt")
def verify(
    artifact: ArtifactArgument,
    reference: Annotated[str, typer.Option(help="The model it was made from: a folder, builtin: or hub:.")],
    text: Annotated[
        Path | None, typer.Option(help="Held-out text, UTF-8. Default: shipped chats, prose and code.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1)] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    kl_mean_max: Annotated[float | None, typer.Option(help="Fail above this mean KL.")] = None,
    top1_min: Annotated[float | None, typer.Option(help="Fail below this top-1 agreement.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare an artifact, run by its own runtime, with the model it was made from, in float32."""
    from .console import parity_table, watching
    from .errors import BadArtifact, GateFailed
    from .files import check_writable
    from .manifest import add_proof, load_artifact
    from .runs.verbs import verify_artifact
    from .spec import Thresholds, VerifySpec, of_options
    from .student import resolve_model
    from .targets import try_artifact
    from .verify.parity import judge

    spec = of_options(VerifySpec, windows=windows, context=context)
    gate = of_options(Thresholds, kl_mean_max=kl_mean_max, top1_min=top1_min)
    loaded, folder = load_artifact(artifact), resolve_model(reference)
    check_writable(loaded.folder, BadArtifact)
    try_artifact(loaded)
    ids = _windows(folder, text, "test", windows, context)
    with watching() as watcher:
        watcher.begin("verify")
        parity = verify_artifact(loaded, folder, ids, spec, lambda f, note: watcher.progress("verify", f, note))
    failures = judge(parity, parity.tokens, gate)
    parity = parity.model_copy(update={"failures": failures})
    add_proof(loaded, parity=parity)
    if as_json:
        print_json(parity.model_dump())
    else:
        parity_table(parity)
    if failures:
        raise GateFailed(f"{artifact}: " + "; ".join(failures) + ".")


def _windows(model: Path, text: Path | None, split: Literal["train", "test"], windows: int | None, context: int) -> Any:
    """Evenly spaced windows ``(N, T)`` of a text file, or of a split of the shipped text; all of them for ``windows``
    None."""
    import numpy as np

    from .student import load_tokenizer
    from .verify.reference import held_out_windows

    tokenizer = load_tokenizer(model)
    if text is None:
        from .distill.mixed import mixed_documents

        documents = [document for its, document in mixed_documents(tokenizer) if its == split]
    else:
        try:
            documents = [text.read_text("utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"--text {text}: not readable as UTF-8 text ({error}).", "Name a text file.") from error
    ids = [token for document in documents for token in tokenizer(document, verbose=False)["input_ids"]]
    return held_out_windows(np.asarray(ids), windows or len(ids), context)


cli_bench.add_to(app)


@app.command("eval", epilog="Example: edgekd eval model-q4 --tasks facts --reference runs/quickstart/student")
def eval_(
    artifact: ArtifactArgument,
    tasks: Annotated[
        str, typer.Option(metavar="FILE,NAME", help="Task files; facts, python-lines; the harness's own names.")
    ],
    reference: Annotated[
        str | None, typer.Option(help="A model to hold it against, such as the teacher: a folder, builtin: or hub:.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most documents of a task.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put questions through the model's chat template.")] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an artifact do tasks of lm-evaluation-harness, and tell how much of a reference's score it keeps."""
    from .console import task_table, watching
    from .errors import BadArtifact
    from .files import check_writable
    from .manifest import add_proof, load_artifact
    from .runs.verbs import evaluate_artifact

    loaded = load_artifact(artifact)
    check_writable(loaded.folder, BadArtifact)
    with watching() as watcher:
        watcher.begin("eval")
        scores = evaluate_artifact(
            loaded,
            tasks.split(","),
            reference,
            threads,
            lambda f, note: watcher.progress("eval", f, note),
            limit=limit,
            fewshot=fewshot,
            chat=chat,
        )
    add_proof(loaded, tasks=scores)
    if as_json:
        return print_json([score.model_dump() for score in scores])
    task_table(scores)


@app.command(epilog="Example: edgekd audit model-q4")
def audit(artifact: ArtifactArgument, as_json: JsonOption = False) -> None:
    """Run an artifact without a network and watch it: no socket, no file written or read that is not its own."""
    from .audit import audit as watch_artifact
    from .console import audit_lines
    from .errors import GateFailed
    from .files import check_writable
    from .manifest import add_proof, load_artifact

    loaded = load_artifact(artifact)
    try:
        check_writable(artifact)
        unwritable = None
    except EdgekdError as error:  # it can be watched all the same
        unwritable = error
    seen = watch_artifact(loaded)
    if unwritable:
        typer.echo(f"not recorded in the manifest: {unwritable.cause}", err=True)
    else:
        add_proof(loaded, audit=seen)
    if as_json:
        print_json(seen.model_dump())
    else:
        for line in audit_lines(seen):
            typer.echo(line)
    if seen.failures:
        raise GateFailed(f"{artifact}: the audit failed: " + "; ".join(seen.failures) + ".")


@app.command(epilog="Example: edgekd report runs/quickstart")
def report(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/report.html.")] = None,
    history: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of bench --history: a page of how its figures moved, instead.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run again from its results, or that of a history of benchmarks."""
    from .benchmarks.report import build
    from .runs.results import RESULTS, read_results

    if (run_folder is None) == (history is None):
        raise EdgekdError("report: give either RUN or --history FILE.", "See edgekd report --help.")
    if history is not None:
        return cli_bench.report_history(history, out, as_json)
    assert run_folder is not None
    if not (run_folder / RESULTS).is_file():
        raise EdgekdError(f"{run_folder}: no {RESULTS}.", "Finish the run first: edgekd run SPEC.")
    written = build(read_results(run_folder / RESULTS), out or run_folder / "report.html")
    if as_json:
        return print_json({"report": str(written)})
    typer.echo(f"report: {written}")


@app.command(epilog='Example: edgekd chat model-q4 --prompt "def read_lines(path):"')
def chat(
    artifact: ArtifactArgument,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and stop. Default: read lines and answer each.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the text as it stands, without the model's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Talk to an artifact, or complete a text with it, through its own runtime."""
    from .console import converse
    from .manifest import load_artifact
    from .targets import open_artifact

    loaded = load_artifact(artifact)
    session = open_artifact(loaded, threads=threads)
    try:
        converse(session, loaded.manifest.contract, prompt, max_tokens, temperature, seed, raw=raw)
    finally:
        session.close()


@app.command(epilog="Example: edgekd serve model-q4 --port 8080")
def serve(
    artifact: ArtifactArgument,
    host: Annotated[str, typer.Option(help="Another than this machine's own needs --key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the key that clients must send (Authorization: Bearer).")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Answer OpenAI's HTTP interface with an artifact, and show a chat page, on this machine alone by default."""
    from .console import serving
    from .serve.server import serve as run_server

    run_server(artifact, host=host, port=port, key=_key(key_file), threads=threads, on_ready=serving)


def _key(path: Path | None) -> str | None:
    """The key in a file: on the command line every user of the machine could read it."""
    if path is None:
        return None
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--key-file {path}: not readable as text ({error}).", "Name a text file.") from error


@app.command(epilog="Example: edgekd bundle model-q4 model-q4.zip --for android --license LICENSE")
def bundle(
    artifact: ArtifactArgument,
    out: Annotated[Path, typer.Argument(help="Folder, or FILE.zip; must not exist.")],
    platform: Annotated[Literal["android", "ios", "web"], typer.Option("--for", help="Where the app runs.")],
    license_file: Annotated[
        Path | None, typer.Option("--license", metavar="FILE", help="The model's licence, as text.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An Ed25519 private key, PEM, to sign the checksums with.")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put together what an app ships: the artifact, licence, model card, golden answers, checksums and a signature."""
    from .bundle import check_bundle, exceeded, public_key, write_bundle
    from .files import check_writable
    from .manifest import load_artifact
    from .targets import open_artifact
    from .verify.golden import golden_texts

    if os.path.lexists(out):
        raise EdgekdError(f"{out} exists.", "Remove it, or name another.")
    check_writable(out)
    loaded = load_artifact(artifact)
    text = check_bundle(loaded, platform, license_file)
    pem = None if key is None else _bytes(key)
    public = None if pem is None else public_key(pem)
    session = open_artifact(loaded, threads=threads)
    try:
        golden = golden_texts(session, loaded.manifest.contract)
    finally:
        session.close()
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    sums = write_bundle(loaded, out, platform, license_file=text, golden=golden, key=pem)
    sizes = [told["bytes"] for told in sums["files"].values()]
    told = exceeded(platform, sizes)
    if as_json:
        return print_json({"bundle": str(out), "bytes": sum(sizes), "public_key": public, "exceeded": told, **sums})
    typer.echo(f"{out}: {sum(sizes) / 1e6:.1f} MB in {len(sizes)} files")
    if public:
        typer.echo(f"public key, for the app: {public}")
    for sentence in told:
        typer.echo(f"too large: {sentence}", err=True)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"--key {path}: {error.strerror}.", "Name a file.") from error


@app.command(epilog="Example: edgekd doctor")
def doctor(as_json: JsonOption = False) -> None:
    """Say which runtimes work on this machine, by a self-test of each in a process of its own."""
    from dataclasses import asdict

    from .console import doctor_table
    from .doctor import diagnose

    checks = diagnose()
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        doctor_table(checks)
    if any(check.status == "broken" for check in checks):
        raise typer.Exit(1)


@app.command(epilog="Example: edgekd init my-model.yaml && edgekd plan my-model.yaml")
def init(path: Annotated[Path, typer.Argument(help="File to write.")] = Path("edgekd.yaml")) -> None:
    """Write a commented spec to start from."""
    from .files import check_writable, write_text
    from .spec import builtin_spec

    template = builtin_spec("template")
    assert template is not None
    if os.path.lexists(path):
        raise EdgekdError(f"{path} exists.", "Remove it, or name another file.")
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, template.read_text("utf-8"))
    typer.echo(f"{path}: edit it, then: edgekd plan {path}")


@app.command(epilog="Example: edgekd schema > edgekd.schema.json")
def schema(
    of_bench: Annotated[
        bool, typer.Option("--bench", help="Of a benchmark's record, which apps on devices write, instead.")
    ] = False,
) -> None:
    """Print the spec's JSON Schema, for editors that check and complete YAML."""
    from .proof import BenchRecord
    from .targets import spec_model

    typer.echo(json.dumps((BenchRecord if of_bench else spec_model()).model_json_schema(), indent=2))


def _hold_streams() -> None:
    """Give closed standard streams a place: else the next file to be opened would take their number, and what a
    library prints would end in it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - held to the end


def _flush() -> None:
    """Have the output written; a reader or a disk that is gone was told of already, and the interpreter would again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    """A message without what could move a terminal's cursor, and without a library's whole dump."""
    line = re.sub(r"\s*\n\s*", " ", text)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:2000])


def _fail(error: EdgekdError) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr
        typer.secho(f"error: {_one_line(str(error))}", err=True, fg="red")
    sys.exit(error.exit_code)


def _write_fault(error: BaseException) -> Path:
    """The file that a report of a fault needs."""
    import platform
    import tempfile
    from importlib.metadata import version

    handle, name = tempfile.mkstemp(prefix="edgekd-fault-", suffix=".txt")
    with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"edgekd {version('edgekd')}, Python {platform.python_version()}, {platform.platform()}\n")
        file.write(f"{sys.argv}\n")
        file.write("".join(traceback.format_exception(error)))
    return Path(name)


def main() -> None:
    """Entry point: every error a user can mend is one sentence on stderr and exit code 2; a fault of ours is one with a
    file to report, and exit code 70."""
    for name in ("torchao", "torch.utils._pytree"):  # they warn, on import, of what no user can mend
        logging.getLogger(name).setLevel(logging.ERROR)
    _hold_streams()
    try:
        app()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command goes on from here.", err=True)
        sys.exit(130)
    except BaseException as error:  # a panic of a Rust library is no Exception
        told = as_error(error)
        if isinstance(told, Fault):
            told = Fault(told.cause, f"Please report it with {_write_fault(error)}.")
        _fail(told)
    finally:
        _flush()


if __name__ == "__main__":
    main()
