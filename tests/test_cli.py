"""The command as a user types it: help, exit codes, and one clear sentence for bad input, before any work."""

import errno
import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from unittest import mock

import pytest

from edgekd import cli
from edgekd.files import write_sealed
from edgekd.manifest import write_artifact
from typed import edgekd

BASE = """
name: tiny
teacher: {{model: {teacher}}}
student: {{init: cut, layers: 2}}
data: {{source: text, paths: [text/*.txt], context: 32, validation_share: 0.2, test_share: 0.2}}
distill: {{steps: 4}}
targets: [{{target: gguf, recipes: [fp16]}}]
verify: {{context: 32}}
bench: {{prompt_tokens: [8], decode_tokens: 8}}
"""


@pytest.fixture
def project(tmp_path, tiny_teacher):
    """A folder with a valid spec, a teacher beside it and some text."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (tmp_path / "spec.yaml").write_text(BASE.format(teacher="teacher"))
    return tmp_path


def refused(result, *said):
    """Exit code 2, one sentence behind whatever progress there was, no traceback, nothing on stdout."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and result.stderr.count("error: ") == 1, result.stderr
    for text in said:
        assert text in result.stderr
    assert result.stdout == ""


VERBS = [
    "run",
    "plan",
    "distill",
    "student",
    "import",
    "quantize",
    "export",
    "verify",
    "bench",
    "compare",
    "predict",
    "pick",
    "cost",
    "report",
    "chat",
    "doctor",
    "init",
    "schema",
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    result = edgekd(verb, "--help")
    assert result.returncode == 0
    assert f"Example: edgekd {verb}" in " ".join(result.stdout.split())


def test_help_imports_no_torch():
    code = "import sys, edgekd.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_wrong_option_is_a_usage_error():
    result = edgekd("run", "quickstart", "--no-such")
    assert result.returncode == 2
    assert "--no-such" in result.stderr


def test_init_writes_a_spec_that_plan_accepts_but_for_its_teacher(tmp_path, tiny_teacher):
    assert edgekd("init", "mine.yaml", cwd=tmp_path).returncode == 0
    text = (tmp_path / "mine.yaml").read_text()
    assert edgekd("init", "mine.yaml", cwd=tmp_path).returncode == 2
    (tmp_path / "mine.yaml").write_text(
        text.replace("builtin:pycode-16m", str(tiny_teacher))
        .replace("layers: 4", "layers: 2", 1)
        .replace("context: 512", "context: 64")
        .replace("context: 256", "context: 64")
        .replace("[32, 256]", "[32]")
    )
    result = edgekd("plan", "mine.yaml", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    stages = json.loads(result.stdout)["stages"]
    assert [stage["stage"] for stage in stages][:4] == ["data", "cut", "student", "baseline"]
    assert all(stage["ram_bytes"] > 0 and not stage["done"] for stage in stages)
    assert not (tmp_path / "runs").exists()


def test_schema_is_json_schema():
    schema = json.loads(edgekd("schema").stdout)
    assert schema["properties"]["teacher"]
    assert schema["additionalProperties"] is False


def test_no_such_spec():
    refused(edgekd("plan", "nowhere.yaml"), "nowhere.yaml: no such spec", "edgekd init")


def test_an_unknown_key(project):
    (project / "spec.yaml").write_text(BASE.format(teacher="teacher") + "banch: {}\n")
    refused(edgekd("run", "spec.yaml", cwd=project), "spec.yaml", "unknown key 'banch'", "did you mean 'bench'")


def test_a_missing_teacher(project):
    (project / "spec.yaml").write_text(BASE.format(teacher="nobody"))
    refused(edgekd("run", "spec.yaml", cwd=project), "nobody", "no config.json")


def test_an_unknown_builtin(project):
    (project / "spec.yaml").write_text(BASE.format(teacher="'builtin:nobody'"))
    refused(edgekd("run", "spec.yaml", cwd=project), "builtin:nobody", "pycode-16m")


def test_missing_text(project):
    shutil.rmtree(project / "text")
    refused(edgekd("run", "spec.yaml", cwd=project), "data.paths", "no such file")


def test_empty_text(project):
    for path in (project / "text").iterdir():
        path.write_text("")
    refused(edgekd("run", "spec.yaml", cwd=project), "data")
    assert not (project / "runs" / "tiny" / "data").exists()


def test_a_folder_that_is_no_run(project):
    (project / "mine").mkdir()
    (project / "mine" / "thesis.tex").write_text("precious")
    refused(edgekd("run", "spec.yaml", "--out", "mine", cwd=project), "mine exists and is not a run")
    assert [p.name for p in (project / "mine").iterdir()] == ["thesis.tex"]


def test_a_truncated_safetensors_file(project):
    path = project / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(edgekd("run", "spec.yaml", cwd=project), "model.safetensors", "truncated")


def test_a_tokenizer_that_exceeds_the_embedding(project):
    path = project / "teacher" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vocab_size": 300}))
    refused(edgekd("run", "spec.yaml", cwd=project), "the tokenizer has 320 ids, the embedding 300 rows")


def test_a_student_for_a_device_is_printed_as_the_lines_of_a_spec(project):
    words = ("student", "teacher", "--target-parameters", "47.5k", "--fits", "iphone-15-pro", "--context", "100")
    result = edgekd(*words, cwd=project)
    assert result.returncode == 0, result.stderr
    table, lines = result.stdout.split("student:\n")
    assert "47,520" in table and "chosen" in table and "2/1" in table
    keys = "{" + ", ".join(line.strip() for line in lines.splitlines()) + "}"
    (project / "spec.yaml").write_text(BASE.format(teacher="teacher").replace("{init: cut, layers: 2}", keys))
    assert edgekd("plan", "spec.yaml", cwd=project).returncode == 0
    told = json.loads(edgekd(*words, "--json", cwd=project).stdout)
    assert told["student"] == {"init": "cut", "layers": 3, "hidden_size": 32, "intermediate_size": 64}
    [shape] = told["shapes"]
    assert shape["chosen"] and shape["parameters"] == 47520
    assert shape["spare_bytes"] == told["budget_bytes"] - shape["weight_bytes"] - shape["cache_bytes"]


def test_a_student_that_no_device_holds_is_shown_all_the_same(project):
    profile = (resources.files("edgekd.benchmarks.profiles") / "iphone-15-pro.yaml").read_text()
    (project / "watch.yaml").write_text(profile.replace("value: 3\n", "value: 0.00005\n"))
    words = ("student", "teacher", "--target-parameters", "47.5k", "--fits", "watch.yaml", "--context", "100")
    result = edgekd(*words, cwd=project)
    assert result.returncode == 2 and "gives an app 50.0 kB" in result.stderr
    assert "47,520" in result.stdout and " -" in result.stdout and "student:" not in result.stdout
    told = edgekd(*words, "--json", cwd=project)
    assert told.returncode == 2 and json.loads(told.stdout)["student"] is None


@pytest.mark.parametrize(
    ("amount", "device", "said"),
    [
        ("47.5k", "iphone-15", ["unknown profile 'iphone-15'; did you mean 'iphone-15-pro'?"]),
        (
            "1.2B",
            "iphone-15-pro",
            ["no student cut from this teacher", "the nearest has 131,712 parameters (layers 3"],
        ),
        ("much", "iphone-15-pro", ["the command line: key 'parameters'"]),
    ],
)
def test_a_student_for_a_device_that_cannot_be(project, amount, device, said):
    words = ("student", "teacher", "--target-parameters", amount, "--fits", device)
    refused(edgekd(*words, cwd=project), *said)


def test_more_layers_than_the_teacher(project):
    text = BASE.format(teacher="teacher").replace("layers: 2", "layers: 9")
    (project / "spec.yaml").write_text(text)
    refused(edgekd("run", "spec.yaml", cwd=project), "student.layers", "9", "3")


def test_another_tokenizer_for_the_student(project):
    shutil.copytree(project / "teacher", project / "student")
    path = project / "student" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(tokenizer))
    text = BASE.format(teacher="teacher").replace("{init: cut, layers: 2}", "{init: checkpoint, model: student}")
    (project / "spec.yaml").write_text(text)
    refused(edgekd("run", "spec.yaml", cwd=project), "student", "teacher")


def test_an_unknown_target_and_recipe(project):
    text = BASE.format(teacher="teacher")
    (project / "spec.yaml").write_text(text.replace("target: gguf", "target: ggml"))
    refused(edgekd("run", "spec.yaml", cwd=project), "ggml", "gguf")
    (project / "spec.yaml").write_text(text.replace("fp16", "q4_9"))
    refused(edgekd("run", "spec.yaml", cwd=project), "q4_9", "portable-int4")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("context: 32, val", "context: 4096, val", "data.context"),
        ("verify: {context: 32}", "verify: {context: 500}", "verify.context"),
        ("prompt_tokens: [8]", "prompt_tokens: [124]", "bench.prompt_tokens"),
        ("verify: {", "verify: {thresholds: {q4_O: {kl_mean_max: 0.1}}, ", "verify.thresholds.q4_O"),
        ("distill: {", "distill: {memory: {lora: {targets: [q_prj]}}, ", "q_prj is no matrix of the student's layers"),
        ("distill: {", "distill: {memory: {lora: {targets: [lm_head]}}, ", "lm_head is the embedding too"),
        ("distill: {", "distill: {memory: {weights: bfloat16}, ", "would lose adamw's small steps"),
    ],
)
def test_what_would_fail_after_the_long_work_is_refused_before(project, old, new, said):
    text = BASE.format(teacher="teacher")
    assert old in text
    (project / "spec.yaml").write_text(text.replace(old, new, 1))
    refused(edgekd("run", "spec.yaml", cwd=project), said)
    assert not (project / "runs").exists()


