"""The verbs that measure artifacts, predict, compare and choose between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import ArtifactArgument, HistoryOption, JsonOption, ThreadsOption, print_json
from .errors import EdgekdError, GateFailed, SpecError

if TYPE_CHECKING:
    from .benchmarks.profiles import Profile
    from .manifest import Artifact
    from .proof import Benchmark

ProfileOption = Annotated[
    str | None,
    typer.Option("--profile", metavar="NAME", help="A device: a shipped profile, such as pixel-9, or a file."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="Measure on adb, adb:SERIAL or ssh:HOST instead of here."),
]
RunnerOption = Annotated[
    Path | None, typer.Option("--runner", metavar="FILE", help="The program that runs artifacts there.")
]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    examples: dict[Callable[..., None], str] = {
        bench: "edgekd bench model-q4 --prompt-tokens 32 --prompt-tokens 512 --json",
        compare: "edgekd compare before/model-q4 after/model-q4 --blocks 9",
        predict: "edgekd predict model-q4 --profile iphone-15-pro",
        pick: "edgekd pick runs/quickstart --memory 1.5GB --ttft 0.5s --quality 0.95",
        cost: "edgekd cost model-q4 --profile laptop --prompt-tokens 500 --output-tokens 200",
    }
    for verb, example in examples.items():
        app.command(epilog=f"Example: {example}")(verb)


def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders with a manifest.json.")],
    prompt_tokens: Annotated[list[int] | None, typer.Option(min=1, help="Prompt length; repeatable.")] = None,
    decode_tokens: Annotated[int, typer.Option(min=1)] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes.")] = 5,
    cold_runs: Annotated[int, typer.Option(min=0, help="Fresh processes whose files left the page cache.")] = 2,
    curve_seconds: Annotated[float, typer.Option(min=0, help="For TTFT and decode up to the whole context.")] = 20,
    energy_seconds: Annotated[float, typer.Option(min=0, help="Of each window in which a counter is read.")] = 10,
    minutes: Annotated[float, typer.Option(min=0, help="Decode for so long, to see what heat does.")] = 0,
    threads: ThreadsOption = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="Hold the runs to this device's threads and memory.")
    ] = None,
    device: DeviceOption = None,
    runner: RunnerOption = None,
    history: HistoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure TTFT, prefill and decode speed, memory and load time, each run in a fresh process.

    Several artifacts are measured in turns, in random order.
    """
    from .console import watching
    from .errors import BadArtifact
    from .files import check_writable
    from .manifest import add_proof, load_artifact
    from .runs.verbs import bench_artifacts, bench_on_device
    from .spec import BenchSpec, of_options

    _check_device(device, runner, profile)
    spec = of_options(
        BenchSpec,
        prompt_tokens=prompt_tokens or None,
        decode_tokens=decode_tokens,
        runs=runs,
        threads=threads,
        cold_runs=cold_runs,
        curve_seconds=curve_seconds,
        energy_seconds=energy_seconds,
        sustained_minutes=minutes,
    )
    limits = _load_profile(profile).limits() if profile else None
    loaded = [load_artifact(folder) for folder in artifacts]
    here = device is None and limits is None
    for artifact in loaded if here else []:
        check_writable(artifact.folder, BadArtifact)
    with watching() as watcher:
        watcher.begin("bench")
        tell = partial(watcher.progress, "bench")
        if device and runner:
            measured = bench_on_device(device, runner, loaded, spec, tell)
        else:
            measured = bench_artifacts(loaded, spec, tell, limits)
    known = [(a, found) for a, found in zip(loaded, measured, strict=True) if not isinstance(found, EdgekdError)]
    for artifact, benchmark in known:
        if here:  # the artifact's proof is of this machine; what another does stands in a history
            add_proof(artifact, benchmark=benchmark)
    if history:
        _append(history, known)
    _tell_benchmarks(loaded, measured, as_json)


def _check_device(device: str | None, runner: Path | None, profile: str | None) -> None:
    if (device is None) != (runner is None):
        raise SpecError("--device and --runner belong together.", "docs/benchmarking.md says how to build a runner.")
    if device and profile:
        raise SpecError("bench: --device measures a device, --profile stands for one.", "Leave one of them out.")


