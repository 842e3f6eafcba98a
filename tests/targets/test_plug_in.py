"""A target of another distribution: one package and one entry point, and every part of edgekd knows it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cases import IDS, export_to, reference
from edgekd import doctor, targets
from edgekd.errors import SpecError
from edgekd.spec import TargetSpec, load_spec

TOY = Path(__file__).parent / "toy" / "edgekd_toy"
SPEC = """
name: tiny
teacher: {{model: {teacher}}}
student: {{init: cut, layers: 2}}
data: {{source: text, paths: ["text/*.txt"], context: 32, validation_share: 0.2, test_share: 0.2}}
distill: {{steps: 2, batch_size: 2, warmup_steps: 1, baseline: false}}
targets: [{{target: toy, recipes: [fp16], colour: blue}}]
verify: {{windows: 2, context: 32, greedy_tokens: 4}}
bench: {{prompt_tokens: [8], decode_tokens: 2, runs: 1, threads: 1}}
"""


def install(site: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution ``edgekd-toy`` whose module is the target ``toy``, for this process and its children."""
    info = site / "edgekd_toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgekd-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[edgekd.targets]\ntoy = {module}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))
    return site


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the toy's package lies."""
    site = install(tmp_path / "site", "edgekd_toy", monkeypatch)
    shutil.copytree(TOY, site / "edgekd_toy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.delitem(sys.modules, "edgekd_toy", raising=False)
    return site / "edgekd_toy"


def edgekd(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_of_the_toy(toy: Path, tmp_path: Path, tiny_teacher: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n\n\n" * 20)
    (tmp_path / "spec.yaml").write_text(SPEC.format(teacher=tiny_teacher))
    done = edgekd("run", "spec.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (manifest,) = [artifact["manifest"] for artifact in results["artifacts"]]
    assert (manifest["target"], manifest["details"]) == ("toy", {"colour": "blue"})
    assert manifest["parity"]["kl_mean"] < 1e-6 and manifest["parity"]["top1_agreement"] == 1
    assert manifest["benchmark"]["decode_tokens_per_s"]["value"] > 0
    assert results["versions"]["numpy"] and "gguf" not in results["versions"]
    assert "Toy Runtime" in (tmp_path / "run" / "report.html").read_text("utf-8")
    (command,) = [line for line in results["commands"] if "export" in line]
    assert "--target toy" in command and "--option 'colour=\"blue\"'" in command
    words = ["run/student", "again", "--target", "toy", "--recipe", "fp16", "--option", "colour=blue"]
    assert edgekd("export", *words, cwd=tmp_path).returncode == 0
    again = json.loads((tmp_path / "again" / "manifest.json").read_text())
    assert (again["files"], again["details"]) == (manifest["files"], manifest["details"])


def test_its_keys_are_keys_of_the_spec(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.format(teacher="x"))
    assert load_spec(path, model=targets.spec_model()).targets[0].own_keys == {"colour": "blue"}
    path.write_text(SPEC.format(teacher="x").replace("colour", "color"))
    with pytest.raises(SpecError, match=r"spec\.yaml: unknown key 'targets\.0\.color'; did you mean 'colour'\?"):
        load_spec(path, model=targets.spec_model())
    assert targets.spec_model().model_json_schema()["$defs"]["toy"]["properties"]["colour"]["default"] == "red"
    assert "executorch, toy" in " ".join(edgekd("export", "--help", cwd=tmp_path).stdout.replace("│", "").split())


def test_doctor_tries_it(toy: Path) -> None:
    assert doctor.check_runtime(doctor.self_test_of("toy")) == doctor.Check("toy", "ok", "NumPy multiplies")
    assert doctor.self_test_of("toy").install(False) == 'pip install "edgekd-toy"'


def test_its_code_is_its_package_and_what_targets_share(toy: Path) -> None:
    files = targets.code_of("toy")
    assert toy / "__init__.py" in files
    assert {path.parent.name for path in files} == {"edgekd_toy", "targets", "shared"}


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import no_such_runtime", "toy does not load: ModuleNotFoundError: No module named 'no_such_runtime'"),
        ("TITLE = 'Toy'\nEXTRA = ''", "toy is not a target of this version: it has no PACKAGES, Options, check"),
    ],
)
def test_a_plug_in_that_is_broken_breaks_nothing_else(
    code: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, "broken_toy", monkeypatch)
    (tmp_path / "broken_toy.py").write_text(code)
    monkeypatch.delitem(sys.modules, "broken_toy", raising=False)
    with pytest.raises(SpecError, match=cause):
        targets.check({}, tmp_path, TargetSpec(target="toy", recipes=["fp16"]))
    assert "toy" not in targets.spec_model().model_json_schema()["$defs"] and cause in caplog.text
    (check,) = doctor._target("toy")
    assert check.status == "broken" and cause in check.detail and "uninstall it" in check.remedy


def test_the_toy_is_what_it_says(toy: Path, tmp_path: Path, tiny_student: Path) -> None:
    session = targets.open_artifact(export_to("toy", tiny_student, "fp16", tmp_path / "out"), threads=1)
    assert np.abs(session.prefill(IDS, all_logits=True) - reference(tiny_student, IDS)).max() < 1e-3
    session.close()