def test_a_context_beyond_the_teachers_is_refused(project):
    shutil.copytree(project / "teacher", project / "student")
    path = project / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 1024}))
    text = BASE.format(teacher="teacher").replace("{init: cut, layers: 2}", "{init: checkpoint, model: student}")
    (project / "spec.yaml").write_text(text.replace("context: 32, val", "context: 129, val"))
    refused(edgekd("run", "spec.yaml", cwd=project), "data.context", "129 tokens are more than the context of 128")


@pytest.mark.parametrize("memory", ["{lora: {r: 4}}", "{optimizer: adamw8bit}"])
def test_what_spares_memory_must_be_installed(project, memory):
    text = BASE.format(teacher="teacher").replace("distill: {", f"distill: {{memory: {memory}, ")
    (project / "spec.yaml").write_text(text)
    package = "peft" if "lora" in memory else "torchao"
    with mock.patch.dict(sys.modules, {package: None}):
        refused(edgekd("run", "spec.yaml", cwd=project), f"{package} is not installed", '"edgekd[train]"')


@pytest.mark.parametrize(("package", "extra"), [("gguf", "gguf"), ("accelerate", "train")])
def test_a_missing_extra_is_named(project, package, extra):
    with mock.patch.dict(sys.modules, {package: None}):
        refused(edgekd("run", "spec.yaml", cwd=project), f"{package} is not installed", f'"edgekd[{extra}]"')


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "portable-int5"], "did you mean 'portable-int4'?"),
        (["--recipe", "fp16", "--text", "none.txt"], "'fp16' quantizes nothing on the portable grid"),
        (["--method", "gptq2"], "'gptq2' is not one of"),
        (["--text", "short.txt"], "tokens, a window needs 256. Give more text."),
        (["--text", "none.txt"], "--text none.txt: not readable as UTF-8 text"),
    ],
)
def test_quantize_refuses_before_the_work(project, options, said):
    (project / "short.txt").write_text("def f(): pass\n")
    result = edgekd("quantize", "teacher", "out", *options, cwd=project)
    assert result.returncode == 2 and said in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert not (project / "out").exists()


