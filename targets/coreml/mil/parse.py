"""From the protobuf of a MIL program to steps that can be run: everything is checked here, once, when it is loaded."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch

from ....errors import BadArtifact, Unsupported
from .ops import COMPUTED, DTYPES, MOVED
from .package import Package, proto
from .weights import ELEMENTS, Blob, unpack

OPSETS = ("CoreML7", "CoreML8")  # iOS 17 and 18
MAX_RANK = 5
READ = "read_state"
# Which input is the state, and which the value written to it.
STATE_INPUTS = {READ: ("input", None), "write_state": ("input", "data"), "coreml_update_state": ("state", "value")}
FEATURE_TYPES = {"FLOAT16": "float16", "FLOAT32": "float32", "INT32": "int32", "INT8": "int8"}
# MIL's types, by the names of protobuf and of MIL; integers narrower than a byte exist in constants alone.
TYPES = {
    "FLOAT16": "fp16",
    "FLOAT32": "fp32",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT16": "int16",
    "UINT16": "uint16",
    "INT32": "int32",
    "BOOL": "bool",
    "INT4": "int8",
    "UINT1": "uint8",
    "UINT2": "uint8",
    "UINT3": "uint8",
    "UINT4": "uint8",
    "UINT6": "uint8",
}
Stored = Blob | np.ndarray | str


@dataclass(frozen=True)
class Feature:
    """An input, output or state.

    Attributes:
        dtype: NumPy's name of its type.
        shape: each axis's length, or its least and greatest where it is flexible; a greatest of -1 is no bound.
        choices: the only shapes allowed, where they are enumerated.
    """

    dtype: str
    shape: tuple[int | tuple[int, int], ...]
    choices: tuple[tuple[int, ...], ...] = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor may have this shape."""
        if self.choices and shape not in self.choices:
            return False
        ranges = [(length, length) if isinstance(length, int) else length for length in self.shape]
        return len(shape) == len(ranges) and all(
            low <= n and (high < 0 or n <= high) for n, (low, high) in zip(shape, ranges, strict=True)
        )


@dataclass(frozen=True)
class Declared:
    """What the program says of a value: its name, its type in memory, its lengths (None where they are flexible)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...] | None

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor has this shape."""
        return self.shape is None or (
            len(self.shape) == len(shape) and all(a in (None, b) for a, b in zip(self.shape, shape, strict=True))
        )


