"""A run on a mixture of sources with two teachers: who teaches what, what is kept where, and what is refused first."""

import json
import shutil

import pytest
import torch
import yaml
from test_cli import edgekd, refused

from edgekd.distill import qad
from edgekd.distill.data import load_windows
from edgekd.distill.evaluate import evaluate
from edgekd.distill.signals import OnlineTeacher
from edgekd.runs import work
from edgekd.runs.preflight import open_run
from edgekd.spec import Spec
from edgekd.student import load_model

pytest.importorskip("llama_cpp")

SPEC = """
name: tiny
teacher: {model: first, sources: [code], more: [{model: second, weight: 2.0}]}
student: {init: cut, layers: 2, choose: even}
data:
  sources:
    code: {source: text, paths: [code/*.txt], weight: 3.0}
    prose: {source: text, paths: [prose/*.txt]}
  context: 32
  validation_share: 0.2
  test_share: 0.2
distill: {steps: 4, batch_size: 4, warmup_steps: 1, validate_every: 2}
targets: [{target: gguf, recipes: [fp16]}]
verify: {windows: 1, context: 32, greedy_tokens: 2}
bench: {prompt_tokens: [8], decode_tokens: 2, runs: 1}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("sources")
    for name, line in {"code": "def f{i}(x):\n    return x + {i}\n", "prose": "It was the {i}th of May. "}.items():
        (folder / name).mkdir()
        for i in range(40):
            (folder / name / f"{i}.txt").write_text(line.format(i=i) * 20)
    shutil.copytree(tiny_teacher, folder / "first")
    shutil.copytree(tiny_teacher, folder / "second")
    other = load_model(tiny_teacher)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(folder / "second")
    (folder / "spec.yaml").write_text(SPEC)
    return folder


def test_what_is_kept_is_told_by_source(project):
    done = edgekd("distill", "spec.yaml", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    quality = json.loads(done.stdout)["quality"]
    for model in quality.values():
        assert list(model["by_source"]) == ["code", "prose"]
        assert sum(part["tokens"] for part in model["by_source"].values()) == model["tokens"]
    assert quality["teacher"]["parameters"] == 2 * load_model(project / "first").num_parameters()

    prose = load_windows(project / "runs/tiny/data", "test").by_source()["prose"]
    teacher = OnlineTeacher(load_model(project / "second"), 320)
    found = evaluate(load_model(project / "runs/tiny/student"), prose, teacher=teacher)
    assert quality["student"]["by_source"]["prose"] == pytest.approx(found, rel=1e-5)
    alone = evaluate(teacher.model, prose)
    assert quality["teacher"]["by_source"]["prose"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)


def plan(project, change):
    (project / "other.yaml").write_text(change(SPEC))
    done = edgekd("plan", "other.yaml", "--json", cwd=project)
    return {stage["stage"]: stage["done"] for stage in json.loads(done.stdout)["stages"]}


def test_weights_redo_what_hangs_on_them(project):
    edgekd("distill", "spec.yaml", cwd=project)
    done = plan(project, lambda text: text)
    assert done["data"] and done["student"] and done["baseline"]
    done = plan(project, lambda text: text.replace("weight: 2.0", "weight: 2.0, sources: [code, prose]"))
    assert done["student"], "they say the same"
    done = plan(project, lambda text: text.replace("sources: [code], more", "more"))
    assert not done["student"] and done["baseline"] and done["data"]
    done = plan(project, lambda text: text.replace("weight: 3.0", "weight: 4.0"))
    assert not done["data"] and not done["baseline"]


def tell(share, note):
    pass


def test_a_quantized_student_hears_them_too(project, tmp_path, monkeypatch):
    whole = yaml.safe_load(SPEC.replace("recipes: [fp16]", "recipes: [portable-int4]"))
    spec = Spec.model_validate(whole | {"quantize": {"method": "qad", "qad": {"teacher": "teacher"}}})
    heard = {}
    monkeypatch.setattr(qad, "quantize_aware_distill", lambda *_, **given: heard.update(given) or {})
    run = open_run(spec, base=project, out=tmp_path / "run")
    for folder in (run.folder, tmp_path / "out"):
        folder.mkdir()
    work.prepare_data(run, spec.data, run.path("data"), tell)
    work.quantize_aware(run, run.quantizations[-1], tmp_path / "state", tmp_path / "out", tell)
    signal, windows = heard["signal"], load_windows(run.path("data"), "train")
    assert torch.equal(signal.sources, windows.sources) and signal.shares == [[1 / 3, 2 / 3], [0.0, 1.0]]
    weights = [next(teacher.model.parameters()) for teacher in signal.teachers]
    torch.testing.assert_close(weights[1], 1.5 * weights[0])


@pytest.mark.parametrize("several", [True, False])
def test_the_ledger_begins_at_a_teacher_that_taught_alone(project, tmp_path, several):
    whole = yaml.safe_load(SPEC)
    spec = Spec.model_validate(whole if several else whole | {"teacher": {"model": "first"}})
    run = open_run(spec, base=project, out=tmp_path / "run")
    for folder in (run.folder, tmp_path / "out"):
        folder.mkdir()
    work.prepare_data(run, spec.data, run.path("data"), tell)
    shutil.copytree(project / "second", run.student)
    work.measure_hops(run, tmp_path / "out", tell)
    assert (tmp_path / "out" / "student.json").exists() == (not several)


REFUSALS = {
    "teacher.sources: law is none of data.sources": lambda text: text.replace("sources: [code]", "sources: [law]"),
    "nobody teaches prose": lambda text: text.replace("weight: 2.0", "weight: 2.0, sources: [code]"),
    "third: not a model folder": lambda text: text.replace("model: second", "model: third"),
    "is id 101, but id 100 in first": lambda text: text.replace("model: second", "model: swapped"),
    "key 'data.context': 129 tokens are more than the context of 128": lambda text: text.replace(
        "context: 32\n  val", "context: 129\n  val"
    ),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_is_refused_before_any_work(project, words):
    shutil.copytree(project / "second", project / "swapped", dirs_exist_ok=True)
    path = project / "swapped" / "tokenizer.json"
    whole = json.loads(path.read_text("utf-8"))
    vocab = whole["model"]["vocab"]
    a, b = (next(token for token, i in vocab.items() if i == n) for n in (100, 101))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(whole), "utf-8")
    (project / "bad.yaml").write_text(REFUSALS[words](SPEC).replace("name: tiny", "name: bad"))
    refused(edgekd("run", "bad.yaml", cwd=project), words)
    assert not (project / "runs" / "bad" / "data").exists()
