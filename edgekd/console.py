"""What the command line shows: progress on stderr, tables and lines on stdout."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .conversation import Message, TooLong, check_prompt, fitted_chat, text_ids
from .conversation import render_chat as render_chat  # where scripts that people have import it from
from .errors import EdgekdError
from .formats import count, duration, plain, significant, size
from .proof import METRICS

if TYPE_CHECKING:
    from .benchmarks.compare import Compared
    from .benchmarks.cost import Cost
    from .benchmarks.predict import Estimate, Prediction
    from .distill.shape import Search
    from .doctor import Check
    from .manifest import Contract
    from .memory import Proposal
    from .plan import Machine, PlannedCache, PlannedCapture, PlannedStage
    from .proof import Audit, Benchmark, Figure, Parity, Quality, TaskScore
    from .results import Results
    from .session import Session

STDOUT, STDERR = Console(), Console(stderr=True)
_LOG_SECONDS = 15.0  # between lines of progress where there is no terminal to draw a bar on


class Bars:
    """A progress bar for every stage; plain lines where stderr is not a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._said = 0.0

    def begin(self, stage: str) -> None:
        """A stage starts."""
        self._tasks[stage] = self._progress.add_task(stage, total=1.0, note="")
        if not STDERR.is_terminal:
            STDERR.print(f"{stage} ...", highlight=False)

    def progress(self, stage: str, fraction: float, note: str) -> None:
        """A stage has done ``fraction`` of its work."""
        self._progress.update(self._tasks[stage], completed=fraction, note=note)
        self._first.setdefault(stage, (fraction, time.monotonic()))
        if not STDERR.is_terminal and time.monotonic() - self._said > _LOG_SECONDS:
            self._said = time.monotonic()
            STDERR.print(f"{stage} {fraction:.0%} {note}{self._left(stage, fraction)}", highlight=False, soft_wrap=True)

    def _left(self, stage: str, fraction: float) -> str:
        """How long it will go on, by what this process did of it."""
        first, since = self._first[stage]
        if fraction <= first:
            return ""
        seconds = (time.monotonic() - since) * (1 - fraction) / (fraction - first)
        return f", {timedelta(seconds=round(seconds))} left"

    def end(self, stage: str, seconds: float, skipped: bool) -> None:
        """A stage is done, or was done before."""
        note = "done before" if skipped else ""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=1.0, note=note)
        self._progress.update(self._tasks[stage], completed=1.0, note=note)
        if not STDERR.is_terminal:
            STDERR.print(f"{stage}: {note or f'{seconds:.1f} s'}", highlight=False)