def _append(history: Path, known: Sequence[tuple[Artifact, Benchmark]]) -> None:
    from .benchmarks.history import append, record_of

    append(history, [record_of(artifact, benchmark) for artifact, benchmark in known])


def _tell_benchmarks(artifacts: Sequence[Artifact], measured: Sequence[Benchmark | EdgekdError], as_json: bool) -> None:
    """Show every benchmark; the first error, where there is one, ends the command when all has been shown."""
    from .console import bench_table

    alone = len(artifacts) == 1
    told: list[dict[str, object]] = []
    for artifact, found in zip(artifacts, measured, strict=True):
        if isinstance(found, EdgekdError):
            told.append({"artifact": str(artifact.folder), "error": str(found)})
            continue
        told.append({"artifact": str(artifact.folder), "benchmark": found.model_dump()})
        if as_json and alone:
            print_json(found.model_dump())
        elif not as_json:
            if not alone:
                typer.echo(f"{artifact.folder}:")
            bench_table(found)
    if as_json and not alone:
        print_json(told)
    if failed := [found for found in measured if isinstance(found, EdgekdError)]:
        raise failed[0]


def _load_profile(name: str) -> Profile:
    from .benchmarks.profiles import load_profile

    return load_profile(name)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="An artifact.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, of any target.")],
    blocks: Annotated[int, typer.Option(min=9, help="Of four processes each, in the order ABBA or BAAB.")] = 12,
    prompt_tokens: PromptTokens = 128,
    decode_tokens: Annotated[int, typer.Option(min=2)] = 64,
    margin: Annotated[float, typer.Option(min=0, max=1, help="Least difference to speak of.")] = 0.03,
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the runs.")] = 0,
    device: DeviceOption = None,
    runner: RunnerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether B is faster or slower than A, or that no difference was shown; exits with 1 when it is slower."""
    from .benchmarks.compare import compare as compare_artifacts
    from .benchmarks.devices.bench import site_on
    from .console import comparison_table, watching
    from .manifest import load_artifact
    from .runs.verbs import refuse_stand_in
    from .spec import BenchSpec, of_options
    from .targets import open_artifact, try_artifact

    _check_device(device, runner, None)
    own = {"curve_seconds": 0.0}  # a device is sent the prompts that are asked for
    spec = of_options(BenchSpec, prompt_tokens=[prompt_tokens], decode_tokens=decode_tokens, threads=threads, **own)
    loaded = [load_artifact(folder) for folder in (a, b)]
    for artifact in loaded if device is None else []:
        refuse_stand_in(artifact)
        try_artifact(artifact)
    there = site_on(device, runner, open_artifact, loaded, spec) if device and runner else nullcontext(None)
    with watching() as watcher, there as site:
        watcher.begin("compare")
        found = compare_artifacts(
            open_artifact,
            loaded[0],
            loaded[1],
            spec,
            blocks=blocks,
            margin=margin,
            seed=seed,
            on_run=lambda run, of: watcher.progress("compare", run / of, f"run {run} of {of}"),
            site=site,
        )
    if as_json:
        print_json(found.model_dump() | {"verdict": found.verdict})
    else:
        comparison_table(found)
    if found.verdict == "slower":
        raise GateFailed(f"{b} decodes at {found.figures[0].speedup:.2f} times the speed of {a}.")


def predict(
    artifact: Annotated[
        Path | None, typer.Argument(metavar="ARTIFACT", help="A folder with a manifest.json.", show_default=False)
    ] = None,
    profile: ProfileOption = None,
    prompt_tokens: PromptTokens = 256,
    history: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of bench --history: predict for this machine from it.")
    ] = None,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate", help="Print the errors on held-out devices instead; with --history, on its machines."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict what a device does with an artifact, from published speeds, with an 80 % interval."""
    from .benchmarks import predict as predictor
    from .benchmarks.profiles import profile_names
    from .console import prediction_table
    from .manifest import load_artifact

    if validate:
        return _validate(history, as_json)
    if artifact is None or (profile is None) == (history is None):
        names = ", ".join(profile_names())
        raise SpecError("predict: give ARTIFACT and either --profile or --history.", f"Profiles: {names}.")
    if profile is None:
        assert history is not None
        return _predict_here(load_artifact(artifact), history, as_json)
    device = _load_profile(profile)
    found = predictor.predict(load_artifact(artifact), device, prompt_tokens)
    if as_json:
        return print_json(found.model_dump())
    prediction_table(found, device.title)


