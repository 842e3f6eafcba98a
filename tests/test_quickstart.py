"""The shipped quickstart, end to end on the shipped teacher: everything but the length of the training is real."""

import json
import subprocess
import sys

import pytest
import yaml

from edgekd.spec import builtin_spec
from edgekd.student import Checkpoint, resolve_model

pytest.importorskip("llama_cpp")


def test_the_shipped_teacher_is_whole_and_small_enough():
    folder = resolve_model("builtin:pycode-16m")
    checkpoint = Checkpoint(folder)
    assert 15e6 < checkpoint.parameters < 30e6
    assert {str(checkpoint.tensor(name).dtype) for name in checkpoint} == {"torch.float16"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 60e6
    assert (folder / "README.md").is_file()


@pytest.mark.slow
def test_the_quickstart_runs_to_its_report(tmp_path):
    spec = yaml.safe_load(builtin_spec("quickstart").read_text())
    spec["distill"] |= {"steps": 12, "warmup_steps": 2, "validate_every": 6, "checkpoint_every": 6}
    spec["data"]["max_test_tokens"] = 8192
    spec["bench"]["runs"] = 1
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "edgekd.cli", "run", "quickstart.yaml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    quality = results["quality"]
    assert quality["teacher"]["next_token_accuracy"] > 0.4
    assert quality["student"]["perplexity"] < quality["baseline"]["perplexity"]
    by_recipe = {a["manifest"]["recipe"]: a for a in results["artifacts"]}
    assert list(by_recipe) == spec["targets"][0]["recipes"]
    for artifact in by_recipe.values():
        assert artifact["manifest"]["parity"]["failures"] == []
    sizes = {recipe: artifact["size_bytes"] for recipe, artifact in by_recipe.items()}
    assert sizes["portable-int4"] < sizes["int8"] < sizes["fp16"]
    divergence = {recipe: a["manifest"]["parity"]["kl_mean"] for recipe, a in by_recipe.items()}
    assert divergence["fp16"] < divergence["int8"] < divergence["portable-int4"]
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