@dataclass(frozen=True)
class Step:
    """One operation, ready to run.

    Attributes:
        tensors: the value each positional parameter takes, or the values of a list.
        settings: Python values of the keyword parameters.
        dynamic: the values of keyword parameters that are known only at run time.
        state: the state that is read or written, or into whose memory a ``slice_update`` may write.
        dying: the values that nothing reads after this step.
    """

    type: str
    outputs: tuple[Declared, ...]
    tensors: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    dynamic: Mapping[str, str] = field(default_factory=dict)
    state: str = ""
    dying: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its first output's, or its state's."""
        return self.outputs[0].name if self.outputs else self.state

    def reads(self) -> Iterator[str]:
        """The values it takes."""
        for names in self.tensors.values():
            yield from [names] if isinstance(names, str) else names
        yield from self.dynamic.values()


@dataclass(frozen=True)
class Program:
    """A checked program. ``constants`` are as stored; ``compressed`` are the steps that unpack some of them."""

    inputs: dict[str, Feature]
    outputs: dict[str, Feature]
    states: dict[str, Feature]
    op_counts: dict[str, int]
    constants: dict[str, Stored]
    compressed: dict[str, Step]
    steps: list[Step]


def parse(package: Package) -> Program:
    """Read a package's program.

    Raises:
        BadArtifact: the program contradicts itself, or its weight file.
        Unsupported: it holds operators or types that the interpreter does not know; unknown operators are all named.
    """
    description = package.spec.description
    function, block = _main(package)
    counts = dict(sorted(Counter(operation.type for operation in block.operations).items()))
    if unknown := set(counts) - {*COMPUTED, *MOVED, *STATE_INPUTS, "const"}:
        names = ", ".join(sorted(unknown))
        raise Unsupported(f"{package.path} has operators that the interpreter does not know: {names}.")
    inputs = {one.name: _feature(package, one) for one in description.input}
    states = {one.name: _feature(package, one) for one in description.state}
    if {one.name for one in function.inputs} != {*inputs, *states}:
        raise bad(package, f"describes other inputs than its program's {[one.name for one in function.inputs]}")
    constants: dict[str, Stored] = {}
    compressed: dict[str, Step] = {}
    steps = []
    for operation in block.operations:
        if operation.type == "const":
            if len(operation.outputs) != 1:
                raise bad(package, f"has a constant of {len(operation.outputs)} names")
            constants[operation.outputs[0].name] = _stored(package, operation.attributes["val"])
            continue
        step = _step(package, operation, constants)
        if step.type.startswith("constexpr_"):
            compressed[step.name] = step
        else:
            steps.append(step)
    returned = list(block.outputs)
    _check_order(package, steps, compressed, {*inputs, *constants, *compressed}, set(states), returned)
    declared = {value.name: value for step in steps for value in step.outputs}
    described = [one.name for one in description.output]
    if sorted(described) != sorted(returned) or not set(described) <= set(declared):
        raise bad(package, f"describes the outputs {described}, and its program returns {returned}")
    outputs = {name: _output(declared[name]) for name in described}
    steps = _write_in_place(_with_dying(steps, {*returned, *constants, *compressed}))
    return Program(inputs, outputs, states, counts, constants, compressed, steps)


def bad(package: Package, what: str, remedy: str = "Export the package again.") -> BadArtifact:
    """An error of a package whose program is wrong."""
    return BadArtifact(f"{package.path} {what}.", remedy)


def _main(package: Package) -> tuple[Any, Any]:
    """The only function, and the block of its opset."""
    functions = package.spec.mlProgram.functions
    if list(functions) != ["main"]:
        raise Unsupported(f"{package.path} has the functions {sorted(functions)}.", "Only 'main' can be interpreted.")
    function = functions["main"]
    if function.opset not in OPSETS:
        raise Unsupported(
            f"{package.path} is of opset {function.opset!r}; the interpreter knows {', '.join(OPSETS)}.",
            "Convert it for iOS 17 or iOS 18.",
        )
    if function.opset not in function.block_specializations:
        raise bad(package, f"has no block of its opset {function.opset}")
    return function, function.block_specializations[function.opset]


def _feature(package: Package, feature: Any) -> Feature:
    """An input or a state."""
    kind = feature.type.WhichOneof("Type")
    array = feature.type.stateType.arrayType if kind == "stateType" else feature.type.multiArrayType
    types = proto("FeatureTypes_pb2").ArrayFeatureType.ArrayDataType
    name = _name(types, array.dataType) if kind in ("multiArrayType", "stateType") else str(kind)
    if name not in FEATURE_TYPES:
        raise Unsupported(f"{package.path}: the feature {feature.name!r} is of type {name}.")
    choices = tuple(tuple(one.shape) for one in array.enumeratedShapes.shapes)
    spans = [(length, length) for length in array.shape]
    if array.shapeRange.sizeRanges:
        spans = [(one.lowerBound, one.upperBound) for one in array.shapeRange.sizeRanges]
    elif choices:
        spans = [(min(lengths), max(lengths)) for lengths in zip(*choices, strict=True)]
    return Feature(FEATURE_TYPES[name], tuple(low if low == high else (low, high) for low, high in spans), choices)


def _output(value: Declared) -> Feature:
    """An output, from the program: the description leaves flexible shapes out."""
    shape = tuple((1, -1) if length is None else length for length in value.shape or ())
    return Feature(str(value.dtype).removeprefix("torch."), shape)


def _tensor_type(package: Package, kind: Any) -> tuple[str, tuple[int | None, ...] | None]:
    """Type, by protobuf's name, and lengths of a tensor; no lengths where even its rank is unknown."""
    if kind.WhichOneof("type") != "tensorType":
        raise Unsupported(f"{package.path} has values of type {kind.WhichOneof('type')}.")
    tensor = kind.tensorType
    lengths = [one.constant.size if one.WhichOneof("dimension") == "constant" else None for one in tensor.dimensions]
    variadic = any(one.unknown.variadic for one in tensor.dimensions)
    return _name(proto("MIL_pb2").DataType, tensor.dataType), None if variadic else tuple(lengths)


