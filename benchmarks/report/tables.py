"""The report's tables, as finished text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ... import formats as show
from ...formats import NOT_MEASURED
from ...proof import (
    METRICS,
    Benchmark,
    BenchSettings,
    Evaluation,
    Figure,
    Hop,
    Host,
    Metric,
    ModelQuality,
    Parity,
    Quality,
    TaskScore,
)
from ...results import MadeArtifact, StageTime
from ..cost import Cost, Prices, Side, cost, default_prices
from ..profiles import Profile, load_profile
from .charts import MODELS

_BY_PHASE = ("anonymous_bytes", "file_backed_bytes")
_COLUMNS = 6
"""Most artifacts side by side: what a printed page holds."""


@dataclass(frozen=True)
class Cell:
    """A figure, small below it the range of what it was made of, and why it is missing where it is."""

    text: str
    range: str = ""
    reason: str = ""


_MISSING = Cell(NOT_MEASURED)


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    title: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """A line a figure or a hop, a column a model or a figure."""

    columns: Sequence[str]
    rows: Sequence[Row]


# --- teacher, student, baseline ---------------------------------------------------------------------------------------


def kept_share(model: Evaluation | None, teacher: Evaluation | None) -> float | None:
    """Share of the teacher's next-token accuracy."""
    return show.ratio(model and model.next_token_accuracy, teacher and teacher.next_token_accuracy)


def model_table(quality: Quality, seeds: Sequence[Quality]) -> Table:
    """Teacher, student and baseline side by side; the small line below a figure is its range over seeds."""
    models = quality.models()
    kept = Row("… of the teacher's", [Cell(show.percent(kept_share(m, quality.teacher))) for m in models.values()])
    rows = [
        _model_row("parameters", models, []),
        _model_row("next_token_accuracy", models, seeds),
        *([kept] if models else []),
        _model_row("perplexity", models, seeds),
        _model_row("kl_to_teacher", models, seeds),
        _model_row("top1_agreement_with_teacher", models, seeds),
        _model_row("tokens", models, []),
    ]
    return Table([MODELS[name] for name in models], rows)


def retention_table(quality: Quality) -> Table:
    """A line for each source of a mixture: what of the teacher's accuracy is kept there; empty for one source."""
    student, rows = quality.student, []
    for source, of_student in (student.by_source if student else {}).items():
        teacher, baseline = (model and model.by_source.get(source) for model in (quality.teacher, quality.baseline))
        accuracies = [e and e.next_token_accuracy for e in (teacher, of_student)]
        kept = [kept_share(e, teacher) for e in (of_student, baseline)]
        texts = [*map(METRICS["next_token_accuracy"].text, accuracies), *map(show.percent, kept)]
        texts += [METRICS[key].text(getattr(of_student, key)) for key in ("perplexity", "kl_to_teacher", "tokens")]
        rows.append(Row(source, [Cell(text) for text in texts]))
    measures = [METRICS[key].label() for key in ("perplexity", "kl_to_teacher", "tokens")]
    return Table(["Teacher's accuracy", "Student's", "Kept", "Kept by labels alone", *measures], rows)


def _model_row(key: str, models: dict[str, ModelQuality], seeds: Sequence[Quality]) -> Row:
    metric = METRICS[key]
    cells = []
    for name, model in models.items():
        by_seed = [getattr(of_seed, key) for seed in seeds if (of_seed := seed.models().get(name))]
        of_itself = name == "teacher" and key.endswith("teacher")
        text = "–" if of_itself else metric.text(getattr(model, key))
        cells.append(Cell(text, show.spread([x for x in by_seed if x is not None], metric.text)))
    return Row(metric.label(), cells)


# --- hops -------------------------------------------------------------------------------------------------------------


def ledger_table(hops: Sequence[Hop]) -> Table:
    """One line a hop; the small line below a figure is its 95 % interval."""
    keys = ("bits_per_weight", "kl_mean", "top1", "perplexity_from", "perplexity_to")
    rows = []
    for hop in hops:
        bits = METRICS["bits_per_weight"].text(hop.bits_per_weight) if hop.bits_per_weight else "–"
        cells = [
            Cell(bits),
            _with_interval("kl_mean", hop.kl_mean, hop.kl_ci95),
            _with_interval("top1", hop.top1, hop.top1_ci95),
            _with_interval("perplexity_from", hop.perplexity_from, None),
            _with_interval("perplexity_to", hop.perplexity_to, hop.perplexity_to_ci95),
        ]
        rows.append(Row(f"{hop.start} → {hop.end}", cells))
    return Table([METRICS[key].label() for key in keys], rows)


