"""The shipped recipes: one YAML file each in ``recipes/``, named as the file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from ...errors import SpecError
from ...manifest import first_complaint
from ...quant.recipe import Recipe

Real = Literal["float16", "float32"]
FOLDER = Path(__file__).parents[1] / "recipes"


def recipe_names(target: str | None = None) -> list[str]:
    """Every recipe, or those that a target takes: the portable ones and its own."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [name for name in names if target is None or _takes(target, load_recipe(name))]


def load_recipe(name: str, target: str | None = None) -> Recipe:
    """A recipe by name.

    Raises:
        SpecError: there is none, its file is wrong, or ``target`` does not take it.
    """
    path = FOLDER / f"{name}.yaml"
    if "/" in name or not path.is_file():
        names = recipe_names(target)
        near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}."
        raise SpecError(f"targets: {target or 'edgekd'} has no recipe {name!r}; {hint}")
    try:
        recipe = Recipe.model_validate({**_read(path), "name": name})
    except ValidationError as error:
        raise SpecError(f"{path}: {first_complaint(error)}.", "Correct the recipe.") from error
    if target is not None and not _takes(target, recipe):
        raise SpecError(f"targets: {target} has no recipe {name!r}; there are: {', '.join(recipe_names(target))}.")
    return recipe


def real_of(recipe: Recipe) -> Real:
    """How a runtime that has no native types but fp32 stores the matrices that are not quantized."""
    if recipe.native is None:
        return "float16"
    if recipe.native.type != "fp32":
        raise SpecError(f"targets: recipe {recipe.name!r} has the native type {recipe.native.type!r}, not fp32.")
    return "float32"


def _takes(target: str, recipe: Recipe) -> bool:
    return recipe.native is None or recipe.native.target == target


def _read(path: Path) -> dict[str, object]:
    raw = yaml.safe_load(path.read_text("utf-8"))
    # Rules are an immutable tuple; YAML knows lists.
    return raw | {"rules": tuple(raw["rules"])} if "rules" in raw else raw
