"""The spec: shipped files are valid, and each kind of mistake gets one sentence with the key in it."""

import math
import os
import textwrap
import time
import typing
from importlib import resources
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from edgekd import strict_yaml
from edgekd.errors import SpecError
from edgekd.spec import DataSpec, Spec, load_spec
from edgekd.strict_yaml import read_yaml
from edgekd.targets import spec_model

MODEL = spec_model()

FITS = "parameters: 1.2B, fits: {profile: iphone-15-pro}"
BASE = """
name: q
teacher: {model: x}
student: {init: cut, layers: 4}
data: {source: stdlib}
targets: [{target: gguf, recipes: [fp16]}]
"""


def _target(words):
    """The spec with another target, or further keys of it."""
    return BASE.replace("target: gguf", f"target: {words}")


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
        (BASE.replace("layers: 4", ""), "key 'student': give layers, or parameters and fits in their place."),
        (BASE.replace("layers: 4", "parameters: 1.2B"), "key 'student': parameters and fits belong together"),
        (BASE.replace("layers: 4", FITS + ", layers: 4"), "give layers, or parameters and fits in their place"),
        (
            BASE.replace("layers: 4", FITS + ", hidden_size: 64"),
            "choose hidden_size and intermediate_size; leave those",
        ),
        (BASE.replace("layers: 4", FITS.replace("1.2B", "1.2b")), "key 'student.parameters': string should match"),
        (
            BASE.replace("layers: 4", FITS.replace("profile", "profil")),
            "'student.fits.profil'; did you mean 'profile'?",
        ),
        (BASE.replace("recipes", "recipe"), "unknown key 'targets.0.recipe'; did you mean 'recipes'?"),
        (BASE + "verify: {thresholds: {int8: {top1: 3}}}", "'verify.thresholds.int8.top1'; did you mean 'top1_min'?"),
        (BASE + "distill: {steps: '3'}", "key 'distill.steps': input should be a valid integer (given: '3')"),
        (BASE + "distill: {steps: 0}", "key 'distill.steps': input should be greater than 0"),
        (BASE + "distill: {loss: {kl: 1}}", "key 'distill.loss.kl': input should be 'forward_kl'"),
        (BASE + "distill: {loss: {}}", "loss needs at least one of"),
        (BASE.replace("gguf", "ggfu"), "key 'targets.0.target': unknown target 'ggfu'; did you mean 'gguf'?"),
        (BASE.replace("gguf", "openvino"), "unknown target 'openvino'; there are: gguf, onnx, coreml, executorch"),
        (BASE.replace("target: gguf, ", ""), "key 'targets.0.target' is missing"),
        (
            _target("gguf, providers: [cpu]"),
            "unknown key 'targets.0.providers'; valid keys: target, recipes, context, gpu_layers.",
        ),
        (_target("onnx, minimum_ios: 18"), "unknown key 'targets.0.minimum_ios'; valid keys: target, recipes, context"),
        (_target("onnx, provider: [cpu]"), "unknown key 'targets.0.provider'; did you mean 'providers'?"),
        (_target("coreml, minimum_io: 18"), "unknown key 'targets.0.minimum_io'; did you mean 'minimum_ios'?"),
        (_target("executorch, providers: []"), "key 'targets.0.providers': list should have at least 1 item"),
        (BASE.replace("init: cut", "init: cat"), "key 'student.init': unknown init 'cat'; did you mean 'cut'?"),
        (BASE.replace("stdlib", "jsonl"), "source jsonl needs paths"),
        (BASE.replace("stdlib", "hub"), "source hub needs name"),
        (BASE.replace("name: q", "name: ../q"), "key 'name'"),
        (BASE.replace("name: q", ""), "key 'name' is missing"),
        (BASE + "name: b", "key 'name' stands twice"),
        (BASE.replace("name: q", "name: con.x"), "is a device on Windows"),
        (BASE.replace("name: q", "name: q."), "key 'name'"),
        (BASE.replace("name: q", "name: " + "q" * 101), "at most 100 characters"),
        (BASE.replace("model: x", 'model: "x\\0y"'), "key 'teacher.model'"),
        (BASE.replace("model: x", 'model: ""'), "key 'teacher.model'"),
        (BASE.replace("[fp16]", "[fp16, fp16]"), "gguf fp16 stands twice"),
        (BASE.replace("stdlib", "stdlib, validation_share: 0.5, test_share: 0.5"), "leave nothing to train on"),
        (BASE + "1: 2", "unknown key '1'"),
        (BASE + "[1]: 2", "a key is one word"),
        (BASE + "{a: 1}: 2", "a key is one word"),
        (BASE + "seed: " + "9" * 5000, "key 'seed': input should be a valid integer"),
        (BASE + "seed: !!bool maybe", "tags such as 'tag:yaml.org,2002:bool' are not read"),
        (BASE + "seed: !!int x", "tags such as"),
        (BASE + "seed: 2026-99-99", "key 'seed'"),
        (BASE + 'seed: "\\UFFFFFFFF"', "not valid YAML"),
        (BASE + 'seed: "\\uD800"', "not valid YAML"),
        (BASE + "verify: &v {}\nbench: *v", "anchors"),
        (BASE + "verify: {<<: {windows: 3}}", "unknown key 'verify.<<'"),
        (BASE + "\0", "not valid YAML"),
        (BASE + "---\n" + BASE, "2 YAML documents"),
        (BASE + "a: " + "[" * 100_000, "nested too deep"),
        (BASE + "a:" + "\n" + "- " * 100_000, "nested too deep"),
        (BASE + "\n".join(f"key{i}: 1" for i in range(40_000)), "unknown key 'key0'"),
        (BASE + "# " + "x" * 2**20, "longer than 1,048,576 bytes"),
        (BASE + f"? {'k' * 100_000}\n: 1", "unknown key 'kkk"),
        (BASE.replace("init: cut", f"init: {'k' * 100_000}"), "key 'student.init': unknown init 'kkk"),
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
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1500


