"""Each operator of the MIL interpreter, in a program that coremltools builds and saves.

The results are compared with an expression of its own in torch, in double precision, and where coremltools evaluates
the operator itself on constants, with that.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.targets.coreml.mil import Interpreter, ops

ct = pytest.importorskip("coremltools")
mil = pytest.importorskip("coremltools.converters.mil.mil")
mb, types = mil.Builder, mil.types

FLOATS = ["float16", "float32"]


def normal(*shape: int) -> np.ndarray:
    """Numbers that are exact in half precision, in double precision."""
    return np.random.default_rng(math.prod(shape)).standard_normal(shape).astype(np.float16).astype(np.float64)


def positive(*shape: int) -> np.ndarray:
    return np.abs(normal(*shape)) + 0.125


def integers(*shape: int, low: int = -7, high: int = 8) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).integers(low, high, shape).astype(np.int32)


def constant(value: Any, x: Any) -> np.ndarray:
    """A constant of the type of a coremltools variable."""
    return np.asarray(value).astype(np.float16 if x.dtype == types.fp16 else np.float32)


@dataclass(frozen=True)
class Case:
    """One use of an operator.

    Attributes:
        op: its name, and what is special about this use.
        build: from coremltools' variables.
        expect: from tensors, floating ones in double precision.
        inputs: what both are given.
    """

    op: str
    build: Callable[..., Any]
    expect: Callable[..., Tensor]
    inputs: tuple[np.ndarray, ...]

    @property
    def name(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.op)


def unary(op: str, expect: Callable[[Tensor], Tensor], x: np.ndarray | None = None, **settings: Any) -> Case:
    special = "".join(f" {key}={value}" for key, value in settings.items())
    x = normal(2, 3, 5) * 3 if x is None else x
    special += " integers" * (x.dtype == np.int32)

    def make(x: Any) -> Any:
        typed = {key: constant(value, x) if isinstance(value, float) else value for key, value in settings.items()}
        return getattr(mb, op)(x=x, **typed)

    return Case(op + special, make, expect, (x,))


def binary(op: str, expect: Callable[[Tensor, Tensor], Tensor], x: np.ndarray, y: np.ndarray, note: str = "") -> Case:
    return Case(f"{op} {note}", lambda x, y: getattr(mb, op)(x=x, y=y), expect, (x, y))


A, B, C = normal(2, 3, 5), normal(3, 1) * 2, normal(1, 4, 3)
INTS, ROWS = integers(2, 3, 5), integers(3, 5)
NONZERO = np.where(ROWS == 0, 3, ROWS).astype(np.int32)
WIDE = normal(2, 4, 6)
LOGIC = (integers(2, 3, 4), integers(3, 4))

ELEMENTWISE = [
    unary("abs", lambda x: x.abs()),
    unary("abs", lambda x: x.abs(), INTS),
    unary("ceil", torch.ceil),
    unary("clip", lambda x: x.clamp(-0.5, 1.25), alpha=-0.5, beta=1.25),
    unary("cos", torch.cos),
    unary("erf", torch.erf),
    unary("exp", torch.exp),
    unary("exp2", torch.exp2),
    unary("floor", torch.floor),
    unary("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
    unary("gelu", lambda x: F.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
    unary("gelu", lambda x: x / (1 + torch.exp(-1.702 * x)), mode="SIGMOID_APPROXIMATION"),
    unary("identity", lambda x: x),
    unary("inverse", lambda x: 1 / (x + 0.5), positive(2, 7), epsilon=0.5),
    unary("log", torch.log, positive(2, 7)),
    unary("log", lambda x: torch.log(x + 0.25), positive(2, 7), epsilon=0.25),
    unary("relu", F.relu),
    unary("round", torch.round, np.array([[-2.5, -1.5, -0.5, 0.5], [1.5, 2.5, 0.49, -0.51]])),
    unary("rsqrt", lambda x: x**-0.5, positive(2, 7)),
    unary("rsqrt", lambda x: (x + 2) ** -0.5, positive(2, 7), epsilon=2.0),
    unary("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    unary("sign", torch.sign),
    unary("silu", lambda x: x / (1 + torch.exp(-x))),
    unary("sin", torch.sin),
    unary("sqrt", torch.sqrt, positive(2, 7)),
    unary("square", lambda x: x * x),
    unary("square", lambda x: x * x, INTS),
    unary("tanh", torch.tanh),
    binary("add", lambda x, y: x + y, A, B),
    binary("add", lambda x, y: x + y, INTS, ROWS, "integers"),
    binary("sub", lambda x, y: x - y, A, B),
    binary("sub", lambda x, y: x - y, INTS, ROWS, "integers"),
    binary("mul", lambda x, y: x * y, A, B),
    binary("mul", lambda x, y: x * y, INTS, ROWS, "integers"),
    binary("real_div", lambda x, y: x / y, A, B),
    binary("floor_div", lambda x, y: torch.floor(x / y), A, B),
    binary("floor_div", lambda x, y: torch.div(x, y, rounding_mode="floor"), INTS, NONZERO, "integers"),
    binary("mod", lambda x, y: x - y * torch.floor(x / y), A, B),
    binary("mod", lambda x, y: x - y * torch.div(x, y, rounding_mode="floor"), INTS, NONZERO, "integers"),
    binary("pow", lambda x, y: torch.exp(y * torch.log(x)), positive(2, 3, 5), B),
    binary("maximum", lambda x, y: torch.where(x > y, x, y), A, B),
    binary("maximum", lambda x, y: torch.where(x > y, x, y), INTS, ROWS, "integers"),
    binary("minimum", lambda x, y: torch.where(x > y, y, x), A, B),
    binary("equal", lambda x, y: x == y, INTS, ROWS),
    binary("not_equal", lambda x, y: x != y, INTS, ROWS),
    binary("less", lambda x, y: x < y, A, B),
    binary("less_equal", lambda x, y: x <= y, INTS, ROWS),
    binary("greater", lambda x, y: x > y, A, B),
    binary("greater_equal", lambda x, y: x >= y, INTS, ROWS),
    *[
        Case(
            f"logical_{op}",
            lambda x, y, op=op: getattr(mb, f"logical_{op}")(x=mb.greater(x=x, y=0), y=mb.less(x=y, y=3)),
            lambda x, y, op=op: {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a != b}[op](
                x > 0, y < 3
            ),
            LOGIC,
        )
        for op in ("and", "or", "xor")
    ],
    Case("logical_not", lambda x: mb.logical_not(x=mb.greater(x=x, y=0)), lambda x: x <= 0, LOGIC[:1]),
    Case(
        "select",
        lambda c, a, b: mb.select(cond=mb.greater(x=c, y=0), a=a, b=b),
        lambda c, a, b: torch.where(c > 0, a, b),
        (integers(2, 1, 5), A, B),
    ),
    Case("cast int32", lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.trunc().to(torch.int32), (A * 4,)),
    Case("cast fp32", lambda x: mb.cast(x=x, dtype="fp32"), lambda x: x.double(), (INTS,)),
    Case("cast bool", lambda x: mb.cast(x=x, dtype="bool"), lambda x: x != 0, (INTS,)),
    Case(
        "cast int16",
        lambda x: mb.cast(x=mb.cast(x=x, dtype="int16"), dtype="int32"),
        lambda x: x,
        (integers(2, 9, low=-30000, high=30000),),
    ),
    Case(
        "cast uint16",
        lambda x: mb.cast(x=mb.cast(x=x, dtype="uint16"), dtype="int32"),
        lambda x: x,
        (integers(2, 9, low=0, high=65535),),
    ),
]

PRODUCTS = [
    Case(
        f"matmul {note}",
        lambda x, y, tx=tx, ty=ty: mb.matmul(x=x, y=y, transpose_x=tx, transpose_y=ty),
        lambda x, y, eq=eq: torch.einsum(eq, x, y),
        (x, y),
    )
    for note, x, y, tx, ty, eq in [
        ("batches", normal(2, 1, 4, 3), normal(5, 3, 6), False, False, "aBik,bkj->abij"),
        ("transpose_x", normal(2, 3, 4), normal(2, 3, 6), True, False, "aki,akj->aij"),
        ("transpose_y", normal(2, 4, 3), normal(2, 6, 3), False, True, "aik,ajk->aij"),
        ("both", normal(2, 3, 4), normal(2, 6, 3), True, True, "aki,ajk->aij"),
        ("matrix", normal(2, 4, 3), normal(3, 6), False, False, "aik,kj->aij"),
        ("matrix transposed", normal(2, 4, 3), normal(6, 3), False, True, "aik,jk->aij"),
        ("vector", normal(3), normal(3, 6), False, False, "k,kj->j"),
        ("integers", integers(2, 4, 3), integers(3, 6), False, False, "aik,kj->aij"),
    ]
] + [
    Case(
        "linear",
        lambda x: mb.linear(x=x, weight=constant(normal(7, 6), x), bias=constant(normal(7), x)),
        lambda x: x @ torch.from_numpy(normal(7, 6)).T + torch.from_numpy(normal(7)),
        (WIDE,),
    ),
    Case(
        "linear without bias",
        lambda x: mb.linear(x=x, weight=constant(normal(7, 6), x)),
        lambda x: x @ torch.from_numpy(normal(7, 6)).T,
        (WIDE,),
    ),
    Case(
        "linear in tiles",  # larger than one tile, and not a multiple of it
        lambda x: mb.linear(x=x, weight=constant(normal(2101, 600), x)),
        lambda x: x @ torch.from_numpy(normal(2101, 600)).T,
        (normal(2, 600) / 10,),
    ),
    Case(
        "matmul in tiles",
        lambda x: mb.matmul(x=x, y=constant(normal(600, 2101), x)),
        lambda x: x @ torch.from_numpy(normal(600, 2101)),
        (normal(2, 600) / 10,),
    ),
    Case(
        "scaled_dot_product_attention",
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        lambda q, k, v: torch.softmax(torch.einsum("bhie,bhje->bhij", q, k) / 8**0.5, -1) @ v,
        (normal(2, 3, 4, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 6)),
    ),
    Case(
        "scaled_dot_product_attention added mask",
        lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        (normal(2, 3, 4, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 6), normal(1, 1, 4, 5)),
    ),
    Case(
        "scaled_dot_product_attention boolean mask",
        lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mb.greater(x=m, y=0)),
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m > 0),
        (normal(2, 3, 4, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 6), np.tri(4, 5, 1, dtype=np.int32)[None, None]),
    ),
]

NORMS = [
    unary("softmax", lambda x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)),
    unary("softmax", lambda x: torch.exp(x) / torch.exp(x).sum(1, keepdim=True), axis=1),
    unary(
        "l2_norm", lambda x: x / ((x * x).sum((1, 2, 3), keepdim=True) + 0.5).sqrt(), normal(2, 3, 4, 5), epsilon=0.5
    ),
    Case(
        "layer_norm",
        lambda x: mb.layer_norm(
            x=x, axes=[-1], gamma=constant(normal(6), x), beta=constant(normal(6) * 2, x), epsilon=constant(2**-10, x)
        ),
        lambda x: F.layer_norm(x, (6,), torch.from_numpy(normal(6)), torch.from_numpy(normal(6) * 2), 2**-10),
        (WIDE,),
    ),
    Case("layer_norm plain", lambda x: mb.layer_norm(x=x, axes=[1, 2]), lambda x: F.layer_norm(x, (4, 6)), (WIDE,)),
    *[
        unary(op, expect, x, **settings)
        for op, expect_axes in {
            "reduce_sum": lambda x, axes, keep: x.sum(axes, keep),
            "reduce_mean": lambda x, axes, keep: x.sum(axes, keep) / (x.numel() / x.sum(axes, keep).numel()),
            "reduce_max": lambda x, axes, keep: x.amax(axes, keep),
            "reduce_min": lambda x, axes, keep: -(-x).amax(axes, keep),
            "reduce_l2_norm": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
            "reduce_sum_square": lambda x, axes, keep: (x**2).sum(axes, keep),
            "reduce_log_sum_exp": lambda x, axes, keep: torch.log(torch.exp(x).sum(axes, keep)),
        }.items()
        for x, settings, expect in [
            (WIDE, {"axes": [-1], "keep_dims": True}, lambda x, f=expect_axes: f(x, (2,), True)),
            (WIDE, {"axes": [0, 2]}, lambda x, f=expect_axes: f(x, (0, 2), False)),
            (WIDE, {}, lambda x, f=expect_axes: f(x, (0, 1, 2), False)),
        ]
    ],
    unary("reduce_sum", lambda x: x.sum((1,), True), INTS, axes=[1], keep_dims=True),
    unary("reduce_max", lambda x: x.amax((1,)), INTS, axes=[1]),
    unary("reduce_argmax", lambda x: x.argmax(1, keepdim=True), normal(3, 9, 2), axis=1, keep_dims=True),
    unary("cumsum", lambda x: x.cumsum(0)),
    unary("cumsum", lambda x: x.cumsum(2) - x, INTS, axis=2, exclusive=True),
    unary("cumsum", lambda x: x.flip(1).cumsum(1).flip(1), INTS, axis=1, reverse=True),
    unary("cumsum", lambda x: x.sum(1, True) - x.cumsum(1), INTS, axis=1, reverse=True, exclusive=True),
]

SHAPES = [
    Case("shape", lambda x: mb.shape(x=x), lambda x: torch.tensor([2, 3, 5]), (A,)),
    unary("expand_dims", lambda x: x[None, :, None, :, None], normal(4, 3), axes=[0, 2, -1]),
    unary("squeeze", lambda x: x[0, :, 0], normal(1, 4, 1, 3), axes=[0, -2]),
    unary("squeeze", lambda x: x[0, :, 0], normal(1, 4, 1, 3)),
    unary("reshape", lambda x: x.reshape(6, 5), shape=[6, -1]),
    unary("reshape", lambda x: x.reshape(2, 5, 3), shape=[0, 5, -1]),
    unary("transpose", lambda x: torch.einsum("abc->cab", x), perm=[-1, 0, 1]),
    unary("tile", lambda x: torch.cat([torch.cat([x] * 3, 2)] * 2, 0), reps=[2, 1, 3]),
    unary("reverse", lambda x: torch.flip(x, (0, 1, 2))),
    unary("reverse", lambda x: torch.flip(x, (1,)), INTS, axes=[-2]),
    unary("band_part", lambda x: x.tril(), WIDE, upper=0),
    unary("band_part", lambda x: x.tril(2).triu(-1), WIDE, lower=1, upper=2),
    Case("concat", lambda x, y: mb.concat(values=[x, y, x], axis=-2), lambda x, y: torch.cat([x, y, x], 1), (A, A)),
    Case(
        "concat interleave",
        lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        lambda x, y: torch.stack([x[:, i // 2] if i % 2 == 0 else y[:, i // 2] for i in range(6)], 1),
        (A, A + 1),
    ),
    Case("stack", lambda x, y: mb.stack(values=[x, y], axis=-1), lambda x, y: torch.stack([x, y], 3), (A, A + 1)),
    Case("split", lambda x: mb.split(x=x, num_splits=3, axis=-1)[1], lambda x: x[..., 2:4], (WIDE,)),
    Case("split sizes", lambda x: mb.split(x=x, split_sizes=[1, 3, 2], axis=2)[1], lambda x: x[..., 1:4], (WIDE,)),
    Case("fill", lambda x: mb.fill(shape=mb.shape(x=x), value=constant(2.5, x)), lambda x: x * 0 + 2.5, (A,)),
    Case("fill default", lambda x: mb.add(x=mb.fill(shape=[3]), y=0.0), lambda x: torch.zeros(3).double(), (A,)),
    Case(
        "range_1d",
        lambda x: mb.range_1d(start=np.int32(2), end=mb.gather(x=mb.shape(x=x), indices=2), step=np.int32(3)),
        lambda x: torch.tensor([2, 5, 8]),
        (normal(2, 1, 10),),
    ),
    Case(
        "range_1d floating",
        lambda x: mb.range_1d(start=constant(1, x), end=constant(-1, x), step=constant(-0.375, x)),
        lambda x: 1 - 0.375 * torch.arange(6).double(),
        (A,),
    ),
    *[
        Case(
            f"gather {note}",
            lambda x, i, settings=settings: mb.gather(x=x, indices=i, **settings),
            expect,
            (x, i),
        )
        for note, x, i, settings, expect in [
            ("rows", normal(9, 4), integers(2, 3, low=0, high=9), {}, lambda x, i: F.one_hot(i.long(), 9).double() @ x),
            ("axis", A, integers(4, low=0, high=5), {"axis": -1}, lambda x, i: x[:, :, i.long()]),
            (
                "batch_dims",
                A,
                integers(2, 4, low=0, high=5),
                {"axis": 2, "batch_dims": 1},
                lambda x, i: torch.stack([x[b][:, i[b].long()] for b in range(2)]),
            ),
            (
                "validated",
                normal(9, 4),
                integers(3, low=0, high=9),
                {"axis": 0, "validate_indices": True},
                lambda x, i: x[i.long()],
            ),
        ]
    ],
    Case(
        "gather_along_axis",
        lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
        lambda x, i: torch.from_numpy(np.take_along_axis(x.numpy(), i.numpy().astype(np.int64), 1)),
        (A, integers(2, 7, 5, low=0, high=3)),
    ),
    *[
        Case(
            f"slice_by_index {note}",
            lambda x, begin=begin, end=end, settings=settings: mb.slice_by_index(x=x, begin=begin, end=end, **settings),
            lambda x, at=at: torch.from_numpy(np.ascontiguousarray(x.numpy()[at])),
            (WIDE,),
        )
        for note, begin, end, settings, at in [
            ("plain", [0, 1, 2], [2, 3, 6], {}, np.s_[0:2, 1:3, 2:6]),
            ("from the end", [-1, -3, 0], [2, -1, -2], {}, np.s_[-1:2, -3:-1, 0:-2]),
            ("stride", [0, 0, 1], [2, 4, 6], {"stride": [1, 2, 3]}, np.s_[:, 0:4:2, 1:6:3]),
            ("backwards", [1, 3, 4], [0, 0, 1], {"stride": [-1, -2, -1]}, np.s_[1:0:-1, 3:0:-2, 4:1:-1]),
            (
                "backwards masks",
                [0, 0, 0],
                [0, 0, 0],
                {"stride": [1, -2, -1], "begin_mask": [True] * 3, "end_mask": [True] * 3},
                np.s_[:, ::-2, ::-1],
            ),
            (
                "masks",
                [1, 1, 1],
                [1, 3, 1],
                {"begin_mask": [True, False, False], "end_mask": [False, False, True]},
                np.s_[:1, 1:3, 1:],
            ),
            (
                "squeeze",
                [1, -1, 0],
                [0, 0, 3],
                {"squeeze_mask": [True, True, False]},
                np.s_[1, -1, 0:3],
            ),
            ("beyond the end", [0, 2, 0], [9, 9, 9], {}, np.s_[:, 2:, :]),
        ]
    ],
    unary("slice_by_size", lambda x: x[1:2, 1:3, 2:], WIDE, begin=[1, -3, 2], size=[1, 2, -1]),
    *[
        Case(
            f"slice_update {note}",
            lambda x, u, begin=begin, end=end, settings=settings: mb.slice_update(
                x=x, update=u, begin=begin, end=end, **settings
            ),
            lambda x, u, at=at: written(x, at, u),
            (WIDE, update),
        )
        for note, begin, end, settings, at, update in [
            ("plain", [0, 1, 2], [2, 3, 6], {}, np.s_[0:2, 1:3, 2:6], normal(2, 2, 4)),
            ("squeeze", [1, 0, 0], [0, 4, 6], {"squeeze_mask": [True, False, False]}, np.s_[1], normal(4, 6)),
            (
                "backwards",
                [0, 3, 0],
                [0, 0, 0],
                {"stride": [1, -2, 3], "begin_mask": [True, False, True], "end_mask": [True, False, True]},
                np.s_[:, 3:0:-2, ::3],
                normal(2, 2, 2),
            ),
        ]
    ],
    Case(
        "slice_update at run time",
        lambda x, u, p: mb.slice_update(
            x=x,
            update=u,
            begin=mb.concat(values=[np.int32([0]), p, np.int32([0])], axis=0),
            end=mb.concat(values=[np.int32([2]), mb.add(x=p, y=np.int32(2)), np.int32([6])], axis=0),
        ),
        lambda x, u, p: written(x, np.s_[:, 1:3], u),
        (WIDE, normal(2, 2, 6), np.int32([1])),
    ),
]


def written(x: Tensor, at: Any, update: Tensor) -> Tensor:
    result = x.numpy().copy()
    result[at] = update.numpy()
    return torch.from_numpy(result)


CASES = [*ELEMENTWISE, *PRODUCTS, *NORMS, *SHAPES]


def output(case: Case, variables: list[Any], name: str) -> Any:
    """A case's result as an output of a program, which cannot be a boolean."""
    result = case.build(*variables)
    result = mb.cast(x=result, dtype="int32") if result.dtype == types.bool else result
    return mb.identity(x=result, name=name)


