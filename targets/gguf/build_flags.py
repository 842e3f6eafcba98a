"""CMake flags that make llama.cpp fast on this CPU and GPU, and safe: run before anything is installed.

    CMAKE_ARGS="$(python3 -I targets/gguf/build_flags.py [auto|none|cuda|vulkan])" pip install llama-cpp-python

On x86 a native build is refused (``GGML_NATIVE=OFF``) and every instruction set is named by itself, because a native
build also takes AMX, and some virtual machines advertise AMX yet kill the process that uses it (SIGILL). Other CPUs
keep llama.cpp's own detection. A GPU's backend is built where its toolkit is installed, CUDA's before Vulkan's.
Standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
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


def gpu_args(
    system: str, machine: str, which: Callable[[str], str | None], include: Sequence[Path], wanted: str = "auto"
) -> list[str]:
    """Flags for a GPU's backend; none where no toolkit is found.

    Args:
        which: the path of a program, as ``shutil.which``.
        include: folders of C headers.
        wanted: ``cuda``, ``vulkan``, ``none``, or ``auto``: what is found first. CUDA's library does not load where
            there is no driver, and is built there only when it is asked for by name.
    """
    if system == "Darwin":
        return ["-DGGML_METAL=ON"] if machine == "arm64" and wanted == "auto" else []
    nvcc, driver = which("nvcc"), which("nvidia-smi")
    if nvcc and (wanted == "cuda" or (wanted == "auto" and driver)) and _has(include, "cublas_v2.h"):
        # For the GPUs that are here: for all that there are it takes hours.
        here = ["-DCMAKE_CUDA_ARCHITECTURES=native"] if driver else []
        return ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", *here]
    # Vulkan's headers of 1.3.239, in Debian 12, are too old for this llama.cpp: they lack this name.
    headers = {"vulkan/vulkan_structs.hpp": "struct LayerSettingEXT", "spirv/unified1/spirv.hpp": ""}
    whole = which("glslc") and all(_has(include, *header) for header in headers.items())
    return ["-DGGML_VULKAN=ON"] if wanted in ("auto", "vulkan") and whole else []


def _has(include: Sequence[Path], header: str, text: str = "") -> bool:
    """Whether a header is in one of some folders, and a text in it."""
    return any((f := folder / header).is_file() and text in f.read_text("utf-8", "replace") for folder in include)


def host_gpu_args(wanted: str = "auto") -> list[str]:
    """Flags for the toolkits that are installed here."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    roots = map(Path, filter(None, ("/usr", "/usr/local", "/usr/local/cuda", os.environ.get("VULKAN_SDK"))))
    return gpu_args(
        platform.system(),
        platform.machine(),
        lambda program: shutil.which(program, path=path),
        [root / "include" for root in roots],
        wanted,
    )


_TOOLKITS = {"cuda": "nvcc and cuBLAS", "vulkan": "glslc, and new enough headers of Vulkan and SPIR-V"}


def main(gpu: str = "auto") -> None:
    """Print the flags.

    Args:
        gpu: as ``gpu_args`` takes it.
    """
    if gpu not in ("auto", "none", *_TOOLKITS):
        sys.exit(f"GPU is {gpu}: give auto, none, cuda or vulkan.")
    found = host_gpu_args(gpu)
    if gpu in _TOOLKITS and not found:
        sys.exit(f"GPU is {gpu}, which takes {_TOOLKITS[gpu]}: install them, or give none.")
    print(" ".join([*host_cmake_args(), *found]))


if __name__ == "__main__":
    main(*sys.argv[1:2])