def test_quantize_and_export_by_hand(project):
    (project / "notes.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    calibration = ["--text", "notes.txt", "--context", "32", "--windows", "8"]
    result = edgekd("quantize", "teacher", "quantized", *calibration, "--json", cwd=project)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["method"] == "gptq" and figures["tensors"]["int4"] == 21
    result = edgekd("export", "teacher", "made", "--quantized", "quantized", "--json", cwd=project)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["grid_digest"] == figures["digest"]
    path = project / "quantized" / "grid.json"
    path.write_text(path.read_text().replace(figures["digest"], "0" * 64))
    refused(edgekd("export", "teacher", "again", "--quantized", "quantized", cwd=project), "grid_digest does not match")
    assert not (project / "again").exists()


def test_export_names_the_providers_there_are(project):
    words = ["--target", "onnx", "--provider", "tpu", "--provider", "cpu"]
    refused(edgekd("export", "teacher", "never", *words, cwd=project), "unknown execution provider 'tpu'", "webgpu")


@pytest.mark.parametrize(
    ("layers", "words"),
    [("-1", ["gpu_layers", "greater than or equal to 0"]), ("2", ["gpu_layers 2", "on the CPU alone"])],
)
def test_export_refuses_layers_that_no_gpu_can_take(project, layers, words):
    from edgekd.targets.gguf.target import gpus

    if gpus():
        pytest.skip("this llama.cpp has a GPU")
    refused(edgekd("export", "teacher", "never", "--option", f"gpu_layers={layers}", cwd=project), *words)


def test_export_refuses_a_folder_that_exists(project):
    (project / "out").mkdir()
    refused(edgekd("export", "teacher", "out", cwd=project), "out exists")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "text", "--decode-tokens", "99999999999"], "decode_tokens"),
        (["verify", "text", "--reference", "teacher", "--kl-mean-max", "nan"], "kl_mean_max"),
        (["quantize", "teacher", "out", "--method", "qad", "--steps", "99999999999"], "steps"),
        (["export", "teacher", "out", "--context", "99999999999"], "context"),
        (["plan", "spec.yaml", "--seed", "99999999999"], "seed"),
    ],
)
def test_options_have_the_bounds_of_the_spec(project, words, said):
    refused(edgekd(*words, cwd=project), f"key '{said}'", "input should be")