def _with_interval(key: str, value: float | None, interval: Sequence[float] | None) -> Cell:
    metric = METRICS[key]
    return Cell(metric.text(value), show.spread(interval or [], metric.text))


# --- artifacts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """Whether an artifact passed, in words."""

    text: str
    style: str


@dataclass(frozen=True)
class Group:
    """Rows of one subject."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class ArtifactTable:
    """A column an artifact: target and recipe, its gate, its figures."""

    columns: Sequence[tuple[str, str]]
    gates: Sequence[Gate]
    groups: Sequence[Group]


def artifact_tables(artifacts: Sequence[MadeArtifact]) -> list[ArtifactTable]:
    """Tables of nearly equal width, each of which fits a printed page."""
    parts = -(-len(artifacts) // _COLUMNS)
    width = -(-len(artifacts) // max(1, parts))
    return [_artifact_table(artifacts[i : i + width]) for i in range(0, len(artifacts), max(1, width))]


def _artifact_table(artifacts: Sequence[MadeArtifact]) -> ArtifactTable:
    groups = [
        Group("Size", _size_rows(artifacts)),
        Group("Against the fp32 student", _parity_rows(artifacts)),
        *([Group("Tasks", rows)] if (rows := _task_rows(artifacts)) else []),
        Group("Privacy", [Row("Audit", [Cell(_audit(a)) for a in artifacts])]),
        Group("Speed", _speed_rows(artifacts)),
        Group("Memory and energy", _memory_rows(artifacts)),
    ]
    return ArtifactTable([a.column for a in artifacts], [_gate(a) for a in artifacts], groups)


def _gate(artifact: MadeArtifact) -> Gate:
    if not artifact.was_judged:
        return Gate(NOT_MEASURED, "missing")
    return Gate("failed", "gate-failed") if artifact.failures else Gate("passed", "passed")


def _size_rows(artifacts: Sequence[MadeArtifact]) -> list[Row]:
    size, bits = METRICS["size_bytes"], METRICS["bits_per_weight"]
    return [
        Row(size.label(), [Cell(size.text(a.size_bytes)) for a in artifacts]),
        Row(bits.label(), [Cell(bits.text(a.manifest.bits_per_weight)) for a in artifacts]),
    ]


def _parity_rows(artifacts: Sequence[MadeArtifact]) -> list[Row]:
    parities = [a.manifest.parity for a in artifacts]
    tokens = [parity.tokens if parity else None for parity in parities]
    keys = ("kl_mean", "kl_p99", "top1_agreement", "perplexity_artifact", "perplexity_ratio")
    return [
        Row("Run by", [Cell(_run_by(a)) for a in artifacts]),
        *(Row(METRICS[key].label(), [_parity_cell(METRICS[key], parity) for parity in parities]) for key in keys),
        Row("Token ids identical", [_identical(t.strings_identical, t.strings) if t else _MISSING for t in tokens]),
        Row("Chats identical", [_identical(t.chats_identical, t.chats) if t else _MISSING for t in tokens]),
    ]


def _parity_cell(metric: Metric, parity: Parity | None) -> Cell:
    if not parity:
        return _MISSING
    figure = parity.figure(metric.key)
    return Cell(metric.text(figure.value), reason=figure.reason or "")


def _run_by(artifact: MadeArtifact) -> str:
    """Its own runtime, or the module that stood in."""
    if not (parity := artifact.manifest.parity):
        return NOT_MEASURED
    return (parity.stand_in or "").partition(",")[0] or artifact.manifest.runtime


def _identical(same: int, total: int) -> Cell:
    return Cell(f"{same} of {total}") if total else _MISSING


def _audit(artifact: MadeArtifact) -> str:
    """The verdict of the privacy audit, and the first thing behind it."""
    if not (audit := artifact.manifest.audit):
        return NOT_MEASURED
    reasons = audit.failures or audit.not_checked
    return ": ".join([audit.status, *reasons[:1]])


def _task_rows(artifacts: Sequence[MadeArtifact]) -> list[Row]:
    """A row for each figure of a task; below a score, what it keeps of the reference's."""
    scores = [{(s.task, s.metric, s.filter, s.fewshot, s.chat): s for s in a.manifest.tasks} for a in artifacts]
    rows = []
    for key in dict.fromkeys(key for by_key in scores for key in by_key):
        task, metric, _, fewshot, chat = key
        more = [f"{fewshot} examples"] * bool(fewshot) + ["chat"] * chat
        rows.append(Row(", ".join([f"{task} {metric}", *more]), [_task_cell(by_key.get(key)) for by_key in scores]))
    return rows


