"""The report's sentences: what the figures say, and what they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ... import formats as show
from ...formats import ratio
from ...proof import SOFTWARE_GPU, Quality
from ...results import MadeArtifact, Results
from .pareto import Point, beats, is_whole
from .tables import kept_share

HELD = 0.95
"""Share of the teacher's accuracy that counts as held."""


def summary(quality: Quality, artifacts: Sequence[MadeArtifact]) -> list[str]:
    """The run in a few sentences: the student, what distilling gave, the artifacts."""
    return [
        text
        for text in (
            _student_words(quality),
            _retention_words(quality),
            _distilling_words(quality),
            *_artifact_words(artifacts),
        )
        if text
    ]


def _student_words(quality: Quality) -> str:
    teacher, student = quality.teacher, quality.student
    if not student:
        return "The student's quality was not measured in this run."
    if not teacher:
        return (
            "How large the student is beside its teacher was not measured; how much of the teacher's next-token "
            "accuracy it keeps was not measured."
        )
    kept = kept_share(student, teacher)
    size = (
        f"The student has {show.parameters(student.parameters)} of the teacher's "
        f"{show.parameters(teacher.parameters)} parameters"
    )
    return f"{size}." if kept is None else f"{size} and keeps {show.percent(kept)} of its next-token accuracy."


def _retention_words(quality: Quality) -> str:
    """Where a mixture's student holds what its teacher knows, and where it does not."""
    teacher, student = quality.teacher, quality.student
    if not teacher or not student or not student.by_source:
        return ""
    kept = {
        source: kept_share(of_student, of_teacher)
        for source, of_student in student.by_source.items()
        if (of_teacher := teacher.by_source.get(source))
    }
    held = [source for source, share in kept.items() if share is not None and share >= HELD]
    dropped = [
        f"{source} ({show.percent(share)})" for source, share in kept.items() if share is not None and share < HELD
    ]
    found = [f"it holds {show.percent(HELD, 0)} or more of the teacher's accuracy on {_joined(held)}"] if held else []
    found += [f"it dropped below on {_joined(dropped)}"] if dropped else []
    return f"By source, {' and '.join(found)}." if found else ""


def _distilling_words(quality: Quality) -> str:
    kept, without = (kept_share(model, quality.teacher) for model in (quality.student, quality.baseline))
    if not quality.student:
        return ""
    if without is None:
        return "No label-only student was measured beside it, so what distilling gave is unknown."
    text = f"Trained on labels alone, the same student keeps {show.percent(without)}"
    if kept is None:
        return text + "."
    if show.percent(kept) == show.percent(without):
        return text + ": distilling made no visible difference."
    return text + ("." if kept > without else ", more than the distilled one: here distilling did not help.")


def _artifact_words(artifacts: Sequence[MadeArtifact]) -> list[str]:
    if not artifacts:
        return ["No artifact was exported in this run."]
    found = []
    judged = [a for a in artifacts if a.was_judged]
    failed = [a for a in judged if a.failures]
    if failed:
        names = ", ".join(a.label for a in failed)
        found.append(f"{len(failed)} of {len(judged)} verified artifacts failed the gate: {names}.")
    elif judged:
        who = "The one artifact" if len(judged) == 1 else f"All {len(judged)} artifacts"
        found.append(
            f"{who} passed the gate."
            if len(judged) == len(artifacts)
            else (f"{len(judged)} of {len(artifacts)} artifacts were verified and passed the gate.")
        )
    else:
        found.append("No artifact was verified.")
    standing = [a for a in artifacts if not a.failures]
    if standing:
        small = min(standing, key=lambda a: a.size_bytes)
        subject = "The smallest" if len(standing) > 1 else "It"
        found.append(f"{subject}, {small.label}, takes {show.size(small.size_bytes)}{_speed_words(small)}.")
    return found


def _speed_words(artifact: MadeArtifact) -> str:
    benchmark = artifact.manifest.benchmark
    if not benchmark or benchmark.decode_tokens_per_s.value is None:
        return "; its speed was not measured"
    said = f" and decodes {show.significant(benchmark.decode_tokens_per_s.value)} tokens per second on this machine"
    if not benchmark.ttft_s:
        return said
    longest = max(benchmark.ttft_s, key=int)
    ttft = show.duration(benchmark.ttft_s[longest].value)
    return f"{said}; its first token comes {ttft} after a prompt of {longest} tokens"


