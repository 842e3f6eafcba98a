"""One model in llama.cpp's own types and on the portable grid: bits per weight, and KL to it in float32, in llama.cpp.

    python -m edgekd.benchmarks.peers.quantized_types MODEL --out FOLDER \\
        --recipe gguf-iq4_nl --recipe gguf-q4_k_s --recipe portable-int4 --recipe portable-mixed --bits 5.85

llama.cpp's importance matrix and the grid's integers are made of the same windows. Held out are chats, prose and code,
and the standard library by itself. Prints a table; what is done already in the folder is not done again.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from ...checkpoint import Checkpoint
from ...manifest import Artifact, load_artifact
from ...matmul import fast_float32
from ...proof import Comparison
from ...spec import DataSpec
from ...student import load_model, load_tokenizer
from ...targets import export, load_recipe, load_target, open_artifact

Text = Literal["mixed", "stdlib"]
TEXTS: tuple[Text, ...] = ("mixed", "stdlib")
RECIPES = ["gguf-q4_0", "gguf-iq4_nl", "gguf-q4_k_s", "gguf-q4_k_m", "portable-int4", "portable-mixed"]
_CONTEXT, _HELD_OUT, _HELD_OUT_CONTEXT = 512, 16, 256


def main(
    model: Path,
    out: Annotated[Path, typer.Option(help="Folder for texts and artifacts.")],
    recipe: Annotated[list[str], typer.Option(help="Repeatable.")] = RECIPES,
    text: Annotated[Text, typer.Option(help="What importance and integers are taken from.")] = "mixed",
    windows: Annotated[int, typer.Option(help="Of 512 tokens, to calibrate on.")] = 64,
    bits: Annotated[float | None, typer.Option(help="Of portable-mixed, without the bytes that GGUF adds.")] = None,
) -> None:
    """Print bits per weight and KL of each recipe."""
    held_out = {name: _held_out(_prepared(model, name, out)) for name in TEXTS}
    typer.echo(f"| {text}, {windows} windows | bits per weight | " + " | ".join(f"KL, {name}" for name in TEXTS) + " |")
    for name in recipe:
        artifact = _artifact(model, name, text, windows, bits, out)
        found = [_compared(model, artifact, ids) for ids in held_out.values()]
        shown = " | ".join(
            f"{one.kl_mean:.3g} (median window {np.median(one.samples['kl_mean']):.3g})" for one in found
        )
        typer.echo(f"| {name} | {artifact.manifest.bits_per_weight:.2f} | {shown} |")


def _prepared(model: Path, text: Text, out: Path) -> Path:
    """The folder of a text's windows."""
    from ...distill.data import prepare

    folder = out / text
    if not (folder / "test.safetensors").is_file():
        spec = DataSpec(source=text, context=_context(model))
        prepare(spec, load_tokenizer(model), folder, seed=0, base=Path())
    return folder


def _context(model: Path) -> int:
    """Tokens of a window, which the model may not hold."""
    return min(_CONTEXT, Checkpoint(model).architecture.context_length)


def _held_out(folder: Path) -> np.ndarray:
    from ...distill.data import load_windows
    from ...verify.reference import held_out_windows

    ids = load_windows(folder, "test").ids.int().numpy()
    return held_out_windows(ids, _HELD_OUT, min(_HELD_OUT_CONTEXT, ids.shape[1]))


def _artifact(model: Path, recipe: str, text: Text, windows: int, bits: float | None, out: Path) -> Artifact:
    """The GGUF artifact of a recipe, made where it is not there."""
    from safetensors.torch import save_file

    from ...distill.data import load_windows
    from ...distill.evaluate import evenly_spaced
    from ...quant.calibrate import second_moments
    from ...quant.quantize import quantize

    chosen = load_recipe(recipe, "gguf").with_bits(bits)
    label = f"{recipe}{f'-{chosen.bits:g}' if chosen.bits else ''}-{text}-{windows}"
    folder, grid, moments = out / label, out / f"{label}-quantized", out / f"moments-{text}-{windows}.safetensors"
    if folder.is_dir():
        return load_artifact(folder)
    ids = evenly_spaced(load_windows(_prepared(model, text, out), "train"), windows).ids.int()
    if chosen.on_grid and not grid.is_dir():
        quantize(model, grid, chosen, method="gptq", ids=ids)
    if chosen.needs_moments and not moments.is_file():
        save_file(second_moments(model, ids), moments)
    section = load_target("gguf").Options(target="gguf", recipes=[recipe], context=_context(model))
    given = grid if chosen.on_grid else None
    return export(model, section, recipe, folder, name=label, quantized=given, moments=moments)


@fast_float32()
def _compared(model: Path, artifact: Artifact, ids: np.ndarray) -> Comparison:
    from ...verify.parity import compare, session_logits
    from ...verify.reference import logits_of

    with closing(open_artifact(artifact)) as session:
        return compare(logits_of(load_model(model)), session_logits(session), ids)


if __name__ == "__main__":
    typer.run(main)