def _task_cell(score: TaskScore | None) -> Cell:
    if score is None:
        return _MISSING
    of = f"{score.kept} of {score.reference_name}" if score.kept else ""
    return Cell(show.significant(score.score.value), of)


def _speed_rows(artifacts: Sequence[MadeArtifact]) -> list[Row]:
    timed = [a.manifest.benchmark or Benchmark() for a in artifacts]
    ttft, prefill = [b.ttft_s for b in timed], [b.prefill_tokens_per_s for b in timed]
    return [
        *_rows(timed, "load_s", "cold_ttft_s", "first_ttft_s"),
        *_rows_by_prompt("ttft_s", ttft),
        *_rows_by_prompt("prefill_tokens_per_s", prefill),
        *_rows(timed, "decode_tokens_per_s", "itl_s", "icl_p50_s", "icl_p95_s", "icl_p99_s"),
        *_rows(timed, "decode_roofline_fraction"),
    ]


def _memory_rows(artifacts: Sequence[MadeArtifact]) -> list[Row]:
    timed = [a.manifest.benchmark or Benchmark() for a in artifacts]
    phases = [(phase, key) for phase in ("load", "prefill", "decode") for key in _BY_PHASE]
    return [
        *_rows(timed, "peak_rss_bytes"),
        *(_phase_row(timed, phase, key) for phase, key in phases if any(phase in b.memory for b in timed)),
        *_rows(timed, "kv_cache_bytes", "kv_bytes_per_1000_tokens", "bytes_per_token"),
        *_rows(timed, "prefill_energy_j_per_token", "decode_energy_j_per_token"),
    ]


def _rows(timed: Sequence[Benchmark], *keys: str) -> list[Row]:
    return [_figure_row(key, [getattr(benchmark, key) for benchmark in timed]) for key in keys]


def _phase_row(timed: Sequence[Benchmark], phase: str, key: str) -> Row:
    of_each = [{str(name): memory for name, memory in benchmark.memory.items()}.get(phase) for benchmark in timed]
    row = _figure_row(key, [getattr(memory, key, None) for memory in of_each])
    return Row(f"{row.title}, {phase}", row.cells)


def _rows_by_prompt(key: str, figures: Sequence[dict[str, Figure]]) -> Iterator[Row]:
    """A row for each length of a prompt; one without, where nothing was timed."""
    for length in sorted(set().union(*figures), key=int) or [""]:
        yield _figure_row(key, [by_length.get(length) for by_length in figures], length)


def _figure_row(key: str, figures: Sequence[Figure | None], prompt_tokens: str = "") -> Row:
    metric = METRICS[key]
    cells = [
        Cell(metric.text(f.value), show.spread(f.samples, metric.text), f.reason or "") if f else _MISSING
        for f in figures
    ]
    return Row(metric.label(prompt_tokens), cells)


# --- what a million requests cost -------------------------------------------------------------------------------------

_REQUEST_TOKENS = 700
"""Five in seven of them read, the others written; fewer where an artifact's context holds fewer."""
_DEVICE = "laptop"
"""Whose watts are the estimate where no counter was read."""


@dataclass(frozen=True)
class CostTable:
    """A million requests of so many tokens, hosted and on a device."""

    prompt_tokens: int
    output_tokens: int
    rows: Sequence[Row]
    hosted: str
    """Whose price and energy it is."""
    sources: Sequence[str]
    remarks: Sequence[str]


