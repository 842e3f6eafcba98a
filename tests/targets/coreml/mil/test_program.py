"""Whole programs in the MIL interpreter: states, flexible shapes, a decoder against torch, damaged packages."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekd.errors import BadArtifact, EdgekdError, Unsupported
from edgekd.targets.coreml.mil import Feature, Interpreter
from edgekd.targets.coreml.mil.package import proto

ct = pytest.importorskip("coremltools")
mb = pytest.importorskip("coremltools.converters.mil").Builder
mil = pytest.importorskip("coremltools.converters.mil.mil")
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
Make = Callable[..., Path]


def edit(path: Path, change: Callable[[Any, Any], Any]) -> Path:
    """Change a package's specification; ``change`` is given it and the block of its program."""
    spec = proto("Model_pb2").Model()
    spec.ParseFromString((path / MODEL).read_bytes())
    function = spec.mlProgram.functions["main"]
    change(spec, function.block_specializations[function.opset])
    (path / MODEL).write_bytes(spec.SerializeToString())
    return path


def operation(block: Any, kind: str) -> Any:
    return next(one for one in block.operations if one.type == kind)


# States.


@pytest.fixture(scope="module")
def counter(make_mlpackage: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows are written to a cache at a position; the sum of the cache comes back, before and after."""

    def body(row: Any, at: Any, cache: Any) -> list[Any]:
        before = mb.read_state(input=cache)
        zero, length = np.int32([0]), np.int32([3])
        updated = mb.slice_update(
            x=before,
            update=row,
            begin=mb.concat(values=[at, zero], axis=0),
            end=mb.concat(values=[mb.add(x=at, y=np.int32(1)), length], axis=0),
        )
        after = mb.coreml_update_state(state=cache, value=updated)
        return [mb.reduce_sum(x=after, axes=[0], name="sums"), mb.identity(x=after, name="all")]

    path = tmp_path_factory.mktemp("state") / "counter.mlpackage"
    inputs = {"row": ("float16", (1, 3)), "at": ("int32", (1,))}
    return make_mlpackage(path, body, inputs, {"cache": ("float16", (4, 3))})


def feed(value: float, at: int) -> dict[str, np.ndarray]:
    return {"row": np.full((1, 3), value, np.float16), "at": np.array([at], np.int32)}


def test_a_state_lives_from_call_to_call(counter: Path) -> None:
    program = Interpreter(counter)
    state = program.make_state()
    cache = state["cache"]
    assert cache.dtype == torch.float16 and cache.shape == (4, 3) and not cache.any()
    assert program.states == {"cache": Feature("float16", (4, 3))}
    assert program.run(feed(1, 0), state)["sums"].tolist() == [1, 1, 1]
    first = program.run(feed(2, 2), state)
    assert first["sums"].tolist() == [3, 3, 3]
    assert program.run(feed(5, 2), state)["sums"].tolist() == [6, 6, 6]
    assert state["cache"] is cache and cache[:, 0].tolist() == [1, 0, 5, 0]
    assert first["all"][:, 0].tolist() == [1, 0, 2, 0]  # what was returned does not change
    assert program.run(feed(7, 3), program.make_state())["sums"].tolist() == [7, 7, 7]


def test_a_cache_is_written_without_a_copy(counter: Path) -> None:
    steps = [step for step in Interpreter(counter)._program.steps if step.type == "slice_update"]
    assert [step.state for step in steps] == ["cache"]


@pytest.mark.parametrize(
    "variant", ["read twice", "kept", "a view is kept", "overlapping", "not written", "read between"]
)
def test_a_copy_is_made_where_the_program_could_tell(variant: str, make_mlpackage: Make, tmp_path: Path) -> None:
    """Every program is compared with one that never shares memory."""

    def body(x: Any, cache: Any) -> list[Any]:
        before = mb.read_state(input=cache)
        other = mb.read_state(input=cache) if variant == "read twice" else before
        view = mb.slice_by_index(x=other, begin=[1, 0], end=[3, 3])
        update = view if variant == "overlapping" else x
        begin, end = ([0, 0], [2, 3])
        written = mb.slice_update(x=before, update=update, begin=begin, end=end)
        if variant == "read between":
            other = mb.read_state(input=cache)
        if variant != "not written":
            mb.coreml_update_state(state=cache, value=written)
        kept = {"kept": before, "a view is kept": view, "read twice": other, "read between": other}.get(variant, x)
        return [mb.identity(x=written, name="written"), mb.identity(x=kept, name="kept")]

    path = make_mlpackage(tmp_path / "p.mlpackage", body, {"x": ("float16", (2, 3))}, {"cache": ("float16", (3, 3))})
    program = Interpreter(path)
    state = program.make_state()
    old = np.arange(9, dtype=np.float16).reshape(3, 3)
    state["cache"].copy_(torch.from_numpy(old))
    x = np.full((2, 3), 50, np.float16)
    outputs = program.run({"x": x}, state)
    new = old.copy()
    new[:2] = old[1:] if variant == "overlapping" else x
    np.testing.assert_array_equal(outputs["written"], new)
    np.testing.assert_array_equal(state["cache"].numpy(), old if variant == "not written" else new)
    kept = {"kept": old, "a view is kept": old[1:], "read twice": old, "read between": old}.get(variant, x)
    np.testing.assert_array_equal(outputs["kept"], kept)
    np.testing.assert_array_equal(x, 50)


# Inputs.


@pytest.fixture(scope="module")
def flexible(make_mlpackage: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def body(ids: Any) -> Any:
        return mb.cumsum(x=mb.mul(x=ids, y=np.int32(2)), axis=1, name="out")

    path = tmp_path_factory.mktemp("flexible") / "p.mlpackage"
    shape = ct.TensorType(name="ids", shape=(1, ct.RangeDim(2, 5, default=2)), dtype=np.int32)
    return make_mlpackage(path, body, {"ids": ("int32", (1, mil.get_new_symbol()))}, shapes=[shape])


def test_flexible_shapes(flexible: Path) -> None:
    program = Interpreter(flexible)
    assert program.inputs == {"ids": Feature("int32", (1, (2, 5)))}
    assert program.outputs == {"out": Feature("int32", (1, (1, -1)))}
    for length in (2, 5, 3):
        out = program.run({"ids": np.ones((1, length), np.int32)})["out"]
        assert out.tolist() == [[2 * i + 2 for i in range(length)]] and out.dtype == np.int32


def test_enumerated_shapes(make_mlpackage: Make, tmp_path: Path) -> None:
    shapes = ct.EnumeratedShapes([(1, 2), (3, 4)], default=(1, 2))
    path = make_mlpackage(
        tmp_path / "p.mlpackage",
        lambda x: mb.relu(x=x, name="out"),
        {"x": ("float32", (mil.get_new_symbol(), mil.get_new_symbol()))},
        shapes=[ct.TensorType(name="x", shape=shapes, dtype=np.float32)],
    )
    program = Interpreter(path)
    assert program.inputs["x"].shape == ((1, 3), (2, 4))
    assert program.run({"x": np.ones((3, 4), np.float32)})["out"].shape == (3, 4)
    with pytest.raises(ValueError, match="'x'"):
        program.run({"x": np.ones((1, 4), np.float32)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "the input 'ids' is missing"),
        ({"ids": np.ones((1, 3), np.int64)}, "the input 'ids' is int32, not int64"),
        ({"ids": np.ones((1, 6), np.int32)}, r"the input 'ids' has the shape \[1, \(2, 5\)\], not \[1, 6\]"),
        ({"ids": np.ones((1, 1), np.int32)}, "the input 'ids' has the shape"),
        ({"ids": np.ones(3, np.int32)}, "the input 'ids' has the shape"),
        ({"ids": np.ones((1, 3), np.int32), "x": np.ones(1)}, "no input 'x'"),
    ],
)
def test_wrong_inputs_are_refused(flexible: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interpreter(flexible).run(inputs)


def test_wrong_states_are_refused(counter: Path) -> None:
    program = Interpreter(counter)
    with pytest.raises(ValueError, match="the state 'cache' is missing"):
        program.run(feed(1, 0))
    with pytest.raises(ValueError, match="the state 'cache' is float16, not float32"):
        program.run(feed(1, 0), {"cache": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="the state 'cache' has the shape"):
        program.run(feed(1, 0), {"cache": torch.zeros(4, 4).half()})


def test_an_operation_that_fails_is_named(make_mlpackage: Make, tmp_path: Path) -> None:
    def body(at: Any) -> Any:
        return mb.gather(x=np.float32([1, 2, 3]), indices=at, name="found")

    program = Interpreter(make_mlpackage(tmp_path / "p.mlpackage", body, {"at": ("int32", (1,))}))
    assert program.run({"at": np.int32([2])})["found"] == 3
    for outside in (3, -1):
        with pytest.raises(BadArtifact, match="cannot execute gather 'found': an index is outside the 3 values"):
            program.run({"at": np.int32([outside])})


def test_every_tensor_is_rounded_to_its_type(make_mlpackage: Make, tmp_path: Path) -> None:
    """In half precision 300² overflows, and 2049 is 2048, even where single precision would bring them back."""

    def body(x: Any) -> list[Any]:
        one = np.float16(1) if x.dtype == mil.types.fp16 else np.float32(1)
        return [mb.sqrt(x=mb.square(x=x), name="root"), mb.sub(x=mb.add(x=x, y=one), y=one, name="same")]

    for dtype, expected in {"float16": (np.inf, 2047), "float32": (2048, 2048)}.items():
        program = Interpreter(make_mlpackage(tmp_path / f"{dtype}.mlpackage", body, {"x": (dtype, (1,))}))
        got = program.run({"x": np.array([2048], dtype)})
        assert (got["root"], got["same"]) == expected


# A decoder, from torch by way of coremltools' own front end.


class Decoder(nn.Module):
    """Two layers of grouped attention with rotary positions over a cache, as exporters write them."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab, self.width, self.heads, self.groups, self.size, self.context = 96, 64, 4, 2, 16, 24
        self.embed = nn.Embedding(self.vocab, self.width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(64, 64),
                    "k": nn.Linear(64, 32, bias=False),
                    "v": nn.Linear(64, 32),
                    "o": nn.Linear(64, 64, bias=False),
                    "up": nn.Linear(64, 96, bias=False),
                    "gate": nn.Linear(64, 96, bias=False),
                    "down": nn.Linear(96, 64, bias=False),
                }
            )
            for _ in range(2)
        )
        angles = torch.arange(self.context)[:, None] * 100.0 ** -(torch.arange(0, self.size, 2) / self.size)
        self.register_buffer("cos", torch.cat([angles, angles], 1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], 1).sin())
        self.register_buffer("keys", torch.zeros(2, 1, self.groups, self.context, self.size))
        self.register_buffer("values", torch.zeros(2, 1, self.groups, self.context, self.size))

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.size // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos[positions] + turned * self.sin[positions]

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length, end = ids.shape[1], mask.shape[-1]
        positions = torch.arange(end - length, end)
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            h = self.norm(x)
            q = self.rotate(layer["q"](h).view(1, length, self.heads, -1).transpose(1, 2), positions)
            k = self.rotate(layer["k"](h).view(1, length, self.groups, -1).transpose(1, 2), positions)
            v = layer["v"](h).view(1, length, self.groups, -1).transpose(1, 2)
            self.keys[i, :, :, end - length : end] = k
            self.values[i, :, :, end - length : end] = v
            k = self.keys[i, :, :, :end].repeat_interleave(2, 1)
            v = self.values[i, :, :, :end].repeat_interleave(2, 1)
            scores = q @ k.transpose(-1, -2) * self.size**-0.5 + mask
            attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, length, -1)
            x = x + layer["o"](attended)
            h = self.norm(x)
            x = x + layer["down"](nn.functional.silu(layer["gate"](h)) * layer["up"](h))
        return self.norm(x) @ self.embed.weight.T


