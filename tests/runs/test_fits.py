"""A spec, or a command, that names a number of parameters and a device in place of a shape."""

import json
from pathlib import Path

import pytest
import yaml

from edgekd.errors import DoesNotFit, SpecError
from edgekd.plan import Machine
from edgekd.runs.chain import stages
from edgekd.runs.preflight import open_run
from edgekd.spec import load_spec

MACHINE = Machine(2**36, 2**40, 1e11, 1e11)
PROFILE = Path(__file__).parents[2] / "benchmarks" / "profiles" / "iphone-15-pro.yaml"
BASE = {
    "name": "fits",
    "data": {"source": "text", "paths": ["*.txt"], "context": 32},
    "distill": {"steps": 4},
    "targets": [{"target": "gguf", "recipes": ["portable-int4"]}],
    "verify": {"context": 32},
    "bench": {"prompt_tokens": [8], "decode_tokens": 8},
}
FITS = {"profile": "iphone-15-pro", "recipe": "portable-int4", "context": 100}


def _open(tmp_path, teacher, **student):
    (tmp_path / "some.txt").write_text("x = 1\n" * 200)
    spec = BASE | {"teacher": {"model": str(teacher)}, "student": {"init": "cut", **student}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    return open_run(load_spec(tmp_path / "spec.yaml"), base=tmp_path, out=tmp_path / "run")


def _profile(path, bytes_):
    """A phone that gives an app so much."""
    values = yaml.safe_load(PROFILE.read_text())
    path.write_text(yaml.safe_dump(values | {"app_memory": values["app_memory"] | {"value": bytes_ / 1e9}}))


def test_a_run_is_that_of_the_shape_written_out(tmp_path, tiny_teacher):
    searched = _open(tmp_path, tiny_teacher, parameters="47.5k", fits=FITS)
    written = _open(tmp_path, tiny_teacher, layers=3, hidden_size=32, intermediate_size=64)
    assert searched.spec.student == written.spec.student
    assert searched.student_config == written.student_config
    assert [stage.key for stage in stages(searched, MACHINE)] == [stage.key for stage in stages(written, MACHINE)]


def test_a_profile_of_ones_own_lies_beside_the_spec(tmp_path, tiny_teacher):
    """Weights of 47,520 parameters at 4.5 to 8.5 bits, and 19,200 B of cache: 57 kB at 100 tokens."""
    wanted = {"parameters": "47.5k", "fits": FITS | {"profile": "phone.yaml"}}
    _profile(tmp_path / "phone.yaml", 100_000)
    assert _open(tmp_path, tiny_teacher, **wanted).spec.student.layers == 3
    _profile(tmp_path / "phone.yaml", 30_000)
    with pytest.raises(DoesNotFit, match=r"gives an app 30\.0 kB, .* 47,520 parameters .layers 3, hidden_size 32"):
        _open(tmp_path, tiny_teacher, **wanted)


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        ({"profile": "iphone-15-prp"}, "unknown profile 'iphone-15-prp'; did you mean 'iphone-15-pro'?"),
        ({"profile": "rtx-4090"}, "student.fits.profile: what .*4090.* gives an app is not sourced"),
        ({"recipe": "portable-int5"}, "no recipe 'portable-int5'; did you mean 'portable-int4'?"),
        ({"context": 129}, "'student.fits.context': 129 tokens are more than the teacher's context of 128"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, tiny_teacher, fits, said):
    with pytest.raises(SpecError, match=said) as raised:
        _open(tmp_path, tiny_teacher, parameters="47.5k", fits=FITS | fits)
    assert "\n" not in str(raised.value)


def test_the_context_is_the_teachers_where_none_is_named(tmp_path, tiny_teacher):
    from edgekd.runs.fits import search
    from edgekd.spec import CutStudent

    spec = CutStudent(init="cut", parameters="47.5k", fits={"profile": "iphone-15-pro"})
    found = search(spec, json.loads((tiny_teacher / "config.json").read_text()), tmp_path)
    assert found.context == 128 and found.budget_bytes == 3_000_000_000
