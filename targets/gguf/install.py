"""How llama.cpp is installed here so that it runs, and why it dies where it was built otherwise."""

from __future__ import annotations

import platform

from .build_flags import cmake_args, host_features

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
    return f'CMAKE_ARGS="{" ".join(cmake_args(set(has), platform.system(), platform.machine()))}"'
