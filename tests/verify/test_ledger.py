"""The ledger's rows."""

from __future__ import annotations

from edgekd.verify.ledger import hop, ledger


def test_ledger_goes_from_the_teacher_to_every_artifact():
    parity = {
        "kl_mean": 0.02, "kl_mean_ci95": [0.01, 0.03], "top1_agreement": 0.97,
        "perplexity_reference": 5.0, "perplexity_artifact": 5.1,
    }  # fmt: skip
    student = {"perplexity": 4.9, "kl_to_teacher": 0.3, "top1_agreement_with_teacher": 0.8}
    rows = ledger({"perplexity": 4.0}, student, {"q4_0": parity, "f16": parity | {"kl_mean": None}})
    assert [(row["from"], row["to"], row["kl_mean"]) for row in rows] == [
        ("teacher", "student", 0.3),
        ("student", "q4_0", 0.02),
        ("student", "f16", None),
    ]
    assert rows[0] == hop("teacher", "student", kl_mean=0.3, top1=0.8, perplexity_from=4.0, perplexity_to=4.9)
    assert rows[0]["kl_ci95"] is None
    assert (rows[1]["perplexity_from"], rows[1]["perplexity_to"]) == (5.0, 5.1)


def test_what_was_not_measured_stays_null():
    assert ledger({}, {}, {})[0]["kl_mean"] is None
