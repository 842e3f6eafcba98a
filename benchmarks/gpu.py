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
        for process in module.nvmlDeviceGetComputeRunningProcesses(module.nvmlDeviceGetHandleByIndex(index)):
            if process.pid == (pid or os.getpid()) and process.usedGpuMemory:
                held[index] = int(process.usedGpuMemory)
    return held
