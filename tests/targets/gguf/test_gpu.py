"""Layers on a GPU: what is refused without one, and, where llama.cpp has one, that it computes what the CPU does.

The tests marked vulkan run by ``make test-vulkan``, on Mesa's software GPU where there is no other.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cases import IDS, export_to, logits, mean_kl
from edgekd import doctor, targets
from edgekd.errors import EdgekdError, NoGpu
from edgekd.manifest import Artifact, Traffic
from edgekd.proof import SOFTWARE_GPU
from edgekd.spec import BenchSpec, TargetSpec, Thresholds, VerifySpec
from edgekd.student import resolve_model
from edgekd.targets.gguf.gpu import BACKEND_PATH, Gpu, check_room
from edgekd.targets.gguf.session import load_model, runtime
from edgekd.targets.gguf.target import gpus

export = partial(export_to, "gguf")
TEACHER = resolve_model("builtin:pycode-16m")
LAYERS = 15
"""Of the teacher, the output among them."""
PROMPTS = ("def read_lines(path):\n", "for name in sorted(names):")
FEW = IDS[:12]
"""A software GPU takes a second for ten tokens, and some for each kernel that it meets the first time."""


def without_gpu() -> None:
    if gpus():
        pytest.skip("this llama.cpp has a GPU")


@pytest.fixture
def gpu() -> Gpu:
    if not gpus():
        pytest.skip("this llama.cpp has no GPU: run make test-vulkan")
    return gpus()[0]


def asking(artifact: Artifact, **details: int) -> Artifact:
    """The artifact, as its manifest would be with these details."""
    changed = {**(artifact.manifest.details or {}), **details}
    return dataclasses.replace(artifact, manifest=artifact.manifest.model_copy(update={"details": changed}))


def test_layers_without_a_gpu_are_refused_before_any_work(tmp_path: Path, tiny_student: Path) -> None:
    without_gpu()
    with pytest.raises(NoGpu, match=r"gpu_layers 2: this llama\.cpp computes on the CPU alone\. .*llama\.cpp"):
        export(tiny_student, "fp16", tmp_path / "never", gpu_layers=2)
    artifact = export(tiny_student, "fp16", tmp_path / "out")
    assert artifact.manifest.details["gpu_layers"] == 0 and targets.gpu(artifact) is None
    with pytest.raises(NoGpu, match=r"out: gpu_layers 2: this llama\.cpp computes on the CPU alone"):
        targets.open_artifact(asking(artifact, gpu_layers=2), threads=1)
    with pytest.raises(NoGpu, match="CPU alone"):
        targets.describe_gpus("gguf")
    check = doctor.check_gpu(doctor.self_test_of("gguf"))
    assert (check.name, check.status) == ("gpu gguf", "not_here") and "CPU alone" in check.detail and check.remedy


def test_an_artifact_of_an_earlier_version_opens(tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "fp16", tmp_path / "out")
    for details in (None, {"tokenizer": artifact.manifest.details["tokenizer"]}):
        older = artifact.manifest.model_copy(update={"details": details})
        targets.open_artifact(dataclasses.replace(artifact, manifest=older), threads=1).close()


def test_layers_that_a_gpu_has_no_memory_for() -> None:
    two = [Gpu("A", "CUDA", 1, 3 * 10**9, 0), Gpu("B", "CUDA", 1, 10**9, 0)]
    check_room(two, 20, 40, 8 * 10**9, "x")
    with pytest.raises(EdgekdError) as refused:
        check_room(two, 30, 40, 8 * 10**9, "x: gpu_layers 30")
    assert refused.value.cause == (
        "x: gpu_layers 30: 30 of 40 layers and their cache take 6.00 GB, and A + B (CUDA) has 4.00 GB free."
    )
    assert refused.value.remedy == "Export with gpu_layers 20, or with a smaller context."


@pytest.mark.parametrize(
    ("name", "software"),
    [
        ("llvmpipe (LLVM 15.0.6, 256 bits)", True),
        ("SwiftShader Device (Subzero)", True),
        ("NVIDIA GeForce RTX 3060", False),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", False),
        ("Apple M3", False),
    ],
)
def test_a_software_gpu_is_known_by_its_name(name: str, software: bool) -> None:
    assert Gpu(name, "Vulkan", 1, 0, 0).software is software


def test_a_backend_that_does_not_load_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "libggml-none.so").write_bytes(b"not a library")
    code = "from edgekd.targets.gguf.session import runtime; runtime()"
    environment = os.environ | {BACKEND_PATH: str(tmp_path / "libggml-none.so")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("edgekd.errors.EdgekdError: GGML_BACKEND_PATH: llama.cpp does not load the backend ")
    assert "libggml-none.so" in last and "make vulkan" in last


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def tokens(artifact: Artifact, prompt: str) -> list[int]:
    session = targets.open_artifact(artifact, threads=1)
    try:
        return list(session.generate(session.tokenize(prompt), 12))
    finally:
        session.close()


@pytest.mark.vulkan
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp16", "portable-int4"])
def test_a_gpu_goes_on_as_the_cpu_does(recipe: str, gpu: Gpu, tmp_path: Path) -> None:
    """A trained model, all of its layers: its greedy tokens."""
    cpu = export(TEACHER, recipe, tmp_path / "cpu")
    made = export(TEACHER, recipe, tmp_path / "gpu", gpu_layers=999)
    assert made.manifest.details["gpu_layers"] == made.manifest.details["layers"] == LAYERS
    assert targets.gpu(made) == f"{LAYERS} layers on {gpu.name} ({gpu.backend})" and targets.gpu(cpu) is None
    assert made.manifest.files["model.gguf"] == cpu.manifest.files["model.gguf"]
    for prompt in PROMPTS:
        expected = tokens(cpu, prompt)
        assert tokens(made, prompt) == expected and len(expected) == 12


@pytest.mark.vulkan
@pytest.mark.parametrize("recipe", ["fp16", "int8", "portable-int4"])
def test_the_logits_are_the_cpus_whatever_layers_are_on_a_gpu(
    recipe: str, gpu: Gpu, tmp_path: Path, tiny_student: Path
) -> None:
    made = [export(tiny_student, recipe, tmp_path / str(layers), gpu_layers=layers) for layers in range(4)]
    expected, *found = [logits(artifact, FEW) for artifact in made]
    # On the CPU the inputs of quantized matrices are rounded to 8 bits; a GPU's kernels may round otherwise.
    for actual in found:
        assert mean_kl(expected, actual) < (1e-4 if recipe == "fp16" else 0.02)


@pytest.mark.vulkan
def test_without_layers_a_gpu_takes_no_part(gpu: Gpu, tmp_path: Path, tiny_student: Path) -> None:
    """llama.cpp by itself would have all layers there, or at no layers the products of long prompts."""
    path = export(tiny_student, "fp16", tmp_path / "out").main_file
    # It has no C name: the only one that tells what a model is on.
    devices = runtime().llama_cpp._lib._Z21llama_model_n_devicesPK11llama_model
    for given, expected in (((), 0), ([gpu], 1)):
        model = load_model(path, gpus=given, gpu_layers=len(given))
        try:
            assert devices(ctypes.c_void_p(model)) == expected
        finally:
            runtime().llama_model_free(model)


@pytest.mark.vulkan
def test_the_gates_are_passed_and_a_software_gpu_is_not_timed(gpu: Gpu, tmp_path: Path, tiny_student: Path) -> None:
    from edgekd.runs.verbs import bench_artifact, verify_artifact
    from edgekd.verify.parity import judge

    artifact = export(tiny_student, "fp16", tmp_path / "out", gpu_layers=3)
    windows, spec = np.array([FEW, IDS[12:24]]), VerifySpec(windows=2, context=12, greedy_tokens=4)
    parity = verify_artifact(artifact, tiny_student, windows, spec, lambda share, note: None)
    assert judge(parity, parity.tokens, Thresholds(kl_mean_max=1e-3, top1_min=0.9)) == []
    if not gpu.software:
        pytest.skip("a real GPU is timed")
    assert parity.stand_in.endswith(SOFTWARE_GPU)
    with pytest.raises(EdgekdError, match="a software GPU: correctness only, and no speed is told"):
        bench_artifact(artifact, BenchSpec(prompt_tokens=[8], decode_tokens=2, runs=1), lambda share, note: None)
    check = doctor.check_gpu(doctor.self_test_of("gguf"))
    assert check.status == "ok" and check.detail.endswith(SOFTWARE_GPU) and gpu.name in check.detail


@pytest.mark.vulkan
def test_a_run_times_no_software_gpu(gpu: Gpu) -> None:
    asked = TargetSpec(target="gguf", recipes=["fp16"], gpu_layers=3).own_keys
    assert (targets.stand_in("gguf", asked) is not None) is gpu.software
    assert targets.stand_in("gguf", {}) is None


@pytest.mark.vulkan
def test_more_than_the_gpus_memory_is_refused_when_it_is_opened(gpu: Gpu, tmp_path: Path, tiny_student: Path) -> None:
    artifact = export(tiny_student, "fp16", tmp_path / "out", gpu_layers=3)
    large = artifact.manifest.model_copy(update={"traffic": Traffic(weight_bytes=10**13, kv_bytes_per_position=0)})
    with pytest.raises(EdgekdError, match=r"3 of 3 layers and their cache take 10000\.00 GB.*gpu_layers 0"):
        targets.open_artifact(dataclasses.replace(artifact, manifest=large), threads=1)
