"""The weight file and the compressed constants, read by our own code and compared with what coremltools wrote."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgekd.errors import BadArtifact, Unsupported
from edgekd.targets.coreml.mil import Interpreter
from edgekd.targets.coreml.mil.weights import ELEMENTS, WeightFile, unpack

mil = pytest.importorskip("coremltools.converters.mil.mil")
BlobWriter = pytest.importorskip("coremltools.libmilstoragepython")._BlobStorageWriter
mb, types = mil.Builder, mil.types

INTEGERS = [name for name in ELEMENTS if "INT" in name]


def limits(element: str) -> tuple[int, int]:
    """The least and the greatest integer of a type."""
    bits = ELEMENTS[element].bits
    return (0, 2**bits - 1) if element.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def write(path: Path, tensors: list[tuple[str, np.ndarray]]) -> list[int]:
    """A weight file by coremltools' writer; where each tensor's metadata stands."""
    writer = BlobWriter(str(path))
    offsets = []
    for element, values in tensors:
        if element == "FLOAT32":
            offsets.append(writer.write_float_data(values))
        elif element == "FLOAT16":
            offsets.append(writer.write_fp16_data(values.view(np.uint16)))
        else:
            offsets.append(getattr(writer, f"write_{element.lower()}_data")(values))
    return offsets


@given(bits=st.sampled_from([1, 2, 3, 4, 6]), signed=st.booleans(), data=st.data())
def test_unpack_reads_the_lowest_bits_first(bits: int, signed: bool, data: st.DataObject) -> None:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    values = data.draw(st.lists(st.integers(low, high), max_size=40))
    stream = sum((value & (1 << bits) - 1) << i * bits for i, value in enumerate(values))
    packed = np.frombuffer(stream.to_bytes((len(values) * bits + 7) // 8, "little"), np.uint8)
    assert unpack(packed, len(values), bits, signed=signed).tolist() == values


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), elements=st.lists(st.sampled_from(sorted(ELEMENTS)), min_size=1, max_size=4))
def test_a_file_of_coremltools_reads_back(data: st.DataObject, elements: list[str], tmp_path: Path) -> None:
    tensors = []
    for element in elements:
        kind = ELEMENTS[element]
        shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        low, high = limits(element) if element in INTEGERS else (None, None)
        wide = np.dtype(kind.dtype)
        choose = arrays.from_dtype(wide, min_value=low, max_value=high) if element in INTEGERS else st.floats(width=16)
        tensors.append((element, data.draw(arrays.arrays(wide, shape, elements=choose))))
    offsets = write(tmp_path / "weight.bin", [(element, values.reshape(-1)) for element, values in tensors])
    file = WeightFile(tmp_path / "weight.bin")
    for (element, values), offset in zip(tensors, offsets, strict=True):
        read = file.blob(offset, values.shape, element).read()
        assert read.dtype == values.dtype and read.tobytes() == values.tobytes()


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, int]:
    """A file of one int4 tensor of shape (3, 5), and where it stands."""
    path = tmp_path / "weight.bin"
    return path, write(path, [("INT4", np.arange(15, dtype=np.int8) - 8)])[0]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match=r"none\.bin cannot be read"):
        WeightFile(tmp_path / "none.bin").blob(64, (1,), "INT8")


@pytest.mark.parametrize(
    ("size", "message"),
    [(0, "cannot be read"), (40, "40 bytes, less than its header"), (100, "no metadata"), (133, "ends at byte 133")],
)
def test_a_truncated_file_is_refused(weights: tuple[Path, int], size: int, message: str) -> None:
    path, offset = weights
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadArtifact, match=message):
        WeightFile(path).blob(offset, (3, 5), "INT4")


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (4, "<I", 1, "version 1"),
        (64, "<I", 0xDEADBEE0, "no metadata at byte 64"),
        (68, "<I", 4, r"type 4 at byte 64, not 8 \(INT4\)"),
        (72, "<Q", 9, "holds 9 bytes"),
        (80, "<Q", 1 << 40, "inside the tensor"),
        (80, "<Q", 130, "inside the tensor"),
        (88, "<Q", 0, "holds 8 bytes"),
    ],
)
def test_a_damaged_file_is_refused(weights: tuple[Path, int], at: int, form: str, value: int, message: str) -> None:
    path, offset = weights
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)
    with pytest.raises(BadArtifact, match=message):
        WeightFile(path).blob(offset, (3, 5), "INT4")


@pytest.mark.parametrize(
    ("offset", "shape", "element", "message"),
    [
        (0, (3, 5), "INT4", "no metadata"),
        (65, (3, 5), "INT4", "no metadata"),
        (1 << 40, (3, 5), "INT4", "no metadata"),
        (64, (3, 6), "INT4", "not those of INT4"),
        (64, (2, 9), "INT4", "not those of INT4"),
        (64, (3, 5), "UINT4", "type 8"),
    ],
)
def test_a_wrong_reference_is_refused(
    weights: tuple[Path, int], offset: int, shape: tuple[int, ...], element: str, message: str
) -> None:
    with pytest.raises(BadArtifact, match=message):
        WeightFile(weights[0]).blob(offset, shape, element)


def test_an_unknown_type_is_unsupported(weights: tuple[Path, int]) -> None:
    with pytest.raises(Unsupported, match="FLOAT8E4M3FN"):
        WeightFile(weights[0]).blob(64, (3, 5), "FLOAT8E4M3FN")


RNG = np.random.default_rng(0)


def quantized(element: str, *shape: int) -> np.ndarray:
    low, high = limits(element)
    return RNG.integers(low, high + 1, shape).astype(ELEMENTS[element].dtype)


def typed(element: str, values: np.ndarray) -> np.ndarray:
    """Integers as coremltools marks those narrower than a byte."""
    return values.astype(types.nptype_from_builtin(getattr(types, element.lower())))


def halves(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float16)


@dataclass(frozen=True)
class Constant:
    """A compressed constant: how coremltools makes it, what it stands for, and what is stored."""

    name: str
    make: Callable[..., Any]
    expected: np.ndarray
    stored: tuple[np.ndarray, ...]


def blockwise(element: str, groups: tuple[int, int], shifted: bool) -> Constant:
    data, scale = quantized(element, 6, 32), halves(*groups)
    offset = quantized(element, *groups)
    blocks = np.ones((6 // groups[0], 32 // groups[1]))
    shift = np.kron(offset.astype(float), blocks) if shifted else 0.0
    settings = {"offset": typed(element, offset)} if shifted else {}
    return Constant(
        f"blockwise_{element}_{groups[0]}_{groups[1]}" + "_shifted" * shifted,
        partial(mb.constexpr_blockwise_shift_scale, data=typed(element, data), scale=scale, **settings),
        (np.kron(scale.astype(float), blocks) * (data - shift)).astype(np.float16),
        (data, scale, offset) if shifted else (data, scale),
    )


def palette(element: str, groups: tuple[int, int]) -> Constant:
    indices, lut = quantized(element, 8, 6), halves(*groups, 2 ** ELEMENTS[element].bits, 1)
    places = [(i, j) for i in range(8) for j in range(6)]
    entries = [lut[i * groups[0] // 8, j * groups[1] // 6, indices[i, j], 0] for i, j in places]
    return Constant(
        f"palette_{element}_{groups[0]}_{groups[1]}",
        partial(mb.constexpr_lut_to_dense, indices=typed(element, indices), lut=lut),
        np.reshape(entries, (8, 6)),
        (indices, lut),
    )


def vectors(axis: int, shape: tuple[int, ...]) -> Constant:
    """The documentation's second example: three values replace each index along an axis."""
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], np.uint8)
    table = np.array([[1, 2, 3], [4, 5, 6]], np.float16)
    lut = table[None, None, None]
    expected = np.empty(shape, np.float16)
    for place in np.ndindex(*indices.shape):
        at: list[Any] = list(place)
        at[axis] = slice(place[axis] * 3, place[axis] * 3 + 3)
        expected[tuple(at)] = table[indices[place]]
    make = partial(mb.constexpr_lut_to_dense, indices=typed("UINT1", indices), lut=lut, vector_axis=axis)
    return Constant(f"vectors_{'last' if axis < 0 else axis}", make, expected, (indices, lut))


