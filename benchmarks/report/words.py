"""The report's sentences: what the figures say, and what they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figures as show
from .artifacts import (
    Artifact,
    beats,
    benchmark,
    by_prompt,
    decode_speed,
    failures,
    is_whole,
    label,
    parity,
    size_bytes,
    was_judged,
)
from .charts import Point
from .figures import number, ratio

Quality = Mapping[str, Mapping[str, Any]]


def kept_share(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> float | None:
    """Share of the teacher's next-token accuracy."""
    return ratio(model.get("next_token_accuracy"), teacher.get("next_token_accuracy"))


def summary(quality: Quality, artifacts: Sequence[Artifact]) -> list[str]:
    """The run in a few sentences: the student, what distilling gave, the artifacts."""
    return [text for text in (_student_words(quality), _distilling_words(quality), *_artifact_words(artifacts)) if text]


def _student_words(quality: Quality) -> str:
    teacher, student = quality.get("teacher") or {}, quality.get("student") or {}
    if not student:
        return "The student's quality was not measured in this run."
    kept = kept_share(student, teacher)
    own, whole = number(student.get("parameters")), number(teacher.get("parameters"))
    size = (
        f"The student has {show.parameters(own)} of the teacher's {show.parameters(whole)} parameters"
        if own and whole
        else "How large the student is beside its teacher was not measured"
    )
    if kept is None:
        return f"{size}; how much of the teacher's next-token accuracy it keeps was not measured."
    return (
        f"{size} and keeps {show.percent(kept)} of its next-token accuracy."
        if own and whole
        else (f"{size}; the student keeps {show.percent(kept)} of the teacher's next-token accuracy.")
    )


def _distilling_words(quality: Quality) -> str:
    teacher, student, baseline = (quality.get(name) or {} for name in ("teacher", "student", "baseline"))
    kept, without = kept_share(student, teacher), kept_share(baseline, teacher)
    if not student:
        return ""
    if without is None:
        return "No label-only student was measured beside it, so what distilling gave is unknown."
    text = f"Trained on labels alone, the same student keeps {show.percent(without)}"
    if kept is None:
        return text + "."
    if show.percent(kept) == show.percent(without):
        return text + ": distilling made no visible difference."
    return text + ("." if kept > without else ", more than the distilled one: here distilling did not help.")


def _artifact_words(artifacts: Sequence[Artifact]) -> list[str]:
    if not artifacts:
        return ["No artifact was exported in this run."]
    found = []
    judged = [a for a in artifacts if was_judged(a)]
    failed = [a for a in judged if failures(a)]
    if failed:
        names = ", ".join(label(a) for a in failed)
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
    sized = [a for a in artifacts if size_bytes(a) and not failures(a)]
    if sized:
        small = min(sized, key=lambda a: size_bytes(a) or 0.0)
        words = f"{'The smallest' if len(sized) > 1 else 'It'}, {label(small)}, takes {show.size(size_bytes(small))}"
        speed = decode_speed(small)
        ttft = by_prompt(small, "ttft_s")
        if speed is not None:
            words += f" and decodes {show.significant(speed)} tokens per second on this machine"
            longest = max(ttft, default=0)
            if longest and number(ttft[longest]) is not None:
                words += f"; its first token comes {show.duration(ttft[longest])} after a prompt of {longest} tokens"
        else:
            words += "; its speed was not measured"
        found.append(words + ".")
    return found


def seed_words(seeds: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Whether what distilling gave is more than the seeds' spread; empty with fewer than two seeds."""
    student, baseline = (
        [x for row in seeds.get(name, ()) if (x := number(row.get("perplexity"))) is not None]
        for name in ("student", "baseline")
    )
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


def pareto_words(marked: Sequence[Point]) -> dict[str, Any]:
    """Each artifact with the reason why it is, or is not, on the front; and the one to begin with, by a plain rule."""
    whole = [p for p in marked if is_whole(p)]
    rows = [
        {"name": p.name, "best": p.on_front, "failed": p.failed, "reason": _reason(p, marked, whole)} for p in marked
    ]
    small = min((p for p in whole if p.on_front), key=lambda p: p.size_bytes or 0.0, default=None)
    start = (
        ""
        if small is None
        else (
            f"To begin with: {small.name}, the smallest that passed its gate "
            f"({show.size(small.size_bytes)}, {show.significant(small.decode_tokens_per_s)} tok/s, "
            f"KL {show.significant(small.kl)})."
        )
    )
    return {"rows": rows, "start": start}


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


def _stand_ins(artifacts: Sequence[Artifact]) -> list[str]:
    """Which artifacts something else ran than their own runtime."""
    names: dict[tuple[str, str], list[str]] = {}
    for artifact in artifacts:
        if instead := parity(artifact).get("stand_in"):
            runtime = str((artifact.get("manifest") or {}).get("runtime"))
            names.setdefault((runtime, str(instead)), []).append(label(artifact))
    return [
        f"{runtime} does not run on this machine; {_joined(labels)} {'was' if len(labels) == 1 else 'were'} run by "
        f"{instead}: program and weights are proved, {runtime}'s own compiler, arithmetic and speed are not."
        for (runtime, instead), labels in names.items()
    ]


def limits(results: Mapping[str, Any], quality: Quality, artifacts: Sequence[Artifact], seeds: int) -> list[str]:
    """What was not run or not measured, in plain words."""
    found = []
    tokens = number((quality.get("student") or {}).get("tokens"))
    if tokens is not None:
        found.append(
            f"Quality is next-token prediction on {show.count(tokens)} held-out tokens of the training data's own "
            "kind. It says nothing of other text, of following instructions, or of facts."
        )
    if not quality.get("baseline"):
        found.append("No label-only student was trained, so what distilling gave is unknown.")
    if seeds < 2:
        found.append("One seed only: how much the figures move with the seed is unknown.")
    found += map(str, (results.get("data") or {}).get("warnings", ()))
    found += _stand_ins(artifacts)
    for words, has in (("verified", was_judged), ("timed", lambda a: bool(benchmark(a)))):
        missing = [label(a) for a in artifacts if not has(a)]
        if missing:
            found.append(f"Not {words}: {_joined(missing)}.")
    if any(benchmark(a) for a in artifacts):
        found.append(
            "Speed and memory were measured on the machine named here and hold for it alone; "
            "no phone or other device was measured."
        )
        if not any(number(benchmark(a).get("energy_j_per_token")) is not None for a in artifacts):
            found.append("Energy was not measured.")
    parted = [(label(a), n) for a in artifacts if (n := number(parity(a).get("first_diverging_token"))) is not None]
    if parted:
        told = ", ".join(f"{name} at token {n + 1:.0f}" for name, n in parted)
        found.append(f"Greedy text parts from the fp32 student's at some point: {told}.")
    if not results.get("spec"):
        found.append("The spec is not part of these results.")
    return found
