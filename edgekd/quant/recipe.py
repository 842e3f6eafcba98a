"""Recipes: how each tensor of a student is stored. A small frozen value; the first rule that matches a tensor wins."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

GROUP = 32
"""Inputs that share an int4 scale. Here, because nothing of this module needs torch."""

Kind = Literal["int4", "int8", "plain"]
"""int4 in groups, int8 per row, or as the student has it."""


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
