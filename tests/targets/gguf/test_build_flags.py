import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.targets.gguf import build_flags as llama_flags
from edgekd.targets.gguf.build_flags import cmake_args, cpu_features

SAPPHIRE_RAPIDS = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu sse4_2 avx f16c fma avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl avx_vnni avx512_bf16 \
avx512vbmi avx512_vnni amx_bf16 amx_tile amx_int8
vmx flags\t: vnmi preemption_timer
bugs\t\t: spectre_v1
"""
SKYLAKE_SERVER = "flags : sse4_2 avx f16c fma avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl\n"
HASWELL = "flags : sse4_2 avx f16c fma avx2 bmi2\n"
ALDER_LAKE = "flags : sse4_2 avx f16c fma avx2 bmi2 avx_vnni\n"
NEHALEM = "flags : fpu sse4_2\n"
KNIGHTS_LANDING = "flags : sse4_2 avx f16c fma avx2 bmi2 avx512f avx512cd avx512vbmi\n"
RASPBERRY_PI = "Features\t: fp asimd evtstrm crc32 cpuid\n"


def switched_on(cpuinfo: str) -> set[str]:
    args = cmake_args(cpu_features(cpuinfo), "Linux", "x86_64")
    return {arg.removeprefix("-DGGML_").removesuffix("=ON") for arg in args if arg.endswith("=ON")}


AVX2 = {"SSE42", "AVX", "F16C", "FMA", "AVX2", "BMI2"}


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (SAPPHIRE_RAPIDS, AVX2 | {"AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"}),
        (SKYLAKE_SERVER, AVX2 | {"AVX512"}),
        (HASWELL, AVX2),
        (ALDER_LAKE, AVX2 | {"AVX_VNNI"}),
        (NEHALEM, {"SSE42"}),
        (KNIGHTS_LANDING, AVX2),  # AVX-512, but not the parts that llama.cpp's flag lets the compiler use
        ("", set()),
    ],
)
def test_what_the_cpu_has_is_switched_on(cpuinfo: str, expected: set[str]) -> None:
    assert switched_on(cpuinfo) == expected


@pytest.mark.parametrize("cpuinfo", [SAPPHIRE_RAPIDS, NEHALEM])
def test_on_x86_nothing_is_left_to_detection(cpuinfo: str) -> None:
    args = cmake_args(cpu_features(cpuinfo), "Linux", "x86_64")
    assert "-DGGML_NATIVE=OFF" in args
    assert not any("AMX" in arg and arg.endswith("=ON") for arg in args)
    assert {arg.split("=")[0] for arg in args} >= {f"-D{option}" for option in llama_flags._NEEDS}


def test_a_feature_must_be_on_every_core() -> None:
    assert switched_on(ALDER_LAKE + HASWELL) == AVX2


@pytest.mark.parametrize(
    ("system", "machine"), [("Darwin", "arm64"), ("Darwin", "x86_64"), ("Linux", "aarch64"), ("Windows", "AMD64")]
)
def test_elsewhere_llama_cpp_decides(system: str, machine: str) -> None:
    assert cmake_args(cpu_features(RASPBERRY_PI), system, machine) == ["-DLLAVA_BUILD=OFF"]


def headers(folder: Path, **texts: str) -> Path:
    """A folder of headers: cublas, vulkan, spirv."""
    names = {"cublas": "cublas_v2.h", "vulkan": "vulkan/vulkan_structs.hpp", "spirv": "spirv/unified1/spirv.hpp"}
    for name, text in texts.items():
        (folder / names[name]).parent.mkdir(parents=True, exist_ok=True)
        (folder / names[name]).write_text(text)
    return folder


NEW = {"vulkan": "  struct LayerSettingEXT\n", "spirv": ""}
OLD = {"vulkan": "  struct LayerProperties\n", "spirv": ""}
ALL = {"cublas": "", **NEW}
CUDA = ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_COMPILER=/bin/nvcc"]


@pytest.mark.parametrize(
    ("programs", "found", "wanted", "expected"),
    [
        ("", ALL, "auto", []),
        ("glslc", NEW, "auto", ["-DGGML_VULKAN=ON"]),
        ("glslc", OLD, "auto", []),
        ("glslc", {"vulkan": NEW["vulkan"]}, "auto", []),
        ("nvcc nvidia-smi glslc", ALL, "auto", [*CUDA, "-DCMAKE_CUDA_ARCHITECTURES=native"]),
        ("nvcc nvidia-smi glslc", NEW, "auto", ["-DGGML_VULKAN=ON"]),  # a compiler without its libraries
        ("nvcc glslc", ALL, "auto", ["-DGGML_VULKAN=ON"]),  # no driver: what is built would not load
        ("nvcc glslc", ALL, "cuda", CUDA),
        ("nvcc nvidia-smi glslc", ALL, "vulkan", ["-DGGML_VULKAN=ON"]),
        ("nvcc nvidia-smi glslc", ALL, "none", []),
    ],
)
def test_a_gpus_backend_is_built_where_its_toolkit_is_whole(
    programs: str, found: dict[str, str], wanted: str, expected: list[str], tmp_path: Path
) -> None:
    def which(name: str) -> str | None:
        return f"/bin/{name}" if name in programs.split() else None

    include = [tmp_path / "empty", headers(tmp_path / "include", **found)]
    assert llama_flags.gpu_args("Linux", "x86_64", which, include, wanted) == expected


@pytest.mark.parametrize(
    ("machine", "wanted", "expected"),
    [("arm64", "auto", ["-DGGML_METAL=ON"]), ("arm64", "none", []), ("x86_64", "auto", [])],
)
def test_metal_on_apples_own_processors(machine: str, wanted: str, expected: list[str]) -> None:
    assert llama_flags.gpu_args("Darwin", machine, lambda name: None, [], wanted) == expected


@pytest.mark.parametrize(("gpu", "words"), [("opencl", "give auto, none, cuda or vulkan"), ("cuda", "takes nvcc")])
def test_a_gpu_that_cannot_be_built_for_is_a_sentence(gpu: str, words: str) -> None:
    command = [sys.executable, "-I", "-S", Path(llama_flags.__file__), gpu]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nowhere"})
    if not done.returncode:
        pytest.skip("CUDA's toolkit is installed")
    assert words in done.stderr and not done.stdout


def test_it_runs_alone_with_the_standard_library() -> None:
    script = Path(llama_flags.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*llama_flags.host_cmake_args(), *llama_flags.host_gpu_args()]
