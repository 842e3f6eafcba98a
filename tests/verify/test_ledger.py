"""The ledger's rows."""

from __future__ import annotations

from edgekd.manifest import Contract, Manifest
from edgekd.proof import Comparison, Parity, QuantizedComparison
from edgekd.verify.ledger import ledger

HOP = Comparison(
    windows=2,
    window_tokens=8,
    unusable_positions=0,
    kl_mean=0.02,
    kl_mean_ci95=[0.01, 0.03],
    top1_agreement=0.97,
    top1_agreement_ci95=[0.96, 0.98],
    perplexity_reference=5.0,
    perplexity_artifact=5.1,
    perplexity_artifact_ci95=[4.9, 5.3],
)
CONTRACT = Contract(context_length=8, vocab_size=4, bos_id=None, eos_ids=[], add_bos=False, chat_template=None)


def hop(kl_mean: float | None) -> Comparison:
    return HOP.model_copy(update={"kl_mean": kl_mean})


def manifest(recipe: str, method: str | None, bits_per_weight: float, parity: Parity | None) -> Manifest:
    return Manifest(
        name="n",
        target="gguf",
        recipe=recipe,
        runtime="llama.cpp",
        main_file="m",
        files={},
        student_digest="d",
        method=method,
        parameters=7,
        bits_per_weight=bits_per_weight,
        contract=CONTRACT,
        versions={},
        parity=parity,
    )


def test_ledger_goes_from_the_teacher_over_the_quantized_student_to_every_artifact():
    packed = Parity(**HOP.model_dump(), runtime=hop(0.001))
    manifests = {
        "gguf-portable-int4": manifest("portable-int4", "qad", 4.7, packed),
        "gguf-fp16": manifest("fp16", None, 16.0, Parity(**hop(None).model_dump())),
        "gguf-int8": manifest("int8", "rtn", 8.5, None),
    }
    quantized = [
        QuantizedComparison(recipe="portable-int4", method=method, bits_per_weight=4.6, **HOP.model_dump())
        for method in ("rtn", "qad")
    ]
    rows = [row.model_dump() for row in ledger(hop(0.3), quantized, manifests)]
    assert [(row["from"], row["to"], row["bits_per_weight"], row["kl_mean"]) for row in rows] == [
        ("teacher", "student", None, 0.3),
        ("student", "portable-int4 rtn", 4.6, 0.02),
        ("student", "portable-int4 qad", 4.6, 0.02),
        ("portable-int4 qad", "gguf-portable-int4", 4.7, 0.001),
        ("student", "gguf-fp16", 16.0, None),
    ]
    assert rows[0] | {"from": "", "to": ""} == {
        "from": "",
        "to": "",
        "bits_per_weight": None,
        "kl_mean": 0.3,
        "kl_ci95": [0.01, 0.03],
        "top1": 0.97,
        "top1_ci95": [0.96, 0.98],
        "perplexity_from": 5.0,
        "perplexity_to": 5.1,
        "perplexity_to_ci95": [4.9, 5.3],
    }


def test_what_was_not_measured_has_no_row():
    assert ledger(None, [], {}) == []