class _Remarks(logging.Handler):
    """Shows what the package warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        STDERR.print(record.getMessage(), style="yellow", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _remarks() -> Iterator[None]:
    logger, handler = logging.getLogger("edgekd"), _Remarks()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@contextmanager
def watching() -> Iterator[Bars]:
    """Progress bars and warnings on stderr while the body runs; Ctrl-C says how to go on, and exits with 130."""
    columns = (
        TextColumn("{task.description:<35}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    try:
        with _remarks(), Progress(*columns, console=STDERR, disable=not STDERR.is_terminal) as progress:
            yield Bars(progress)
    except KeyboardInterrupt:
        typer.echo("Interrupted. Finished stages are kept; the same command goes on from here.", err=True)
        raise typer.Exit(130) from None


def _text(key: str, value: float | None) -> str:
    """A figure of the table, as a terminal shows it."""
    return plain(METRICS[key].text(value))


def artifact_lines(results: Results) -> list[str]:
    """One line for every artifact of a run."""
    lines = []
    for made in results.artifacts:
        parity, benchmark = made.manifest.parity, made.manifest.benchmark
        words = [_text("size_bytes", made.size_bytes), f"KL {_text('kl_mean', made.kl_mean)}"]
        if benchmark:
            words.append(f"TTFT {_text('ttft_s', next((f.value for f in benchmark.ttft_s.values()), None))}")
            words.append(f"decode {_text('decode_tokens_per_s', benchmark.decode_tokens_per_s.value)} tok/s")
        else:
            words.append("not timed")
        words.append(f"gate {'FAILED' if parity.failures else 'passed'}" if parity else "not verified")
        lines.append(f"{made.folder}: {', '.join(words)}")
    return lines


def plan_table(folder: Path, rows: Sequence[PlannedStage], caches: Sequence[PlannedCache] = ()) -> None:
    """The stages and their estimated needs, and what the artifacts' caches will take on a device."""
    table = Table(title=f"{folder} (estimates)", title_justify="left", box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("state")
    for name in ("RAM MiB", "disk MiB", "time s"):
        table.add_column(name, justify="right")
    for row in rows:
        needs = (row.ram_bytes / 2**20, row.disk_bytes / 2**20, row.seconds)
        table.add_row(row.stage, "done" if row.done else "to do", *(f"{need:,.0f}" for need in needs))
    left = [row for row in rows if not row.done]
    table.add_section()
    table.add_row(
        "to do",
        f"{len(left)}",
        f"{max((row.ram_bytes for row in left), default=0) / 2**20:,.0f}",
        f"{sum(row.disk_bytes for row in left) / 2**20:,.0f}",
        f"{sum(row.seconds for row in left):,.0f}",
    )
    STDOUT.print(table)
    for cache in caches:
        each, whole = plain(size(cache.bytes_per_1000_tokens)), plain(size(cache.bytes_at_context))
        typer.echo(f"{cache.target}: cache {each} for 1,000 tokens, {whole} for its context of {cache.context:,}")


def training_table(ways: Sequence[Proposal], capture: PlannedCapture | None, machine: Machine) -> None:
    """Ways to train, their peak memory, and whether there is so much; and what a cached teacher will take."""
    budget = f"a GPU of {size(machine.gpu_bytes)}" if machine.gpu_bytes else f"this machine's {size(machine.ram_bytes)}"
    if ways:
        typer.echo(plain(f"training, peak memory within {budget}:"))
    for way in ways:
        typer.echo(plain(f"  {way.setting}: {'yes' if way.fits else 'no'}, {size(way.bytes)}"))
    if capture:
        once = f"once {duration(capture.seconds)} in {size(capture.gpu_bytes or capture.ram_bytes)} of memory"
        typer.echo(plain(f"teacher's cache: {size(capture.disk_bytes)} at most, {once}"))


def shapes_table(found: Search) -> None:
    """The shapes of a student, the deepest first, what each takes of a device, and the spec's lines of the chosen."""
    title = f"{found.device}: {plain(size(found.budget_bytes))} for an app; cache of {found.context} tokens"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("layers", "hidden", "MLP", "heads", "parameters", "weights", "cache", "left"):
        table.add_column(name, justify="right")
    table.add_column("")
    for shape in found.shapes:
        spare = found.spare_bytes(shape)
        left = f"{'-' * (spare < 0)}{plain(size(abs(spare)))}"
        needs = (plain(size(shape.weight_bytes)), plain(size(shape.cache_bytes)), left)
        widths = (str(shape.layers), str(shape.hidden_size), str(shape.intermediate_size))
        heads = f"{shape.heads}/{shape.kv_heads}"
        chosen = "chosen" if shape == found.chosen else ""
        table.add_row(*widths, heads, plain(count(shape.parameters)), *needs, chosen)
    STDOUT.print(table)
    if chosen_shape := found.chosen:
        typer.echo("student:\n  init: cut")
        for key in ("layers", "hidden_size", "intermediate_size"):
            typer.echo(f"  {key}: {getattr(chosen_shape, key)}")


def quality_table(quality: Quality) -> None:
    """Teacher, student and baseline beside each other."""
    keys = ("parameters", "perplexity", "next_token_accuracy", "kl_to_teacher")
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for key in keys:
        table.add_column(METRICS[key].label(), justify="right")
    for name, model in quality.models().items():
        itself = {"kl_to_teacher"} if name == "teacher" else set()
        table.add_row(name, *("" if key in itself else _text(key, getattr(model, key)) for key in keys))
    STDOUT.print(table)


def _figures_table(rows: Sequence[tuple[str, str]]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    STDOUT.print(table)


def parity_table(parity: Parity) -> None:
    """The figures of a verification."""
    rows = [("Run by", parity.stand_in)] if parity.stand_in else []
    if parity.tokens:
        rows.append(("Golden strings", f"{parity.tokens.strings_identical} of {parity.tokens.strings} identical"))
    keys = ("kl_mean", "kl_p99", "top1_agreement", "perplexity_artifact", "perplexity_ratio")
    _figures_table([*rows, *((METRICS[key].label(), _text(key, parity.figure(key).value)) for key in keys)])


def bench_table(benchmark: Benchmark) -> None:
    """The medians of a benchmark, what is unknown with its reason, and what disturbed it."""
    rows = [("load_s", "", benchmark.load_s)]
    cold = str(benchmark.settings.cold_tokens or "")
    rows += [("cold_ttft_s", cold, benchmark.cold_ttft_s), ("first_ttft_s", cold, benchmark.first_ttft_s)]
    rows += [("ttft_s", length, figure) for length, figure in benchmark.ttft_s.items()]
    rows += [("prefill_tokens_per_s", length, figure) for length, figure in benchmark.prefill_tokens_per_s.items()]
    for key in ("decode_tokens_per_s", "itl_s", "icl_p50_s", "icl_p95_s", "icl_p99_s", "decode_roofline_fraction"):
        rows.append((key, "", getattr(benchmark, key)))
    shown = [(METRICS[key].label(length), _known(key, figure)) for key, length, figure in rows]
    for name, phase in benchmark.memory.items():
        for key in ("peak_rss_bytes", "anonymous_bytes", "file_backed_bytes"):
            shown.append((f"{METRICS[key].label()}, {name}", _known(key, getattr(phase, key))))
    for key in ("kv_bytes_per_1000_tokens", "prefill_energy_j_per_token", "decode_energy_j_per_token"):
        shown.append((METRICS[key].label(), _known(key, getattr(benchmark, key))))
    _figures_table(shown)
    if sustained := benchmark.sustained:
        slow = (
            "no slice was slower" if sustained.change_slice is None else f"slower from slice {sustained.change_slice}"
        )
        typer.echo(f"sustained: {len(sustained.slices)} slices, {slow}, factor {sustained.factor:.2f}")
    for words in benchmark.settings.limits:
        typer.echo(f"held to {benchmark.settings.profile}: {words}", err=True)
    for words in benchmark.noise.dirty:
        typer.echo(f"disturbed: {words}", err=True)


def _known(key: str, figure: Figure) -> str:
    """A figure as a terminal shows it, or why there is none."""
    return f"unknown: {figure.reason}" if figure.value is None else _text(key, figure.value)


def comparison_table(found: Compared) -> None:
    """Two artifacts beside each other, with the verdict."""
    rows = []
    for figure in found.figures:
        low, high = figure.interval
        rows.append(
            (
                METRICS[figure.key].label(),
                f"{_text(figure.key, figure.a)} -> {_text(figure.key, figure.b)}, {figure.speedup:.3f} x "
                f"({low:.3f} to {high:.3f}): {figure.verdict}",
            )
        )
    _figures_table(rows)
    for words in found.noise.dirty:
        typer.echo(f"disturbed: {words}", err=True)


def estimate_text(key: str, estimate: Estimate) -> str:
    """A predicted figure with its interval and where it comes from, or why there is none."""
    if estimate.value is None:
        return f"unknown: {estimate.reason}"
    span = ""
    if estimate.low is not None and estimate.high is not None:
        span = f" ({_text(key, estimate.low)} to {_text(key, estimate.high)})"
    return f"{_text(key, estimate.value)}{span}, {estimate.source}"


def prediction_table(found: Prediction, device: str) -> None:
    """What a device is predicted to do."""
    keys = {
        "decode_tokens_per_s": found.decode_tokens_per_s,
        "prefill_tokens_per_s": found.prefill_tokens_per_s,
        "ttft_s": found.ttft_s,
        "peak_rss_bytes": found.memory_bytes,
        "estimated_decode_energy_j_per_token": found.estimated_decode_energy_j_per_token,
    }
    titles = {"peak_rss_bytes": "Memory", "ttft_s": f"TTFT at {found.prompt_tokens} tokens, without load"}
    rows = [(titles.get(key, METRICS[key].label()), estimate_text(key, estimate)) for key, estimate in keys.items()]
    sustained = estimate_text("decode_tokens_per_s", found.sustained_decode_tokens_per_s)
    rows.insert(1, ("Decode when hot, tok/s", sustained))
    fits = {True: "yes", False: "no", None: f"unknown: {found.app_memory_bytes.reason or found.memory_bytes.reason}"}
    rows.append(("Fits an app's memory", fits[found.fits]))
    typer.echo(f"predicted for {device}, 80 % intervals:")
    _figures_table(rows)
    for words in found.remarks:
        typer.echo(words, err=True)


def cost_table(found: Cost) -> None:
    """A million requests, hosted and on the device."""
    table = Table(box=None, pad_edge=False)
    table.add_column(f"a million requests of {found.prompt_tokens} + {found.output_tokens} tokens")
    for name in ("USD", "kWh", "kg CO2"):
        table.add_column(name, justify="right")
    for name, side in ((f"teacher, hosted ({found.teacher.source})", found.teacher), ("", found.student)):
        figures = (side.usd, side.energy_kwh, side.carbon_kg)
        name = name or f"student, {found.device} ({side.source})"
        table.add_row(name, *("unknown" if x is None else plain(significant(x)) for x in figures))
    STDOUT.print(table)
    for words, times in (("cheaper", found.cheaper), ("less energy", found.less_energy)):
        typer.echo(f"{words}: {'unknown' if times is None else f'{plain(significant(times))} times'}")
    for remark in found.remarks:
        typer.echo(remark, err=True)


def task_table(scores: Sequence[TaskScore]) -> None:
    """What an artifact scores, and the reference."""
    table = Table(box=None, pad_edge=False)
    for title in ("task", "metric"):
        table.add_column(title)
    for title in ("documents", "score", "reference", "kept"):
        table.add_column(title, justify="right", no_wrap=True)
    for score in scores:
        error = "" if score.standard_error is None else f" ± {score.standard_error:.3f}"
        theirs = "" if score.reference is None else f"{score.reference.value:.3f}"
        row = [score.task, score.metric, f"{score.documents:,}", f"{score.score.value:.3f}{error}", theirs]
        table.add_row(*row, plain(score.kept))
    STDOUT.print(table)


def audit_lines(audit: Audit) -> list[str]:
    """What an audit saw, the verdict last."""
    lines = []
    if audit.opened:  # strace was there
        lines.append(f"opened: {', '.join(f'{count} {group}' for group, count in audit.opened.items())}")
        for title in ("opened_outside", "written", "sockets"):
            found = getattr(audit, title)
            lines.append(f"{title.replace('_', ' ')}:{'' if found else ' none'}")
            lines += [f"  {text}" for text in found]
    lines += [f"not checked: {text}" for text in audit.not_checked]
    lines += [f"failed: {text}" for text in audit.failures]
    return [*lines, f"audit: {audit.status}"]


def doctor_table(checks: Sequence[Check]) -> None:
    """What works here, and how to mend what does not."""
    style = {"ok": "green", "missing": "yellow", "broken": "red", "not_here": "dim"}
    for check in checks:
        STDOUT.print(f"[{style[check.status]}]{check.status:<9}[/] {check.name:<14} ", end="", highlight=False)
        STDOUT.print(check.detail, markup=False, highlight=False, soft_wrap=True)
        if check.remedy:
            STDOUT.print(f"          {check.remedy}", markup=False, highlight=False, soft_wrap=True)


def serving(url: str, model: str) -> None:
    """A server is ready."""
    typer.echo(f"{model}: {url} (OpenAI's interface below {url}/v1); Ctrl-C stops it", err=True)


def converse(
    session: Session,
    contract: Contract,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    *,
    raw: bool = False,
) -> None:
    """Answer ``prompt``, or line after line until the end of input; Ctrl-C ends an answer that is being given.

    Args:
        raw: complete the text as it stands, also with a model that has a chat template.

    Raises:
        EdgekdError: the prompt does not fit, the template refuses the conversation, or the input is not text.
    """
    from .generation import Generator, Piece, Sampling

    sampling = Sampling(max_tokens, temperature, seed=seed)
    generator = Generator(session, contract.eos_ids)

    def answer(history: list[Message], *, stoppable: bool) -> str:
        ids = _conversation_ids(session, contract, history, max_tokens, raw)
        last = Piece("")

        def texts() -> Iterator[str]:
            nonlocal last
            for last in generator.answer(ids, sampling):
                yield last.text

        said = _say(texts(), stoppable=stoppable)
        if not said:
            drawn = last.ending.tokens if last.ending else 0
            why = f"its {drawn} tokens have no text" if drawn else "the model ended it with its first token"
            typer.echo(f"The answer is empty: {why}.", err=True)
        return said

    if prompt is not None:
        answer([{"role": "user", "content": _utf8(prompt)}], stoppable=False)
        return
    line = _next_line()
    if line is None and not sys.stdin.isatty():
        raise EdgekdError("the standard input is empty or closed: there is nothing to answer.", "Give a --prompt.")
    history: list[Message] = []
    while line is not None:
        history.append({"role": "user", "content": _utf8(line)})
        try:
            history.append({"role": "assistant", "content": answer(history, stoppable=True)})
        except TooLong as error:
            typer.echo(f"{error}", err=True)
            history.pop()
        line = _next_line()


def _next_line() -> str | None:
    """The next line that says something; None at the end. Only who types is asked."""
    try:
        while not (line := _read_line()).strip():
            pass
    except (KeyboardInterrupt, EOFError):
        typer.echo("", err=True)
        return None
    except UnicodeDecodeError as error:
        raise EdgekdError("the input is not UTF-8 text.", "Convert it.") from error
    return line


def _read_line() -> str:
    if sys.stdin.isatty():
        if sys.stdout.isatty():
            return input("you> ")
        typer.echo("you> ", nl=False, err=True)  # what is piped on must not hold it
        return input()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _utf8(text: str) -> str:
    """The text, if it is one: what is not UTF-8 on the command line or the terminal becomes half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EdgekdError("the input is not UTF-8 text.", "Convert it.") from error
    return text


def _conversation_ids(
    session: Session, contract: Contract, history: list[Message], max_tokens: int, raw: bool
) -> list[int]:
    """Ids of the conversation; its oldest exchanges leave ``history`` where an answer would have no room."""
    if contract.chat_template is None or raw:
        return check_prompt(session, text_ids(session, contract, str(history[-1]["content"])))
    ids, kept = fitted_chat(session, contract, history, max_tokens)
    if len(kept) < len(history):
        history[:] = kept
        typer.echo("The oldest question and its answer no longer fit; the conversation goes on without.", err=True)
    return ids


def _say(pieces: Iterator[str], *, stoppable: bool = False) -> str:
    """Write an answer as it comes, to its end or to Ctrl-C; what was written."""
    said = []
    try:
        for piece in pieces:
            said.append(piece)
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        if not stoppable:
            raise
    typer.echo("")
    return "".join(said)
