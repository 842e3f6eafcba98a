"""Figures of the house, counted from the source: ``make metrics``. One line a figure; ``--json`` prints an object."""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("edgekd", "targets", "benchmarks")
LONG = 60


def sources() -> dict[Path, str]:
    """Every module of the package, without the tests."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {path: path.read_text("utf-8") for path in paths}


def functions(trees: dict[Path, ast.Module]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method."""
    for tree in trees.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines(pattern: str, texts: dict[Path, str]) -> int:
    """Lines that a pattern is found in."""
    return sum(bool(re.search(pattern, line)) for text in texts.values() for line in text.splitlines())


def files(pattern: str, texts: dict[Path, str]) -> int:
    """Modules that a pattern is found in."""
    return sum(bool(re.search(pattern, text)) for text in texts.values())


def module_name(path: Path) -> str:
    """A module's name as it is installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("edgekd", *parts[parts[0] == "edgekd" :])).removesuffix(".__init__")


def imports(name: str, is_package: bool, tree: ast.Module, names: set[str]) -> set[str]:
    """The package's modules that one imports when it is imported: not inside functions, not for type checking."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            whole = ".".join(filter(None, base))
            found |= {f"{whole}.{alias.name}" if f"{whole}.{alias.name}" in names else whole for alias in node.names}
    return (found & names) - {name}


def cycles(trees: dict[Path, ast.Module]) -> int:
    """Modules that import themselves by way of others."""
    names = {module_name(path) for path in trees}
    graph = {module_name(p): imports(module_name(p), p.stem == "__init__", tree, names) for p, tree in trees.items()}

    def reaches(start: str) -> bool:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += graph[name]
        return start in seen

    return sum(map(reaches, graph))


def documented(trees: dict[Path, ast.Module]) -> float:
    """Share of public functions, methods and classes with a docstring."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [
        node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    return sum(ast.get_docstring(node) is not None for node in public) / len(public)


def measure() -> dict[str, float]:
    """Every figure by its name."""
    texts = sources()
    trees = {path: ast.parse(text) for path, text in texts.items()}
    tests = {path: path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py")}
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions(trees)]
    return {
        "modules": len(texts),
        "lines of code": sum(len(text.splitlines()) for text in texts.values()),
        "lines of tests": sum(len(text.splitlines()) for text in tests.values()),
        "functions": len(lengths),
        "median lines of a function": statistics.median(lengths),
        f"functions above {LONG} lines": sum(length > LONG for length in lengths),
        "lines of the longest module": max(len(text.splitlines()) for text in texts.values()),
        "modules in an import cycle": cycles(trees),
        "documented public names, %": round(100 * documented(trees), 1),
        "lines that ask for a model by its name": lines(r"arch\.name\s*(==|!=|in )", texts),
        "modules that read config.json's keys": files(r"[\"'](num_hidden_layers|num_attention_heads)[\"']", texts),
        "modules with a default of head_dim": files(r"head_dim[\"']?\)? or ", texts),
        "modules that name every target": sum(
            all(re.search(rf"[\"'{{]{name}[\"'}}:]", text) for name in ("gguf", "onnx", "coreml", "executorch"))
            for text in texts.values()
        ),
        "lines that say dict[str, Any]": lines(r"dict\[str, Any\]|Mapping\[str, Any\]", texts),
        "isinstance of Checkpoint or QuantizedStudent": lines(r"isinstance\([^)]*(Checkpoint|QuantizedStudent)", texts),
        "modules that rename or replace files": files(
            r"os\.(replace|rename)\(|\.(replace|rename)\((out|path|final|partial)\w*\)", texts
        ),
        "lines the formatter leaves alone": lines(r"fmt: (skip|off)", texts | tests),
    }


if __name__ == "__main__":
    figures = measure()
    if "--json" in sys.argv:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<42} {value:>8g}")
