"""A finished run whose files were damaged: what is damaged is made again, byte for byte, and nothing else is."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_cli import edgekd, refused

from edgekd.runs import records
from edgekd.runs.records import Record, outputs_of, read_record, write_record

pytest.importorskip("llama_cpp")

SPEC = """
name: tiny
teacher: {{model: {teacher}}}
student: {{init: cut, layers: 2}}
data: {{source: text, paths: [text/*.txt], context: 32, validation_share: 0.2, test_share: 0.2}}
distill: {{steps: 4, batch_size: 2, warmup_steps: 1, validate_every: 2, baseline: false}}
quantize: {{method: rtn, calibration_windows: 4}}
targets: [{{target: gguf, recipes: [portable-int4, gguf-q4_k_m]}}]
verify: {{windows: 1, context: 32, greedy_tokens: 2, thresholds: {{default: {{kl_mean_max: 100, top1_min: 0}}}}}}
bench: {{prompt_tokens: [8], decode_tokens: 2, runs: 1, cold_runs: 0, curve_seconds: 0}}
"""
ALL = {
    "data",
    "cut",
    "student",
    "quality",
    "calibrate",
    "quantize portable-int4 rtn",
    "ledger",
    *(
        f"{verb} gguf-{recipe}"
        for verb in ("export", "verify", "audit", "bench")
        for recipe in ("portable-int4", "q4_k_m")
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher):
    project = tmp_path_factory.mktemp("finished")
    (project / "text").mkdir()
    for i in range(40):
        (project / "text" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    (project / "spec.yaml").write_text(SPEC.format(teacher=tiny_teacher))
    done = edgekd("run", "spec.yaml", cwd=project)
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture
def project(finished, tmp_path):
    """A copy to spoil, times of change kept."""
    return shutil.copytree(finished, tmp_path / "project")


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the stages' folders; benchmarks and audits, and the manifests that hold them, hold times."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.glob("*/**/*")
        if path.is_file()
        and path.name not in ("bench.json", "audit.json", "manifest.json")
        and ".edgekd" not in path.parts
    }


def planned(project: Path) -> set[str]:
    """What ``edgekd plan`` says is left to do."""
    told = json.loads(edgekd("plan", "spec.yaml", "--json", cwd=project).stdout)["stages"]
    assert {stage["stage"] for stage in told} == ALL
    return {stage["stage"] for stage in told if not stage["done"]}


def run_again(project: Path, *options: str) -> tuple[set[str], str]:
    """Run it; the stages that were done, and all that was said."""
    done = edgekd("run", "spec.yaml", *options, cwd=project)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return {name for name in ALL if f"\n{name} ...\n" in "\n" + done.stderr}, done.stderr


def flip(path: Path) -> None:
    """One bit in the middle; the size stays, the time of change does not."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_silently(path: Path) -> None:
    """One bit, and nothing in the file's entry tells of it, as when a disk rots."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def put_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def put_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("/nowhere")


DAMAGED = [
    ("artifacts/gguf-portable-int4/model.gguf", flip, "export gguf-portable-int4"),
    ("artifacts/gguf-portable-int4/model.gguf", cut, "export gguf-portable-int4"),
    ("artifacts/gguf-portable-int4/model.gguf", Path.unlink, "export gguf-portable-int4"),
    ("artifacts/gguf-portable-int4/manifest.json", cut, "export gguf-portable-int4"),
    ("artifacts/gguf-portable-int4/tokenizer.json", flip, "export gguf-portable-int4"),
    ("artifacts/gguf-q4_k_m", shutil.rmtree, "export gguf-q4_k_m"),
    ("artifacts/gguf-q4_k_m", put_a_file, "export gguf-q4_k_m"),
    ("student/model.safetensors", flip, "student"),
    ("student/config.json", Path.unlink, "student"),
    ("student", put_a_link, "student"),
    ("data/test.safetensors", flip, "data"),
    ("calibration/moments.safetensors", cut, "calibrate"),
    ("quantized/portable-int4-rtn/grid.json", cut, "quantize portable-int4 rtn"),
    ("quality/quality.json", cut, "quality"),
    ("quality/quality.json", flip_silently, "quality"),
    ("ledger/student.json", cut, "ledger"),
    ("parity/gguf-q4_k_m/parity.json", cut, "verify gguf-q4_k_m"),
    ("audit/gguf-q4_k_m/audit.json", cut, "audit gguf-q4_k_m"),
    ("bench/gguf-q4_k_m/bench.json", cut, "bench gguf-q4_k_m"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage", "stage"), DAMAGED)
def test_a_damaged_output_is_made_again_and_nothing_else(project, name, damage, stage):
    run = project / "runs" / "tiny"
    before = contents(run)
    damage(run / name)
    assert planned(project) == {stage}
    done, said = run_again(project)
    assert done == {stage}
    assert f"{name}" in said and f"Doing again: {stage}." in said
    assert contents(run).items() >= before.items()
    assert planned(project) == set() and run_again(project)[0] == set()


RECORDS = [b"[]", b"null", b"", b"\xff\xfe", b"{}", b'{"key":' * 50_000, b'{"seconds": ' + b"9" * 5000 + b"}"]


@pytest.mark.slow
@pytest.mark.parametrize("data", [*RECORDS, "without seconds", "of an earlier version", "cut", "a flipped digit"])
def test_a_damaged_record_is_a_stage_that_is_not_done(project, data):
    path = project / "runs" / "tiny" / ".edgekd" / "parity-gguf-q4_k_m.json"
    whole = json.loads(path.read_text())
    spoilt = {
        "without seconds": {key: value for key, value in whole.items() if key != "seconds"},
        "of an earlier version": {key: whole[key] for key in ("key", "name", "seconds", "figures")},
        "cut": None,
        "a flipped digit": whole | {"seconds": whole["seconds"] + 1},
    }
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data == "cut":
        cut(path)
    else:
        path.write_text(json.dumps(spoilt[data]))
    assert planned(project) == {"verify gguf-q4_k_m"}
    assert run_again(project)[0] == {"verify gguf-q4_k_m"} and planned(project) == set()


@pytest.mark.slow
def test_what_no_size_and_time_tell_is_found_by_check(project, monkeypatch):
    monkeypatch.setattr(records, "SMALL_BYTES", 0)
    run = project / "runs" / "tiny"
    before = contents(run)
    flip_silently(run / "artifacts" / "gguf-q4_k_m" / "model.gguf")
    flip_silently(run / "data" / "test.safetensors")
    assert planned(project) == set() and run_again(project)[0] == set()
    assert run_again(project, "--check")[0] == {"data", "export gguf-q4_k_m"}
    assert contents(run) == before


@pytest.mark.slow
def test_what_a_stage_will_read_is_always_compared(project, monkeypatch):
    """Rot in the student, under a stage that is to be done: and in the data, that the student is made of."""
    monkeypatch.setattr(records, "SMALL_BYTES", 0)
    run = project / "runs" / "tiny"
    before = contents(run)
    shutil.rmtree(run / "parity" / "gguf-q4_k_m")
    flip_silently(run / "student" / "model.safetensors")
    flip_silently(run / "data" / "train.safetensors")
    flip_silently(run / "quantized" / "portable-int4-rtn" / "model-00001-of-00001.safetensors")  # nobody reads it
    assert planned(project) == {"data", "student", "verify gguf-q4_k_m"}
    assert run_again(project)[0] == {"data", "student", "verify gguf-q4_k_m"}
    assert run_again(project, "--check")[0] == {"quantize portable-int4 rtn"}
    assert contents(run) == before


@pytest.mark.slow
def test_other_content_upstream_redoes_what_read_it(project):
    """A redone stage may end with other bytes (another number of threads): then what hangs on it is stale."""
    run = project / "runs" / "tiny"
    path = run / ".edgekd" / "calibration.json"
    shutil.copy(run / "data" / "test.safetensors", run / "calibration" / "other.safetensors")
    changed = read_record(path).model_copy(update={"outputs": outputs_of(run / "calibration")})
    write_record(path, Record.model_validate(changed))
    assert planned(project) == {"export gguf-q4_k_m"}
    assert run_again(project)[0] == {"export gguf-q4_k_m"}


@pytest.mark.slow
def test_a_proof_and_files_beside_it_are_no_damage(project):
    """``edgekd bench`` and a file manager write into an artifact's folder."""
    artifact = project / "runs" / "tiny" / "artifacts" / "gguf-q4_k_m"
    done = edgekd("bench", artifact, "--prompt-tokens", 4, "--decode-tokens", 2, "--runs", 1, cwd=project)
    assert done.returncode == 0, done.stderr
    (artifact / ".DS_Store").write_text("x")
    assert planned(project) == set() and run_again(project)[0] == set()
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["contract"]["eos_ids"] = [7]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert planned(project) == {"export gguf-q4_k_m"}
    assert run_again(project)[0] == {"export gguf-q4_k_m"}
    assert json.loads((artifact / "manifest.json").read_text())["contract"]["eos_ids"] != [7]


@pytest.mark.slow
def test_what_killed_runs_left_is_swept_and_checkpoints_go(project):
    run = project / "runs" / "tiny"
    assert not list(run.glob(".edgekd/*/checkpoint-*")) and list(run.glob(".edgekd/student-*/log.jsonl"))
    left = ".model.gguf.999999999-0123456789abcdef.tmp"
    (run / "artifacts" / left).mkdir()
    (run / ".edgekd" / left).touch()
    (run / "artifacts" / "gguf-q4_k_m" / left).symlink_to("/nowhere")
    state = next(run.glob(".edgekd/student-*"))
    (state / "checkpoint-4").mkdir()  # killed between the record and the removal
    (state / "log.jsonl").write_text("{")
    assert run_again(project)[0] == set()
    assert not list(run.rglob("*.tmp")) and not list(run.rglob("checkpoint-*"))
    results = json.loads((run / "results.json").read_text())
    assert [point["step"] for point in results["training"]["student"]] == [2, 4], "the record holds the curve"


RESULTS = [b"[]", b"null", b"{}", b"\xff", b'{"artifacts": 3}', b'{"a":' * 50_000]


@pytest.mark.parametrize("data", [*RESULTS, "cut", "a key is another"])
def test_damaged_results_end_in_a_sentence(project, data):
    path = project / "runs" / "tiny" / "results.json"
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data == "cut":
        cut(path)
    else:
        path.write_text(path.read_text().replace('"stages"', '"stages2"'))
    refused(edgekd("report", "runs/tiny", cwd=project), "results.json", "edgekd run SPEC")


def test_links_in_the_state_of_a_run_are_refused(project, tmp_path):
    state = project / "runs" / "tiny" / ".edgekd"
    (tmp_path / "outside").mkdir()
    (state / "student-0123").symlink_to(tmp_path / "outside")
    refused(edgekd("run", "spec.yaml", cwd=project), "student-0123 is a link")
    (state / "student-0123").unlink()
    state.rename(tmp_path / "state")
    state.symlink_to(tmp_path / "state")
    refused(edgekd("run", "spec.yaml", cwd=project), ".edgekd is a link")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is a folder that nobody can write")
@pytest.mark.parametrize(
    "words",
    [
        ["run", "spec.yaml", "--out", "/proc/x"],
        ["distill", "spec.yaml", "--out", "/proc/x"],
        ["quantize", "teacher", "/proc/x/y", "--method", "rtn"],
        ["export", "runs/tiny/student", "/proc/x"],
        ["report", "runs/tiny", "--out", "/proc/x/report.html"],
        ["init", "/proc/x.yaml"],
    ],
    ids=lambda words: words[0],
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(project, tiny_teacher, words):
    words = [str(tiny_teacher) if word == "teacher" else word for word in words]
    done = edgekd(*words, cwd=project)
    refused(done, "/proc", "cannot be written")
    assert " ...\n" not in done.stderr
