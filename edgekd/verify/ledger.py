"""The ledger of quality: what each hop, from teacher to student to artifact, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def hop(
    name_from: str,
    name_to: str,
    *,
    kl_mean: float | None,
    kl_ci95: Sequence[float] | None = None,
    top1: float | None,
    perplexity_from: float | None,
    perplexity_to: float | None,
) -> dict[str, Any]:
    """One row. KL(from || to) in nats per token; what was not measured is None."""
    return {
        "from": name_from,
        "to": name_to,
        "kl_mean": kl_mean,
        "kl_ci95": None if kl_ci95 is None else list(kl_ci95),
        "top1": top1,
        "perplexity_from": perplexity_from,
        "perplexity_to": perplexity_to,
    }


def ledger(
    teacher: Mapping[str, Any], student: Mapping[str, Any], parities: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every hop of a run.

    Args:
        teacher: the teacher's evaluation, with ``perplexity``.
        student: the student's, with ``perplexity``, ``kl_to_teacher`` and ``top1_agreement_with_teacher``.
        parities: figures of :func:`edgekd.verify.parity.measure` by the artifact's name.
    """
    first = hop(
        "teacher",
        "student",
        kl_mean=student.get("kl_to_teacher"),
        top1=student.get("top1_agreement_with_teacher"),
        perplexity_from=teacher.get("perplexity"),
        perplexity_to=student.get("perplexity"),
    )
    return [first] + [
        hop(
            "student",
            name,
            kl_mean=parity["kl_mean"],
            kl_ci95=parity["kl_mean_ci95"],
            top1=parity["top1_agreement"],
            perplexity_from=parity["perplexity_reference"],
            perplexity_to=parity["perplexity_artifact"],
        )
        for name, parity in parities.items()
    ]