def seed_words(seeds: Sequence[Quality]) -> str:
    """Whether what distilling gave is more than the seeds' spread; empty with fewer than two seeds."""
    student = [seed.student.perplexity for seed in seeds if seed.student]
    baseline = [seed.baseline.perplexity for seed in seeds if seed.baseline]
    if len(student) < 2 or len(baseline) < 2:
        return ""

    def span(values: Sequence[float]) -> str:
        return f"{show.significant(min(values), 4)} to {show.significant(max(values), 4)}"

    told = (
        f"Over {len(student)} seeds the distilled student's perplexity runs from {span(student)}, the label-only "
        f"student's from {span(baseline)}: "
    )
    gap = min(baseline) - max(student)
    if gap <= 0:
        return told + "the ranges meet, so these seeds do not show that distilling helped."
    spread = max(max(student) - min(student), max(baseline) - min(baseline))
    return told + (
        f"the worst distilled one beats the best label-only one by {show.significant(gap, 2)}, "
        f"{'more' if gap > spread else 'but not more'} than the wider spread of {show.significant(spread, 2)}."
    )


@dataclass(frozen=True)
class ParetoRow:
    """Why an artifact is, or is not, on the front."""

    name: str
    best: bool
    reason: str


@dataclass(frozen=True)
class ParetoWords:
    """Every artifact, and the one to begin with, by a plain rule."""

    rows: Sequence[ParetoRow]
    start: str


def pareto_words(marked: Sequence[Point]) -> ParetoWords:
    """What is said of the artifacts beside each other."""
    whole = [p for p in marked if is_whole(p)]
    rows = [ParetoRow(p.name, p.on_front, _reason(p, marked, whole)) for p in marked]
    small = min((p for p in whole if p.on_front), key=lambda p: p.size_bytes or 0.0, default=None)
    if small is None:
        return ParetoWords(rows, "")
    figures = (
        f"{show.size(small.size_bytes)}, {show.significant(small.decode_tokens_per_s)} tok/s, "
        f"KL {show.significant(small.kl)}"
    )
    return ParetoWords(rows, f"To begin with: {small.name}, the smallest that passed its gate ({figures}).")


def _reason(point: Point, marked: Sequence[Point], whole: Sequence[Point]) -> str:
    if point.failed:
        return "failed its gate, so it does not compete"
    if not is_whole(point):
        named = (("KL", point.kl), ("decode speed", point.decode_tokens_per_s), ("size", point.size_bytes))
        return f"{' and '.join(name for name, x in named if x is None)} not measured, so it does not compete"
    rivals = [p for p in marked if beats(p, point)]
    if rivals:
        return f"beaten by {rivals[0].name}: as close or closer, as fast or faster, as small or smaller"
    first = []
    if point.kl == min(p.kl or 0.0 for p in whole):
        first.append("closest to the student")
    if point.decode_tokens_per_s == max(p.decode_tokens_per_s or 0.0 for p in whole):
        first.append("fastest")
    if point.size_bytes == min(p.size_bytes or 0.0 for p in whole):
        first.append("smallest")
    closer = [p for p in whole if p.on_front and (p.kl or 0.0) < (point.kl or 0.0)]
    if not closer:
        return _joined(first or ["no other beats it"])
    return "; ".join(([_joined(first)] if first else []) + [_beside(point, max(closer, key=lambda p: p.kl or 0.0))])


def _beside(point: Point, closer: Point) -> str:
    """What a point gives for being less close than its neighbour on the front."""
    smaller = 1 - (ratio(point.size_bytes, closer.size_bytes) or 1.0)
    faster = (ratio(point.decode_tokens_per_s, closer.decode_tokens_per_s) or 1.0) - 1
    size = f"{show.percent(abs(smaller), 0)} {'smaller' if smaller >= 0 else 'larger'}"
    speed = f"{show.percent(abs(faster), 0)} {'faster' if faster >= 0 else 'slower'}"
    glue = "and" if (smaller >= 0) == (faster >= 0) else "but"
    return f"{size} {glue} {speed} than {closer.name}, for KL {show.significant(point.kl)}"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _stand_ins(artifacts: Sequence[MadeArtifact]) -> list[str]:
    """Which artifacts something else ran than their own runtime."""
    names: dict[tuple[str, str], list[str]] = {}
    for artifact in artifacts:
        if (parity := artifact.manifest.parity) and parity.stand_in:
            names.setdefault((artifact.manifest.runtime, parity.stand_in), []).append(artifact.label)
    return [_stood_in(runtime, instead, labels) for (runtime, instead), labels in names.items()]


