"""What a wheel built from a clean copy of the tree holds, and that every dependency is pinned."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def tracked() -> list[str]:
    """The files a clone would have: those git knows, and those it would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools")
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, tree], check=True
    )
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_module_and_file(wheel: zipfile.ZipFile) -> None:
    expected = set()
    for name in tracked():
        if re.match(r"(edgekd|targets|benchmarks)/", name) and "/." not in name:
            installed = name.replace("edgekd/optimum/", "optimum/commands/register/")
            expected.add(installed if name.startswith("edgekd/") else f"edgekd/{name}")
    assert {"edgekd/py.typed", "edgekd/specs/quickstart.yaml", "edgekd/targets/gguf/target.py"} <= expected
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == expected


def test_the_wheel_says_who_it_is(wheel: zipfile.ZipFile) -> None:
    (points,) = [wheel.read(n).decode() for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "edgekd = edgekd.cli:main" in points
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", line) for line in lines), lines
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def test_every_direct_dependency_is_pinned_to_a_version_it_allows() -> None:
    pinned = pins()
    for line in [*PROJECT["dependencies"], *(r for requirements in EXTRAS.values() for r in requirements)]:
        requirement = Requirement(line)
        if requirement.name == "edgekd":
            continue
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{line} does not allow {pinned[name]}"


def test_all_means_every_user_extra() -> None:
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).extras == set(EXTRAS) - {"all", "dev", "fuzz"}
