"""How much of what a processor can do a training makes use of (MFU, Chowdhery et al. 2022)."""

from __future__ import annotations

import torch

from ..plan import flops_per_s
from .precision import Precision

_GPUS: tuple[tuple[str, float, float], ...] = (
    ("H200", 989.4e12, 66.9e12),
    ("H100 PCIe", 756e12, 51.2e12),
    ("H100 NVL", 835.5e12, 60e12),
    ("H100", 989.4e12, 66.9e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)
"""Operations a second of dense matrix products in bfloat16 with float32 sums, and in float32 without TF32, by NVIDIA's
data sheets (of GeForce: the white papers of Ada and Ampere); the first whose name stands in the device's counts."""


def peak_flops_per_s(device: torch.device, precision: Precision) -> float | None:
    """What a device can do at most: of a CPU measured by matrix products, of a GPU as its maker says; None: unknown."""
    if device.type == "cpu":
        return flops_per_s(precision)
    if device.type != "cuda":
        return None
    return published(torch.cuda.get_device_name(device), precision)


def published(name: str, precision: Precision) -> float | None:
    """Of a GPU by its name; None for one that the table lacks."""
    half = precision == "bfloat16"
    return next((wide if not half else narrow for part, narrow, wide in _GPUS if part in name), None)
