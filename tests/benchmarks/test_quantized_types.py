"""The peers' table of quantized types, on a tiny student."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.benchmarks.peers.quantized_types import main
from edgekd.manifest import load_artifact


@pytest.mark.slow
def test_each_recipe_has_a_row_and_is_made_once(tiny_teacher: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("llama_cpp")
    recipes = ["gguf-iq4_nl", "gguf-q4_k_s", "portable-int4"]
    main(tiny_teacher, tmp_path, recipes, "mixed", 4, None)
    first = capsys.readouterr().out
    rows = [line.split(" | ") for line in first.splitlines()]
    assert [row[0] for row in rows] == ["| mixed, 4 windows", *(f"| {recipe}" for recipe in recipes)]
    for recipe, (_, bits, *kls) in zip(recipes, rows[1:], strict=True):
        made = load_artifact(tmp_path / f"{recipe}-mixed-4").manifest
        assert bits == f"{made.bits_per_weight:.2f}" and len(kls) == 2
        assert all(0 < float(kl.split()[0]) < 1 for kl in kls)
    main(tiny_teacher, tmp_path, recipes[-1:], "mixed", 4, None)
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]
