"""The chain of a run: what each stage's key hangs on, and what it is planned to need."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgekd
from edgekd import plan, targets
from edgekd.checkpoint import Checkpoint
from edgekd.memory import CONTEXT_BYTES
from edgekd.runs import work
from edgekd.runs.chain import Stage, stages
from edgekd.runs.preflight import open_run
from edgekd.runs.run import resolve
from edgekd.spec import Spec

for module in ("llama_cpp", "onnxruntime", "coremltools"):
    pytest.importorskip(module)

MACHINE = plan.Machine(ram_bytes=2**36, disk_free_bytes=2**40, flops_per_s=1e11, training_flops_per_s=1e11)
GGUF = {"target": "gguf", "recipes": ["fp16", "portable-int4", "gguf-q4_k_m"]}
ONNX = {"target": "onnx", "recipes": ["portable-int4"]}
COREML = {"target": "coreml", "recipes": ["fp16"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("def f(x):\n    return x\n")
    return tmp_path


def spec_of(teacher: Path, /, **changes: Any) -> Spec:
    spec = {
        "name": "tiny",
        "teacher": {"model": str(teacher)},
        "student": {"init": "cut", "layers": 2},
        "data": {"source": "text", "paths": ["text/*.txt"], "context": 32},
        "targets": [GGUF, ONNX, COREML],
        "verify": {"windows": 2, "context": 32},
        "bench": {"prompt_tokens": [8], "decode_tokens": 4},
    }
    return Spec.model_validate(spec | changes)


def chain(
    folder: Path, teacher: Path, /, seeds: tuple[int, ...] = (), machine: plan.Machine = MACHINE, **changes: Any
) -> dict[str, Stage]:
    """Every stage by its name."""
    run = open_run(spec_of(teacher, **changes), base=folder, more_seeds=seeds)
    return {stage.name: stage for stage in stages(run, machine)}


def changed(before: dict[str, Stage], after: dict[str, Stage]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name].key != after[name].key}


def hanging_on(name: str, found: dict[str, Stage]) -> set[str]:
    """A stage and all that read it, by way of others too."""
    names = {name}
    while more := {n for n in found if set(found[n].reads) & {found[m].folder for m in names}} - names:
        names |= more
    return names


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch):
    """A source file of the package that reads as if it had been edited."""

    def edit(path: Path) -> None:
        assert path.is_file()
        true = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda p: true(p) + b"# edited" * (p == path))

    return edit


@pytest.mark.parametrize(
    ("part", "redone"),
    [
        ("quant/calibrate.py", "calibrate"),
        ("matmul.py", "calibrate"),
        ("quant/gptq.py", "quantize portable-int4 gptq"),
        ("verify/tokens.py", "verify gguf-fp16"),
        ("audit.py", "audit gguf-fp16"),
    ],
)
def test_code_that_changes_redoes_what_it_makes(folder, tiny_teacher, edited, part, redone):
    before = chain(folder, tiny_teacher)
    edited(Path(edgekd.__file__).parent / part)
    found = changed(before, chain(folder, tiny_teacher))
    assert redone in found
    assert not {"data", "student", "baseline", "quality"} & found


def test_an_edited_comment_discards_no_training(folder, tiny_teacher, monkeypatch):
    """Whichever file of the package it stands in."""
    spec = {"quantize": {"method": "qad"}}
    before = chain(folder, tiny_teacher, **spec)
    true = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: true(p) + b"# edited" * (p.suffix == ".py"))
    found = changed(before, chain(folder, tiny_teacher, **spec))
    assert not {"data", "student", "baseline", "quantize portable-int4 qad"} & found
    assert {"verify gguf-fp16", "quality", "export gguf-portable-int4"} <= found


@pytest.mark.parametrize(
    ("algorithm", "redone"),
    [
        ("TEXT", "data"),
        ("STUDENT", "student"),
        ("TRAINING", "student"),
        ("EVALUATION", "quality"),
        ("QAD", "quantize portable-int4 qad"),
    ],
)
def test_another_version_of_an_algorithm_redoes_what_it_made(folder, tiny_teacher, monkeypatch, algorithm, redone):
    spec = {"quantize": {"method": "qad"}}
    before = chain(folder, tiny_teacher, **spec)
    monkeypatch.setattr(f"edgekd.distill.versions.{algorithm}", 999)
    found = changed(before, chain(folder, tiny_teacher, **spec))
    trained = {"student", "baseline"} if redone == "student" else set()
    assert found == hanging_on(redone, before).union(*(hanging_on(name, before) for name in trained))


@pytest.mark.parametrize("target", ["gguf", "onnx", "coreml"])
def test_a_targets_code_redoes_its_own_artifacts_alone(folder, tiny_teacher, edited, target):
    before = chain(folder, tiny_teacher)
    edited(Path(targets.__file__).parent / target / "target.py")
    found = changed(before, chain(folder, tiny_teacher))
    assert found == {name for name in before if name.partition(" ")[2].startswith(f"{target}-")}


def test_a_targets_packages_redo_its_own_artifacts_alone(folder, tiny_teacher, monkeypatch):
    from importlib import metadata

    before = chain(folder, tiny_teacher)
    true = metadata.version
    monkeypatch.setattr("edgekd.targets.shared.artifact.version", lambda n: true(n) + "x" * (n == "onnxruntime"))
    found = changed(before, chain(folder, tiny_teacher))
    assert found and all(" onnx-" in name for name in found)


def test_what_all_targets_share_redoes_every_artifact(folder, tiny_teacher, edited):
    before = chain(folder, tiny_teacher)
    edited(Path(targets.__file__).parent / "shared" / "artifact.py")
    found = changed(before, chain(folder, tiny_teacher))
    assert found == {name for name in before if name.split()[0] in ("export", "verify", "audit", "bench")}


def test_a_targets_option_redoes_its_own_artifacts_alone(folder, tiny_teacher):
    before = chain(folder, tiny_teacher)
    after = chain(folder, tiny_teacher, targets=[GGUF, ONNX, COREML | {"minimum_ios": 26}])
    assert changed(before, after) == {name for name in before if " coreml-" in name}


def test_a_stage_hangs_on_all_it_reads(folder, tiny_teacher):
    before = chain(folder, tiny_teacher)
    after = chain(folder, tiny_teacher, distill={"steps": 3})
    assert changed(before, after) == hanging_on("student", before) | hanging_on("baseline", before)


def test_benchmarks_come_last(folder, tiny_teacher):
    phases = [stage.phase for stage in chain(folder, tiny_teacher).values()]
    assert phases == sorted(phases, key="work bench".index) and set(phases) == {"work", "bench"}


def test_nothing_is_timed_where_another_runtime_stands_in(folder, tiny_teacher, monkeypatch):
    monkeypatch.setattr("edgekd.runs.run.stand_in", lambda target, _: "an interpreter" if target == "coreml" else None)
    timed = {name for name, stage in chain(folder, tiny_teacher).items() if stage.phase == "bench"}
    assert timed and not any("coreml" in name for name in timed)


def test_verifying_is_planned_for_the_two_models_in_memory(folder, tiny_teacher):
    """The artifact and the student: the difference to one of them in memory is a model's weights in float32."""
    student = {"init": "config", "architecture": "llama", "hidden_size": 1024, "intermediate_size": 4096}
    student |= {"layers": 8, "heads": 8, "kv_heads": 8}
    found = chain(folder, tiny_teacher, student=student, targets=[GGUF])
    one = found["calibrate"].cost.ram_bytes
    weights = 4 * 8 * (4 * 1024**2 + 3 * 1024 * 4096)
    assert found["verify gguf-portable-int4"].cost.ram_bytes >= one + weights