def causal(start: int, length: int) -> np.ndarray:
    ahead = np.arange(start + length)[None] > start + np.arange(length)[:, None]
    return np.where(ahead, -np.inf, 0).astype(np.float16)[None, None]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * 2).half())
    return model


@pytest.fixture(scope="module")
def converted(decoder: Decoder) -> Any:
    from coremltools.converters.mil.frontend.torch import ops as front_end

    original = front_end._cast

    def cast(context: Any, node: Any, dtype: Any, name: str) -> None:  # int() of an array of one, which NumPy refuses
        value = context[node.inputs[0]].val
        if value is not None and np.ndim(value):
            context.add(mb.const(val=dtype(value.item()), name=node.name))
        else:
            original(context, node, dtype, name)

    length, end = ct.RangeDim(1, 24, default=2), ct.RangeDim(1, 24, default=2)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(front_end, "_cast", cast)
        example = torch.zeros(1, 3, dtype=torch.int32), torch.from_numpy(causal(2, 3)).float()
        model = ct.convert(
            torch.jit.trace(decoder, example),
            inputs=[
                ct.TensorType(name="ids", shape=(1, length), dtype=np.int32),
                ct.TensorType(name="mask", shape=(1, 1, length, end), dtype=np.float16),
            ],
            outputs=[ct.TensorType(name="logits", dtype=np.float16)],
            states=[
                ct.StateType(wrapped_type=ct.TensorType(shape=(2, 1, 2, 24, 16), dtype=np.float16), name=name)
                for name in ("keys", "values")
            ],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    return model


def compressed(model: Any, how: str) -> Any:
    """The model with its weights as they are, in int4 blocks, or in palettes, by coremltools."""
    from coremltools.optimize import coreml as optimize

    if how == "fp16":
        return model
    if how == "int4":
        blocks = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32, weight_threshold=1
        )
        return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=blocks))
    palettes = optimize.OpPalettizerConfig(
        mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=16, weight_threshold=1
    )
    return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=palettes))


