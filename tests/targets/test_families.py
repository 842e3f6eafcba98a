"""Every family of ``edgekd.architecture``, through every runtime, against transformers. ``docs/architectures.md`` is
the table of it; to write it again: ``python tests/targets/test_families.py``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the table, which pytest does not run

from families import CASES, ODD, WINDOW, architectures, make_family

from cases import IDS, export_to, logits, mean_kl, quantized, reference, skip_without, spec_of
from edgekd import targets
from edgekd.checkpoint import Checkpoint
from edgekd.errors import SpecError, Unsupported
from edgekd.quant.calibrate import second_moments
from edgekd.student import load_model
from edgekd.targets.shared.recipes import load_recipe, recipe_names

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "architectures.md"
PLAIN = {"gguf": "fp16", "onnx": "onnx-fp32", "coreml": "fp16", "executorch": "executorch-fp32"}
NOISE = {"gguf": 3e-2, "onnx": 2e-5, "coreml": 2e-2, "executorch": 2e-5}
"""Most that a logit may be off, in the logits' standard deviations: fp32 throughout, or a cache in fp16 and more."""
SHAPES = {"tied": (True, {}), "untied, odd widths": (False, ODD)}
QUICK = {"executorch": {"Gemma 2": ["tied"], "Phi-4-mini": ["untied, odd widths"]}}
"""Of targets that take seconds to export, what is tried without the slow mark: together every part of a decoder."""
SHALLOW: dict[tuple[str, str], dict[str, Any]] = {
    ("executorch", "Gemma 3"): {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ("executorch", "SmolLM3"): {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
}
"""For every recipe, a layer of each kind: the logits of all layers are compared with one."""
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A family's student, made once."""
    made: dict[str, Path] = {}

    def student(case: str, shape: str, **settings: Any) -> Path:
        tied, sizes = SHAPES[shape]
        key = f"{case} {shape} {settings}"
        if key not in made:
            made[key] = make_family(tmp_path_factory.mktemp("family") / "s", case, tied=tied, **sizes, **settings)
        return made[key]

    return student


def _check(target: str, student: Path, **options: Any) -> None:
    targets.check(Checkpoint(student).config, student, spec_of(target, PLAIN[target], **options))


def _takes(target: str, student: Path) -> bool:
    """Whether the target takes the student; where it does not, the table says so."""
    skip_without(target)
    try:
        _check(target, student)
    except Unsupported as refusal:
        told = str(refusal)
    else:
        return True
    assert told in TABLE.read_text("utf-8").replace("4096", str(WINDOW))
    return False


def _tried() -> list[Any]:
    found = []
    for target in PLAIN:
        for case in CASES:
            for shape in SHAPES:
                quick = target not in QUICK or shape in QUICK[target].get(case, [])
                marks = [] if quick else [pytest.mark.slow]
                found.append(pytest.param(target, case, shape, marks=marks, id=f"{target}-{case}-{shape}"))
    return found


@pytest.mark.parametrize(("target", "case", "shape"), _tried())
def test_logits_are_those_of_transformers(target: str, case: str, shape: str, make: Make, tmp_path: Path) -> None:
    """At once, and in pieces of 37 and then token by token, far beyond every window."""
    student = make(case, shape)
    if not _takes(target, student):
        return
    artifact = export_to(target, student, PLAIN[target], tmp_path / "artifact")
    expected = reference(student, IDS)
    session = targets.open_artifact(artifact, threads=1)
    whole = session.prefill(IDS, all_logits=True)
    session.reset()
    pieces = [session.prefill(IDS[i : min(i + 37, 150)], all_logits=True) for i in range(0, 150, 37)]
    pieces += [session.decode(token)[None].copy() for token in IDS[150:]]
    session.close()
    for found in (whole, np.concatenate(pieces)):
        assert np.abs(found - expected).max() < NOISE[target] * expected.std()


@pytest.mark.parametrize(("target", "case"), [("onnx", c) for c in CASES] + [("gguf", c) for c in CASES])
def test_the_grid_is_packed(target: str, case: str, make: Make, tmp_path: Path) -> None:
    student = make(case, "tied")
    if not _takes(target, student):
        return
    packed = quantized(student, tmp_path / "packed")
    artifact = export_to(target, student, "portable-int4", tmp_path / "artifact", packed)
    expected = reference(student, IDS, packed)
    assert mean_kl(expected, logits(artifact, IDS)) < 0.01  # the kernels round activations to 8 bits
    assert mean_kl(reference(student, IDS), expected) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", PLAIN)
def test_every_recipe_is_exported(target: str, case: str, make: Make, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    student = make(case, "tied", **SHALLOW.get((target, case), {}))
    if not _takes(target, student):
        return
    moments = tmp_path / "moments.safetensors"
    save_file(second_moments(student, torch.tensor([IDS])), moments)
    expected = reference(student, IDS)
    for recipe in recipe_names(target):
        packed = quantized(student, tmp_path / f"packed {recipe}", recipe) if load_recipe(recipe).on_grid else None
        artifact = export_to(target, student, recipe, tmp_path / recipe, packed, moments)
        assert mean_kl(expected, logits(artifact, IDS)) < 1, recipe


@pytest.mark.parametrize("case", CASES)
def test_calibration_walks_it(case: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments that the model's own forward pass gives, to float32's digits."""
    monkeypatch.setattr("edgekd.matmul.has_bfloat16", lambda: False)
    student, ids = make(case, "tied"), torch.tensor([IDS[:80], IDS[80:160]])
    found, model = second_moments(student, ids), load_model(student)
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        sums[name] = args[0].square().mean((0, 1))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(partial(hook, f"{name}.weight"))
    with torch.no_grad():
        model(ids)
    assert found.keys() - sums.keys() == {"model.embed_tokens.weight"}
    for name, expected in sums.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)


def test_a_window_is_refused_where_the_runtime_has_none(make: Make) -> None:
    student = make("Mistral, sliding window", "tied")
    for context in (None, WINDOW + 1):
        with pytest.raises(Unsupported, match=rf"GGUF's llama cannot hold: sliding .* context: {WINDOW} or less"):
            _check("gguf", student, context=context)
    _check("gguf", student, context=WINDOW)
    with pytest.raises(SpecError, match="longer than the student's"):
        _check("gguf", student, context=512)


@pytest.mark.parametrize("target", ["gguf", "onnx", "coreml", pytest.param("executorch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("context", [WINDOW, 64])
def test_a_context_may_be_as_long_as_a_window_or_as_was_trained(
    target: str, context: int, make: Make, tmp_path: Path
) -> None:
    """And LongRoPE's divisors are then those of short contexts."""
    skip_without(target)
    student = make("Mistral, sliding window" if context == WINDOW else "Phi-4-mini", "tied")
    artifact = export_to(target, student, PLAIN[target], tmp_path / "artifact", context=context)
    expected = reference(student, IDS[:context])
    assert np.abs(logits(artifact, IDS[:context]) - expected).max() < NOISE[target] * expected.std()


def test_windows_and_bases_would_show(make: Make) -> None:
    """What the tests above compare differs where a window, or a layer's own rope, is left out."""
    for case, keys in (
        ("Mistral, sliding window", {"sliding_window": 4096}),
        ("Gemma 3", {"rope_parameters": None}),
        ("Granite 3", {"logits_scaling": 1.0}),
        ("Gemma 2", {"attn_logit_softcapping": None}),
        ("Gemma 2", {"final_logit_softcapping": None}),
        ("SmolLM3", {"no_rope_layers": [1, 1, 1, 1]}),
    ):
        right, wrong = (reference(make(case, "tied", **own), IDS) for own in ({}, keys))
        assert np.abs(right - wrong).max() > max(NOISE.values()) * right.std(), case


def test_odd_channels_of_heads_are_refused(make: Make) -> None:
    sizes = {"hidden_size": 96, "head_dim": 24}
    with pytest.raises(Unsupported, match="of a multiple of 16 channels, not 24"):
        _check("onnx", make("Llama", "tied", **sizes))


def test_one_module_alone_names_it() -> None:
    """A word of a chat's template, a tokenizer's or a comment is no decision; a quoted name in code would be one."""
    sources = (path for folder in ("edgekd", "targets", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    found = [path for path in sources if re.search(r"[\"'_]mistral|Mistral[A-Z]", path.read_text("utf-8"))]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["edgekd/architecture.py"]


def test_the_table_says_what_the_targets_say(tmp_path: Path) -> None:
    for target in PLAIN:
        skip_without(target)
    assert TABLE.read_text("utf-8") == table(tmp_path), f"run: python {Path(__file__).relative_to(ROOT)}"


def table(folder: Path) -> str:
    """``docs/architectures.md``."""
    from conftest import make_tokenizer

    make_tokenizer().save_pretrained(folder)
    sentences: dict[str, int] = {}
    rows = []
    for case, config in architectures():
        cells = [_cell(target, config, folder, sentences) for target in PLAIN]
        rows.append(f"| {case} | {' | '.join(cells)} |\n")
    titles = [targets.load_target(target).TITLE for target in PLAIN]
    takes = [
        f"| {recipe} | {' | '.join('yes' if recipe in recipe_names(target) else '' for target in PLAIN)} |\n"
        for recipe in recipe_names()
    ]
    head = f"| {' | '.join(titles)} |\n|{'---|' * (1 + len(titles))}\n"
    refusals = [f"{number}. {sentence}\n" for sentence, number in sentences.items()]
    return (
        _INTRODUCTION
        + f"| architecture {head}{''.join(rows)}\nRefusals:\n\n{''.join(refusals)}"
        + f"\n## Recipes\n\nEach holds for every architecture that its target takes.\n\n| recipe {head}{''.join(takes)}"
    )


_INTRODUCTION = """# Architectures

Written by `tests/targets/test_families.py`, which tries each of these with two to six random layers: the logits of the
runtime are held against transformers' in fp32, at once, in pieces, and token by token, beyond every window.

A context is at most `max_position_embeddings`, so dynamic scaling of the rotary embedding never begins. LongRoPE has
divisors for contexts as long as was trained, and others for longer ones: an artifact has those of its own context.
Mixtures of experts, models of other inputs than text, and state-space models are refused by name.

"""


def _cell(target: str, config: dict[str, Any], folder: Path, sentences: dict[str, int]) -> str:
    """What a target says of an architecture, by recipe where recipes differ."""
    answers: dict[str, list[str]] = {}
    for recipe in recipe_names(target):
        try:
            context = config["max_position_embeddings"]  # not the default one, which a window may hold
            targets.check(config, folder, spec_of(target, recipe, context=context))
            answer = "works"
        except Unsupported as refusal:
            told = str(refusal).replace(f"{targets.load_target(target).TITLE} cannot", "The target cannot")
            answer = f"refused ({sentences.setdefault(told, len(sentences) + 1)})"
        answers.setdefault(answer, []).append(recipe)
    if len(answers) == 1:
        return next(iter(answers))
    return "; ".join(f"{answer}: {', '.join(recipes)}" for answer, recipes in answers.items())


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch:
        TABLE.write_text(table(Path(scratch)), "utf-8")