def _stood_in(runtime: str, instead: str, labels: Sequence[str]) -> str:
    were = f"{_joined(labels)} {'was' if len(labels) == 1 else 'were'}"
    if instead.endswith(SOFTWARE_GPU):
        return f"{were} computed on {instead}: what a GPU computes is proved, its speed is not told."
    return (
        f"{runtime} does not run on this machine; {were} run by {instead}: program and weights are proved, {runtime}'s "
        "own compiler, arithmetic and speed are not."
    )


def _dequantized(artifacts: Sequence[MadeArtifact]) -> list[str]:
    """That the student's weights have been through one of the formats that are compared here."""
    types = list(dict.fromkeys(kind for a in artifacts for kind in a.manifest.dequantized_from))
    if not types:
        return []
    return [
        f"The student's weights were dequantized from {_joined(types)}: a comparison of formats favours those like it."
    ]


def _tokenizer_habits(artifacts: Sequence[MadeArtifact]) -> list[str]:
    """What runtimes read otherwise by themselves, which no file can change."""
    labels: dict[str, list[str]] = {}
    for artifact in artifacts:
        told = (artifact.manifest.details or {}).get("tokenizer")
        if isinstance(told, Mapping) and told.get("differ"):
            own = " and took ids from tokenizer.json" if told["used"] == "tokenizers" else ""
            words = (
                f"{artifact.manifest.runtime} by itself reads {told['differ']} of {told['texts']} texts otherwise than "
                f"the student's tokenizer, first {told['first']}; edgekd placed special tokens by id{own}"
            )
            labels.setdefault(words, []).append(artifact.label)
    return [f"{words}. So in {_joined(names)}." for words, names in labels.items()]


def limits(results: Results) -> list[str]:
    """What was not run or not measured, in plain words."""
    quality, artifacts = results.quality or Quality(), results.artifacts
    found = []
    if quality.student:
        found.append(
            f"Quality is next-token prediction on {show.count(quality.student.tokens)} held-out tokens of the training "
            "data's own kind. It says nothing of other text, of following instructions, or of facts."
        )
    if not quality.baseline:
        found.append("No label-only student was trained, so what distilling gave is unknown.")
    if len(results.seeds) < 2:
        found.append("One seed only: how much the figures move with the seed is unknown.")
    found += results.data.warnings
    found += _stand_ins(artifacts)
    found += _dequantized(artifacts)
    found += _tokenizer_habits(artifacts)
    found += _unmeasured(artifacts)
    parted = [
        f"{a.label} at token {first + 1}"
        for a in artifacts
        if a.manifest.parity and (first := a.manifest.parity.first_diverging_token) is not None
    ]
    if parted:
        found.append(f"Greedy text parts from the fp32 student's at some point: {', '.join(parted)}.")
    if not results.spec:
        found.append("The spec is not part of these results.")
    return found


def _unmeasured(artifacts: Sequence[MadeArtifact]) -> list[str]:
    """What verification and benchmarks have not told of the artifacts."""
    found = []
    benchmarks = [a.manifest.benchmark for a in artifacts if a.manifest.benchmark]
    if missing := [a.label for a in artifacts if not a.was_judged]:
        found.append(f"Not verified: {_joined(missing)}.")
    if missing := [a.label for a in artifacts if not a.manifest.benchmark]:
        found.append(f"Not timed: {_joined(missing)}.")
    if benchmarks:
        found.append(
            "Speed and memory were measured on the machine named here and hold for it alone; "
            "no phone or other device was measured."
        )
        if all(benchmark.decode_energy_j_per_token.value is None for benchmark in benchmarks):
            found.append("Energy was not measured.")
    return found