@pytest.fixture(scope="module", params=FLOATS)
def results(
    request: pytest.FixtureRequest, make_mlpackage: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, np.ndarray]]:
    """What one program with every case computes, in half or in single precision."""
    given = {
        f"in_{case.name}_{i}": value.astype(request.param) if value.dtype == np.float64 else value
        for case in CASES
        for i, value in enumerate(case.inputs)
    }

    def body(**values: Any) -> list[Any]:
        return [output(c, [values[f"in_{c.name}_{i}"] for i in range(len(c.inputs))], f"{c.name}_out") for c in CASES]

    path = tmp_path_factory.mktemp(request.param) / "ops.mlpackage"
    make_mlpackage(path, body, {name: (str(value.dtype), value.shape) for name, value in given.items()})
    return request.param, Interpreter(path).run(given)


def test_the_cases_are_of_different_names() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator(case: Case, results: tuple[str, dict[str, np.ndarray]]) -> None:
    dtype, outputs = results
    tensors = [
        torch.from_numpy(value.astype(dtype).astype(np.float64))
        if value.dtype == np.float64
        else torch.from_numpy(value)
        for value in case.inputs
    ]
    expected = case.expect(*tensors).numpy()
    got = outputs[f"{case.name}_out"]
    assert got.shape == expected.shape
    if expected.dtype != np.float64:
        np.testing.assert_array_equal(got, expected.astype(np.int32))
        return
    assert got.dtype == (np.float32 if case.op == "cast fp32" or case.op == "fill default" else dtype)
    # One rounding to the type, of a result whose own error is that of single precision.
    np.testing.assert_allclose(
        got, expected, rtol=np.finfo(dtype).eps * (0.51 if dtype == "float16" else 16), atol=4e-6
    )