def affine(element: str, scales: tuple[int, ...], zeros: tuple[int, ...]) -> Constant:
    data, scale, zero = quantized(element, 4, 6), np.asarray(halves(*scales)), np.asarray(quantized(element, *zeros))
    zero = zero.astype(data.dtype)
    make = partial(
        mb.constexpr_affine_dequantize,
        quantized_data=data,
        axis=1,
        scale=scale if scales else scale[()],
        zero_point=zero if zeros else zero[()],
    )
    expected = (scale.astype(float) * (data - zero.astype(float))).astype(np.float16)
    return Constant(f"affine_{element}_{len(scales)}_{len(zeros)}", make, expected, (data, zero, scale))


def palette_of_integers() -> Constant:
    """One compressed constant made of another: int8 palettes, and a scale for each row."""
    indices, lut, scale = quantized("UINT2", 4, 8), quantized("INT8", 1, 1, 4, 1), halves(4, 1)

    def make(name: str) -> Any:
        dense = mb.constexpr_lut_to_dense(indices=typed("UINT2", indices), lut=lut, name="integers")
        return mb.constexpr_blockwise_shift_scale(data=dense, scale=scale, name=name)

    return Constant("nested", make, (scale.astype(float) * lut[0, 0, :, 0][indices]).astype(np.float16), ())


