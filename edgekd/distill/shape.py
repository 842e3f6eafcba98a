"""How deep and how wide a cut student is to be: of the shapes with the wanted number of weights, the deepest that a
device has room for. Arithmetic alone: the teacher's architecture, a recipe's bits, a device's memory.

Widths go before layers: cut by activations and trained again, a Llama 3.1 of 8B is better as 4B with 3/4 of its
channels and 9/14 of its MLP than with half of its layers (Sreenivas et al. 2024). They go no further than was shown to
heal, half of the channels and 3/8 of the MLP (Minitron's 15B to 4B, Muralidharan et al. 2024), and their shares differ
by no more than those do; what is still too much goes by layers. Heads stay as they are, so the key-value cache shrinks
with the layers alone: where the cache is what does not fit, a shallower and wider student of as many weights is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ..architecture import Architecture, read_architecture
from ..errors import DoesNotFit, SpecError
from ..formats import count, plain, size
from ..quant.recipe import GROUP, Recipe, stored_bits
from ..spec import CutStudent
from ..student import student_config

FEWEST_CHANNELS, FEWEST_UNITS = Fraction(1, 2), Fraction(3, 8)
TOLERANCE = Fraction(1, 50)
"""Of the wanted number of weights: shapes come in steps."""
CACHE_BYTES = 2
"""Of a number in the key-value cache, float16, as llama.cpp keeps it."""
_STEPS = (256, 128, 64, GROUP)
_LARGEST = {"num_hidden_layers": 2**9, "hidden_size": 2**15, "intermediate_size": 2**18}
"""Far beyond any model's: the widths and depths of a file that names more would be minutes in the counting."""
_UNEVENNESS = FEWEST_CHANNELS / FEWEST_UNITS
"""Most that the share of channels that stay may be of the share of MLP units, and the other way round."""


@dataclass(frozen=True)
class Shape:
    """A student, and what it takes on a device."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    parameters: int
    weight_bytes: int
    """At most, of the formats that a recipe goes to."""
    cache_bytes: int
    """At most: which layers stay, and whether these have windows, is chosen later."""

    @property
    def bytes(self) -> int:
        """Weights and cache; not what the runtime and its tokenizer take."""
        return self.weight_bytes + self.cache_bytes

    def __str__(self) -> str:
        """For messages."""
        sizes = f"layers {self.layers}, hidden_size {self.hidden_size}, intermediate_size {self.intermediate_size}"
        return f"{plain(count(self.parameters))} parameters ({sizes})"


@dataclass(frozen=True)
class Search:
    """The shapes that have the wanted number of weights, the deepest first, and a device's room."""

    shapes: Sequence[Shape]
    device: str
    budget_bytes: int
    """What the device gives one app."""
    context: int

    @property
    def chosen(self) -> Shape | None:
        """The deepest that fits."""
        return next((shape for shape in self.shapes if self.spare_bytes(shape) >= 0), None)

    def spare_bytes(self, shape: Shape) -> int:
        """What the device has left beside a student; below zero, what it lacks."""
        return self.budget_bytes - shape.bytes

    def taken(self) -> Shape:
        """The chosen shape.

        Raises:
            DoesNotFit: there is none.
        """
        if self.chosen:
            return self.chosen
        least = min(self.shapes, key=lambda shape: shape.bytes)
        raise DoesNotFit(
            f"student.fits: {self.device} gives an app {plain(size(self.budget_bytes))}, and the smallest of such "
            f"students, {least}, takes {plain(size(least.bytes))}: weights {plain(size(least.weight_bytes))}, cache of "
            f"{self.context} tokens {plain(size(least.cache_bytes))}.",
            "Lower the parameters or the context, or take a recipe of fewer bits.",
        )


def shapes(config: Mapping[str, object], recipe: Recipe, wanted: int, context: int, fewest: int) -> list[Shape]:
    """Of every depth, the deepest first, the student of the wanted number of weights whose channels and MLP are cut by
    the same share as nearly as the steps allow.

    Args:
        config: the teacher's ``config.json``.
        fewest: layers.

    Raises:
        SpecError: the teacher or the recipe is none that can be counted, or no shape comes near the wanted number.
    """
    teacher = _countable(config, recipe)
    counts = {
        (hidden, units): _count(teacher, hidden, units)
        for hidden in _hidden_sizes(config, teacher)
        for units in _steps(teacher.intermediate, FEWEST_UNITS)
        if _unevenness(teacher, hidden, units) <= _UNEVENNESS
    }
    most = math.floor(TOLERANCE * wanted)
    depths = range(teacher.layers, min(fewest, teacher.layers) - 1, -1)
    found = []
    for layers in depths:
        off = {widths: abs(rest + layers * each - wanted) for widths, (rest, each) in counts.items()}
        near = [widths for widths in counts if off[widths] <= most]
        if near:
            hidden, units = min(near, key=lambda widths: (_unevenness(teacher, *widths), off[widths], widths))
            found.append(_shape(teacher, recipe, context, layers, hidden, units))
    if found:
        return found
    every = [(abs(rest + n * each - wanted), n, *w) for n in depths for w, (rest, each) in counts.items()]
    nearest = _shape(teacher, recipe, context, *min(every)[1:])
    raise SpecError(
        f"student.parameters: no student cut from this teacher of {plain(count(teacher.parameters()))} parameters has "
        f"{plain(count(wanted))}, within {float(TOLERANCE):.0%}; the nearest has {nearest}.",
        "Ask for that many, or write layers, hidden_size and intermediate_size yourself.",
    )