def test_a_further_seed_trains_and_measures_and_no_more(folder, tiny_teacher):
    alone, more = chain(folder, tiny_teacher), chain(folder, tiny_teacher, seeds=(7,))
    assert {name: stage.key for name, stage in more.items() if name in alone} == {
        name: stage.key for name, stage in alone.items()
    }
    extra = {name: stage for name, stage in more.items() if name not in alone}
    assert set(extra) == {"student, seed 7", "baseline, seed 7", "quality, seed 7"}
    assert extra["student, seed 7"].folder == "seeds/7/student"
    assert extra["student, seed 7"].key != alone["student"].key
    assert set(extra["quality, seed 7"].reads) == {"data", "seeds/7/student", "seeds/7/baseline"}


def test_the_log_of_a_training_that_has_begun_tells_the_time_left(folder, tiny_teacher, monkeypatch):
    monkeypatch.chdir(folder)
    distill = {"steps": 100, "batch_size": 4, "gradient_accumulation": 2}
    fresh = chain(folder, tiny_teacher, distill=distill)["student"]
    log = fresh.state / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"event": "validation", "step": 1, "steps": 100, "perplexity": 9.0}\n')
    assert chain(folder, tiny_teacher, distill=distill)["student"].cost == fresh.cost
    lines = (f'{{"event": "step", "step": {i}, "steps": 100, "tokens_per_s": 128}}\n' for i in range(1, 41))
    log.write_text("".join(lines))
    begun = chain(folder, tiny_teacher, distill=distill)["student"].cost
    assert (begun.seconds, begun.source) == (60 * 8 * 32 / 128, "measured:steps")


