"""NVIDIA's management library, where it is installed: what a process holds on a GPU."""

from __future__ import annotations

import importlib
import os
from typing import Any


class NoCounter(Exception):
    """Why something cannot be read here, and what to do."""


def nvml() -> Any:
    """NVML, ready.

    Raises:
        NoCounter: nvidia-ml-py or the driver is not there.
    """
    try:
        module = importlib.import_module("pynvml")
    except ModuleNotFoundError as error:
        raise NoCounter("nvidia-ml-py is not installed") from error
    try:
        module.nvmlInit()
    except Exception as error:  # NVMLError, of the module that may be any version
        raise NoCounter(f"no NVIDIA driver: {error}") from error
    return module


def vram_bytes(pid: int | None = None) -> dict[int, int]:
    """Memory that a process holds on each GPU; empty where it holds none, or nothing tells."""
    try:
        module = nvml()
    except NoCounter:
        return {}
    held = {}
    for index in range(module.nvmlDeviceGetCount()):
        device = module.nvmlDeviceGetHandleByIndex(index)
        # What computes through Vulkan stands among the processes that draw.
        processes = [
            *module.nvmlDeviceGetComputeRunningProcesses(device),
            *module.nvmlDeviceGetGraphicsRunningProcesses(device),
        ]
        own = [p.usedGpuMemory for p in processes if p.pid == (pid or os.getpid()) and p.usedGpuMemory]
        if own:
            held[index] = int(max(own))
    return held
