"""The GPUs that llama.cpp computes on: those that the build knows, and those of a backend that was built beside it.

An artifact says how many of its layers go there (``gpu_layers``); without, all is computed on the CPU, whatever the
build could do.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...errors import EdgekdError, NoGpu
from .install import how_to_get_a_gpu

BACKEND_PATH = "GGML_BACKEND_PATH"
"""Environment variable of llama.cpp: the file of a backend that was built apart, of the same version."""
_DISCRETE, _INTEGRATED = 1, 2  # ggml-backend.h: ggml_backend_dev_type
_SOFTWARE = ("llvmpipe", "lavapipe", "softpipe", "swiftshader", "microsoft basic render")


@dataclass(frozen=True)
class Gpu:
    """A device of a llama.cpp backend."""

    name: str
    """As its driver calls it."""
    backend: str
    """CUDA, Vulkan, Metal …"""
    kind: int
    free_bytes: int
    handle: int
    """``ggml_backend_dev_t``."""

    @property
    def software(self) -> bool:
        """Whether the CPU does its work: it proves what is computed, and nothing of how fast."""
        return self.name.lower().startswith(_SOFTWARE)


@cache
def _library(name: str) -> ctypes.CDLL:
    """One of llama.cpp's libraries, the very one that is loaded already."""
    from llama_cpp import llama_cpp as bindings
    from llama_cpp._ctypes_extensions import load_shared_library

    return load_shared_library(name, bindings._base_path)


def _call(library: str, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_library(library), name)
    function.restype, function.argtypes = result, None
    return function(*arguments)


def load_backend() -> bool:
    """Load the backend that ``GGML_BACKEND_PATH`` names, if it does; false where llama.cpp refuses it."""
    path = os.environ.get(BACKEND_PATH)
    return not path or bool(_call("ggml", "ggml_backend_load", ctypes.c_void_p, path.encode()))


def gpus() -> list[Gpu]:
    """Those that layers go to: of one backend, and integrated ones only where there is no other, as llama.cpp does."""
    count = _call("ggml", "ggml_backend_dev_count", ctypes.c_size_t)
    handles = [_call("ggml", "ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t(i)) for i in range(count)]
    found = [gpu for gpu in map(_describe, handles) if gpu.kind in (_DISCRETE, _INTEGRATED)]
    if not found:
        return []
    first = min(found, key=lambda gpu: gpu.kind)
    return [gpu for gpu in found if (gpu.kind, gpu.backend) == (first.kind, first.backend)]


def _describe(handle: int) -> Gpu:
    device, free, total = ctypes.c_void_p(handle), ctypes.c_size_t(), ctypes.c_size_t()
    _call("ggml-base", "ggml_backend_dev_memory", None, device, ctypes.byref(free), ctypes.byref(total))
    registry = ctypes.c_void_p(_call("ggml-base", "ggml_backend_dev_backend_reg", ctypes.c_void_p, device))
    name, backend = (
        _call("ggml-base", function, ctypes.c_char_p, of).decode("utf-8", "replace")
        for function, of in (("ggml_backend_dev_description", device), ("ggml_backend_reg_name", registry))
    )
    kind = _call("ggml-base", "ggml_backend_dev_type", ctypes.c_int, device)
    return Gpu(name, backend, kind, free.value, handle)


def need_gpus(found: Sequence[Gpu], what: str) -> None:
    """Refuse what wants a GPU where llama.cpp has none.

    Raises:
        NoGpu: it has none; how to get one.
    """
    if not found:
        raise NoGpu(f"{what}: this llama.cpp computes on the CPU alone.", how_to_get_a_gpu())


def check_room(found: Sequence[Gpu], layers: int, of: int, whole_bytes: int, what: str) -> None:
    """Refuse layers that the GPUs have no memory for.

    Args:
        of: how many layers there are, the output among them.
        whole_bytes: of all weights and of the cache of the whole context.

    Raises:
        EdgekdError: names both sizes, and how many layers there is memory for.
    """
    free, wanted = sum(gpu.free_bytes for gpu in found), whole_bytes * layers // of
    if wanted > free:
        raise EdgekdError(
            f"{what}: {layers} of {of} layers and their cache take {wanted / 1e9:.2f} GB, and {names(found)} has "
            f"{free / 1e9:.2f} GB free.",
            f"Export with gpu_layers {free * of // whole_bytes}, or with a smaller context.",
        )


def names(found: Sequence[Gpu]) -> str:
    """For people: what the devices are called, and the backend that drives them."""
    return f"{' + '.join(gpu.name for gpu in found)} ({found[0].backend})"
