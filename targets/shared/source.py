"""What an exporter reads its tensors from: the student, or the quantized student of a recipe on the grid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint import Checkpoint
from ...errors import EdgekdError
from ...origin import read_origin
from ...quant.recipe import Recipe
from ...quant.source import Source

if TYPE_CHECKING:
    import numpy as np


def open_source(
    checkpoint: Checkpoint, recipe: Recipe, quantized: Path | None, scratch: Path
) -> tuple[Source, dict[str, object]]:
    """The student, or its quantized form, and the manifest's fields that say what is packed.

    Args:
        quantized: the quantized student's folder; None rounds the student to nearest.
        scratch: a folder to make for that.

    Raises:
        EdgekdError: ``quantized`` was made from another student or for another recipe.
    """
    fields: dict[str, object] = {"student_digest": checkpoint.digest, "parameters": checkpoint.parameters}
    if origin := read_origin(checkpoint.folder):
        fields["dequantized_from"] = origin.dequantized_from
    if not recipe.on_grid:
        return checkpoint, fields
    from ...quant.quantize import quantize
    from ...quant.store.reader import open_quantized

    if quantized is None:
        quantize(checkpoint.folder, scratch, recipe)
    opened = open_quantized(quantized or scratch)
    record = opened.record
    if record.student_digest != checkpoint.digest:
        raise EdgekdError(f"{quantized} was quantized from another student.", "Quantize this one.")
    if any(kind != recipe.kind_of(name, opened.shape(name)) for name, kind in opened.kinds.items()):
        raise EdgekdError(
            f"{quantized} was quantized for the recipe {record.recipe}, not {recipe.name}.",
            f"Take --recipe {record.recipe}.",
        )
    return opened, fields | {
        "grid_digest": opened.digest,
        "method": record.method,
        "int8_by_width": opened.int8_by_width,
    }


def narrow(source: Source, name: str, dtype: str) -> np.ndarray:
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