def _validate(history: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from .benchmarks import predict as predictor
    from .benchmarks.history import read_history

    rows = predictor.validate_here(read_history(history)) if history else predictor.validate()
    if as_json:
        return print_json([asdict(row) for row in rows])
    typer.echo(predictor.errors_table(rows))


def _predict_here(artifact: Artifact, history: Path, as_json: bool) -> None:
    from .benchmarks.history import read_history
    from .benchmarks.machine import describe_machine
    from .benchmarks.predict import local_points, predict_here
    from .console import estimate_text

    points = local_points(read_history(history), artifact.manifest.target, describe_machine().cpu)
    found = predict_here(artifact, points)
    if as_json:
        return print_json(found.model_dump())
    typer.echo(f"decode on this machine: {estimate_text('decode_tokens_per_s', found)}")


def pick(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a folder of artifacts.")],
    quality: Annotated[str | None, typer.Option(help="Least share of the student's top tokens kept: 0.95.")] = None,
    ttft: Annotated[str | None, typer.Option(help="Most time to the first token: 0.5s.")] = None,
    decode: Annotated[str | None, typer.Option(help="Least tokens per second.")] = None,
    memory: Annotated[str | None, typer.Option(help="Most memory: 1.5GB.")] = None,
    energy: Annotated[str | None, typer.Option(help="Most joules per decoded token.")] = None,
    size: Annotated[str | None, typer.Option(help="Most on disk: 100MB.")] = None,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose an artifact by hard limits, then by quality, and say what was given up."""
    from .benchmarks.pick import candidate, limit_of, lines
    from .benchmarks.pick import pick as choose
    from .manifest import load_artifact

    asked = {"quality": quality, "ttft": ttft, "decode": decode, "memory": memory, "energy": energy, "size": size}
    limits = {key: limit_of(key, text) for key, text in asked.items() if text is not None}
    device = _load_profile(profile) if profile else None
    folders = sorted(path.parent for path in [*run.glob("artifacts/*/manifest.json"), *run.glob("*/manifest.json")])
    if not folders:
        raise EdgekdError(
            f"{run}: no artifacts in it or in its folder artifacts.", "Name the folder of a finished run."
        )
    choice = choose([candidate(load_artifact(folder, check_files=False), device) for folder in folders], limits)
    if as_json:
        print_json(choice.model_dump())
    else:
        for line in lines(choice):
            typer.echo(line)
    if choice.taken is None:
        raise GateFailed(f"{run}: no artifact is within the limits.")


def cost(
    artifact: ArtifactArgument,
    profile: ProfileOption = None,
    prompt_tokens: PromptTokens = 500,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 200,
    price_in: Annotated[float | None, typer.Option(min=0, help="USD per million prompt tokens of the teacher.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="USD per million tokens that it writes.")] = None,
    hosted_energy: Annotated[float | None, typer.Option(min=0, help="J per token that the teacher writes.")] = None,
    electricity: Annotated[float | None, typer.Option(min=0, help="USD per kWh of the device.")] = None,
    carbon: Annotated[float | None, typer.Option(min=0, help="g CO2 per kWh.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a million requests: the teacher hosted, the student on a device; in money, energy and carbon."""
    from .benchmarks.cost import check_tokens, default_prices
    from .benchmarks.cost import cost as compute
    from .console import cost_table
    from .manifest import load_artifact

    prices = default_prices().with_own(
        price_in=price_in, price_out=price_out, hosted_energy=hosted_energy, electricity=electricity, carbon=carbon
    )
    device = _load_profile(profile) if profile else None
    loaded = load_artifact(artifact)
    check_tokens(prompt_tokens, output_tokens, loaded.manifest.contract.context_length)
    found = compute(loaded.folder.name, loaded.manifest, device, prompt_tokens, output_tokens, prices)
    if as_json:
        return print_json(found.model_dump())
    cost_table(found)


def report_history(history: Path, out: Path | None, as_json: bool) -> None:
    """Write the page of a history of benchmarks."""
    from .benchmarks.history import read_history
    from .benchmarks.report.history import build

    written = build(read_history(history), out or history.with_suffix(".html"))
    if as_json:
        return print_json({"report": str(written)})
    typer.echo(f"report: {written}")
