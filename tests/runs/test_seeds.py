"""A run with several seeds: each trains a student and a baseline, and the report tells the spread."""

import json

import pytest
from test_cli import edgekd, refused

pytest.importorskip("llama_cpp")

SPEC = """
name: tiny
teacher: {{model: {teacher}}}
student: {{init: config, architecture: llama, hidden_size: 32, intermediate_size: 48, layers: 1, heads: 2, kv_heads: 1}}
data: {{source: text, paths: [text/*.txt], context: 32, validation_share: 0.2, test_share: 0.2}}
distill: {{steps: 4, batch_size: 2, warmup_steps: 1, validate_every: 2}}
quantize: {{method: rtn}}
targets: [{{target: gguf, recipes: [fp16]}}]
verify: {{windows: 1, context: 32, greedy_tokens: 2}}
bench: {{prompt_tokens: [8], decode_tokens: 2, runs: 1, cold_runs: 0, curve_seconds: 0}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    (folder / "spec.yaml").write_text(SPEC.format(teacher=tiny_teacher))
    return folder


def left(project, *options):
    """What ``edgekd plan`` says is to do."""
    told = json.loads(edgekd("plan", "spec.yaml", *options, "--json", cwd=project).stdout)
    return {stage["stage"] for stage in told["stages"] if not stage["done"]}


def test_seeds_are_trained_and_the_report_tells_their_spread(project):
    done = edgekd("run", "spec.yaml", "--seeds", "3,4", "--report-only", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [row["seed"] for row in results["seeds"]] == [3, 4]
    first, second = results["seeds"]
    assert first["student"] == results["quality"]["student"] and first["baseline"] == results["quality"]["baseline"]
    for model in ("student", "baseline"):
        assert first[model]["perplexity"] != second[model]["perplexity"]
        assert first[model]["tokens"] == second[model]["tokens"], "the same test text"
    assert results["commands"][0] == "edgekd run spec.yaml --seeds 3,4 --out runs/tiny"
    page = (project / "runs" / "tiny" / "report.html").read_text("utf-8")
    assert "Over 2 seeds" in page and "One seed only" not in page
    assert not list((project / "runs" / "tiny").glob(".edgekd/*/checkpoint-*")), "trainings leave no checkpoints"

    assert left(project, "--seeds", "3,4") == left(project, "--seed", "3") == set()
    assert left(project, "--seeds", "3,5,4") == {"student, seed 5", "baseline, seed 5", "quality, seed 5"}


@pytest.mark.parametrize("seeds", ["", "a", "0,", "0,-1", "0;1", "1.5", "0,99999999999", "0,0", "0,00", "\x00", "٣"])
def test_seeds_that_are_none(project, seeds):
    refused(edgekd("run", "spec.yaml", "--seeds", seeds, cwd=project), "--seeds")


def test_two_ways_to_say_the_seed(project):
    refused(edgekd("run", "spec.yaml", "--seeds", "0,1", "--seed", "2", cwd=project), "--seed and --seeds")
