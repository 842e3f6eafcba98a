"""Recipes: how each tensor of a student is stored. A small frozen value; the first rule that matches a tensor wins."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GROUP = 32
"""Inputs that share an int4 scale. Here, because nothing of this module needs torch."""

Kind = Literal["int4", "int8", "plain"]
"""int4 in groups, int8 per row, or as the student has it."""


def stored_bits(kind: Kind, shape: tuple[int, ...], plain_bits: int = 32) -> int:
    """Bits of a parameter's integers and scales as an artifact needs them."""
    count = math.prod(shape)
    if kind == "plain":
        return plain_bits * count
    return 4 * count + 16 * count // GROUP if kind == "int4" else 8 * count + 16 * shape[0]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Rule(_Frozen):
    """What the matrices of matching names become."""

    match: str
    """Glob on the Hugging Face parameter name, such as ``*.down_proj.weight``."""
    kind: Literal["int4", "int8", "fp16"]


class Native(_Frozen):
    """A scheme that one runtime's own quantizer makes from the student."""

    target: str
    type: str
    importance_matrix: bool = False
    """Weigh errors by the second moments of the activations on calibration text."""


class Recipe(_Frozen):
    """Rules for the portable grid, or a native scheme."""

    name: str
    description: str
    rules: tuple[Rule, ...] = ()
    bits: float | None = Field(None, gt=0, le=32)
    """Bits per weight up to which int4 matrices become int8, those of most sensitivity first."""
    native: Native | None = None

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Recipe:
        if bool(self.rules) == bool(self.native):
            raise ValueError("a recipe has either rules or native")
        return self

    def kind_of(self, name: str, shape: tuple[int, ...]) -> Kind:
        """How a parameter is stored. What is no matrix stays as it is; int4 whose width is not divisible by the group
        becomes int8."""
        if not name.endswith(".weight") or len(shape) != 2:
            return "plain"
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                if rule.kind == "fp16":
                    return "plain"
                return "int8" if shape[1] % GROUP else rule.kind
        return "plain"

    def takes(self, name: str, shape: tuple[int, ...], kind: Kind) -> bool:
        """Whether a quantized student for it may store a parameter so."""
        wanted = self.kind_of(name, shape)
        return kind == wanted or (self.bits is not None and (wanted, kind) == ("int4", "int8"))

    def with_bits(self, bits: float | None) -> Recipe:
        """With another budget, where it has one and another is given."""
        return self if bits is None or self.bits is None else self.model_copy(update={"bits": bits})

    @property
    def on_grid(self) -> bool:
        """Whether the student has to be quantized for it."""
        return any(rule.kind != "fp16" for rule in self.rules)

    @property
    def needs_moments(self) -> bool:
        """Whether the runtime's quantizer wants the activations' second moments."""
        return self.native is not None and self.native.importance_matrix

    @property
    def has_int4(self) -> bool:
        """Whether there are integers to choose: int8 rows are rounded to nearest whatever the method."""
        return any(rule.kind == "int4" for rule in self.rules)
