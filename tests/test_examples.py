"""Every example that a newcomer copies: the template's ways to begin, the README's and the help's commands."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgekd import plan
from edgekd.runs.chain import stages
from edgekd.runs.preflight import open_run
from edgekd.spec import Spec, load_spec
from edgekd.student import init_student, load_tokenizer, save_model

pytest.importorskip("llama_cpp")

ROOT = Path(__file__).parent.parent
TEMPLATE = (ROOT / "edgekd" / "specs" / "template.yaml").read_text("utf-8")
MACHINE = plan.Machine(ram_bytes=2**36, disk_free_bytes=2**40, flops_per_s=1e11, training_flops_per_s=1e11)
TINY: dict[str, Any] = {
    "data": {"source": "text", "paths": ["text/*.txt"], "context": 32, "validation_share": 0.2, "test_share": 0.2},
    "distill": {"steps": 2, "batch_size": 2, "warmup_steps": 1, "validate_every": 2, "baseline": False},
    "quantize": {"method": "rtn", "compare": [], "calibration_windows": 2},
    "verify": {"windows": 2, "context": 32, "greedy_tokens": 4},
    "bench": {"prompt_tokens": [8], "decode_tokens": 4, "runs": 1, "cold_runs": 0, "curve_seconds": 0},
}
ALL_TARGETS = [
    {"target": "gguf", "recipes": ["fp16", "portable-int4"]},
    {"target": "onnx", "recipes": ["fp16"]},
    {"target": "coreml", "recipes": ["portable-int4"]},
    {"target": "executorch", "recipes": ["portable-int4"]},
]
OF_THE_REAL_ONE = {"serve", "pick", "cost", "compare", "eval", "bundle"}
"""Without an end, of many minutes, or about limits, prices and licences of a real student: tested elsewhere, as are
devices, which nobody has plugged in here."""
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 2, "kv_heads": 1}
SMALL: dict[str, dict[str, Any]] = {
    "cut": {"init": "cut", "layers": 2, "hidden_size": 64, "intermediate_size": 96},
    "checkpoint": {"init": "checkpoint", "model": "./student"},
    **{kind: {"init": "config", "architecture": kind, **SHAPE} for kind in ("llama", "qwen2", "qwen3")},
}


def sections() -> dict[str, list[str]]:
    """The template's lines by top-level key, keys in comments uncommented."""
    found: dict[str, list[str]] = {}
    for line in TEMPLATE.splitlines():
        if named := re.match(r"(\w+):", line):
            found[named[1]] = []
        if found and line:
            found[[*found][-1]].append(re.sub(r"^( +)# ", r"\1", line))
    return found


def ways_to_begin() -> dict[str, list[str]]:
    """The three students that the template describes."""
    first, *lines = sections()["student"]
    starts = [i for i, line in enumerate(lines) if "init:" in line]
    parts = [lines[i:j] for i, j in itertools.pairwise([*starts, len(lines)])]
    return {yaml.safe_load("\n".join(part))["init"]: [first, *part] for part in parts}


def spec_of(way: str, folder: Path, *, sized: bool = False) -> Spec:
    """The template, one way to begin and every optional key but those of other data sources uncommented.

    Args:
        sized: of a cut student the keys that stand in place of its shape, which stay out without.
    """
    shape, in_place = ("layers", "hidden_size", "intermediate_size"), ("parameters", "fits")
    left_out = shape if sized else in_place
    student = [line for line in ways_to_begin()[way] if not line.strip().startswith(tuple(f"{k}:" for k in left_out))]
    chosen = sections() | {"student": student}
    chosen["data"] = [line for line in TEMPLATE.splitlines() if line in ("data:", *chosen["data"])]
    path = folder / "my-model.yaml"
    path.write_text("\n".join(line for lines in chosen.values() for line in lines))
    return load_spec(path)


def test_the_template_shows_every_way_to_begin(tmp_path: Path) -> None:
    assert set(ways_to_begin()) == {"cut", "config", "checkpoint"}
    assert {target.target for target in spec_of("cut", tmp_path).targets} == {"gguf", "onnx", "coreml", "executorch"}


def test_the_template_shows_a_student_by_size_and_device(tmp_path: Path) -> None:
    sized = spec_of("cut", tmp_path, sized=True).student
    assert sized.parameters and sized.fits and sized.layers is None


