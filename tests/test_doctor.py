"""doctor: crashes are recognised by real children that die, and the self-tests run in real runtimes."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edgekd import doctor, selftest, targets
from edgekd.targets.gguf import install as llama_cpp
from edgekd.targets.gguf.build_flags import host_features
from edgekd.targets.gguf.install import explain_crash
from edgekd.targets.gguf.selftest import write_random_gguf

TESTS = [*doctor.OWN_TESTS, *map(doctor.self_test_of, targets.names())]
GGUF = dataclasses.replace(doctor.self_test_of("gguf"), explain_crash=lambda name: explain_crash(name, AMX))
AMX = frozenset({"sse4_2", "avx", "avx2", "fma", "f16c", "bmi2", "amx_tile", "amx_int8", "amx_bf16"})


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def dies_of(name: str) -> list[str]:
    return python(f"import os, signal; os.kill(os.getpid(), signal.{name})")


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV"])
def test_a_crash_of_llama_cpp_on_an_amx_cpu_is_laid_to_the_native_build(name: str) -> None:
    check = doctor.check_runtime(GGUF, dies_of(name))
    assert check.status == "broken"
    assert name in check.detail and "AMX" in check.detail and "built natively" in check.detail
    assert "pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python==0.3.36" in check.remedy
    assert "--no-deps --no-cache-dir" in check.remedy


def test_a_crash_of_llama_cpp_elsewhere_is_not_laid_to_amx() -> None:
    plain = dataclasses.replace(GGUF, explain_crash=lambda name: explain_crash(name, AMX - {"amx_tile"}))
    assert "instructions that this one lacks" in doctor.check_runtime(plain, dies_of("SIGILL")).detail
    assert "AMX" not in doctor.check_runtime(plain, dies_of("SIGSEGV")).detail


def test_a_crash_of_another_runtime_does_not_ask_to_rebuild_llama_cpp() -> None:
    onnx = doctor.self_test_of("onnx")
    check = doctor.check_runtime(onnx, dies_of("SIGILL"))
    assert (check.status, "SIGILL" in check.detail, "llama" in check.remedy) == ("broken", True, False)
    assert "memory" in doctor.check_runtime(onnx, dies_of("SIGKILL")).detail


@pytest.mark.skipif(sys.platform != "linux", reason="the flags are those of Linux on x86-64")
def test_the_rebuild_command_leaves_amx_and_native_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp.platform, "machine", lambda: "x86_64")
    command = llama_cpp.rebuild(AMX)
    assert command.startswith('CMAKE_ARGS="') and "-DGGML_NATIVE=OFF" in command and "-DGGML_AVX2=ON" in command
    assert "GGML_AMX" not in command


def test_a_child_that_answers_is_believed() -> None:
    check = doctor.check_runtime(GGUF, python("""print('noise'); print('{"ok": "it ran"}')"""))
    assert check == doctor.Check("gguf", "ok", "it ran")


def test_an_answer_before_a_crash_is_not_believed() -> None:
    code = """import os, signal; print('{"ok": "it ran"}', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"""
    assert doctor.check_runtime(GGUF, python(code)).status == "broken"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("""print('{"failed": "RuntimeError: wrong logits"}')""", "RuntimeError: wrong logits"),
        ("import sys; sys.exit('no such library')", "exit code 1: no such library"),
        ("print('not JSON')", "exit code 0: no message"),
        ("print('[1]')", "exit code 0: no message"),
    ],
)
def test_a_child_that_fails_is_broken_and_says_why(code: str, expected: str) -> None:
    check = doctor.check_runtime(GGUF, python(code))
    assert check.status == "broken" and expected in check.detail and check.remedy


def test_a_child_that_hangs_is_stopped() -> None:
    check = doctor.check_runtime(dataclasses.replace(GGUF, timeout_s=0.5), python("import time; time.sleep(60)"))
    assert check.status == "broken" and "more than" in check.detail


def test_a_child_that_cannot_start_is_broken() -> None:
    assert doctor.check_runtime(GGUF, ["/no/such/program"]).status == "broken"


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_a_runtime_that_is_not_installed_names_its_extra(test: doctor.SelfTest) -> None:
    lacking = dataclasses.replace(test, packages=(*test.packages, "no-such-package"))
    check = doctor.check_runtime(lacking)
    extra = "train" if test in doctor.OWN_TESTS else test.name
    assert check.status == "missing" and "no-such-package" in check.detail and f"edgekd[{extra}]" in check.remedy


def test_a_package_that_only_the_self_test_misses_is_missing_too() -> None:
    check = doctor.check_runtime(GGUF, python("""print('{"missing": "gguf"}')"""))
    assert (check.status, check.detail) == ("missing", "not installed: gguf") and "edgekd[gguf]" in check.remedy


def test_a_child_tells_what_is_not_installed_from_what_does_not_load() -> None:
    absent, lacks_a_part = ModuleNotFoundError(name="torchao"), ModuleNotFoundError(name="torchao.ops")
    assert selftest.absent_module(absent) == "torchao"
    assert selftest.absent_module(lacks_a_part) is selftest.absent_module(ImportError(name="torchao")) is None


def test_every_extra_named_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {targets.load_target(name).EXTRA for name in targets.TARGETS} | {"train"} <= set(extras)
    assert {test.name for test in doctor.OWN_TESTS} == set(selftest.TESTS)
    pinned = [line for line in extras["gguf"] if line.startswith("llama-cpp-python==")]
    assert pinned == [f"llama-cpp-python=={llama_cpp.VERSION}"]


@pytest.mark.parametrize("name", targets.TARGETS)
def test_an_extra_brings_the_targets_packages(name: str) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    target = targets.load_target(name)
    brought = {re.split("[<>=]", line)[0] for line in project["optional-dependencies"][target.EXTRA]}
    assert set(target.PACKAGES) - {"torch"} <= brought  # executorch brings torch


def test_the_gguf_self_test_passes_in_a_child() -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama_cpp is not installed")
    check = doctor.check_runtime(GGUF)
    assert check.status == "ok" and "agree" in check.detail


@pytest.mark.slow
def test_the_coreml_self_test_passes_in_a_child() -> None:
    pytest.importorskip("coremltools")
    check = doctor.check_runtime(doctor.self_test_of("coreml"))
    assert check.status == "ok" and "agrees" in check.detail
    assert ("interpreter" in check.detail) == (sys.platform != "darwin")


def test_the_random_gguf_holds_tensors_large_enough_for_the_matrix_kernels(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_random_gguf(tmp_path / "a.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q4_0 and list(down.shape) == [512, 256]


def test_cpu_flags_are_those_of_every_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu avx2 amx_tile\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n"
    )
    assert host_features(tmp_path / "cpuinfo") == {"fpu", "avx2"}
    assert host_features(tmp_path / "none") == frozenset()


def test_the_machine_checks_say_something() -> None:
    checks = [doctor._python(), doctor._compiler(), doctor._ram(), doctor._disk(), doctor._rapl(), doctor._nvml()]
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.detail
        assert check.remedy or check.status in ("ok", "not_here")


def test_doctor_imports_nothing_heavy() -> None:
    code = (
        "import sys, edgekd.doctor, edgekd.selftest;"
        "print([m for m in ('torch', 'transformers', 'llama_cpp', 'gguf', 'numpy', 'onnx') if m in sys.modules])"
    )
    assert subprocess.run(python(code), capture_output=True, text=True, check=True).stdout.strip() == "[]"
