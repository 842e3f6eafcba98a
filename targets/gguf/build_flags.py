"""CMake flags that make llama.cpp fast on this CPU and safe: run before anything is installed.

    CMAKE_ARGS="$(python3 -I targets/gguf/build_flags.py)" pip install llama-cpp-python

On x86 a native build is refused (``GGML_NATIVE=OFF``) and every instruction set is named by itself, because a native
build also takes AMX, and some virtual machines advertise AMX yet kill the process that uses it (SIGILL). Other CPUs
keep llama.cpp's own detection. Standard library only.
"""

from __future__ import annotations

import platform
from pathlib import Path

_NEEDS = {
    "GGML_SSE42": {"sse4_2"},
    "GGML_AVX": {"avx"},
    "GGML_AVX2": {"avx2"},
    "GGML_FMA": {"fma"},
    "GGML_F16C": {"f16c"},
    "GGML_BMI2": {"bmi2"},
    "GGML_AVX_VNNI": {"avx_vnni"},
    "GGML_AVX512": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "GGML_AVX512_VBMI": {"avx512vbmi"},
    "GGML_AVX512_VNNI": {"avx512_vnni"},
    "GGML_AVX512_BF16": {"avx512_bf16"},
}
"""CMake option → the names in /proc/cpuinfo of all that its compiler flags let the compiler use."""


def cpu_features(cpuinfo: str) -> set[str]:
    """The features that every processor in the text of ``/proc/cpuinfo`` has."""
    flags = [set(line.partition(":")[2].split()) for line in cpuinfo.splitlines() if line.startswith("flags")]
    return set.intersection(*flags) if flags else set()


def cmake_args(features: set[str], system: str, machine: str) -> list[str]:
    """Flags for a CPU.

    Args:
        features: of ``cpu_features``.
        system, machine: as ``platform.system()`` and ``platform.machine()`` say.
    """
    # The multimodal library is a quarter of the build, and nothing here reads pictures.
    common = ["-DLLAVA_BUILD=OFF"]
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        return common  # on a Mac llama-cpp-python's own build settles Metal and the CPU
    has = {option: needs <= features for option, needs in _NEEDS.items()}
    for option in has:
        if option.startswith("GGML_AVX512_"):
            has[option] &= has["GGML_AVX512"]
    has["GGML_AVX_VNNI"] &= not has["GGML_AVX512"]  # the 512-bit kernels come first, and older compilers lack it
    return [*common, "-DGGML_NATIVE=OFF", *(f"-D{option}={'ON' if on else 'OFF'}" for option, on in has.items())]


def host_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The features of the CPU this runs on; none where the system has no such file."""
    return frozenset(cpu_features(cpuinfo.read_text("utf-8", "replace"))) if cpuinfo.is_file() else frozenset()


def host_cmake_args() -> list[str]:
    """Flags for the CPU this runs on."""
    return cmake_args(set(host_features()), platform.system(), platform.machine())


if __name__ == "__main__":
    print(" ".join(host_cmake_args()))
