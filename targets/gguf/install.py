"""How llama.cpp is installed here so that it runs, and why it dies where it was built otherwise."""

from __future__ import annotations

import platform

from .build_flags import cmake_args, host_features, host_gpu_args

VERSION = "0.3.36"
"""Of llama-cpp-python."""


def install(again: bool, features: frozenset[str] | None = None) -> str:
    """The command that installs the extra, or replaces what is installed. A plain one builds natively, which crashes.

    Args:
        features: of the CPU, as ``/proc/cpuinfo`` names them; default: this one's.
    """
    return f'{_build(features)} pip install {"--force-reinstall --no-cache-dir " * again}"edgekd[gguf]"'


def rebuild(features: frozenset[str] | None = None) -> str:
    """The command that builds llama-cpp-python for this CPU, AMX left off."""
    return (
        f"{_build(features)} pip install --force-reinstall --no-binary llama-cpp-python "
        f"llama-cpp-python=={VERSION} --no-deps --no-cache-dir"
    )


def how_to_get_a_gpu() -> str:
    """What to do where llama.cpp has no GPU's backend: build it, once the toolkit of one is installed."""
    if host_gpu_args():
        return f"Build llama.cpp for the GPU: {rebuild()}"
    return (
        "Install CUDA's nvcc and cuBLAS, or glslc with headers of Vulkan and SPIR-V as new as Debian 13's, and build "
        "llama.cpp again, by make setup or the command that edgekd doctor then names; or export with gpu_layers 0."
    )


def explain_crash(signal: str, features: frozenset[str] | None = None) -> tuple[str, str] | None:
    """Why llama.cpp died of a signal, and the remedy; None for a signal that does not come of the build."""
    if signal not in ("SIGILL", "SIGSEGV", "SIGBUS"):
        return None
    has = host_features() if features is None else features
    if "amx_tile" in has:
        cause = (
            f"llama.cpp died of {signal} in its first prefill: it was built natively, and the AMX kernels it then "
            "uses do not run here, although the CPU advertises AMX"
        )
    elif signal == "SIGILL":
        cause = "llama.cpp died of SIGILL: it was built for a CPU with instructions that this one lacks"
    else:
        cause = f"llama.cpp died of {signal} in its first prefill: the build does not suit this machine"
    return cause, rebuild(features)


def _build(features: frozenset[str] | None) -> str:
    has = host_features() if features is None else features
    flags = [*cmake_args(set(has), platform.system(), platform.machine()), *host_gpu_args()]
    return f'CMAKE_ARGS="{" ".join(flags)}"'