def _name(enum: Any, number: int) -> str:
    """An enumerator's name; a file may hold any number."""
    return str(enum.Name(number)) if number in enum.values() else f"number {number}"


def _declared(package: Package, value: Any) -> Declared:
    name, shape = _tensor_type(package, value.type)
    if name not in TYPES:
        raise Unsupported(f"{package.path}: the value {value.name!r} is of type {name}.")
    if shape and len(shape) > MAX_RANK:
        raise Unsupported(f"{package.path}: the value {value.name!r} is of rank {len(shape)}; Core ML has {MAX_RANK}.")
    return Declared(value.name, DTYPES[TYPES[name]], shape)


def _stored(package: Package, value: Any) -> Stored:
    """A constant: where the weight file has it, or what the program itself holds."""
    name, lengths = _tensor_type(package, value.type)
    if lengths is None or None in lengths:
        raise bad(package, "has a constant without a shape")
    shape = tuple(length or 0 for length in lengths)
    if name != "STRING" and name not in TYPES:
        raise Unsupported(f"{package.path} has a constant of type {name}.")
    if value.WhichOneof("value") == "blobFileValue":
        return package.weights(value.blobFileValue.fileName).blob(value.blobFileValue.offset, shape, name)
    tensor = value.immediateValue.tensor
    content: Any = getattr(tensor, tensor.WhichOneof("value") or "ints").values
    if name == "STRING":
        return str(content[0]) if content else ""
    if isinstance(content, bytes):
        if name not in ELEMENTS:
            raise bad(package, f"has a constant of type {name} written as bytes")
        kind = ELEMENTS[name]
        if len(content) != (prod(shape) * kind.bits + 7) // 8:
            raise bad(package, f"has a constant of {len(content)} bytes, not those of {name} {list(shape)}")
        if kind.bits < 8:
            packed = np.frombuffer(content, np.uint8)
            return unpack(packed, prod(shape), kind.bits, signed=name == "INT4").reshape(shape)
        return np.frombuffer(content, kind.dtype).reshape(shape).copy()
    if len(content) != prod(shape):
        raise bad(package, f"has a constant of {len(content)} elements, not of shape {list(shape)}")
    wide = np.array(content)
    if wide.dtype.kind in "iufb":
        value = wide.astype(np.bool_ if name == "BOOL" else ELEMENTS[name].dtype)
        if wide.dtype.kind == "f" or np.array_equal(value, wide):
            return value.reshape(shape)
    raise bad(package, f"has a constant that is not of its type {name}")


def _arguments(package: Package, operation: Any, constants: dict[str, Stored]) -> dict[str, str | tuple[str, ...]]:
    """The names that an operation's parameters are bound to; values given in place become constants."""
    name = operation.outputs[0].name if operation.outputs else ""
    arguments: dict[str, str | tuple[str, ...]] = {}
    for key, argument in operation.inputs.items():
        names = []
        for i, binding in enumerate(argument.arguments):
            if binding.WhichOneof("binding") == "value":
                names.append(f"{name}.{key}.{i}")
                constants[names[-1]] = _stored(package, binding.value)
            else:
                names.append(binding.name)
        if len(names) != 1 and key != "values":
            raise bad(package, f"gives {len(names)} values to the input {key!r} of {operation.type} {name!r}")
        arguments[key] = tuple(names) if key == "values" else names[0]
    for key, value in operation.attributes.items():  # where iOS 16's compressed constants have their parameters
        if key != "name":
            arguments[key] = f"{name}.{key}"
            constants[f"{name}.{key}"] = _stored(package, value)
    return arguments