def test_further_teachers_are_planned_where_they_lie(folder, tiny_teacher):
    """On a GPU, and in the RAM that they are loaded to."""
    machine, one = replace(MACHINE, gpu_bytes=2**36), {"model": str(tiny_teacher)}
    alone, three = (
        chain(folder, tiny_teacher, machine=machine, teacher=one | {"more": [one] * count})["student"].cost
        for count in (0, 2)
    )
    weights = 4 * Checkpoint(tiny_teacher).architecture.parameters()
    assert three.gpu_bytes == alone.gpu_bytes + 2 * weights and three.ram_bytes == alone.ram_bytes + 2 * weights
    assert three.seconds > alone.seconds


def test_a_teacher_must_fit_where_it_is_captured(folder, tiny_teacher):
    machine, teacher = replace(MACHINE, gpu_bytes=2**36), {"model": str(tiny_teacher), "signal": "cached"}
    found = chain(folder, tiny_teacher, machine=machine, teacher=teacher)
    weights = 4 * Checkpoint(tiny_teacher).architecture.parameters()
    assert found["student"].cost.ram_bytes == found["baseline"].cost.ram_bytes + weights
    assert found["student"].cost.gpu_bytes >= CONTEXT_BYTES["cuda"] + weights


@pytest.mark.parametrize(
    ("teacher", "distill", "known"),
    [
        ({}, {}, True),
        ({"signal": "cached"}, {}, True),
        ({"more": [{"model": "builtin:pycode-16m"}]}, {}, False),
        ({"more": [{"model": "builtin:pycode-16m"}], "signal": "cached"}, {}, True),
        ({"alignment": "text"}, {}, False),
        ({}, {"on_policy": {"max_new_tokens": 8}}, False),
        ({}, {"memory": {"lora": {}}}, False),
    ],
)
def test_operations_are_told_where_they_are_known(folder, tiny_teacher, teacher, distill, known):
    named, student = {"model": str(tiny_teacher)}, {"init": "checkpoint", "model": str(tiny_teacher)}
    spec = spec_of(tiny_teacher, teacher=named | teacher, student=student, distill=distill)
    run = resolve(spec, base=folder, folder=folder / "run", words=[], more_seeds=[])
    assert (work._operations(run, True) is not None) == known