def test_init_writes_new_files_alone(tmp_path):
    assert edgekd("init", "new/folder/mine.yaml", cwd=tmp_path).returncode == 0
    (tmp_path / "link.yaml").symlink_to(tmp_path / "target.yaml")
    refused(edgekd("init", "link.yaml", cwd=tmp_path), "link.yaml exists")
    assert not (tmp_path / "target.yaml").exists()
    refused(edgekd("init", "x" * 300, cwd=tmp_path), "ile name too long")
    refused(edgekd("init", "new/folder/mine.yaml/mine.yaml", cwd=tmp_path), "mine.yaml is a file, not a folder")


def test_init_and_report_where_nothing_can_be_written(tmp_path):
    write_sealed(tmp_path / "results.json", {})
    refused(edgekd("init", "/proc/mine.yaml"), "/proc cannot be written")
    refused(edgekd("report", tmp_path, "--out", "/proc/report.html"), "/proc/report.html")


def test_a_message_cannot_move_the_cursor():
    result = edgekd("plan", "\udcff\x1b[2J\n.yaml")
    refused(result, r"\udcff\x1b[2J .yaml: no such spec")


class Panic(BaseException):
    """As pyo3's, no Exception."""


@pytest.mark.parametrize("kind", [TypeError, RecursionError, Panic, OSError, AssertionError])
def test_what_nobody_foresaw_is_a_fault_with_a_file_to_report(monkeypatch, tmp_path, kind):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("edgekd.spec.load_spec", mock.Mock(side_effect=kind("odd\nthing")))
    result = edgekd("plan", "quickstart")
    assert result.returncode == 70 and result.stderr.count("\n") == 1
    assert f"a fault in edgekd, not in your input: {kind.__name__}: odd thing" in result.stderr
    (report,) = tmp_path.iterdir()
    assert str(report) in result.stderr and report.stat().st_mode & 0o77 == 0
    assert "Traceback" in report.read_text() and "'plan', 'quickstart'" in report.read_text()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "x", "a.json"), "a.json: permission denied."),
        (OSError(36, "x", "a.json"), "a.json: file name too long."),
        (OSError(40, "x"), "too many levels of symbolic links."),
        (RuntimeError("save: No space left on device (28)"), "no space left"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "larger than the file system or your limit"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (ModuleNotFoundError(name="datasets"), '"edgekd[train]"'),
    ],
)
def test_what_the_machine_refuses_is_no_fault(monkeypatch, error, said):
    monkeypatch.setattr("edgekd.spec.load_spec", mock.Mock(side_effect=error))
    refused(edgekd("plan", "quickstart"), said)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("schema >&-", 0, ""),
        ("schema >/dev/full", 2, "error: no space left on the disk."),
        ("plan nowhere.yaml <&- >&- 2>&-", 2, ""),
        ("schema | true; exit ${PIPESTATUS[0]}", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(words, code, said):
    command = [f"{sys.executable} -c 'from edgekd.cli import main; main()' {words}"]
    done = subprocess.run(["bash", "-c", *command], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_closed_stream_is_no_files_place(tmp_path):
    code = (
        "import os; from edgekd.cli import _hold_streams as h; h(); print(os.open(os.devnull, 0), file=open('fd', 'w'))"
    )
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], cwd=tmp_path, check=True)
    assert int((tmp_path / "fd").read_text()) > 2