def numeric_keys(model=MODEL):
    """Every key of the spec that takes numbers, with the section it stands in."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation]
        for kind in kinds:  # grows: what stands within unions, lists and annotations
            kinds += typing.get_args(kind)
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for section in sections:
            yield from numeric_keys(section)
        if {int, float} & set(kinds):
            yield model, name


NUMERIC = list(dict.fromkeys(numeric_keys()))


def test_the_list_of_numbers_is_whole():
    names = {name for _, name in NUMERIC}
    assert {"seed", "layers", "loss", "top1_min", "prompt_tokens", "minimum_ios", "head_dim"} <= names
    assert len(NUMERIC) > 40


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -0.5, 10**30, 1e300, -(10**300)])
@pytest.mark.parametrize(("section", "name"), NUMERIC, ids=[f"{model.__name__}.{name}" for model, name in NUMERIC])
def test_every_number_has_bounds(section, name, value):
    for given in (value, [value], {"forward_kl": value}):
        with pytest.raises(ValidationError) as raised:
            section.model_validate({name: given})
        assert name in {error["loc"][0] for error in raised.value.errors()}


def test_a_missing_file_is_named():
    with pytest.raises(SpecError, match=r"nowhere\.yaml: no such spec"):
        load_spec("nowhere.yaml")


def test_yaml_cannot_construct_objects(tmp_path):
    with pytest.raises(SpecError, match="not valid YAML"):
        _load(tmp_path, BASE + "seed: !!python/object/apply:os.getpid []")


@pytest.mark.parametrize("text", ["[" * 1000, "a: !!int x", "a: 1\na: 2", 'a: "\\uD800"', 'a: "\\UFFFFFFFF"'])
def test_a_yaml_without_libyaml_refuses_the_same(tmp_path, monkeypatch, text):
    monkeypatch.setattr(strict_yaml, "_Parser", yaml.SafeLoader)
    with pytest.raises(SpecError, match=r"spec\.yaml"):
        _load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ("1_000", 1000),
        ("-07", -7),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("'1'", "1"),
        ("2026-11-24", "2026-11-24"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("1__0", "1__0"),
        (".nan", ".nan"),
    ],
)
def test_words_and_numbers(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: [{text}]" if text else "a:")
    assert read_yaml(path, SpecError) == {"a": [value] if text else value}


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"name: \xff")
    with pytest.raises(SpecError, match="not valid YAML"):
        load_spec(path)
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())  # Notepad's mark
    assert load_spec(path).name == "q"


@pytest.mark.parametrize("name", ["folder", "pipe", "/dev/zero", "x" * 300, "a\0b"])
def test_what_is_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecError, match="no such spec"):
        load_spec(tmp_path / name)


def test_a_pattern_means_files_alone(tmp_path):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "deep" / "a.txt").write_text("a")
    spec = DataSpec(source="text", paths=["docs/**", "docs/deep/a.txt"])
    assert spec.files(tmp_path) == [tmp_path / "docs" / "deep" / "a.txt"]
    with pytest.raises(SpecError, match="no such file"):
        DataSpec(source="text", paths=["doc*"]).files(tmp_path)


def _load(tmp_path, text):
    path = tmp_path / "spec.yaml"
    path.write_text(textwrap.dedent(text))
    began = time.process_time()  # of this process: a shared machine stalls for seconds now and then
    try:
        return load_spec(path, model=MODEL)
    finally:
        assert time.process_time() - began < 5