def _countable(config: Mapping[str, object], recipe: Recipe) -> Architecture:
    """The teacher, where its students can be counted before they are made."""
    teacher = read_architecture(config)
    if teacher.unknown or None in teacher.attention:
        cause = f"student.fits: edgekd does not know every part of a {teacher.model_type!r:.100}, to count its cuts."
        raise SpecError(cause, "Write layers instead of parameters and fits.")
    sizes = (teacher.layers, teacher.hidden, teacher.intermediate)
    for (key, most), value in zip(_LARGEST.items(), sizes, strict=True):
        if value > most:
            raise SpecError(f"config.json: {key}: {value} is more than any teacher has, at most {most}.", "Correct it.")
    if recipe.native:
        raise SpecError(
            f"student.fits.recipe: how much {recipe.name} stores is known to {recipe.native.target} alone.",
            "Name one on the portable grid, such as portable-int4.",
        )
    return teacher


def _steps(width: int, fewest: Fraction) -> list[int]:
    """Widths to try: multiples of a group of 32, and of as large a block, up to 256, as leaves sixteen of them: kernels
    work in blocks, llama.cpp's K-quants in those of 256."""
    step = next((step for step in _STEPS if 16 * step <= width), GROUP)
    least = max(step, math.ceil(width * fewest / step) * step)
    return [*range(least, width, step), width]


def _hidden_sizes(config: Mapping[str, object], teacher: Architecture) -> list[int]:
    """Numbers of channels that the teacher's class can be built with: of some it must be a multiple of the heads."""
    spec = CutStudent(init="cut", layers=teacher.layers)
    student_config(spec, config)  # says what is wrong with the teacher itself
    return [n for n in _steps(teacher.hidden, FEWEST_CHANNELS) if _can_be_built(spec, config, n)]


def _can_be_built(spec: CutStudent, config: Mapping[str, object], hidden: int) -> bool:
    try:
        student_config(spec.model_copy(update={"hidden_size": hidden}), config)
    except SpecError:
        return False
    return True


def _count(teacher: Architecture, hidden: int, units: int) -> tuple[int, int]:
    """Weights of a narrower teacher beside its layers, and of a layer."""
    narrow = replace(teacher, hidden=hidden, intermediate=units)
    return replace(narrow, attention=()).parameters(), narrow.layer_parameters()


def _unevenness(teacher: Architecture, hidden: int, units: int) -> Fraction:
    """1 where MLP and channels are cut by the same share, more the further they are from it."""
    ratio = Fraction(units * teacher.hidden, hidden * teacher.intermediate)
    return max(ratio, 1 / ratio)


def _shape(teacher: Architecture, recipe: Recipe, context: int, layers: int, hidden: int, units: int) -> Shape:
    widest = sorted(teacher.attention, key=lambda of: of.window or math.inf if of else 0, reverse=True)
    student = replace(teacher, hidden=hidden, intermediate=units, attention=tuple(widest[:layers]))
    return Shape(
        layers=layers,
        hidden_size=hidden,
        intermediate_size=units,
        heads=student.heads,
        kv_heads=student.kv_heads,
        parameters=student.parameters(),
        weight_bytes=weight_bytes(student, recipe),
        cache_bytes=student.kv_bytes(context, CACHE_BYTES),
    )


def weight_bytes(arch: Architecture, recipe: Recipe) -> int:
    """Bytes of an artifact's weights, at most: GGUF and ONNX keep a scale for 32 numbers of int8 too, where Core ML and
    ExecuTorch have one a row."""
    bits = 0
    for name, weight in arch.weights().items():
        kind = recipe.kind_of(name, weight.shape)
        amount = math.prod(weight.shape)
        if kind == "int8":
            bits += 8 * amount + 16 * math.ceil(amount / GROUP)
        else:
            bits += stored_bits(kind, weight.shape, 16 if len(weight.shape) == 2 else 32)
    if recipe.bits is not None:  # a budget, counted with one scale a row
        bits = max(bits, math.ceil((recipe.bits + 16 / GROUP) * arch.parameters()))
    return math.ceil(bits / 8)
