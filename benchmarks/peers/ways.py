"""One teacher, one student, equal steps of equal tokens, and different ways to learn.

    python -m edgekd.benchmarks.peers.ways OUT --seeds 0,1,2
    python -m edgekd.benchmarks.peers.ways OUT --ways labels,greedy --steps 20      # a small part, to try it
    python -m edgekd.benchmarks.peers.ways OUT --second ./other-teacher             # two teachers too

Each way is a run of ``edgekd distill`` on the shipped quickstart with other keys, below OUT; one that is done is not
done again. Prints a table, the median over the seeds with its range, then one line of JSON with every sample. On policy
a step reads no more tokens than elsewhere, and fewer where texts end early: the table tells how many.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from ...errors import EdgekdError, SpecError
from ...files import Json, read_sealed, write_text
from ...spec import builtin_spec
from ...strict_yaml import read_yaml

WAYS: dict[str, Json] = {
    "labels": {"distill": {"loss": {"cross_entropy": 1.0}}},
    "even": {"student": {"choose": "even"}},
    "greedy": {},
    "cached": {"teacher": {"signal": "cached"}},
    "on-policy": {"distill": {"on_policy": {"share": 0.5, "prompt_tokens": 192, "max_new_tokens": 64}}},
    "two-teachers": {},
}
"""What each changes of the spec."""
COLUMNS = ("loss", "perplexity", "next_token_accuracy", "kept", "kl_to_teacher", "tokens", "train_s")


def spec_of(way: str, steps: int | None, second: Path | None) -> Json:
    """The quickstart's spec with a way's keys; trained alone, without a baseline."""
    path = builtin_spec("quickstart")
    assert path is not None
    spec: Json = read_yaml(path, SpecError)
    changes = [WAYS[way], {"name": way, "distill": {"baseline": False}}]
    if steps:
        few = {"steps": steps, "warmup_steps": min(steps, spec["distill"]["warmup_steps"])}
        changes.append({"distill": {**few, "validate_every": max(1, steps // 5)}})
    if way == "two-teachers":
        if second is None:
            raise EdgekdError("two-teachers: there is one teacher.", "Name another of its tokenizer with --second.")
        changes.append({"teacher": {"more": [{"model": str(second.resolve())}]}})
    for change in changes:
        for section, keys in change.items():
            spec[section] = {**spec[section], **keys} if isinstance(keys, dict) else keys
    return spec


def trained(folder: Path, spec: Mapping[str, object], seed: int) -> dict[str, float]:
    """The figures of one way with one seed."""
    out, path = folder / f"{spec['name']}-{seed}", folder / f"{spec['name']}.yaml"
    write_text(path, yaml.safe_dump(dict(spec), sort_keys=False))
    command = [sys.executable, "-m", "edgekd.cli", "distill", path, "--seed", seed, "--out", out, "--json"]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EdgekdError(f"{spec['name']}, seed {seed}: edgekd distill ended with {done.returncode}.")
    quality: Json = json.loads(done.stdout)["quality"]
    student, teacher = quality["student"], quality["teacher"]
    figures = {name: student[name] for name in ("loss", "perplexity", "next_token_accuracy", "kl_to_teacher")}
    figures["kept"] = student["next_token_accuracy"] / teacher["next_token_accuracy"]
    return figures | _of_training(out)


def _of_training(out: Path) -> dict[str, float]:
    """Tokens and seconds of a training, from its stage's record."""
    told = read_sealed(out / ".edgekd" / "student.json")["figures"]
    assert isinstance(told, dict)
    return {name: told[name] for name in ("tokens", "train_s")}


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Medians, each with its range where there are several seeds."""
    lines = [["way", *COLUMNS]]
    for way, samples in found.items():
        cells = [[sample[name] for sample in samples] for name in COLUMNS]
        lines.append([way, *(_cell(values) for values in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def _cell(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):,.4g}"
    return middle if min(values) == max(values) else f"{middle} ({min(values):,.4g} to {max(values):,.4g})"


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the runs.")],
    seeds: Annotated[str, typer.Option(help="Each way is trained with each.")] = "0",
    ways: Annotated[str, typer.Option(help=f"Of {', '.join(WAYS)}. Default: all that can be done.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the quickstart's.")] = None,
    second: Annotated[Path | None, typer.Option(help="A second teacher.")] = None,
) -> None:
    """Train in several ways, and compare."""
    chosen = ways.split(",") if ways else [way for way in WAYS if second or way != "two-teachers"]
    if unknown := [way for way in chosen if way not in WAYS]:
        raise typer.BadParameter(f"there is no way {unknown[0]!r}; there are {', '.join(WAYS)}")
    specs = [spec_of(way, steps, second) for way in chosen]
    out.mkdir(parents=True, exist_ok=True)
    found = {str(spec["name"]): [trained(out, spec, int(seed)) for seed in seeds.split(",")] for spec in specs}
    typer.echo(table(found))
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
