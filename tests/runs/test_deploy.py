"""A model that exists, taken to devices without a teacher: the verb, and the spec it stands for."""

import json
import shutil
from functools import partial

import pytest

from edgekd.checkpoint import Checkpoint
from edgekd.cli import main
from edgekd.errors import EdgekdError, SpecError
from edgekd.runs.deploy import deployment
from edgekd.spec import DEFAULT_CONTEXT, BenchSpec, Spec, checked

GIVEN = {
    "name": "ready",
    "student": {"init": "checkpoint", "model": "model"},
    "targets": [{"target": "gguf", "recipes": ["fp16"]}],
}


def edgekd(monkeypatch, capfd, *words):
    monkeypatch.setattr("sys.argv", ["edgekd", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    return code, *capfd.readouterr()


@pytest.fixture
def folder(tmp_path, tiny_teacher, monkeypatch):
    """A place with a model and a text."""
    shutil.copytree(tiny_teacher, tmp_path / "my model")
    lines = (f"def f{i}(x, y={i % 7}):\n    return x * {i} + y\n" for i in range(900))
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_is_deployed_where_it_lies(folder, monkeypatch, capfd):
    pytest.importorskip("llama_cpp")
    quick = partial(BenchSpec, runs=1, cold_runs=0, curve_seconds=0)
    monkeypatch.setattr("edgekd.runs.deploy.BenchSpec", quick)
    before = {path.name: path.read_bytes() for path in (folder / "my model").iterdir()}
    words = ["deploy", "my model", "--targets", "gguf", "--recipe", "fp16", "--recipe", "portable-int4"]
    words += ["--method", "rtn", "--text", "text.txt", "--json"]
    code, out, err = edgekd(monkeypatch, capfd, *words)
    assert code == 0, err
    told = json.loads(out)
    run = folder / "runs" / "my-model"
    assert (run / "report.html").stat().st_size > 10_000
    assert {a["manifest"]["recipe"] for a in told["artifacts"]} == {"fp16", "portable-int4"}
    assert all(a["manifest"]["parity"]["failures"] == [] for a in told["artifacts"])
    assert told["quality"] is None and {row["from"] for row in told["ledger"]} == {"student", "portable-int4 rtn"}
    assert {path.name: path.read_bytes() for path in (folder / "my model").iterdir()} == before
    assert not list(run.rglob("model.safetensors"))
    code, out, err = edgekd(monkeypatch, capfd, *words)
    assert code == 0 and "quantize portable-int4 rtn ..." not in err and "export gguf-fp16 ..." not in err
    assert json.loads(out)["artifacts"] == told["artifacts"]


def test_an_artifact_is_verified_without_its_quantized_student(folder, monkeypatch, capfd):
    """What it should compute is not known then: only the thresholds judge how far quantization took it."""
    pytest.importorskip("llama_cpp")
    words = ["--target", "gguf", "--recipe", "portable-int4", "--context", "96"]
    assert edgekd(monkeypatch, capfd, "export", "my model", "int4", *words)[0] == 0
    words = ["--reference", "my model", "--text", "text.txt", "--windows", "2", "--context", "64", "--json"]
    code, out, err = edgekd(monkeypatch, capfd, "verify", "int4", *words)
    told = json.loads(out)
    assert code == 0, err
    assert told["runtime_kl_mean"] is None and told["kl_mean"] > 3 * told["arithmetic_kl_mean"]


def test_lengths_follow_the_model(folder):
    spec = deployment("my model", targets=["gguf"])
    assert spec.targets[0].context == 128 and spec.verify.context == spec.data.context == 128
    assert max(spec.bench.prompt_tokens) + spec.bench.decode_tokens <= 128
    config = json.loads((folder / "my model" / "config.json").read_text())
    (folder / "my model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**17}))
    assert Checkpoint(folder / "my model").config["max_position_embeddings"] == 2**17
    assert deployment("my model", targets=["gguf"]).targets[0].context == DEFAULT_CONTEXT
    assert deployment("my model", targets=["gguf"], context=2**16).targets[0].context == 2**16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--targets", "gguf,nothing"], "nothing"),
        (["--targets", ""], "target"),
        (["--recipe", "portable-int5"], "portable-int5"),
        (["--context", "4096"], "the model holds 128 tokens"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_what_cannot_be_deployed_is_said_first(folder, monkeypatch, capfd, words, said):
    code, out, err = edgekd(monkeypatch, capfd, "deploy", "my model", *words)
    assert code == 2 and out == "" and said in err.splitlines()[-1] and "Traceback" not in err
    assert not (folder / "runs").exists()


def test_a_target_that_refuses_is_left_out_where_the_user_named_none(folder, monkeypatch, caplog):
    from edgekd.errors import Unsupported
    from edgekd.runs import deploy

    def check(config, tokenizer, section):
        if section.target != "gguf":
            raise Unsupported(f"{section.target} cannot.", "Take another.")

    monkeypatch.setattr(deploy, "check", check)
    assert [section.target for section in deployment("my model").targets] == ["gguf"]
    assert "onnx is left out: onnx cannot." in caplog.text
    with pytest.raises(Unsupported, match="onnx cannot"):
        deployment("my model", targets=["gguf", "onnx"])
    monkeypatch.setattr(deploy, "check", lambda *_: check({}, "", deployment_section("onnx")))
    with pytest.raises(EdgekdError, match="onnx cannot"):
        deployment("my model")


def deployment_section(target):
    from edgekd.targets import load_target

    return load_target(target).Options(target=target, recipes=["portable-int4"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"student": {"init": "cut", "layers": 2}}, "teacher: student.init cut needs one"),
        ({"distill": {"steps": 3}}, "distill: without a teacher"),
        ({"quantize": {"qad": {"teacher": "teacher"}}}, "quantize.qad.teacher"),
        ({"teacher": {"model": "x"}}, "data: what is the student to read"),
    ],
)
def test_a_spec_says_what_it_lacks(change, said):
    with pytest.raises(SpecError, match=said):
        checked(Spec, GIVEN | change, "spec.yaml")
    assert checked(Spec, GIVEN, "spec.yaml").teacher is None
