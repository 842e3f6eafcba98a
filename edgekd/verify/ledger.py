"""The ledger of quality: what each hop, from teacher to student to quantized student to artifact, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..manifest import Manifest
from ..proof import Comparison, Hop, QuantizedComparison


def hop(start: str, end: str, compared: Comparison, bits_per_weight: float | None) -> Hop:
    """One row; what was not measured is None.

    Args:
        bits_per_weight: of what stands at the end.
    """
    return Hop(
        start=start,
        end=end,
        bits_per_weight=bits_per_weight,
        kl_mean=compared.kl_mean,
        kl_ci95=compared.kl_mean_ci95,
        top1=compared.top1_agreement,
        top1_ci95=compared.top1_agreement_ci95,
        perplexity_from=compared.perplexity_reference,
        perplexity_to=compared.perplexity_artifact,
        perplexity_to_ci95=compared.perplexity_artifact_ci95,
    )


def ledger(
    student: Comparison | None, quantized: Sequence[QuantizedComparison], manifests: Mapping[str, Manifest]
) -> list[Hop]:
    """Every hop of a run: teacher → student → quantized student, by each method → runtime; and student → what has none.

    Args:
        student: of the first hop.
        quantized: of each hop to a quantized student.
        manifests: of the artifacts, by name; those without parity figures are left out.
    """
    rows = [hop("teacher", "student", student, None)] if student else []
    rows += [hop("student", f"{made.recipe} {made.method}", made, made.bits_per_weight) for made in quantized]
    for name, manifest in manifests.items():
        parity, bits = manifest.parity, manifest.bits_per_weight
        if parity and parity.runtime:
            rows.append(hop(f"{manifest.recipe} {manifest.method}", name, parity.runtime, bits))
        elif parity:
            rows.append(hop("student", name, parity, bits))
    return rows
