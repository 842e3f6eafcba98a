"""What an exporter reads its tensors from: the student itself, or the quantized student of a recipe on the grid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint import Checkpoint
from ...errors import EdgekdError
from ...quant.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np

    from ...quant.folder import Grid


def open_source(checkpoint: Checkpoint, recipe: Recipe, grid: Path | None, scratch: Path) -> Checkpoint | Grid:
    """The student, or its quantized form.

    Args:
        grid: the quantized student's folder; None rounds the student to nearest.
        scratch: a folder to make for that.

    Raises:
        EdgekdError: ``grid`` was made from another student or for another recipe.
    """
    if not recipe.on_grid:
        return checkpoint
    from ...quant.folder import open_grid
    from ...quant.quantize import quantize

    if grid is None:
        quantize(checkpoint.folder, scratch, recipe)
        return open_grid(scratch)
    opened = open_grid(grid)
    if opened.student_digest != checkpoint.digest:
        raise EdgekdError(f"{grid} was quantized from another student.", "Quantize this one.")
    kinds = {name: recipe.kind_of(name, opened.shape(name)) for name in opened.names()}
    if kinds != opened.kinds:
        raise EdgekdError(
            f"{grid} was quantized for the recipe {opened.recipe}, not {recipe.name}.",
            f"Take --recipe {opened.recipe}.",
        )
    return opened


def source_fields(checkpoint: Checkpoint, source: Checkpoint | Grid) -> dict[str, object]:
    """The manifest's fields that say what was packed."""
    fields = {"student_digest": checkpoint.digest, "parameters": checkpoint.parameters}
    if isinstance(source, Checkpoint):
        return fields
    return fields | {
        "grid_digest": source.digest,
        "method": source.method,
        "int8_by_width": source.int8_by_width,
    }


def narrow(source: Checkpoint | Grid, name: str, dtype: str) -> np.ndarray:
    """One of the source's tensors in a dtype that may hold less.

    Raises:
        EdgekdError: a weight that is not finite, or does not fit.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        value = source.tensor(name).float().numpy().astype(dtype)
    if not np.isfinite(value).all():
        raise EdgekdError(
            f"{source.folder}: tensor {name!r} has weights that are not finite, or too large for {dtype}.",
            "Train the student again with a lower learning rate, or take a recipe in fp32 where the target has one.",
        )
    return value


def exact_half(scale: np.ndarray) -> np.ndarray:
    """float32 scales in fp16, which holds each of the grid's exactly."""
    import numpy as np

    half = scale.astype("<f2")
    assert np.array_equal(half.astype(np.float32), scale), "a scale is not exact in fp16"
    return half
