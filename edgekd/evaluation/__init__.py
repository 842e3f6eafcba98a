"""Artifacts at tasks, by lm-evaluation-harness: ``edgekd eval``."""
