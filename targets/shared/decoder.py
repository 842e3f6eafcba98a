"""What every target asks of a student's architecture: whether it can write it, and the rotary embedding's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...architecture import EMBEDDING, HEAD, Architecture, Feature, Rotary, read_architecture
from ...errors import EdgekdError, SpecError, Unsupported
from ...quant.source import Source
from ...spec import TargetSpec
from .recipes import load_recipe

if TYPE_CHECKING:
    import numpy as np

__all__ = ["EMBEDDING", "HEAD", "MAX_CACHE_BYTES", "Architecture"]
DECODER_FEATURES = frozenset(
    {
        Feature.QKV_BIAS,
        Feature.OUT_BIAS,
        Feature.MLP_BIAS,
        Feature.HEAD_NORM,
        Feature.WIDE_NORM,
        Feature.NORM_OFFSET,
        Feature.NORMS_AFTER,
        Feature.NORMS_AROUND,
        Feature.FREE_HEADS,
        Feature.EMBEDDING_SCALE,
        Feature.RESIDUAL_SCALE,
        Feature.LOGIT_SCALE,
        Feature.ATTENTION_SCALE,
        Feature.ATTENTION_CAP,
        Feature.LOGIT_CAP,
        Feature.GELU_TANH,
        Feature.SLIDING_WINDOW,
        Feature.NO_ROPE,
        Feature.ROPE_BY_LAYER,
        Feature.PARTIAL_ROPE,
        Feature.LINEAR_ROPE,
        Feature.LLAMA3_ROPE,
        Feature.YARN_ROPE,
        Feature.LONG_ROPE,
        Feature.FUSED_QKV,
        Feature.FUSED_GATE_UP,
    }
)
"""What a target has a place for whose decoder is written operator by operator, from all that ``Architecture`` tells."""
MAX_CACHE_BYTES = 2 * 2**30
"""Of a key-value cache that is there in full from the start: about what a phone gives an app in all."""


def check_features(arch: Architecture, held: frozenset[Feature], form: str, context_length: int) -> None:
    """Refuse what a file format has no place for.

    Args:
        held: the features that it has a place for.
        form: the file format, for messages.
        context_length: of the artifact.

    Raises:
        Unsupported: the student has another feature, or is quantized.
    """
    if arch.quantized:
        raise Unsupported(
            "config.json: the model is quantized already (quantization_config).",
            "Give the student it was made from; a quantized student of edgekd goes behind --quantized.",
        )
    if missing := arch.features(context_length) - held:
        ordered = [feature for feature in Feature if feature in missing]
        words, keys = ", ".join(f.words for f in ordered), ", ".join(dict.fromkeys(f.keys for f in ordered))
        raise Unsupported(
            f"{form} cannot hold: {words} ({arch.class_name}, config.json: {keys}).",
            _remedy(arch, missing),
        )


def _remedy(arch: Architecture, missing: frozenset[Feature]) -> str:
    narrowest = min((a.window for a in arch.attention if a and a.window), default=0)
    if missing == {Feature.SLIDING_WINDOW} and narrowest:
        return f"Set context: {narrowest} or less, of which a window sees all."
    return "Train a student without it, or export another target."


def asked_for(config: Mapping[str, object], spec: TargetSpec) -> tuple[Architecture, int]:
    """The student's architecture, and the context length of the artifact: what every target's ``check`` begins with.

    Raises:
        SpecError: the target has no such recipe, or the context is longer than the student's.
    """
    for recipe in spec.recipes:
        load_recipe(recipe, spec.target)
    arch = read_architecture(config)
    if spec.context and spec.context > arch.context_length:
        raise SpecError(
            f"targets: context {spec.context} is longer than the student's {arch.context_length} "
            "(config.json: max_position_embeddings).",
            "Ask for a shorter one.",
        )
    return arch, spec.context_of(arch.context_length)


def check_head_dim(arch: Architecture) -> None:
    """Refuse heads without a whole number of rotary pairs.

    Raises:
        Unsupported: the head size is odd.
    """
    if odd := next((rotary.dim for rotary in arch.rotaries if rotary.dim % 2), 0):
        raise Unsupported(
            f"config.json: head_dim {odd} is odd: the rotary embedding turns pairs.", "Use an even head_dim."
        )


def rotary_tables(rotary: Rotary, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position, float32 ``(context_length, rotary.dim / 2)`` each."""
    import numpy as np

    rotary = rotary.at(context_length)
    exponents = np.arange(0, rotary.dim, 2, dtype=np.float32) / np.float32(rotary.dim)
    frequencies = 1 / np.power(np.float32(rotary.theta), exponents)
    if rotary.factors:
        frequencies = frequencies / np.array(rotary.factors, np.float32)
    angles = np.arange(context_length, dtype=np.float32)[:, None] * frequencies[None]
    scale = np.float32(rotary.attention_factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def check_weights(arch: Architecture, source: Source, form: str) -> None:
    """Compare a model folder's tensors with what its configuration says.

    Args:
        form: the file format, for messages.

    Raises:
        EdgekdError: a tensor is missing or has another shape.
        Unsupported: a tensor that has no place in the architecture.
    """
    expected = {name: weight.shape for name, weight in arch.weights().items()}
    shapes, folder = {name: source.shape(name) for name in source.kinds}, source.folder
    for name, shape in expected.items():
        if name not in shapes:
            raise EdgekdError(f"{folder}: tensor {name!r} is missing.", "Save the model again.")
        if shapes[name] != shape:
            raise EdgekdError(
                f"{folder}: tensor {name!r} has shape {shapes[name]}, by config.json {shape}.",
                "Check config.json against the weights.",
            )
    known = expected.keys() | ({HEAD} if arch.tied else set())
    extra = [name for name in shapes if name not in known]
    if extra:
        raise Unsupported(
            f"{folder}: tensor {extra[0]!r} has no place in {form}'s {arch.class_name} ({len(extra)} such).",
            "Check config.json against the weights.",
        )
