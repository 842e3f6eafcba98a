"""The ledger of quality: what each hop, from teacher to student to grid to artifact, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def hop(name_from: str, name_to: str, figures: Mapping[str, Any], bits_per_weight: float | None) -> dict[str, Any]:
    """One row: KL(from || to) in nats per token, with 95 % intervals; what was not measured is None.

    Args:
        figures: of :func:`edgekd.verify.parity.compare`.
        bits_per_weight: of what stands at the end.
    """
    return {
        "from": name_from,
        "to": name_to,
        "bits_per_weight": bits_per_weight,
        "kl_mean": figures["kl_mean"],
        "kl_ci95": figures["kl_mean_ci95"],
        "top1": figures["top1_agreement"],
        "top1_ci95": figures["top1_agreement_ci95"],
        "perplexity_from": figures["perplexity_reference"],
        "perplexity_to": figures["perplexity_artifact"],
        "perplexity_to_ci95": figures["perplexity_artifact_ci95"],
    }


def ledger(
    student: Mapping[str, Any] | None, grids: Sequence[Mapping[str, Any]], manifests: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every hop of a run: teacher → student → grid, by each method → runtime; and student → what is not on the grid.

    Args:
        student: the figures of the first hop.
        grids: ``recipe``, ``method``, ``bits_per_weight`` and the figures of each hop to the grid.
        manifests: of the artifacts, by name; those without parity figures are left out.
    """
    rows = [hop("teacher", "student", student, None)] if student else []
    for grid in grids:
        rows.append(hop("student", f"{grid['recipe']} {grid['method']}", grid, grid["bits_per_weight"]))
    for name, manifest in manifests.items():
        parity, bits = manifest.get("parity"), manifest.get("bits_per_weight")
        if parity and parity.get("runtime"):
            rows.append(hop(f"{manifest['recipe']} {manifest['method']}", name, parity["runtime"], bits))
        elif parity:
            rows.append(hop("student", name, parity, bits))
    return rows
