"""The version of each algorithm whose outcome a run keeps.

A finished stage is done again when the version of its algorithm is another, and not when a comment is edited: a student
may have trained for a week. Raise a number whenever the outcome changes; ``tests/distill/test_versions.py`` does a
little of each algorithm and compares what comes out with what came out before.
"""

TEXT = 2
"""From documents to windows: reading, splitting, tokenizing, packing."""

CUT = 1
"""What a cut student keeps of the teacher."""

STUDENT = 1
"""The first weights: cut from the teacher, or fresh."""

CACHE = 1
"""What of a teacher stands in its cache."""

TRAINING = 1
"""The loop: order of windows, losses, optimizer, which weights are kept."""

EVALUATION = 1
"""What is measured of a student."""

QAD = 3
"""Quantization-aware distillation, from the start at GPTQ's integers to those it writes."""
