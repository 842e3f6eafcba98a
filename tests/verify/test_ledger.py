"""The ledger's rows."""

from __future__ import annotations

from edgekd.verify.ledger import ledger

HOP = {
    "kl_mean": 0.02,
    "kl_mean_ci95": [0.01, 0.03],
    "top1_agreement": 0.97,
    "top1_agreement_ci95": [0.96, 0.98],
    "perplexity_reference": 5.0,
    "perplexity_artifact": 5.1,
    "perplexity_artifact_ci95": [4.9, 5.3],
}


def test_ledger_goes_from_the_teacher_over_the_grid_to_every_artifact():
    grid = HOP | {"recipe": "portable-int4", "bits_per_weight": 4.6}
    runtime = {"recipe": "portable-int4", "method": "qad", "bits_per_weight": 4.7}
    manifests = {
        "gguf-portable-int4": runtime | {"parity": HOP | {"runtime": HOP | {"kl_mean": 0.001}}},
        "gguf-fp16": {"recipe": "fp16", "method": None, "bits_per_weight": 16.0, "parity": HOP | {"kl_mean": None}},
        "gguf-int8": {"recipe": "int8", "method": "rtn", "bits_per_weight": 8.5, "parity": None},
    }
    rows = ledger(HOP | {"kl_mean": 0.3}, [grid | {"method": method} for method in ("rtn", "qad")], manifests)
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
