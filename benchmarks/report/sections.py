"""The report's sections, in the order of reading, as the template shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ... import formats as show
from ...formats import NOT_MEASURED
from ...proof import Quality
from ...results import MadeArtifact, Results
from . import charts, tables, words
from .charts import Chart, Choice
from .pareto import points


@dataclass(frozen=True)
class Card:
    """One of the few figures to see first, and what it is measured against."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Charts:
    """None where there is nothing to draw."""

    accuracy: Chart | None
    perplexity: Chart | None
    validation: Chart | None
    ledger: Chart | None
    pareto: Chart | None

    def drawn(self) -> dict[str, Chart]:
        """Those that are drawn, by the id of their place in the page."""
        return {place: chart for place, chart in asdict(self).items() if chart}


@dataclass(frozen=True)
class Page:
    """Everything on the page."""

    name: str
    created: str
    summary: Sequence[str]
    cards: Sequence[Card]
    failed: Sequence[tuple[str, str]]
    """Artifact and sentence."""
    models: tables.Table
    retention: tables.Table
    seeds: str
    ledger: tables.Table
    pareto: words.ParetoWords
    artifacts: Sequence[tables.ArtifactTable]
    cost: tables.CostTable | None
    limits: Sequence[str]
    charts: Charts
    choices: Sequence[Choice]
    """Axes for the chart of artifacts."""
    commands: Sequence[str]
    stages: Sequence[tuple[str, str]]
    sources: Sequence[tables.SourceRow]
    proofs: Sequence[tuple[str, str]]
    """Artifact, and the file with its samples."""
    machine: Sequence[tuple[str, str]]
    versions: Mapping[str, str]
    spec: str


def page(results: Results) -> Page:
    """A run as the page tells it."""
    quality, artifacts = results.quality or Quality(), results.artifacts
    marked = points(artifacts)
    return Page(
        name=results.name,
        created=(results.created or "").replace("T", " ").replace("+00:00", " UTC"),
        summary=words.summary(quality, artifacts),
        cards=cards(quality, artifacts),
        failed=[(a.label, text) for a in artifacts for text in a.failures],
        models=tables.model_table(quality, results.seeds),
        retention=tables.retention_table(quality),
        seeds=words.seed_words(results.seeds),
        ledger=tables.ledger_table(results.ledger),
        pareto=words.pareto_words(marked),
        artifacts=tables.artifact_tables(artifacts),
        cost=tables.cost_table(artifacts),
        limits=words.limits(results),
        charts=Charts(
            charts.quality(quality, results.seeds, "next_token_accuracy", "next-token accuracy → better"),
            charts.quality(quality, results.seeds, "perplexity", "← better: perplexity"),
            charts.training(results.training),
            charts.ledger(results.ledger),
            charts.pareto(marked),
        ),
        choices=charts.pareto_choices(artifacts),
        commands=results.commands,
        stages=tables.stage_table(results.stages),
        sources=tables.source_table(artifacts),
        proofs=[(a.label, f"{a.folder}/manifest.json") for a in artifacts],
        machine=tables.machine_table(artifacts),
        versions=results.versions,
        spec=_yaml(results.spec),
    )


def cards(quality: Quality, artifacts: Sequence[MadeArtifact]) -> list[Card]:
    """The few figures to see first."""
    teacher, student = quality.teacher, quality.student
    kept, without = (tables.kept_share(model, teacher) for model in (student, quality.baseline))
    gain = None if kept is None or without is None else 100 * (kept - without)
    share = show.ratio(student and student.parameters, teacher and teacher.parameters)
    of_teacher = f"of {show.parameters(teacher.parameters)}, {show.percent(share, 0)}" if teacher and share else ""
    judged = [a for a in artifacts if a.was_judged]
    standing = [a for a in artifacts if not a.failures]
    small = min(standing, key=lambda a: a.size_bytes, default=None)
    quick = max(
        (a for a in standing if a.decode_tokens_per_s), key=lambda a: a.decode_tokens_per_s or 0.0, default=None
    )
    gates = f"{sum(not a.failures for a in judged)} of {len(judged)}" if judged else NOT_MEASURED
    won = NOT_MEASURED if gain is None else f"{gain:+.1f}{show.NBSP}points".replace("-", "−")
    decode = f"{show.significant(quick.decode_tokens_per_s)}{show.NBSP}tok/s" if quick else NOT_MEASURED
    return [
        Card("Parameters", show.parameters(student and student.parameters), of_teacher),
        Card("Accuracy kept", show.percent(kept), "of the teacher's next-token accuracy"),
        Card("Given by distilling", won, "of accuracy kept, against labels alone"),
        Card("Gates passed", gates, "artifacts held against the fp32 student"),
        Card("Smallest", show.size(small and small.size_bytes), small.label if small else ""),
        Card("Fastest decode", decode, quick.label if quick else ""),
    ]


def _yaml(spec: Mapping[str, object]) -> str:
    import yaml

    return yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True).strip() if spec else ""