def cost_table(artifacts: Sequence[MadeArtifact]) -> CostTable | None:
    """The hosted model beside every artifact: by the energy that was counted, else estimated for a laptop; None where
    there is no artifact."""
    if not artifacts:
        return None
    total = min(_REQUEST_TOKENS, *(a.manifest.contract.context_length for a in artifacts))
    output = max(1, 2 * total // 7)
    prices, laptop = default_prices(), load_profile(_DEVICE)
    costs = [_cost(artifact, laptop, total - output, output, prices) for artifact in artifacts]
    hosted = costs[0].teacher
    rows = [Row("Hosted", [*_side(hosted), _ONE, _ONE, Cell(hosted.source)])]
    for artifact, found in zip(artifacts, costs, strict=True):
        times = [_times(found.cheaper), _times(found.less_energy)]
        source = f"{found.student.source}, {found.device}"
        rows.append(Row(artifact.label, [*_side(found.student), *times, Cell(source)]))
    named = [getattr(prices, key) for key in type(prices).model_fields]
    sources = [f"{show.significant(p.value)} {p.unit}: {p.basis} ({p.source}, {p.date})" for p in named]
    remarks = dict.fromkeys(words for found in costs for words in found.remarks)
    return CostTable(total - output, output, rows, prices.price_out.basis, sources, list(remarks))


def _cost(artifact: MadeArtifact, laptop: Profile, prompt: int, output: int, prices: Prices) -> Cost:
    benchmark = artifact.manifest.benchmark or Benchmark()
    counted = benchmark.decode_energy_j_per_token.value is not None
    return cost(artifact.label, artifact.manifest, None if counted else laptop, prompt, output, prices)


_ONE = Cell("1")


def _side(side: Side) -> list[Cell]:
    return [Cell(show.significant(value)) for value in (side.usd, side.energy_kwh, side.carbon_kg)]


def _times(value: float | None) -> Cell:
    return _MISSING if value is None else Cell(f"{show.significant(value)} ×")


# --- how it was made --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceRow:
    """Where a figure of the benchmarks comes from, and how many samples are behind each."""

    key: str
    source: str
    samples: str


def source_table(artifacts: Sequence[MadeArtifact]) -> list[SourceRow]:
    """Every figure of the benchmarks."""
    found: dict[str, list[Figure]] = {}
    for artifact in artifacts:
        for key, figure in _figures(artifact.manifest.benchmark or Benchmark()):
            found.setdefault(key, []).append(figure)
    return [_source_row(key, figures) for key, figures in found.items() if figures]


def _figures(benchmark: Benchmark) -> Iterator[tuple[str, Figure]]:
    """Every figure of a benchmark with its key, those by length or by phase included."""
    for key, value in benchmark:
        if isinstance(value, Figure):
            yield key, value
        elif isinstance(value, dict):
            for part in value.values():
                yield from ((key, part),) if isinstance(part, Figure) else part


def _source_row(key: str, figures: Sequence[Figure]) -> SourceRow:
    known = [figure for figure in figures if figure.value is not None]
    counts = sorted({len(figure.samples) for figure in known})
    named = ", ".join(sorted({str(figure.source) for figure in known})) or NOT_MEASURED
    return SourceRow(key, named, "–".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "–")


def machine_table(artifacts: Sequence[MadeArtifact]) -> list[tuple[str, str]]:
    """The machine and the settings of the first benchmark."""
    timed = next((a.manifest.benchmark for a in artifacts if a.manifest.benchmark), None)
    return [*_machine_rows(timed.machine), *_settings_rows(timed.settings)] if timed else []


def _machine_rows(machine: Host) -> list[tuple[str, str]]:
    return [
        ("CPU", machine.cpu or NOT_MEASURED),
        ("Cores", show.count(machine.cores)),
        ("Logical cores", show.count(machine.logical_cores)),
        ("RAM", show.size(machine.ram_bytes)),
        ("System", machine.os or NOT_MEASURED),
        ("Last-level cache", show.size(machine.last_level_cache_bytes)),
        ("Load average before", show.significant(machine.load_average_1min)),
    ]


def _settings_rows(settings: BenchSettings) -> list[tuple[str, str]]:
    return [
        ("Threads", show.count(settings.threads)),
        ("Tokens decoded", show.count(settings.decode_tokens)),
        ("Runs, a process each", show.count(settings.runs)),
        ("Warm-up", settings.warm_up or NOT_MEASURED),
    ]


def stage_table(stages: Sequence[StageTime]) -> list[tuple[str, str]]:
    """Stages with the time that each took when it was done, and the sum."""
    if not stages:
        return []
    rows = [(stage.name, show.duration(stage.seconds)) for stage in stages]
    return [*rows, ("all", show.duration(sum(stage.seconds for stage in stages)))]
