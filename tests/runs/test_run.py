"""Whole runs on a tiny random teacher, through the command line: skipping, resuming, gates."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("llama_cpp")

SPEC = """
name: tiny
teacher: {{model: {teacher}}}
student: {{init: cut, layers: 2}}
data: {{source: text, paths: [text/*.txt], context: 32, validation_share: 0.2, test_share: 0.2}}
distill: {{precision: float32, steps: {steps}, batch_size: 4, warmup_steps: 1, validate_every: 10, checkpoint_every: 5}}
quantize:
  method: qad
  compare: [rtn, gptq]
  calibration_windows: 8
  qad: {{precision: float32, steps: 80, batch_size: 4, warmup_steps: 1, validate_every: 10, checkpoint_every: 5}}
targets: [{{target: gguf, recipes: [fp16, portable-int4], context: 96}}]
verify: {{windows: 2, context: 32, greedy_tokens: 4, thresholds: {{fp16: {{kl_mean_max: {gate}}}}}}}
bench: {{prompt_tokens: [8], decode_tokens: 4, runs: 1, cold_runs: 0, curve_seconds: 0}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("project")
    (folder / "text").mkdir()
    for i in range(60):
        lines = (f"def f{i}_{j}(x, y={j}):\n    return x * {i + j} + y\n" for j in range(12))
        (folder / "text" / f"{i}.txt").write_text("".join(lines))
    write_spec(folder, tiny_teacher)
    return folder


def write_spec(folder, teacher, steps=90, gate=0.01):
    (folder / "spec.yaml").write_text(SPEC.format(teacher=teacher, steps=steps, gate=gate))


def start(project, *arguments):
    command = [sys.executable, "-m", "edgekd.cli", "run", "spec.yaml", *arguments]
    return subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def weights(run):
    files = {name: run / name / "model.safetensors" for name in ("student", "baseline")}
    files["qad"] = run / "quantized" / "portable-int4-qad" / "grid.json"
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@pytest.fixture(scope="module")
def whole(project):
    """An uninterrupted run."""
    code, out, err = finish(start(project, "--out", "whole", "--json"))
    assert code == 0, err
    return project / "whole", json.loads(out), err


def test_a_run_leaves_verified_artifacts_and_a_report(whole):
    run, results, _ = whole
    assert (run / "report.html").stat().st_size > 10_000
    assert {a["manifest"]["recipe"] for a in results["artifacts"]} == {"fp16", "portable-int4"}
    for artifact in results["artifacts"]:
        manifest = artifact["manifest"]
        assert manifest["parity"]["failures"] == []
        assert manifest["parity"]["tokens"]["strings"] >= 200
        assert manifest["benchmark"]["decode_tokens_per_s"]["value"] > 0
    for name in ("student", "baseline"):
        assert [point["step"] for point in results["training"][name]] == [*range(10, 91, 10)]
        assert all(point["validation_perplexity"] > 1 for point in results["training"][name])
    hops = [(row["from"], row["to"]) for row in results["ledger"]]
    assert hops == [
        ("teacher", "student"),
        ("student", "portable-int4 rtn"),
        ("student", "portable-int4 gptq"),
        ("student", "portable-int4 qad"),
        ("student", "gguf-fp16"),
        ("portable-int4 qad", "gguf-portable-int4"),
    ]
    for row in results["ledger"][1:]:
        assert row["kl_ci95"][0] <= row["kl_mean"] <= row["kl_ci95"][1]
    assert results["quality"]["student"]["tokens"] == results["quality"]["baseline"]["tokens"] > 0


def test_the_commands_it_tells_make_its_artifacts(project, whole):
    _, results, _ = whole
    run, *exports = map(shlex.split, results["commands"])
    assert run == ["edgekd", "run", "spec.yaml", "--out", "whole"]
    for number, (words, told) in enumerate(zip(exports, results["artifacts"], strict=True)):
        words = [f"again-{number}" if word == "OUT" else word for word in words[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "edgekd.cli", *words, "--json"], cwd=project, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        for key in ("target", "recipe", "contract", "grid_digest", "student_digest", "bits_per_weight"):
            assert made[key] == told["manifest"][key]
        assert made["contract"]["context_length"] == 96


def test_bench_prints_its_table_alone_or_one_line_of_json(whole, tmp_path):
    shutil.copytree(whole[0] / "artifacts" / "gguf-fp16", tmp_path / "model")
    command = [sys.executable, "-m", "edgekd.cli", "bench", "model", "--prompt-tokens", "8", "--decode-tokens", "2"]
    command += ["--runs", "1"]
    table, line = (
        subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for more in ([], ["--json"])
    )
    assert "Decode, tok/s" in table and "{" not in table and len(table) < 4000
    assert line.count("\n") == 1 and json.loads(line)["decode_tokens_per_s"]["value"] > 0


def test_a_second_run_skips_everything(project, whole):
    before = weights(whole[0])
    code, _, err = finish(start(project, "--out", "whole"))
    assert code == 0, err
    assert err.count("done before") == len(whole[1]["stages"])
    assert weights(whole[0]) == before


def test_a_change_redoes_only_what_hangs_on_it(project, whole, tiny_teacher):
    write_spec(project, tiny_teacher, gate=0.02)
    plan = [sys.executable, "-m", "edgekd.cli", "plan", "spec.yaml", "--out", "whole", "--json"]
    stages = json.loads(subprocess.run(plan, cwd=project, capture_output=True, text=True).stdout)["stages"]
    assert all(stage["done"] for stage in stages), "a threshold is judged, not measured"
    write_spec(project, tiny_teacher, steps=91)
    stages = json.loads(subprocess.run(plan, cwd=project, capture_output=True, text=True).stdout)["stages"]
    assert [stage["stage"] for stage in stages if stage["done"]] == ["data", "cut"]
    write_spec(project, tiny_teacher)


@pytest.mark.parametrize(
    ("where", "folder", "how"),
    [
        ("student", "student", signal.SIGKILL),
        ("student", "student", signal.SIGINT),
        ("baseline", "baseline", signal.SIGINT),
        ("qad", "quantized/portable-int4-qad", signal.SIGKILL),
        ("qad", "quantized/portable-int4-qad", signal.SIGINT),
    ],
)
def test_an_interrupted_run_ends_with_the_same_student(project, whole, where, folder, how):
    out = project / f"{where}-{how.name}"
    process = start(project, "--out", out.name)
    deadline = time.monotonic() + 300
    while not any(log.stat().st_size for log in out.glob(f".edgekd/{where}-*/log.jsonl")):  # a first step is done
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    code, _, err = finish(process)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    assert not (out / folder).exists(), "nothing half-written"
    code, _, err = finish(start(project, "--out", out.name))
    assert code == 0, err
    assert weights(out) == weights(whole[0])


def test_two_runs_in_one_folder_are_refused(project, whole):
    out = project / "locked"
    first = start(project, "--out", out.name)
    deadline = time.monotonic() + 300
    while not (out / ".edgekd" / "data.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    code, _, err = finish(start(project, "--out", out.name))
    os.kill(first.pid, signal.SIGKILL)
    finish(first)
    assert code == 2
    assert "another edgekd is at work" in err


def test_a_missed_gate_fails_the_run_but_not_with_report_only(project, whole, tiny_teacher):
    write_spec(project, tiny_teacher, gate=0.0)
    code, _, err = finish(start(project, "--out", "whole"))
    assert code == 1
    assert "gguf-fp16: " in err and "exceeds 0" in err and "Traceback" not in err
    assert "report.html" in err
    code, out, err = finish(start(project, "--out", "whole", "--report-only"))
    assert code == 0, err
    assert "gate FAILED" in out
    write_spec(project, tiny_teacher)