def run_in_pieces(program: Interpreter, ids: list[int], pieces: list[int]) -> np.ndarray:
    """Logits ``(T, V)`` of the ids, fed in pieces of these lengths."""
    state, done, logits = program.make_state(), 0, []
    for count in pieces:
        given = {"ids": np.array([ids[done : done + count]], np.int32), "mask": causal(done, count)}
        logits.append(program.run(given, state)["logits"][0])
        done += count
    return np.concatenate(logits)


def with_stored_weights(decoder: Decoder, program: Interpreter, how: str) -> Decoder:
    """The torch model with the weights that a package has, by an expression of their own."""
    model = copy.deepcopy(decoder)
    suffix = {"fp16": "", "int4": "_quantized", "palette": "_palettized"}[how]
    for name, weight in model.named_parameters():
        stored = program.weight(f"{name.replace('.', '_')}_to_fp16" + suffix * (weight.ndim > 1))
        if how == "int4" and isinstance(stored, tuple):
            stored = stored[0] * np.repeat(stored[1], weight.shape[1] // stored[1].shape[1], 1)
        elif isinstance(stored, tuple):
            row_groups = np.arange(weight.shape[0]) // (weight.shape[0] // stored[1].shape[0])
            stored = stored[1][row_groups[:, None], 0, stored[0], 0]
        weight.data = torch.from_numpy(np.asarray(stored)).float()
    return model


@pytest.mark.parametrize("how", ["fp16", "int4", "palette"])
def test_a_decoder_computes_what_torch_does(how: str, decoder: Decoder, converted: Any, tmp_path: Path) -> None:
    compressed(converted, how).save(str(tmp_path / "decoder.mlpackage"))
    program = Interpreter(tmp_path / "decoder.mlpackage")
    kind = {"fp16": "const", "int4": "constexpr_blockwise_shift_scale", "palette": "constexpr_lut_to_dense"}[how]
    assert program.op_counts[kind] >= 15
    ids = np.random.default_rng(1).integers(0, 96, 20).tolist()
    with torch.no_grad():
        model = with_stored_weights(decoder, program, how)
        expected = model(torch.tensor([ids]), torch.from_numpy(causal(0, 20)).float())[0].numpy()
    ulp = np.spacing(np.abs(expected).max().astype(np.float16))
    for pieces in ([20], [1] * 20, [7, 1, 12], [13, 7]):
        got = run_in_pieces(program, ids, pieces)
        assert np.abs(got - expected).max() <= 2 * ulp
        assert (got.argmax(-1) == expected.argmax(-1)).all()


# Packages that are wrong.


@pytest.fixture
def package(counter: Path, tmp_path: Path) -> Path:
    """A package of a test's own, to be spoiled, with weights in a file."""
    return Path(shutil.copytree(counter, tmp_path / "spoiled.mlpackage"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("Manifest.json", None, "Manifest.json: cannot be read"),
        ("Manifest.json", b"{", "Manifest.json: not readable as JSON"),
        ("Manifest.json", b"\xff", "Manifest.json: not readable as JSON"),
        ("Manifest.json", b"[]", "Manifest.json: holds a list"),
        (
            "Manifest.json",
            b'{"rootModelIdentifier": "a", "itemInfoEntries": {}}',
            "Manifest.json does not name a model",
        ),
        (str(MODEL), None, "model.mlmodel cannot be read"),
        (str(MODEL), b"\xff\xff\xff\xff", "model.mlmodel is no model specification"),
        (str(MODEL), b"", "model.mlmodel holds no model"),
    ],
)
def test_a_file_is_missing_or_damaged(package: Path, file: str, content: bytes | None, message: str) -> None:
    (package / file).unlink() if content is None else (package / file).write_bytes(content)
    with pytest.raises(BadArtifact, match=message):
        Interpreter(package)


@pytest.mark.parametrize("path", ["../../outside.mlmodel", "/etc/hostname", "a\0b", 7])
def test_a_manifest_that_leaves_the_package(package: Path, path: object) -> None:
    shutil.copy(package / MODEL, package.parent / "outside.mlmodel")
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path
    (package / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadArtifact, match=r"outside the package|does not name a model: key 'itemInfoEntries.+path'"):
        Interpreter(package)


def test_a_model_that_is_a_link_out_of_the_package(package: Path) -> None:
    outside = shutil.move(package / MODEL, package.parent / "outside.mlmodel")
    (package / MODEL).symlink_to(outside)
    with pytest.raises(BadArtifact, match="outside the package"):
        Interpreter(package)


@pytest.fixture(scope="module")
def small(make_mlpackage: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with one tensor in its weight file."""
    weight = np.arange(64, dtype=np.float16).reshape(8, 8)
    path = tmp_path_factory.mktemp("small") / "p.mlpackage"
    return make_mlpackage(path, lambda x: mb.linear(x=x, weight=weight, name="out"), {"x": ("float16", (1, 8))})


@pytest.fixture
def weighted(small: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    return Path(shutil.copytree(small, tmp_path / "spoiled.mlpackage"))


def blob(block: Any) -> Any:
    return next(
        one.attributes["val"].blobFileValue
        for one in block.operations
        if one.type == "const" and one.attributes["val"].WhichOneof("value") == "blobFileValue"
    )


def test_a_truncated_weight_file(weighted: Path) -> None:
    Interpreter(weighted)
    data = (weighted / WEIGHTS).read_bytes()
    (weighted / WEIGHTS).write_bytes(data[:-64])
    with pytest.raises(BadArtifact, match=r"weight\.bin ends at byte"):
        Interpreter(weighted)
    (weighted / WEIGHTS).unlink()
    with pytest.raises(BadArtifact, match=r"weight\.bin cannot be read"):
        Interpreter(weighted)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offset", 128, "no metadata at byte 128"),
        ("fileName", "@model_path/../../../elsewhere.bin", "outside the package"),
        ("fileName", "weights/weight.bin", "outside the package"),
        ("fileName", "@model_path/weights/none.bin", "cannot be read"),
    ],
)
def test_a_wrong_reference_to_the_weights(weighted: Path, field: str, value: object, message: str) -> None:
    edit(weighted, lambda spec, block: setattr(blob(block), field, value))
    with pytest.raises(BadArtifact, match=message):
        Interpreter(weighted)


def rename(block: Any, kind: str, to: str) -> None:
    operation(block, kind).type = to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda spec, block: (rename(block, "reduce_sum", "lstm"), rename(block, "identity", "conv")),
            "operators that the interpreter does not know: conv, lstm",
        ),
        (
            lambda spec, block: operation(block, "reduce_sum").inputs["speed"].arguments.add(name="row"),
            r"reduce_sum 'sums' with inputs that the interpreter does not know: \['speed'\]",
        ),
        (lambda spec, block: setattr(spec.mlProgram.functions["main"], "opset", "CoreML5"), "opset 'CoreML5'"),
        (lambda spec, block: spec.mlProgram.functions["other"].SetInParent(), r"functions \['main', 'other'\]"),
        (lambda spec, block: spec.neuralNetwork.SetInParent(), "holds neuralNetwork"),
        (
            lambda spec, block: setattr(operation(block, "identity").outputs[0].type.tensorType, "dataType", 24),
            "'all' is of type INT64",
        ),
        (
            lambda spec, block: [
                operation(block, "identity").outputs[0].type.tensorType.dimensions.add().constant.SetInParent()
                for _ in range(4)
            ],
            "'all' is of rank 6",
        ),
        (
            lambda spec, block: setattr(spec.description.input[0].type.multiArrayType, "dataType", 65600),
            "'row' is of type DOUBLE",
        ),
    ],
)
def test_what_is_unknown_is_refused_by_name(package: Path, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        Interpreter(edit(package, change))


def test_the_dialect_of_ios_17(package: Path) -> None:
    def change(spec: Any, block: Any) -> None:
        function = spec.mlProgram.functions["main"]
        function.block_specializations["CoreML7"].CopyFrom(block)
        function.opset = "CoreML7"

    program = Interpreter(edit(package, change))
    assert program.run(feed(1, 0), program.make_state())["sums"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec, block: operation(block, "reduce_sum").inputs.pop("x"), "reduce_sum 'sums' without the input 'x'"),
        (
            lambda spec, block: setattr(operation(block, "reduce_sum").inputs["x"].arguments[0], "name", "ghost"),
            "reduce_sum 'sums' that reads 'ghost', which nothing computes",
        ),
        (
            lambda spec, block: setattr(operation(block, "write_state").inputs["input"].arguments[0], "name", "ghost"),
            "of the state 'ghost', which it does not describe",
        ),
        (lambda spec, block: operation(block, "write_state").inputs.pop("data"), "write_state"),
        (lambda spec, block: setattr(operation(block, "add").outputs[0], "name", "row"), "the value 'row' twice"),
        (lambda spec, block: block.outputs.append("ghost"), "which nothing computes"),
        (lambda spec, block: spec.description.output.pop(), "describes the outputs"),
        (lambda spec, block: spec.description.input.pop(), "describes other inputs"),
        (lambda spec, block: operation(block, "const").outputs.pop(), "a constant of 0 names"),
        (
            lambda spec, block: setattr(operation(block, "const").outputs[0], "name", "renamed"),
            "which nothing computes",
        ),
        (
            lambda spec, block: operation(block, "const").attributes["val"].immediateValue.tensor.ints.values.append(1),
            "a constant of",
        ),
        (
            lambda spec, block: operation(block, "reduce_sum").inputs["x"].arguments.add(name="row"),
            "gives 2 values to the input 'x'",
        ),
        (
            lambda spec, block: spec.mlProgram.functions["main"].block_specializations.pop("CoreML8"),
            "no block of its opset",
        ),
    ],
)
def test_a_program_that_contradicts_itself(package: Path, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(BadArtifact, match=message):
        Interpreter(edit(package, change))


def test_a_result_of_another_shape_than_declared(package: Path) -> None:
    def change(spec: Any, block: Any) -> None:
        operation(block, "reduce_sum").outputs[0].type.tensorType.dimensions[0].constant.size = 4

    program = Interpreter(edit(package, change))
    with pytest.raises(BadArtifact, match=r"reduce_sum 'sums': its result has the shape \[3\], not \[4\]"):
        program.run(feed(1, 0), program.make_state())


@pytest.mark.parametrize(
    ("name", "part", "content", "message"),
    [
        ("BOOL", "bytes", [1], "a constant of type BOOL written as bytes"),
        ("INT8", "ints", [300], "a constant that is not of its type INT8"),
    ],
)
def test_a_constant_that_is_not_of_its_type(
    name: str, part: str, content: list[int], message: str, package: Path
) -> None:
    def change(spec: Any, block: Any) -> None:
        value = operation(block, "const").attributes["val"]
        value.type.tensorType.dataType = proto("MIL_pb2").DataType.Value(name)
        tensor = value.immediateValue.tensor
        count = len(tensor.ints.values)
        if part == "bytes":
            tensor.bytes.values = bytes(content * count)
        else:
            tensor.ints.values[:] = content * count

    with pytest.raises(BadArtifact, match=message):
        Interpreter(edit(package, change))


def test_a_type_without_a_name(package: Path) -> None:
    def change(spec: Any, block: Any) -> None:
        operation(block, "const").attributes["val"].type.tensorType.dataType = 42

    with pytest.raises(Unsupported, match="a constant of type number 42"):
        Interpreter(edit(package, change))


@settings(max_examples=300, deadline=None)
@given(
    where=st.sampled_from([MODEL, WEIGHTS, Path("Manifest.json")]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_random_damage_gives_an_error_of_ours_or_none(
    where: Path, changes: list[tuple[float, int]], small: Path
) -> None:
    original = (small / where).read_bytes()
    data = bytearray(original)
    for place, value in changes:
        data[int(place * len(data))] = value
    (small / where).write_bytes(data)
    try:
        with contextlib.suppress(EdgekdError):
            Interpreter(small)
    finally:
        (small / where).write_bytes(original)


@pytest.mark.slow
def test_coremltools_itself_is_not_imported(counter: Path) -> None:
    probe = f"""
import sys
from edgekd.targets.coreml.mil import Interpreter
from edgekd.targets.coreml.mil.package import proto
program = Interpreter({str(counter)!r})
assert "coremltools" not in sys.modules
import coremltools
assert coremltools.proto.Model_pb2.Model is proto("Model_pb2").Model
coremltools.models.MLModel({str(counter)!r}, skip_model_load=True)
assert Interpreter({str(counter)!r}).op_counts == program.op_counts
print("good")
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "good"


def test_without_coremltools(counter: Path) -> None:
    probe = f"""
import importlib.util
from edgekd.errors import MissingExtra
from edgekd.targets.coreml.mil import Interpreter
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "coremltools" else find(name, *rest)
try:
    Interpreter({str(counter)!r})
except MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "edgekd[coreml]" in done.stdout
