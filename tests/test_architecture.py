"""The import direction of the house, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"edgekd": "edgekd", "targets": "edgekd.targets", "benchmarks": "edgekd.benchmarks"}
LAYERS = [
    {"privacy"},
    {"", "errors"},  # the package itself begins with privacy
    {"files", "formats", "matmul", "strict_yaml", "strace", "trial", "tokenizer_file"},
    {"spec", "architecture", "proof"},
    {
        "checkpoint",
        "student",
        "manifest",
        "origin",
        "results",
        "plan",
        "memory",
        "session",
        "conversation",
        "template_process",
    },
    {"generation", "bundle"},
    {"quant"},
    {"distill", "targets", "verify", "benchmarks"},
    {"selftest", "audit"},
    {"evaluation"},
    {"runs", "doctor", "teachers", "peers", "serve"},
    {"console", "cli_options"},
    {"cli_bench"},
    {"cli", "optimum"},
]
# Modules of one layer that may know each other; distill, targets, verify and benchmarks never do.
SIBLINGS = {2, 4}
# A run reads from the first to the last; each knows those before it alone.
RUNS = ["records", "deploy", "fits", "run", "preflight", "verbs", "work", "chain", "runner", "results"]
HEAVY = ["torch", "transformers", "datasets", "llama_cpp", "gguf", "plotly", "jinja2", "onnx", "coremltools"]


def modules() -> dict[str, Path]:
    """Every module of the package, by its installed name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def unit(module: str) -> str:
    """The part of the house a module belongs to: ``edgekd.quant.grid`` is ``quant``; the peers stand by themselves."""
    return "peers" if ".peers" in module else [*module.split("."), ""][1]


def layer(name: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if name in names), -1)


def imports(module: str, path: Path) -> set[str]:
    """The package's modules that a module imports, those for type checking included."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from . import plan` names a module, `from .plan import Cost` an object in one.
            found |= {name if (name := ".".join([*base, a.name])) in MODULES else ".".join(base) for a in node.names}
    return {name for name in found if name in MODULES}


def test_every_module_has_a_place() -> None:
    homeless = {unit(name) for name in MODULES} - set().union(*LAYERS) - {"", "specs"}
    assert not homeless


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    mine = unit(module)
    for name in imports(module, MODULES[module]):
        other = unit(name)
        if other in ("", mine):
            continue
        down = layer(other) < layer(mine) or (layer(other) == layer(mine) and layer(mine) in SIBLINGS)
        assert down, f"{module} must not import {name}"


@pytest.mark.parametrize("place", range(len(RUNS)))
def test_the_flow_of_a_run_goes_down(place: int) -> None:
    module = f"edgekd.runs.{RUNS[place]}"
    later = {"edgekd.runs", *(f"edgekd.runs.{name}" for name in RUNS[place:])}
    assert not imports(module, MODULES[module]) & later


def test_every_module_of_a_run_has_its_place() -> None:
    assert {name for name in MODULES if unit(name) == "runs"} == {"edgekd.runs", *(f"edgekd.runs.{n}" for n in RUNS)}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if unit(name) in ("targets", "benchmarks")))
def test_mapped_folders_import_relatively(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not {name.split(".")[0] for name in names} & set(FOLDERS), f"{module}:{node.lineno}"


def test_this_test_sees_a_forbidden_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from .. import targets\nfrom ..verify.parity import x\nimport edgekd.distill\n")
    assert {unit(name) for name in imports("edgekd.benchmarks.bad", bad)} == {"targets", "verify", "distill"}


def test_nothing_asks_whether_a_source_is_quantized() -> None:
    """A student and a quantized student are read through ``quant.source.Source``."""
    kinds = {"Checkpoint", "QuantizedStudent"}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                named = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node.args[1])}
                assert not named & kinds, f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", ["edgekd.cli", "edgekd.targets", "edgekd.benchmarks"])
def test_the_command_line_is_light(module: str) -> None:
    probe = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
