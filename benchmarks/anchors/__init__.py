"""Published speeds of devices, each with its source, and what is known of the devices: what predictions rest on.

``published_points.csv``: a row a measurement, as published; ``quality`` A is a vendor's or a repository's own table,
B a single report, C hearsay, which nothing is fitted to. ``devices.csv``: bandwidth and the like; blank where nobody
could source it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

CLASSES = {
    "gpu": "gpu",
    "apple": "apple",
    "cpu": "cpu",
    "igpu": "cpu",
    "phone-cpu": "cpu",
    "phone-npu": "cpu",
    "phone-gpu": "apple",
}


@dataclass(frozen=True)
class Point:
    """A published decode speed."""

    device: str
    chip: str
    """Points of one chip are held out together."""
    device_class: str
    model: str
    read_bytes: float
    """Of weights, for a token."""
    bandwidth_bytes_per_s: float | None
    tokens_per_s: float
    prefill_tokens_per_s: float | None = None
    parameters: float | None = None
    flops_per_s: float | None = None


@cache
def points() -> tuple[Point, ...]:
    """Every published point whose bytes are known, of a device that is in ``devices.csv``."""
    devices = {row["id"]: row for row in _rows("devices.csv")}
    found = []
    for row in _rows("published_points.csv"):
        device = devices.get(row["device_id"])
        known = row["weight_gb_read_per_token"] and row["decode_tokens_per_s"]
        if not device or not known or row["quality"] == "C" or _is_hot(row):
            continue
        found.append(
            Point(
                row["device"],
                device["chip"].partition(" (")[0],
                CLASSES[row["device_class"]],
                row["model"],
                1e9 * float(row["weight_gb_read_per_token"]),
                _scaled(device["bandwidth_gb_s"], 1e9),
                float(row["decode_tokens_per_s"]),
                _number(row["prefill_tokens_per_s"]),
                _scaled(row["parameters_b"], 1e9),
                _scaled(device["fp16_tflops"], 1e12),
            )
        )
    return tuple(found)


def _is_hot(row: dict[str, str]) -> bool:
    return row["device"].endswith("(hot)")


def _rows(name: str) -> list[dict[str, str]]:
    text = (resources.files(__name__) / name).read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


def _number(text: str) -> float | None:
    """The number in a cell; None for one that is blank, or a span."""
    try:
        return float(text)
    except ValueError:
        return None


def _scaled(text: str, scale: float) -> float | None:
    number = _number(text)
    return number and number * scale