@pytest.mark.parametrize("way", ["cut", "config", "checkpoint"])
def test_the_templates_examples_can_be_planned(way: str, tmp_path: Path) -> None:
    if way == "checkpoint":
        run = open_run(spec_of("cut", tmp_path), base=tmp_path)
        model = init_student(run.spec.student, run.teacher.folder, seed=0)
        save_model(model, load_tokenizer(run.teacher.folder), tmp_path / "student")
    run = open_run(spec_of(way, tmp_path), base=tmp_path)
    assert run.spec.student.init == way and len(stages(run, MACHINE)) > 10


def edgekd(folder: Path, *words: str) -> str:
    """Run a command there, and give back what it printed."""
    command = [sys.executable, "-m", "edgekd.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr[-2000:]}"
    return done.stdout


def project(folder: Path, teacher: Path, student: dict[str, Any], targets: list[Any], name: str = "tiny") -> Path:
    """A folder with text, and a spec of a run of two steps."""
    (folder / "text").mkdir(parents=True)
    for i in range(40):
        text = "".join(f"def f{i}_{j}(x, y={j}):\n    return x * {i + j} + y\n" for j in range(12))
        (folder / "text" / f"{i}.txt").write_text(text)
    spec = {"name": name, "teacher": {"model": str(teacher)}, "student": student, "targets": targets, **TINY}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", SMALL)
def test_every_way_to_begin_runs(way: str, tmp_path: Path, tiny_teacher: Path) -> None:
    """A fresh student of every architecture reaches every target."""
    fresh = SMALL[way]["init"] == "config"
    targets = ALL_TARGETS if fresh else ALL_TARGETS[:1]
    folder = project(tmp_path / "p", tiny_teacher, SMALL[way], targets)
    shutil.copytree(tiny_teacher, folder / "student")
    (folder / "student" / "generation_config.json").unlink()
    edgekd(folder, "run", "spec.yaml", "--report-only")
    made = [json.loads(path.read_text()) for path in folder.glob("runs/tiny/artifacts/*/manifest.json")]
    assert len(made) == sum(len(target["recipes"]) for target in targets)
    inherited = (folder / "runs" / "tiny" / "student" / "generation_config.json").read_text()
    assert inherited == (tiny_teacher / "generation_config.json").read_text()


def examples() -> list[list[str]]:
    """The commands in the help's epilogs and in the README's blocks, in the order in which they build on each other."""
    import typer

    from edgekd.cli import app

    group = typer.main.get_command(app)
    texts = [command.epilog or "" for command in group.commands.values()]  # type: ignore[attr-defined]
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        texts += re.findall(r"^```\w*\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
    found = [
        shlex.split(re.split("[#>]", command)[0])
        for text in texts
        for command in re.findall(r"^(?:Example: )?(?=edgekd )(.*)$", text.replace(" && ", "\n"), re.M)
    ]
    order = ["edgekd init", "edgekd plan", "edgekd distill", "edgekd run", "edgekd quantize", "edgekd export"]
    return sorted(found, key=lambda words: next((i for i, o in enumerate(order) if o == " ".join(words[:2])), 9))


@pytest.mark.slow
def test_the_readmes_and_the_helps_commands_run(tmp_path: Path, tiny_teacher: Path) -> None:
    """On a tiny run in the quickstart's place, of a teacher with as long a context."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    folder = project(tmp_path / "p", teacher, SMALL["cut"], ALL_TARGETS[:1], name="quickstart")
    (folder / "notes.txt").write_text("".join(path.read_text() for path in (folder / "text").iterdir()))
    stand_ins = {
        "quickstart": "spec.yaml",
        "my-model.yaml": "spec.yaml",
        "MODEL": "runs/quickstart/student",
        "ARTIFACT": "model-q4",
        "before/model-q4": "model-q4",
        "after/model-q4": "model-q4",
        "SmolLM2-135M-Instruct.Q4_1.gguf": "runs/quickstart/artifacts/gguf-fp16/model.gguf",
    }
    done = []
    for words in dict.fromkeys(tuple(stand_ins.get(word, word) for word in words[1:]) for words in examples()):
        if words[0] == "init":
            words = ("init", "my-model.yaml")
        elif words[0] in ("verify", "bench", "chat") and not (folder / words[1]).exists():
            shutil.copytree(folder / "runs/quickstart/artifacts/gguf-portable-int4", folder / words[1])
        elif words[0] in ("quantize", "export"):
            shutil.rmtree(folder / words[2], ignore_errors=True)
        if words[0] in OF_THE_REAL_ONE or "--device" in words:
            continue
        edgekd(folder, *words)
        done.append(words[0])
    assert {"init", "plan", "distill", "run", "quantize", "export", "verify", "bench", "report", "chat"} <= set(done)
