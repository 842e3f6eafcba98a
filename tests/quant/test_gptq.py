"""GPTQ against the formulas it is derived from, in float64 and without its shortcuts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import random_ids, save_random_decoder
from safetensors.torch import load_file, save_file

from edgekd.checkpoint import Checkpoint
from edgekd.errors import EdgekdError
from edgekd.quant import gptq
from edgekd.quant.calibrate import second_moments
from edgekd.quant.gptq import gptq_int4, gptq_student
from edgekd.quant.grid import (
    GROUP,
    SCALE_MIN,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8_rows,
    snap_scale,
)
from edgekd.quant.recipe import Kind
from edgekd.quant.search import search_int4
from edgekd.student import load_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def correlated(width: int, count: int, seed: int = 0) -> torch.Tensor:
    """Inputs ``(count, width)`` of unequal energy with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator) ** 2
    return torch.randn(count, width, generator=generator) @ mix


def matrix(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def output_error(w: torch.Tensor, block: tuple[torch.Tensor, torch.Tensor], hessian: torch.Tensor) -> float:
    off = (w - dequantize_int4(*block)).double()
    return float(((off @ hessian.double()) * off).sum())


def optimal_brain_surgeon(w: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """Column by column in float64, with the explicit inverse of what is still free (Hassibi and Stork 1993)."""
    left, h = w.double().numpy().copy(), hessian.double().numpy()
    h = h + gptq.DAMP * np.diag(h).mean() * np.eye(len(h))
    energy = np.diag(hessian.numpy()).reshape(-1, GROUP)
    turns = [
        group * GROUP + column
        for group in np.argsort(-energy.sum(1), kind="stable")
        for column in np.argsort(-energy[group], kind="stable")
    ]
    q = np.zeros(left.shape)
    while turns:
        inverse = np.linalg.inv(h[np.ix_(turns, turns)])
        column, s = turns[0], scale[:, turns[0] // GROUP].double().numpy()
        q[:, column] = np.clip(np.round(left[:, column] / s), -8, 7)
        error = (left[:, column] - s * q[:, column]) / inverse[0, 0]
        left[:, turns] -= np.outer(error, inverse[0])
        turns = turns[1:]
    return q


@pytest.mark.parametrize("width", [GROUP, 3 * GROUP, 7 * GROUP])
def test_integers_are_those_of_the_formula(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = correlated(width, 4 * width), matrix(24, width)
    hessian = x.T @ x
    scale = search_int4(w)[1]
    q, kept = gptq_int4(w, hessian, scale)
    assert torch.equal(kept, scale) and q.dtype == torch.int8
    expected = optimal_brain_surgeon(w, hessian, scale)
    # Float32 may fall on the other side of a rounding edge, after which that row goes another way.
    same = (q.numpy() == expected).all(1)
    assert same.mean() >= 0.9
    monkeypatch.setattr(gptq, "_ROWS", 10)
    assert torch.equal(gptq_int4(w, hessian, scale)[0], q)


def test_a_group_s_scale_is_the_candidate_of_least_cost() -> None:
    """With one group, its cost is the whole objective with the damped Hessian: compare with each candidate alone."""
    x, w = correlated(GROUP, 200), matrix(16, GROUP)
    hessian = x.T @ x
    damped = hessian + gptq.DAMP * hessian.diagonal().mean() * torch.eye(GROUP)
    chosen = gptq_int4(w, hessian)
    unclipped = torch.maximum(w.amin(1) / -8, w.amax(1) / 7)
    for row in range(16):
        one = slice(row, row + 1)
        found = output_error(w[one], (chosen[0][one], chosen[1][one]), damped)
        for factor in gptq._CANDIDATES:
            scale = snap_scale(factor * unclipped[one].unsqueeze(1))
            assert found <= output_error(w[one], gptq_int4(w[one], hessian, scale), damped) * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_going_through_again_ends_where_no_single_change_helps(seed: int) -> None:
    """The objective in float64 never grows with a sweep, and in the end no integer has a better neighbour."""
    x, w = correlated(3 * GROUP, 400, seed), matrix(16, 3 * GROUP, seed)
    hessian = x.T @ x
    damped = hessian + gptq.DAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
    blocks = [gptq_int4(w, hessian, sweeps=sweeps) for sweeps in (0, 1, 2, 40)]
    errors = [output_error(w, block, damped) for block in blocks]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0]
    q, scale = blocks[-1]
    assert torch.equal(scale, snap_scale(scale)) and q.min() >= -8 and q.max() <= 7
    for step in (-1, 1):
        for column in range(0, 3 * GROUP, 5):
            other = q.clone()
            other[:, column] = (q[:, column] + step).clamp(-8, 7)
            assert output_error(w, (other, scale), damped) >= errors[-1] * (1 - 1e-5)


def test_a_shift_aims_at_other_inputs() -> None:
    """From the formula, with the explicit inverse in float64."""
    x, w = correlated(2 * GROUP, 300), matrix(8, 2 * GROUP)
    y = x + 0.1 * correlated(2 * GROUP, 300, seed=5)
    hessian, shift = x.T @ x, (y - x).T @ x
    damped = hessian.double() + gptq.DAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
    target = w + w.double() @ shift.double() @ torch.linalg.inv(damped)
    given, expected = gptq_int4(w, hessian, shift=shift), gptq_int4(target.float(), hessian)
    assert (given[0] == expected[0]).all(1).float().mean() >= 0.7
    assert not torch.equal(given[0], gptq_int4(w, hessian)[0])


def test_independent_inputs_are_rounded_to_nearest() -> None:
    w, energy = matrix(8, 4 * GROUP), torch.rand(4 * GROUP, generator=torch.Generator().manual_seed(3)) + 0.1
    q, scale = quantize_int4(w)
    assert torch.equal(gptq_int4(w, torch.diag(energy), scale)[0], q)


@pytest.mark.parametrize("seed", range(4))
def test_outputs_change_less_than_by_rounding_or_search(seed: int) -> None:
    x, w = correlated(6 * GROUP, 500, seed), matrix(32, 6 * GROUP, seed)
    hessian = x.T @ x
    searched = output_error(w, search_int4(w, hessian.diagonal()), hessian)
    assert searched < output_error(w, quantize_int4(w), hessian)
    assert output_error(w, gptq_int4(w, hessian), hessian) < 0.5 * searched


def test_the_hessian_s_magnitude_does_not_matter() -> None:
    x, w = correlated(2 * GROUP, 200), matrix(8, 2 * GROUP)
    hessian = x.T @ x
    expected = gptq_int4(w, hessian)
    for factor in (2.0**-40, 2.0**40):
        for one, other in zip(gptq_int4(w, hessian * factor), expected, strict=True):
            assert torch.equal(one, other)


def test_dead_inputs_are_rounded_to_nearest_and_disturb_no_other() -> None:
    x, w = correlated(2 * GROUP, 200), matrix(8, 2 * GROUP)
    x[:, :GROUP:2] = 0
    hessian = x.T @ x
    q, scale = gptq_int4(w, hessian)
    spread = scale.repeat_interleave(GROUP, 1)
    nearest = torch.round(w / spread).clamp(-8, 7).to(torch.int8)
    assert torch.equal(q[:, :GROUP:2], nearest[:, :GROUP:2])
    unseen = gptq_int4(w, torch.zeros_like(hessian))
    assert (
        output_error(w, unseen, torch.eye(2 * GROUP)) <= output_error(w, quantize_int4(w), torch.eye(2 * GROUP)) * 1.1
    )


def test_fewer_tokens_than_inputs_and_degenerate_weights() -> None:
    x = correlated(2 * GROUP, 3)
    w = matrix(4, 2 * GROUP)
    w[1], w[2], w[3] = 0, w[2] * 1e-30, w[3] * 1e4
    q, scale = gptq_int4(w, x.T @ x)
    assert q.min() >= -8 and q.max() <= 7 and torch.isfinite(dequantize_int4(q, scale)).all()
    assert not q[1:3].any() and (scale[1:3] == SCALE_MIN).all()


def test_bad_matrices() -> None:
    w, hessian = matrix(2, GROUP), torch.eye(GROUP)
    with pytest.raises(EdgekdError, match="NaN or infinite weights"):
        gptq_int4(w * torch.nan, hessian)
    with pytest.raises(EdgekdError, match="NaN or infinite activations"):
        gptq_int4(w, hessian * torch.inf)
    indefinite = torch.full((GROUP, GROUP), -9.0).fill_diagonal_(1.0)
    with pytest.raises(EdgekdError, match="cannot be factorised"):
        gptq_int4(w, indefinite)
    with pytest.raises(ValueError, match="do not fit"):
        gptq_int4(matrix(2, GROUP + 1), torch.eye(GROUP + 1))
    with pytest.raises(ValueError, match="do not fit"):
        gptq_int4(w, torch.eye(2 * GROUP))


def make(folder: Path, kind: str, *, tied: bool, mlp: int = 96) -> Path:
    return save_random_decoder(folder, kind, layers=2, tied=tied, mlp=mlp)


def kinds_of(folder: Path, embedding: Kind = "int8", off_grid: Kind = "int8") -> dict[str, Kind]:
    """Matrices int4 where their width allows."""
    source = Checkpoint(folder)
    kinds: dict[str, Kind] = {}
    for name in source:
        shape = source.shape(name)
        kinds[name] = "plain" if len(shape) < 2 else "int4" if shape[1] % GROUP == 0 else off_grid
    return kinds | {EMBEDDING: embedding}


def mean_kl(folder: Path, changed: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    model = load_model(folder)
    with torch.no_grad():
        reference = model(ids.long()).logits.double().log_softmax(-1)
        for name, tensor in changed.items():
            model.get_parameter(name).copy_(tensor)
        logits = model(ids.long()).logits.double().log_softmax(-1)
    return float((reference.exp() * (reference - logits)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_student_is_nearer_than_by_rounding_or_search(tmp_path: Path, kind: str, tied: bool) -> None:
    folder, ids = make(tmp_path, kind, tied=tied), random_ids()
    source = Checkpoint(folder)
    found = {name: (q, scale) for name, q, scale in gptq_student(folder, ids, kinds_of(folder))}
    assert torch.is_grad_enabled(), "two walks at once must not leave gradients off"
    linears = {name for name in source if name.endswith("proj.weight")} | (set() if tied else {HEAD})
    assert found.keys() == linears and len(linears) == (14 if tied else 15)
    embedding = {EMBEDDING: dequantize_int8(*quantize_int8_rows(source.tensor(EMBEDDING)))}
    moments = second_moments(folder, ids)
    held_out = random_ids(8, seed=2)
    by_gptq, by_search, by_rounding = (
        mean_kl(folder, embedding | {name: dequantize_int4(*block) for name, block in kind_of.items()}, held_out)
        for kind_of in (
            found,
            {name: search_int4(source.tensor(name), moments[name]) for name in linears},
            {name: quantize_int4(source.tensor(name)) for name in linears},
        )
    )
    assert by_gptq < 0.9 * min(by_search, by_rounding)


def test_a_tied_int4_head_goes_first_and_the_layers_make_up_for_it(tmp_path: Path) -> None:
    folder, ids = make(tmp_path, "qwen3", tied=True), random_ids()
    found = {name: (q, scale) for name, q, scale in gptq_student(folder, ids, kinds_of(folder, "int4"))}
    assert next(iter(found)) == EMBEDDING and len(found) == 15
    held_out = random_ids(8, seed=2)
    rounded = {name: dequantize_int4(*quantize_int4(Checkpoint(folder).tensor(name))) for name in found}
    whole = {name: dequantize_int4(*block) for name, block in found.items()}
    assert mean_kl(folder, whole, held_out) < 0.9 * mean_kl(folder, rounded, held_out)


def test_what_is_not_int4_is_not_returned_but_counts(tmp_path: Path) -> None:
    folder, ids = make(tmp_path, "llama", tied=True, mlp=80), random_ids(8)
    first = list(gptq_student(folder, ids, kinds_of(folder)))
    assert not any("down_proj" in name for name, _, _ in first) and len(first) == 12
    again = list(gptq_student(folder, ids, kinds_of(folder)))
    plain = list(gptq_student(folder, ids, kinds_of(folder, "plain", "plain")))
    for (name, q, scale), (same_name, same_q, same_scale) in zip(first, again, strict=True):
        assert name == same_name and torch.equal(q, same_q) and torch.equal(scale, same_scale)
    # Layer 1 sees what the int8 matrices of layer 0 and of the embedding do.
    assert any(not torch.equal(q, other) for (_, q, _), (_, other, _) in zip(first, plain, strict=True))


def test_the_inputs_are_the_quantized_layers_and_the_target_is_the_student_s_own_output(tmp_path: Path) -> None:
    """The last Linear of the model, from the formula: inputs of the quantized model, outputs of the other."""
    folder, ids = make(tmp_path, "llama", tied=True), random_ids()
    blocks = {name: (q, scale) for name, q, scale in gptq_student(folder, ids, kinds_of(folder, "plain"))}
    last = "model.layers.1.mlp.down_proj"
    caught: list[torch.Tensor] = []
    for quantized in (False, True):
        model = load_model(folder)
        if quantized:
            with torch.no_grad():
                for name, block in blocks.items():
                    model.get_parameter(name).copy_(dequantize_int4(*block))
        model.get_submodule(last).register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(ids.long())
    y, x = (inputs.double() for inputs in caught)
    w = Checkpoint(folder).tensor(f"{last}.weight").double()
    hessian = x.T @ x
    damped = hessian + gptq.DAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
    target = w + w @ (y - x).T @ x @ torch.linalg.inv(damped)
    q, scale = gptq_int4(target.float(), hessian.float(), sweeps=gptq.SWEEPS)
    # What it aims at was recorded in bfloat16, so some integers differ; the distance to the target does not.
    found, expected = (output_error(target.float(), block, damped) for block in (blocks[f"{last}.weight"], (q, scale)))
    assert found == pytest.approx(expected, rel=0.03)
    aimed_at_x = gptq_int4(w.float(), hessian.float(), sweeps=gptq.SWEEPS)
    assert output_error(target.float(), aimed_at_x, damped) > 1.1 * found


def test_a_tensor_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama", tied=False)
    weights = load_file(folder / "model.safetensors")
    weights[HEAD][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EdgekdError, match=r"tensor 'lm_head\.weight' holds NaN or infinite weights"):
        list(gptq_student(folder, random_ids(4), kinds_of(folder)))


def test_less_than_a_window(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama", tied=True)
    nothing = torch.zeros((0, 32), dtype=torch.int32)
    with pytest.raises(EdgekdError, match="shorter than a window"):
        next(gptq_student(folder, nothing, kinds_of(folder)))