def many_steps() -> Constant:
    """More elements than are unpacked at a time, and in single precision."""
    data, scale = quantized("INT4", 700, 1024), RNG.standard_normal((700, 32)).astype(np.float32)
    make = partial(mb.constexpr_blockwise_shift_scale, data=typed("INT4", data), scale=scale)
    return Constant("many_steps", make, np.repeat(scale, 32, 1) * data, (data, scale))


def dense() -> Constant:
    values = halves(40, 30)
    return Constant("dense", partial(mb.const, val=values), values, (values,))


GROUPS = [(6, 4), (1, 1), (3, 1), (1, 8)]
CONSTANTS = [
    *(blockwise(e, g, s) for e in ("INT4", "UINT4", "INT8", "UINT8") for g in GROUPS for s in (False, True)),
    *(
        palette(element, groups)
        for element in ("UINT1", "UINT2", "UINT3", "UINT4", "UINT6", "UINT8")
        for groups in [(1, 1), (4, 1), (2, 3), (8, 6)]
    ),
    *(vectors(axis, shape) for axis, shape in [(0, (6, 2, 2)), (1, (2, 6, 2)), (2, (2, 2, 6)), (-1, (2, 2, 6))]),
    *(affine(e, s, z) for e in ("INT8", "UINT8") for s, z in [((), ()), ((6,), ()), ((), (6,)), ((6,), (6,))]),
    palette_of_integers(),
    many_steps(),
    dense(),
]


@pytest.fixture(scope="module")
def interpreted(
    make_mlpackage: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Interpreter, dict[str, np.ndarray]]:
    """A package of all the constants, and what the program returns of them."""

    def body(x: Any) -> list[Any]:
        values = [mb.identity(x=one.make(name=one.name), name=f"{one.name}_out") for one in CONSTANTS]
        return [mb.identity(x=x, name="out"), *values]

    path = make_mlpackage(tmp_path_factory.mktemp("constants") / "weights.mlpackage", body, {"x": ("float16", (1,))})
    program = Interpreter(path)
    return program, program.run({"x": np.zeros(1, np.float16)})


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda one: one.name)
def test_a_constant_stands_for(constant: Constant, interpreted: tuple[Interpreter, dict[str, np.ndarray]]) -> None:
    got = interpreted[1][f"{constant.name}_out"]
    assert got.dtype == constant.expected.dtype
    np.testing.assert_array_equal(got, constant.expected)


@pytest.mark.parametrize("constant", [one for one in CONSTANTS if one.stored], ids=lambda one: one.name)
def test_a_constant_reads_back(constant: Constant, interpreted: tuple[Interpreter, dict[str, np.ndarray]]) -> None:
    read = interpreted[0].weight(constant.name)
    for ours, stored in zip(read if isinstance(read, tuple) else (read,), constant.stored, strict=True):
        assert ours.dtype == stored.dtype and ours.shape == stored.shape
        np.testing.assert_array_equal(ours, stored)


def test_there_is_no_other_constant(interpreted: tuple[Interpreter, dict[str, np.ndarray]]) -> None:
    with pytest.raises(KeyError):
        interpreted[0].weight("nothing")