# Their evaluation of these is absent (silu), fails (cumsum), or ignores the setting (concat).
NOT_EVALUATED = ("silu", "cumsum axis=2 exclusive", "cumsum axis=1 reverse=True exclusive", "concat interleave")
EVALUATED = [case for case in CASES if not case.op.startswith(NOT_EVALUATED)]


@pytest.fixture(scope="module")
def evaluated(
    make_mlpackage: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Cases on constants: what coremltools makes of them itself, and the interpreter."""
    theirs: dict[str, np.ndarray] = {}

    def body(x: Any) -> list[Any]:
        outputs = [mb.identity(x=x, name="out")]
        for case in EVALUATED:
            values = [value.astype(np.float32) if value.dtype == np.float64 else value for value in case.inputs]
            outputs.append(output(case, [mb.const(val=value) for value in values], f"{case.name}_out"))
            theirs[case.name] = np.asarray(outputs[-1].val)
        return outputs

    path = make_mlpackage(tmp_path_factory.mktemp("constants") / "ops.mlpackage", body, {"x": ("float32", (1,))})
    ours = Interpreter(path).run({"x": np.zeros(1, np.float32)})
    return {name: (value, ours[f"{name}_out"]) for name, value in theirs.items()}


@pytest.mark.parametrize("case", EVALUATED, ids=lambda case: case.name)
def test_an_operator_against_their_evaluation(case: Case, evaluated: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    expected, got = evaluated[case.name]
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=4e-6, atol=4e-6)


def test_every_operator_has_a_case() -> None:
    tested = {case.op.split()[0] for case in CASES}
    compressed = {name for name in ops.MOVED if name.startswith("constexpr_")}  # in test_mil_weights.py
    assert {*ops.MOVED, *ops.COMPUTED} - compressed == tested


@pytest.mark.parametrize("op", sorted({**ops.MOVED, **ops.COMPUTED}))
def test_inputs_are_those_of_the_documentation(op: str) -> None:
    documented = mil.ops.registry.SSAOpRegistry.core_ops[op][ct.target.iOS18].input_spec.input_types
    mine = dict(inspect.signature({**ops.MOVED, **ops.COMPUTED}[op]).parameters)
    mine.pop("in_place", None)
    assert {key: one.default is not one.empty for key, one in mine.items()} == {
        key: one.optional for key, one in documented.items()
    }


@pytest.mark.parametrize(
    ("op", "given"),
    [
        ("band_part", {}),
        ("concat", {"axis": 0}),
        ("cumsum", {}),
        ("fill", {"shape": [2]}),
        ("gather", {"indices": [0]}),
        ("gather_along_axis", {"indices": np.zeros((2, 3, 4, 5), np.int32)}),
        ("gelu", {}),
        ("inverse", {}),
        ("l2_norm", {}),
        ("layer_norm", {"axes": [-1]}),
        ("log", {}),
        ("matmul", {"y": np.ones((5, 2), np.float32)}),
        ("reduce_argmax", {}),
        ("reduce_sum", {}),
        ("rsqrt", {}),
        ("softmax", {}),
    ],
)
def test_defaults_are_those_of_the_documentation(op: str, given: dict[str, Any]) -> None:
    with mil.Function({"x": mb.TensorSpec((2, 3, 4, 5))}, opset_version=ct.target.iOS18) as function:
        x = function.inputs["x"]
        source = {"fill": {}, "concat": {"values": [x, x]}}.get(op, {"x": x})
        theirs = getattr(mb, op)(**source, **given).op.inputs
    for name, parameter in inspect.signature({**ops.MOVED, **ops.COMPUTED}[op]).parameters.items():
        if name in given or parameter.default in (None, parameter.empty) or name == "in_place":
            continue
        value = theirs[name].val
        assert value == (np.float32(parameter.default) if isinstance(parameter.default, float) else parameter.default)
