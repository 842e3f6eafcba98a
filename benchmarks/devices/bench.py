"""``edgekd bench --device``: artifacts and a runner go to a device, run there, and their figures come back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from ...errors import EdgekdError
from ...files import file_sha256
from ...manifest import Artifact
from ...proof import Host
from ...spec import BenchSpec
from ..children import in_child
from ..definitions import real_text
from ..harness import Measured, bench_at, check_context
from ..measure import OpenSession, curve_lengths
from . import others
from .device import Lost, ask, connect
from .llama import LlamaSite, Pushed, prompt_text
from .place import Place, check_program, place_on, read_program
from .readings import FACTS, facts_of, host_of

RUNNERS = {"edgekd-llama": "gguf", "llama-bench": "gguf", "llama_main": "executorch"}
"""Name of the program → target that it runs."""
_OTHERS = {"llama-bench": others.llama_bench, "llama_main": others.llama_main}
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Runner:
    """A program for the device."""

    path: Path
    name: str
    sha256: str


def choose_runner(path: Path, artifacts: Sequence[Artifact]) -> Runner:
    """The runner in a file, which is known by its name.

    Raises:
        EdgekdError: it is none, or it does not run an artifact.
    """
    name = next((name for name in RUNNERS if path.name.startswith(name)), None)
    if name is None:
        raise EdgekdError(
            f"--runner {path}: is none of {', '.join(RUNNERS)}.", "docs/benchmarking.md says how to build one."
        )
    read_program(path)
    for artifact in artifacts:
        if artifact.manifest.target != RUNNERS[name]:
            fitting = [runner for runner, target in RUNNERS.items() if target == artifact.manifest.target]
            raise EdgekdError(
                f"--runner {path} does not run {artifact.folder}, of the target {artifact.manifest.target}.",
                f"Take {' or '.join(fitting)}." if fitting else "Its app measures it: docs/benchmarking.md.",
            )
    return Runner(path, name, file_sha256(path))


def bench_on_device(
    device_name: str,
    path: Path,
    open_session: OpenSession,
    artifacts: Sequence[Artifact],
    spec: BenchSpec,
    on_run: Told | None = None,
) -> list[Measured]:
    """Measure artifacts on a device.

    Args:
        device_name: as ``device.connect`` takes it.
        path: the runner.
        open_session: opens an artifact here, for prompts of as many tokens as are asked for.

    Returns:
        For each artifact its benchmark, or why it has none.

    Raises:
        EdgekdError: the device, the runner or an artifact cannot be used, or the device went away.
    """
    with _prepared(device_name, path, open_session, artifacts, spec) as (on, texts):
        measured = _measure(on, artifacts, texts, spec, on_run)
        for found in measured:
            if isinstance(found, Lost):  # then nothing more comes of the others either
                raise found
        return measured


@contextmanager
def site_on(
    device_name: str, path: Path, open_session: OpenSession, artifacts: Sequence[Artifact], spec: BenchSpec
) -> Iterator[LlamaSite]:
    """The device with artifacts and ``edgekd-llama`` on it; see ``bench_on_device``."""
    if choose_runner(path, artifacts).name in _OTHERS:
        raise EdgekdError(f"--runner {path}: two artifacts are compared by edgekd-llama alone.", "Build it.")
    with _prepared(device_name, path, open_session, artifacts, spec) as (on, texts):
        yield _site(on, artifacts, texts)


@contextmanager
def _prepared(
    device_name: str, path: Path, open_session: OpenSession, artifacts: Sequence[Artifact], spec: BenchSpec
) -> Iterator[tuple[_On, list[dict[int, str]]]]:
    """The runner on a device that has room for the artifacts, and their prompts."""
    for artifact in artifacts:
        check_context(artifact, spec)
    runner = choose_runner(path, artifacts)
    device = connect(device_name)
    facts = facts_of(ask(device, FACTS))
    check_program(
        path, read_program(path), facts, lambda name: "yes" in ask(device, f"[ -e {quote(name)} ] && echo yes; :")
    )
    texts = [_texts(open_session, artifact, spec, runner) for artifact in artifacts]
    with tempfile.TemporaryDirectory() as scratch, place_on(device, Path(scratch)) as place:
        place.check_room(sum(_needed(artifact, runner) for artifact in artifacts) + path.stat().st_size)
        program = place.push(path, runner.name, runner.sha256)
        ask(device, f"chmod 700 {quote(program)}")
        host = host_of(facts, device.name, f"sha256 {runner.sha256[:12]}")
        threads = spec.threads or host.cores or host.logical_cores or 1
        yield _On(place, program, runner, host, threads, Path(scratch)), texts


@dataclass(frozen=True)
class _On:
    """A device with a runner on it."""

    place: Place
    program: str
    runner: Runner
    host: Host
    threads: int
    scratch: Path


def _measure(
    on: _On, artifacts: Sequence[Artifact], texts: Sequence[Mapping[int, str]], spec: BenchSpec, on_run: Told | None
) -> list[Measured]:
    if on.runner.name in _OTHERS:
        return [_other(on, artifact, text, spec, on_run) for artifact, text in zip(artifacts, texts, strict=True)]
    return bench_at(_site(on, artifacts, texts), artifacts, spec, on_run=on_run)


def _needed(artifact: Artifact, runner: Runner) -> int:
    return sum(artifact.path(name).stat().st_size for name in _files(artifact, runner))


def _files(artifact: Artifact, runner: Runner) -> list[str]:
    """What the runner opens."""
    return [artifact.manifest.main_file, *(["tokenizer.json"] if runner.name == "llama_main" else [])]


def _texts(open_session: OpenSession, artifact: Artifact, spec: BenchSpec, runner: Runner) -> dict[int, str]:
    """Prompts by their length; none where the runner reads no text."""
    if runner.name == "llama-bench":
        return {}
    lengths = set(spec.prompt_tokens)
    if runner.name == "edgekd-llama" and spec.curve_seconds:
        lengths |= set(curve_lengths(artifact.manifest.contract.context_length))
    what = f"the choice of prompts for {artifact.manifest.name}"
    texts: dict[int, str] = in_child(what, prompts, open_session, artifact, sorted(lengths))
    return texts


def prompts(open_session: OpenSession, artifact: Artifact, lengths: Sequence[int]) -> dict[int, str]:
    """English text of each number of tokens."""
    session = open_session(artifact)
    try:
        return {n: real_text(session, n) for n in lengths}
    finally:
        session.close()


def _push(on: _On, artifact: Artifact, texts: Mapping[int, str]) -> tuple[str, dict[str, str], dict[int, str]]:
    """Send an artifact and its prompts; the beginning of all their names there, and their paths."""
    contract, hashes = artifact.manifest.contract, artifact.manifest.files
    prefix = hashes[artifact.manifest.main_file][:8]
    files = {
        name: on.place.push(artifact.path(name), f"{prefix}-{_plain(name)}", hashes[name])
        for name in _files(artifact, on.runner)
    }
    sent = {
        n: on.place.write(
            prompt_text(contract, text) if on.runner.name == "edgekd-llama" else text, f"{prefix}-{n}", on.scratch
        )
        for n, text in texts.items()
    }
    return prefix, files, sent


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _site(on: _On, artifacts: Sequence[Artifact], texts: Sequence[Mapping[int, str]]) -> LlamaSite:
    pushed = {}
    for artifact, text in zip(artifacts, texts, strict=True):
        prefix, files, sent = _push(on, artifact, text)
        contract = artifact.manifest.contract
        ids = " ".join(map(str, sorted((contract.special_ids or {}).values())))
        special = on.place.write(ids, f"{prefix}-special", on.scratch)
        main = files[artifact.manifest.main_file]
        pushed[str(artifact.folder)] = Pushed(main, special, sent, text, contract.context_length)
    version = on.place.run("the start of the runner", [on.program, "--version"], every_s=0.05).output.strip()
    host = on.host.model_copy(update={"runtime_build": f"{on.runner.name}, {version}, {on.host.runtime_build}"})
    return LlamaSite(on.place, on.program, pushed, host, on.threads)


def _other(on: _On, artifact: Artifact, texts: Mapping[int, str], spec: BenchSpec, on_run: Told | None) -> Measured:
    _, files, sent = _push(on, artifact, texts)
    job = others.Job(on.place, on.program, files, sent, artifact, spec, on.threads, on.host)
    try:
        return _OTHERS[on.runner.name](job, on_run)
    except EdgekdError as error:
        return error
