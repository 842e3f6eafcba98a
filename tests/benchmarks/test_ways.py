"""The comparison of ways to learn: each is a spec, and the table tells medians and ranges."""

from pathlib import Path

import pytest

from edgekd.benchmarks.peers.ways import COLUMNS, WAYS, spec_of, table
from edgekd.errors import EdgekdError
from edgekd.spec import Spec, load_spec


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_a_spec_of_equal_steps(way):
    spec = Spec.model_validate(spec_of(way, None, Path("x")))
    quickstart = load_spec("quickstart")
    assert spec.distill.steps == quickstart.distill.steps and not spec.distill.baseline
    differing = {name for name in Spec.model_fields if getattr(spec, name) != getattr(quickstart, name)}
    assert differing <= {"name", "teacher", "student", "distill"}
    assert Spec.model_validate(spec_of(way, 3, Path("x"))).distill.steps == 3


def test_two_teachers_need_a_second():
    with pytest.raises(EdgekdError, match="--second"):
        spec_of("two-teachers", None, None)


def test_the_table_tells_medians_and_ranges():
    samples = [dict.fromkeys(COLUMNS, value) for value in (3.0, 1.0, 2.0)]
    lines = table({"labels": samples, "cached": samples[:1]}).splitlines()
    assert lines[0].split() == ["way", *COLUMNS]
    assert lines[1].count("2 (1 to 3)") == len(COLUMNS) and lines[2].split() == ["cached", *["3"] * len(COLUMNS)]
