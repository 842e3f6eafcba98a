"""The privacy audit of a tiny artifact of every target, run by its own runtime or what stands in for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cases import export_to
from edgekd import files, privacy
from edgekd.audit import audit, find_tools, watch
from edgekd.cli import app
from edgekd.errors import EdgekdError
from edgekd.manifest import MANIFEST, Artifact, load_artifact

TOOLS = find_tools()
BLIND = [text for text in TOOLS.not_checked if "strace" in text]
RUNTIMES = {"gguf": "llama_cpp", "onnx": "onnxruntime", "coreml": "coremltools", "executorch": "executorch"}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Callable[[str], Artifact]:
    """The fp16 artifact of a target, made once."""
    folder, made = tmp_path_factory.mktemp("audit"), {}

    def make_one(target: str) -> Artifact:
        pytest.importorskip(RUNTIMES[target])
        if target not in made:
            made[target] = export_to(target, tiny_student, "fp16", folder / target)
        return made[target]

    return make_one


@pytest.mark.skipif(bool(BLIND), reason=" ".join(BLIND))
@pytest.mark.slow
@pytest.mark.parametrize("target", RUNTIMES)
def test_an_artifact_opens_no_socket_and_leaves_nothing(target: str, make: Callable[[str], Artifact]) -> None:
    artifact = make(target)
    seen = audit(artifact)
    assert seen.failures == []
    assert not [words for words in seen.sockets if "AF_INET" in words]
    assert seen.opened["artifact"] >= 1 + len(artifact.manifest.files), "all is hashed: the trace is whole"
    assert seen.status == ("not checked" if TOOLS.not_checked else "passed")


@pytest.mark.skipif(bool(BLIND), reason=" ".join(BLIND))
def test_the_audit_sees_what_onnxruntime_does_when_nobody_silences_it(make: Callable[[str], Artifact]) -> None:
    names = [*privacy._SILENCE, *privacy._OFFLINE]
    code = (
        f"import os, sys, edgekd\nfor name in {names}: os.environ.pop(name, None)\n"
        "from pathlib import Path; from edgekd.audit import exercise; exercise(Path(sys.argv[1]))"
    )
    artifact = make("onnx")
    seen = watch([sys.executable, "-P", "-c", code, str(artifact.folder)], artifact, TOOLS)
    assert seen.status == "failed"
    assert "write: ~/.cache/Microsoft" in seen.failures


@pytest.mark.skipif(bool(BLIND), reason=" ".join(BLIND))
def test_a_session_of_genai_is_silent_too(make: Callable[[str], Artifact]) -> None:
    pytest.importorskip("onnxruntime_genai")
    code = """
import sys, edgekd, onnxruntime_genai as genai
model = genai.Model(sys.argv[1])
params = genai.GeneratorParams(model)
params.set_search_options(max_length=8)
generator = genai.Generator(model, params)
generator.append_tokens(genai.Tokenizer(model).encode("def f"))
generator.generate_next_token()
"""
    artifact = make("onnx")
    seen = watch([sys.executable, "-P", "-c", code, str(artifact.folder)], artifact, TOOLS)
    assert (seen.failures, seen.sockets, seen.written) == ([], [], [])


def test_the_command_records_its_verdict(make: Callable[[str], Artifact]) -> None:
    folder = make("gguf").folder
    done = CliRunner().invoke(app, ["audit", str(folder), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    recorded = load_artifact(folder).manifest.audit
    assert recorded is not None and recorded.model_dump() == said
    assert said["status"] == ("not checked" if TOOLS.not_checked else "passed")


def test_a_folder_that_cannot_be_written_is_audited_all_the_same(
    make: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise EdgekdError(f"{folder} cannot be written.")

    artifact = make("gguf")
    before = (artifact.folder / MANIFEST).read_bytes()
    monkeypatch.setattr(files, "check_writable", refuse)  # root can write everywhere
    done = CliRunner().invoke(app, ["audit", str(artifact.folder)], catch_exceptions=False)
    assert done.exit_code == 0 and "not recorded" in done.stderr
    assert (artifact.folder / MANIFEST).read_bytes() == before
