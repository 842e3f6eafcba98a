"""The spec: shipped files are valid, and each kind of mistake gets one sentence with the key in it."""

import textwrap
from importlib import resources
from pathlib import Path

import pytest

from edgekd.errors import SpecError
from edgekd.spec import Spec, load_spec

BASE = """
name: q
teacher: {model: x}
student: {init: cut, layers: 4}
data: {source: stdlib}
targets: [{target: gguf, recipes: [fp16]}]
"""


@pytest.mark.parametrize(
    "path", sorted(Path(str(resources.files("edgekd") / "specs")).glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_spec_is_valid(path):
    assert isinstance(load_spec(path), Spec)


def test_a_shipped_spec_is_found_by_name():
    assert load_spec("quickstart").name == "quickstart"


def test_yaml_12_floats_are_numbers(tmp_path):
    assert _load(tmp_path, BASE + "distill: {learning_rate: 1e-3}").distill.learning_rate == 0.001


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE + "distil: {}", "unknown key 'distil'; did you mean 'distill'?"),
        (BASE + "distill: {stps: 3}", "unknown key 'distill.stps'; did you mean 'steps'?"),
        (BASE + "zzz: 1", "unknown key 'zzz'; valid keys: name, seed, teacher"),
        (BASE.replace("layers: 4", "layrs: 4"), "unknown key 'student.layrs'; did you mean 'layers'?"),
        (BASE.replace("recipes", "recipe"), "unknown key 'targets.0.recipe'; did you mean 'recipes'?"),
        (BASE + "verify: {thresholds: {int8: {top1: 3}}}", "'verify.thresholds.int8.top1'; did you mean 'top1_min'?"),
        (BASE + "distill: {steps: '3'}", "key 'distill.steps': input should be a valid integer (given: '3')"),
        (BASE + "distill: {steps: 0}", "key 'distill.steps': input should be greater than 0"),
        (BASE + "distill: {loss: {kl: 1}}", "key 'distill.loss.kl': input should be 'forward_kl'"),
        (BASE + "distill: {loss: {}}", "loss needs at least one of"),
        (BASE.replace("init: cut", "init: cat"), "key 'student': input tag 'cat'"),
        (BASE.replace("stdlib", "jsonl"), "source jsonl needs paths"),
        (BASE.replace("stdlib", "hub"), "source hub needs name"),
        (BASE.replace("name: q", "name: ../q"), "key 'name'"),
        (BASE.replace("name: q", ""), "key 'name' is missing"),
        (BASE + "name: b", "key 'name' stands twice"),
        ("a: [", "not valid YAML"),
        ("- 1", "a spec is a mapping"),
        ("", "a spec is a mapping"),
    ],
)
def test_mistakes_are_named(tmp_path, text, said):
    with pytest.raises(SpecError) as raised:
        _load(tmp_path, text)
    assert said in str(raised.value)
    assert "spec.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named():
    with pytest.raises(SpecError, match=r"nowhere\.yaml: no such spec"):
        load_spec("nowhere.yaml")


def test_yaml_cannot_construct_objects(tmp_path):
    with pytest.raises(SpecError, match="not valid YAML"):
        _load(tmp_path, BASE + "seed: !!python/object/apply:os.getpid []")


def _load(tmp_path, text):
    path = tmp_path / "spec.yaml"
    path.write_text(textwrap.dedent(text))
    return load_spec(path)