def _step(package: Package, operation: Any, constants: dict[str, Stored]) -> Step:
    """An operation, its parameters matched with those of the function that executes it."""
    outputs = tuple(_declared(package, output) for output in operation.outputs)
    arguments = _arguments(package, operation, constants)
    what = f"{operation.type} {outputs[0].name if outputs else ''!r}"
    if operation.type in STATE_INPUTS:
        state, data = STATE_INPUTS[operation.type]
        if set(arguments) != {state, data} - {None}:
            raise bad(package, f"has a {what} with the inputs {sorted(arguments)}")
        tensors = {data: arguments[data]} if data else {}
        return Step(operation.type, outputs, tensors, state=str(arguments[state]))
    parameters = inspect.signature({**MOVED, **COMPUTED}[operation.type]).parameters
    if unknown := sorted(set(arguments) - set(parameters) | {"in_place"} & set(arguments)):
        raise Unsupported(f"{package.path} has a {what} with inputs that the interpreter does not know: {unknown}.")
    missing = [key for key, one in parameters.items() if one.default is one.empty and key not in arguments]
    if missing:
        raise bad(package, f"has a {what} without the input {missing[0]!r}")
    tensors, settings, dynamic = {}, {}, {}
    for key, names in arguments.items():
        if parameters[key].kind is not inspect.Parameter.KEYWORD_ONLY:
            tensors[key] = names
        elif names in constants:
            value = constants[str(names)]
            settings[key] = value if isinstance(value, str) else _array(value).tolist()
        else:
            dynamic[key] = str(names)
    return Step(operation.type, outputs, tensors, settings, dynamic)


def _array(value: Blob | np.ndarray) -> np.ndarray:
    return value.read() if isinstance(value, Blob) else value


def _check_order(
    package: Package,
    steps: Sequence[Step],
    compressed: Mapping[str, Step],
    known: set[str],
    states: set[str],
    returned: Sequence[str],
) -> None:
    """Every value is computed once, and before it is read."""
    known = set(known)
    for step in [*compressed.values(), *steps]:
        for name in step.reads():
            if name not in known:
                raise bad(package, f"has a {step.type} {step.name!r} that reads {name!r}, which nothing computes")
        if step.type in STATE_INPUTS and step.state not in states:
            raise bad(package, f"has a {step.type} of the state {step.state!r}, which it does not describe")
        for value in step.outputs:
            if value.name in known and step.name not in compressed:
                raise bad(package, f"computes the value {value.name!r} twice")
            known.add(value.name)
    if missing := set(returned) - known:
        raise bad(package, f"returns {sorted(missing)}, which nothing computes")


def _with_dying(steps: Sequence[Step], kept: set[str]) -> list[Step]:
    """The steps, each with the values that are read by it for the last time, or by nothing at all."""
    seen, result = set(kept), []
    for step in reversed(steps):
        dying = {*step.reads(), *(value.name for value in step.outputs)} - seen
        seen |= dying
        result.append(replace(step, dying=tuple(sorted(dying))))
    return result[::-1]


def _write_in_place(steps: Sequence[Step]) -> list[Step]:
    """Let a ``slice_update`` write into a state's own memory, where the program could not tell.

    That is where it updates what was just read from the state, nothing reads that afterwards, and its result is the
    next thing written to the state. A cache would be copied otherwise for each of its layers.
    """
    result = list(steps)
    current: dict[str, str] = {}  # value → the state whose content it is
    for i, step in enumerate(steps):
        if step.type in STATE_INPUTS:
            if step.type != READ:
                current = {name: state for name, state in current.items() if state != step.state}
            current |= {value.name: step.state for value in step.outputs}
        x = str(step.tensors.get("x", ""))
        if step.type != "slice_update" or x not in current or x not in step.dying or list(step.reads()).count(x) > 1:
            continue
        state = current[x]
        after = next((one for one in steps[i + 1 :] if one.type in STATE_INPUTS and one.state == state), None)
        if after and list(after.reads()) == [step.name]:
            result[i] = replace(step, state=state, settings={**step.settings, "in_place": True})
    return result
