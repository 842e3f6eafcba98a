"""Recipes: the shipped files, and what a recipe makes of a tensor."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from edgekd.errors import SpecError
from edgekd.quant.recipe import Native, Recipe, Rule
from edgekd.targets import label, load_recipe, recipe_names
from edgekd.targets.shared import recipes as _recipes

FILES = sorted(_recipes.FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem and recipe.description
    assert recipe.native is None or recipe.name.startswith(f"{recipe.native.target}-")


def test_what_the_portable_recipes_make_of_a_student():
    names = {
        "model.embed_tokens.weight": (320, 64),
        "lm_head.weight": (320, 64),
        "model.norm.weight": (64,),
        "model.layers.0.mlp.up_proj.weight": (96, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 80),
        "model.layers.0.self_attn.q_proj.bias": (64,),
    }
    kinds = {recipe: [load_recipe(recipe).kind_of(*item) for item in names.items()] for recipe in recipe_names()}
    assert kinds["fp16"] == ["plain"] * 6
    assert kinds["int8"] == ["int8", "int8", "plain", "int8", "int8", "plain"]
    # 80 inputs are no groups of 32
    assert kinds["portable-int4"] == ["int8", "int8", "plain", "int4", "int8", "plain"]
    assert kinds["portable-int4-head4"] == ["int4", "int4", "plain", "int4", "int8", "plain"]
    assert not load_recipe("fp16").on_grid and load_recipe("int8").on_grid and not load_recipe("int8").has_int4


def test_the_first_rule_that_matches_wins():
    rules = (Rule(match="*.0.*", kind="fp16"), Rule(match="*", kind="int4"))
    recipe = Recipe(name="x", description="x", rules=rules)
    assert recipe.kind_of("model.layers.0.mlp.up_proj.weight", (32, 32)) == "plain"
    assert recipe.kind_of("model.layers.1.mlp.up_proj.weight", (32, 32)) == "int4"
    first = Recipe(name="x", description="x", rules=rules[:1])
    assert first.kind_of("model.layers.1.mlp.up_proj.weight", (32, 32)) == "plain", "no rule: as it is"


def test_a_recipe_is_rules_or_native():
    with pytest.raises(ValidationError, match="either rules or native"):
        Recipe(name="x", description="x")
    with pytest.raises(ValidationError, match="either rules or native"):
        Recipe(name="x", description="x", rules=(Rule(match="*", kind="int4"),), native=Native(target="a", type="b"))


def test_unknown_and_foreign_recipes_are_named():
    with pytest.raises(SpecError, match="did you mean 'portable-int4'"):
        load_recipe("portable-int44")
    with pytest.raises(SpecError, match=r"no recipe '\.\./fp16'"):
        load_recipe("../fp16")
    with pytest.raises(
        SpecError, match="onnx has no recipe 'gguf-q4_k_m'; there are: fp16, int8, onnx-fp32, portable-int4"
    ):
        load_recipe("gguf-q4_k_m", "onnx")
    assert "gguf-q4_k_m" in recipe_names("gguf") and "gguf-q4_k_m" not in recipe_names("onnx")


def test_an_artifact_is_named_after_its_target_once():
    assert label("gguf", "fp16") == "gguf-fp16" and label("gguf", "gguf-q4_k_m") == "gguf-q4_k_m"
