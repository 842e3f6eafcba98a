"""Tasks: files of one's own, those that come with edgekd, and the harness's by name.

A task file is YAML as the harness reads it, with data beside it. It is read as plain values: what would run somebody's
Python, a tag, is refused by its line, and what its templates can reach is what jinja2's sandbox lets them.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..files import Json, write_text
from ..strict_yaml import read_yaml

_LOADERS = ("json", "csv", "text", "parquet")
_FOLDER = Path(str(files(__package__))) / "tasks"
_CODE = ("class", "python_task", "include")
LINES = "python-lines"


def builtin_tasks() -> list[str]:
    """The names of those that come with edgekd."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_tasks(names: Sequence[str], scratch: Path) -> Json:
    """Tasks as the harness holds them.

    Args:
        names: files, or names.
        scratch: a folder for what they are made of, until they have been run.

    Raises:
        SpecError: no such task, or none that can be run from this machine's own files.
    """
    from lm_eval.tasks import TaskManager

    _sandbox()
    given: list[Any] = [_own(name, scratch) or name for name in names]
    named = [name for name in given if isinstance(name, str)]
    manager = TaskManager(include_defaults=bool(named))
    for name in named:
        if name not in manager.all_tasks:
            known = [*builtin_tasks(), *manager.all_tasks]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"edgekd has {', '.join(builtin_tasks())}."
            raise SpecError(f"--tasks: {name!r:.200} is no file and no known task; {hint}")
    try:
        return dict(manager.load(given))
    except Exception as error:  # the harness and datasets raise whatever they like
        words = " ".join(str(error).split())[:300]
        remedy = "Tasks by name need their data in the Hugging Face cache; see docs/evaluating.md." if named else ""
        raise SpecError(f"--tasks {', '.join(names)}: {type(error).__name__}: {words}.", remedy) from error


def _own(name: str, scratch: Path) -> Json | None:
    """The task of a file, or one that comes with edgekd; None: some other name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_task(path, scratch)
    if name not in builtin_tasks():
        return None
    return read_task(_FOLDER / f"{name}.yaml", scratch, _write_lines(scratch) if name == LINES else None)


def read_task(path: Path, scratch: Path, data: dict[str, Path] | None = None) -> Json:
    """A task file's values, its data found beside it.

    Args:
        data: files that stand for names of ``data_files``.

    Raises:
        SpecError: it is no task, runs code, or names data that is not a file here.
    """
    config = read_yaml(path, SpecError)
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise SpecError(f"{path}: it is no task: it has no key 'task' with a name.", "See docs/evaluating.md.")
    if code := next((key for key in _CODE if key in config), None):
        raise SpecError(f"{path}: key {code!r}: what it names is not read.", "Put the whole task into this file.")
    if config.get("dataset_path") not in _LOADERS:
        raise SpecError(
            f"{path}: dataset_path is {config.get('dataset_path')!r:.100}, not one of {', '.join(_LOADERS)}.",
            "Name files beside it by dataset_kwargs.data_files.",
        )
    options = config.get("dataset_kwargs")
    named = options.get("data_files") if isinstance(options, dict) else None
    if isinstance(named, str):
        named = {config.get("test_split") or "train": named}
    if not isinstance(named, dict) or not named:
        raise SpecError(f"{path}: dataset_kwargs.data_files names no file of each split.", "Write {test: FILE.jsonl}.")
    found = {split: str(_data_file(path, name, data or {})) for split, name in named.items()}
    return {**config, "dataset_kwargs": {"data_files": found, "cache_dir": str(scratch / "datasets")}}


def _data_file(path: Path, name: object, data: dict[str, Path]) -> Path:
    found = data.get(str(name)) or path.parent / str(name)
    if not isinstance(name, str) or "://" in name or not found.is_file():
        raise SpecError(f"{path}: dataset_kwargs.data_files: {name!r:.200} is no file beside it.", "Name one.")
    return found.resolve()


def _sandbox() -> None:
    """Have the harness render tasks' templates in jinja2's sandbox: by its own environment they could run anything."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        safe = ImmutableSandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
        safe.filters.update(utils.env.filters)
        utils.env = safe


# --- the task that is made of the standard library --------------------------------------------------------------------

_BEFORE, _OTHERS, _QUESTIONS = 12, 3, 200


def _write_lines(scratch: Path) -> dict[str, Path]:
    """Questions of the standard library's test split: which line comes next?"""
    from ..distill.corpus import stdlib_corpus

    path = scratch / f"{LINES}.jsonl"
    questions = _chosen(list(_lines(stdlib_corpus().test)))
    write_text(path, "".join(json.dumps(question) + "\n" for question in questions))
    return {f"{LINES}.jsonl": path}


def _chosen(questions: list[Json]) -> list[Json]:
    """As many of them as are asked, evenly spread."""
    step = max(1, len(questions) // _QUESTIONS)
    return questions[::step][:_QUESTIONS]


def _lines(documents: Sequence[str]) -> Iterator[Json]:
    """A line of code, the lines before it, and other lines of the same file that are indented as deep."""
    rng = random.Random(0)
    for document in documents:
        lines = document.splitlines()
        for at in range(_BEFORE, len(lines), _BEFORE):
            others = [line for line in lines if _is_like(line, lines[at]) and line != lines[at]]
            if len(lines[at].strip()) < 12 or len(set(others)) < _OTHERS:
                continue
            choices = [lines[at], *rng.sample(sorted(set(others)), _OTHERS)]
            rng.shuffle(choices)
            context = "\n".join(lines[at - _BEFORE : at]) + "\n"
            yield {"context": context, "choices": choices, "label": choices.index(lines[at])}


def _is_like(line: str, other: str) -> bool:
    def depth(text: str) -> int:
        return len(text) - len(text.lstrip())

    return depth(line) == depth(other) and len(line.strip()) >= 12
