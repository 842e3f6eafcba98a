"""A MIL program, run step by step.

Every value is a torch tensor of the type the program declares (narrower integers widened to a byte, unsigned 16-bit
ones to 32). An operator computes in float32 and its result is rounded to the declared type, so that a program in half
precision is rounded at every tensor, and always in the same way. Weights are unpacked when first used and kept in the
declared type: two bytes each in fp16, however few they take in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ops import COMPUTED, MOVED
from .package import Package
from .parse import READ, STATE_INPUTS, Feature, Step, bad, parse
from .weights import Blob


class Interpreter:
    """A package's program.

    Args:
        path: the ``.mlpackage`` folder.
        rounded: round to half precision where the program declares it. False keeps float32, in states too: what the
            program says, without what its types cost.

    Raises:
        BadArtifact: the package is incomplete or damaged.
        Unsupported: it holds operators or types that the interpreter does not know; unknown operators are all named.
    """

    def __init__(self, path: Path | str, *, rounded: bool = True) -> None:
        self.path, self._rounded = Path(path), rounded
        self._package = Package(self.path)
        self._program = parse(self._package)
        self._constants: dict[str, Tensor] = {}

    @property
    def inputs(self) -> dict[str, Feature]:
        """Type and shape of each input."""
        return self._program.inputs

    @property
    def outputs(self) -> dict[str, Feature]:
        """Type and shape of each output."""
        return self._program.outputs

    @property
    def states(self) -> dict[str, Feature]:
        """Type and shape of each state."""
        return self._program.states

    @property
    def op_counts(self) -> dict[str, int]:
        """How many operations of each type the program has, constants included."""
        return self._program.op_counts

    def make_state(self) -> dict[str, Tensor]:
        """Every state, of zeros, as Core ML makes it."""
        state = {}
        for name, one in self.states.items():
            shape: Any = one.shape  # no axis of a state is flexible
            state[name] = torch.zeros(shape, dtype=self._held(getattr(torch, one.dtype)))
        return state

    def run(self, inputs: Mapping[str, np.ndarray], state: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
        """Run the program once.

        Args:
            inputs: every input, of its type and of a shape it allows.
            state: from ``make_state``; its tensors are written in place. What they hold after an error is undefined.

        Raises:
            ValueError: an input or a state is missing, unknown, or of the wrong type or shape.
            BadArtifact: an operation cannot be executed.
        """
        states = dict(state or {})
        _check("input", self.inputs, inputs)
        _check("state", self.states, states, widened=not self._rounded)
        values = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        # One thread: beside other work, threads that meet after every small operator wait more than they gain.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                for step in self._program.steps:
                    self._execute(step, values, states)
                    for name in step.dying:
                        values.pop(name, None)
        finally:
            torch.set_num_threads(threads)
        return {name: values[name].numpy().copy() for name in self.outputs}

    def weight(self, name: str) -> np.ndarray | tuple[np.ndarray, ...]:
        """A constant as it is stored: read again and unpacked, but not dequantized.

        Returns:
            The tensor of a ``const``; ``(data, scale)`` or ``(data, scale, offset)`` of a
            ``constexpr_blockwise_shift_scale``, ``(indices, lut)`` of a ``constexpr_lut_to_dense``,
            ``(data, zero point, scale)`` of a ``constexpr_affine_dequantize``. Shapes are those of the program.

        Raises:
            KeyError: the program has no such constant.
        """
        if name not in self._program.compressed:
            return self._stored(name)
        step = self._program.compressed[name]
        order = ["data", "quantized_data", "indices", "lut", "zero_point", "scale", "offset"]
        return tuple(self._stored(str(step.tensors[key])) for key in order if key in step.tensors)

    def _stored(self, name: str) -> Any:
        stored = self._program.constants[name]
        return stored.read() if isinstance(stored, Blob) else stored

    def _tensor(self, name: str) -> Tensor:
        stored = self._stored(name)
        return torch.from_numpy(stored.astype(np.int32) if stored.dtype == np.uint16 else stored)

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A value of this run, or a constant, which is unpacked when first asked for."""
        if name in values:
            return values[name]
        if name not in self._constants:
            if step := self._program.compressed.get(name):
                parts = {one: self._tensor(one) for one in step.reads() if one in self._program.constants}
                self._execute(step, parts, {})
                self._constants[name] = parts[name]
            else:
                self._constants[name] = self._tensor(name)
        return self._constants[name]

    def _execute(self, step: Step, values: dict[str, Tensor], states: Mapping[str, Tensor]) -> None:
        """Take a step's inputs from ``values``, and put its outputs there."""
        try:
            results = self._results(step, values, states)
            for declared, result in zip(step.outputs, results, strict=True):
                if not declared.fits(result.shape):
                    raise ValueError(f"its result has the shape {list(result.shape)}, not {list(declared.shape or ())}")
                values[declared.name] = result.to(self._held(declared.dtype))
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            what = f"cannot execute {step.type} {step.name!r}: {error}"
            raise bad(self._package, what, "Check the inputs, or export the package again.") from error

    def _held(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which values declared as ``dtype`` are kept."""
        return dtype if self._rounded or dtype != torch.float16 else torch.float32

    def _results(self, step: Step, values: dict[str, Tensor], states: Mapping[str, Tensor]) -> Sequence[Tensor]:
        if step.state and step.type != READ:
            _make_writable(states[step.state], step, values)
        args: dict[str, Tensor | list[Tensor]] = {
            key: self._value(names, values) if isinstance(names, str) else [self._value(one, values) for one in names]
            for key, names in step.tensors.items()
        }
        if step.type in STATE_INPUTS:
            memory = states[step.state]
            for data in args.values():
                if isinstance(data, Tensor) and data is not memory:
                    memory.copy_(data)
            return [memory] * len(step.outputs)
        settings = {**step.settings, **{k: self._value(name, values).tolist() for k, name in step.dynamic.items()}}
        if compute := COMPUTED.get(step.type):
            results = compute(**{k: _widened(v) for k, v in args.items()}, **settings)
        else:
            results = MOVED[step.type](**args, **settings)
        return results if isinstance(results, tuple) else [results]


def _widened(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def _make_writable(memory: Tensor, step: Step, values: dict[str, Tensor]) -> None:
    """Give the values that share a state's memory their own, for the step is about to write there.

    Reading a state gives its memory, not a copy. What a ``slice_update`` writes into needs none, nor does a value
    that stands in that memory already and is written to the state.
    """
    spared = str(step.tensors["x" if step.type == "slice_update" else str(STATE_INPUTS[step.type][1])])
    if step.type in STATE_INPUTS and values.get(spared) is not memory:
        spared = ""
    storage = memory.untyped_storage().data_ptr()
    for name, value in values.items():
        if name != spared and value.untyped_storage().data_ptr() == storage:
            values[name] = value.clone()


def _check(
    kind: str, features: Mapping[str, Feature], given: Mapping[str, np.ndarray | Tensor], *, widened: bool = False
) -> None:
    """Every feature is given, no other, each of its type and of a shape it allows."""
    for name in sorted({*features, *given}):
        if name not in given:
            raise ValueError(f"the {kind} {name!r} is missing")
        if name not in features:
            raise ValueError(f"there is no {kind} {name!r}: the program has {sorted(features)}")
        feature, value = features[name], given[name]
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype != feature.dtype and not (widened and (dtype, feature.dtype) == ("float32", "float16")):
            raise ValueError(f"the {kind} {name!r} is {feature.dtype}, not {dtype}")
        if not feature.fits(tuple(value.shape)):
            raise ValueError(f"the {kind} {name!r} has the shape {list(feature.shape)}, not {list(value.shape)}")