def test_rows_that_the_template_refuses_stop_the_run_until_they_are_allowed(project):
    template = project / "teacher" / "chat_template.jinja"
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn here') }}{% endif %}"
    template.write_text(picky + template.read_text())
    answer = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a lot of words to learn " * 9}]
    rows = [[{"role": "system", "content": f"{i}"}, *answer] for i in range(40)]
    rows += [[{"role": "user", "content": f"{i}"}, *answer[1:]] for i in range(40)]
    (project / "chats.jsonl").write_text("".join(json.dumps({"m": row}) + "\n" for row in rows))
    spec = BASE.format(teacher="teacher").replace("source: text, paths: [text/*.txt]", "source: jsonl, chat: true")
    (project / "spec.yaml").write_text(spec.replace("chat: true", "chat: true, column: m, paths: [chats.jsonl]"))
    words = "40 of 80 rows of chats.jsonl are unusable and were skipped: the chat template refuses them: No system turn"
    refused(edgekd("distill", "spec.yaml", cwd=project), words, "--allow-skipped")
    result = edgekd("distill", "spec.yaml", "--allow-skipped", cwd=project)
    assert result.returncode == 0 and words in " ".join(result.stderr.split()), result.stderr
    record = project / "runs" / "tiny" / ".edgekd" / "data.json"
    before = record.read_bytes()
    assert edgekd("distill", "spec.yaml", cwd=project).returncode == 0  # what was allowed once is done
    assert record.read_bytes() == before


def test_what_is_no_artifact(project):
    for verb in (["bench"], ["chat"], ["verify", "--reference", "teacher"]):
        refused(edgekd(verb[0], "text", *verb[1:], cwd=project), "text is not an artifact")


def test_report_of_what_is_no_run(project):
    refused(edgekd("report", "text", cwd=project), "no results.json")


@pytest.mark.parametrize("verb", [["bench"], ["verify", "--reference", "teacher"]])
def test_an_artifact_of_somebody_else_is_refused_before_the_work(project, monkeypatch, verb):
    (project / "artifact").mkdir()
    (project / "artifact" / "model.bin").write_bytes(b"weights")
    contract = {"context_length": 8, "vocab_size": 4, "bos_id": None, "eos_ids": [0], "add_bos": False}
    write_artifact(
        project / "artifact",
        name="n",
        target="t",
        recipe="r",
        runtime="x",
        main_file="model.bin",
        student_digest="d",
        parameters=7,
        bits_per_weight=8.0,
        contract=contract | {"chat_template": None},
        versions={},
    )
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    result = edgekd(*verb[:1], "artifact", *verb[1:], cwd=project)
    refused(result, "artifact belongs to another user", "Copy it")


def test_skipped_rows_are_allowed_of_every_text(project, monkeypatch):
    monkeypatch.chdir(project)
    with (project / "spec.yaml").open("a") as file:
        file.write("calibration: {source: text, paths: [text/*.txt], context: 32}\n")
    for allowed in (False, True):
        spec = cli._open("spec.yaml", project / "out", None, allowed).spec
        assert (spec.data.allow_skipped, spec.calibration.allow_skipped) == (allowed, allowed)
