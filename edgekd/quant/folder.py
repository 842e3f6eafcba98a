"""The quantized student on disk: one model folder that edgekd's exporters, transformers and vLLM all read.

The layout is compressed-tensors' *pack-quantized* (W4A16, group 32, symmetric), not GPTQ's: it keeps weights
``(out, in)`` with plain symmetric integers and one scale per group, it mixes int4 and int8 by module, and it needs no
zero points; GPTQ's transposes, adds a constant to zero points, and allows one bit width for the whole model.

For a module ``M`` with weight ``(O, I)``:

- int4: ``M.weight_packed`` int32 ``(O, I/8)`` (``pack_int4``'s bytes), ``M.weight_scale`` fp16 ``(O, I/32)``,
  ``M.weight_shape`` int64 ``(2,)``.
- int8: the same with four integers + 128 in an int32 and ``weight_scale`` ``(O, 1)``.
- An embedding, int4 or int8: compressed-tensors defines packed embeddings, but transformers 5.23 fails to load them
  and vLLM reads them for no model in general. So it lies there dequantized to fp16, which every reader takes, and
  ``grid.safetensors`` beside it holds the scales. fp16 holds ``scale * q`` of int4 exactly, and of int8 up to
  127 * 2**-11 < 0.07 of a step, so dividing by the scale and rounding gives back the very integers. A tied head is this
  same tensor, stored once.
- Everything else (norms, biases) is as in the student, or as quantization-aware distillation left it.

``grid.json`` holds the kind of every tensor and the digests. The index names the weight files, so that other readers
pass over ``grid.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ..checkpoint import INDEX_FILE, Checkpoint
from ..errors import DoesNotFit, EdgekdError
from ..files import atomic_folder, write_json
from ..manifest import first_complaint
from ..student import check_model
from .grid import GROUP, check_finite, dequantize_int4, dequantize_int8, pack_int4, unpack_int4
from .recipe import Kind, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Block = tuple[torch.Tensor, torch.Tensor]
"""Some rows of a matrix: q int8 ``(rows, I)`` and scale float32, ``(rows, G)`` for int4 and ``(rows,)`` for int8."""

GRID_JSON = "grid.json"
SCALES_FILE = "grid.safetensors"
SHARD_BYTES = 10**9
BLOCK_WEIGHTS = 2**20
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_COPIED = {".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class _Stored:
    """One tensor of an output file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


_Plan = tuple[dict[str, Kind], list[list[str]], dict[str, list[_Stored]]]
"""The kind of every parameter, the parameters of every shard, and the tensors that hold each parameter."""


class _GridFile(BaseModel):
    """``grid.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1]
    recipe: str
    method: str
    group_size: Literal[32]
    student_digest: str
    grid_digest: str
    plain_digest: str
    bits_per_weight: float
    tensors: dict[str, Kind]


def is_embedding(name: str) -> bool:
    """Whether a parameter is looked up rather than multiplied."""
    return name.endswith("embed_tokens.weight")


def grid_digest(tensors: Iterable[tuple[str, Iterable[Block]]]) -> str:
    """sha256 over integers and scales, whatever file they come from.

    Args:
        tensors: HF parameter name and blocks of whole rows in order (one block may be the whole matrix). The order of
            the tensors does not matter.
    """
    lines = []
    for name, blocks in tensors:
        integers, scales = hashlib.sha256(), hashlib.sha256()
        rows, kind = 0, ""
        for q, scale in blocks:
            rows, width, kind = rows + q.shape[0], q.shape[1], "int4" if scale.ndim == 2 else "int8"
            integers.update(_bytes(pack_int4(q) if kind == "int4" else q))
            scales.update(_bytes(scale.half()))
        lines.append(f"{name} {kind} {rows}x{width} {integers.hexdigest()} {scales.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes as safetensors stores them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Grid:
    """A quantized student, read lazily: one tensor in memory at a time. Names are HF parameter names."""

    folder: Path
    recipe: str
    method: str
    digest: str
    student_digest: str
    bits_per_weight: float
    kinds: dict[str, Kind] = field(repr=False)
    _files: Checkpoint = field(repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The student's ``config.json``, without the quantization."""
        return {key: value for key, value in self._files.config.items() if key != "quantization_config"}

    def names(self) -> list[str]:
        """Every parameter, sorted; a tied head is not among them."""
        return sorted(self.kinds)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "lm_head.weight" not in self.kinds

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        if self.kinds[name] == "plain" or is_embedding(name):
            return self._files.shape(name)
        rows, width = self._files.tensor(f"{name.removesuffix('.weight')}.weight_shape").tolist()
        return rows, width

    @cached_property
    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.kinds)

    @property
    def int8_by_width(self) -> list[str]:
        """int8 matrices whose input width is not divisible by 32."""
        return [name for name in self.names() if self.kinds[name] == "int8" and self.shape(name)[1] % GROUP]

    def blocks(self, name: str) -> Iterator[Block]:
        """The integers and scales of a quantized matrix, a few rows at a time."""
        kind, module = self.kinds[name], name.removesuffix(".weight")
        width = self.shape(name)[1]
        stored = name if is_embedding(name) else f"{module}.weight_packed"
        scales = self._files.tensor(f"{module}.weight_scale").float()
        start = 0
        for rows in self._files.rows(stored, _block_rows(width)):
            scale = scales[start : start + rows.shape[0]]
            start += rows.shape[0]
            if is_embedding(name):
                q = torch.round(rows.float().view(*scale.shape, -1) / scale.unsqueeze(-1)).to(torch.int8).flatten(1)
            elif kind == "int4":
                q = unpack_int4(rows.view(torch.uint8))
            else:
                q = (rows.view(torch.uint8)[:, :width] ^ 0x80).view(torch.int8)
            yield q, scale if kind == "int4" else scale[:, 0]

    def _whole(self, name: str) -> Block:
        q, scale = zip(*self.blocks(name), strict=True)
        return torch.cat(q), torch.cat(scale)

    def int4(self, name: str) -> Block | None:
        """q int8 ``(O, I)`` in [-8, 7] and scale float32 ``(O, I/32)``, or None where the tensor is not int4."""
        return self._whole(name) if self.kinds[name] == "int4" else None

    def int8(self, name: str) -> Block | None:
        """q int8 ``(O, I)`` in [-127, 127] and scale float32 ``(O,)``, or None where the tensor is not int8."""
        return self._whole(name) if self.kinds[name] == "int8" else None

    def plain(self, name: str) -> torch.Tensor | None:
        """A tensor that is not quantized, in the student's dtype, or None where it is."""
        return self._files.tensor(name) if self.kinds[name] == "plain" else None

    def tensor(self, name: str) -> torch.Tensor:
        """Any parameter as the grid holds it, float32."""
        if self.kinds[name] == "plain":
            return self._files.tensor(name).float()
        return dequantize(*self._whole(name))


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale * q`` of int4 or int8, float32 ``(O, I)``."""
    return dequantize_int4(q, scale) if scale.ndim == 2 else dequantize_int8(q, scale)


def load_dequantized(grid: Grid) -> PreTrainedModel:
    """The Hugging Face model whose weights are the grid's, float32, in evaluation mode."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[grid.config["model_type"]].from_dict(grid.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(grid.tensor(name))
    return model.eval()


def _block_rows(width: int) -> int:
    """How many rows of ``width`` weights are read at a time."""
    return max(1, BLOCK_WEIGHTS // width)


def _read(folder: Path) -> tuple[_GridFile, Grid]:
    """What was recorded, and the grid, its tensors all there but not compared with their digests."""
    path = folder / GRID_JSON
    if not path.is_file():
        raise EdgekdError(f"{folder} is not a quantized student: it has no {GRID_JSON}.", "Make one: edgekd quantize")
    try:
        recorded = _GridFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise EdgekdError(f"{path}: {first_complaint(error)}.", "Quantize the student again.") from error
    files = Checkpoint(folder, beside=SCALES_FILE)
    for name, kind in recorded.tensors.items():
        stored = [name] if kind == "plain" else [s.name for s in _storage(name, kind, (1, GROUP))]
        if missing := [key for key in stored if key not in files.tensors]:
            raise EdgekdError(f"{folder}: tensor {missing[0]!r} is missing.", "Quantize the student again.")
    return recorded, Grid(
        folder,
        recorded.recipe,
        recorded.method,
        recorded.grid_digest,
        recorded.student_digest,
        recorded.bits_per_weight,
        recorded.tensors,
        files,
    )


def open_grid(folder: Path) -> Grid:
    """Open a quantized student and check that it is what was written.

    Raises:
        EdgekdError: no grid, a missing or truncated file, or integers, scales or other tensors that do not match the
            recorded digests.
    """
    recorded, grid = _read(folder)
    for key, expected, actual in (
        ("grid_digest", recorded.grid_digest, _digest(grid)),
        ("plain_digest", recorded.plain_digest, _plain_digest(grid)),
    ):
        if actual != expected:
            raise EdgekdError(
                f"{folder / GRID_JSON}: {key} does not match the tensors of the folder.",
                "It was changed: quantize again.",
            )
    return grid


def _digest(grid: Grid) -> str:
    return grid_digest((name, grid.blocks(name)) for name in grid.names() if grid.kinds[name] != "plain")


def _plain_digest(grid: Grid) -> str:
    whole = hashlib.sha256()
    for name in grid.names():
        if (tensor := grid.plain(name)) is not None:
            whole.update(f"{name} {_DTYPES[tensor.dtype]} {tuple(tensor.shape)}\n".encode())
            whole.update(hashlib.sha256(_bytes(tensor)).digest())
    return whole.hexdigest()


def _storage(name: str, kind: Kind, shape: tuple[int, ...]) -> list[_Stored]:
    """The tensors that hold a quantized matrix."""
    module, (rows, width) = name.removesuffix(".weight"), shape
    words, groups = (width // 8, width // GROUP) if kind == "int4" else (-(-width // 4), 1)
    scale = _Stored(f"{module}.weight_scale", torch.float16, (rows, groups))
    if is_embedding(name):
        return [_Stored(name, torch.float16, shape), scale]
    return [
        _Stored(f"{module}.weight_packed", torch.int32, (rows, words)),
        scale,
        _Stored(f"{module}.weight_shape", torch.int64, (2,)),
    ]


class _File:
    """A safetensors file whose tensors are filled in place, in any order, so that none need be whole in memory.

    The format is a length, a JSON header and the bytes; the header needs only names, dtypes and shapes.
    """

    def __init__(self, path: Path, tensors: list[_Stored]) -> None:
        # Wide types first: every tensor is then aligned to its own width.
        offset = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._at: dict[str, int] = {}
        for t in sorted(tensors, key=lambda t: -t.dtype.itemsize):
            header[t.name] = {
                "dtype": _DTYPES[t.dtype],
                "shape": list(t.shape),
                "data_offsets": [offset, offset + t.size_bytes],
            }
            self._at[t.name] = offset
            offset += t.size_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        base = self._file.tell()
        self._file.truncate(base + offset)
        self._at = {name: base + at for name, at in self._at.items()}
        self._left = {t.name: t.size_bytes for t in tensors}

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next rows of a tensor."""
        data = _bytes(tensor)
        self._file.seek(self._at[name])
        self._file.write(data)
        self._at[name] += len(data)
        self._left[name] -= len(data)

    def close(self) -> None:
        self._file.close()

    def unfilled(self) -> list[str]:
        """Tensors that were given too few rows, or too many."""
        return [name for name, left in self._left.items() if left]


class GridWriter:
    """A quantized student being written; ``new_grid`` makes one. Tensors come in any order, rows in theirs."""

    def __init__(self, source: Checkpoint, folder: Path, plan: _Plan) -> None:
        self.source, self._folder = source, folder
        self.kinds, shards, self._stored = plan
        self._of: dict[str, _File] = {}
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            parts = [s for n in names for s in (self._stored[n][:1] if is_embedding(n) else self._stored[n])]
            weight_map |= {part.name: file for part in parts}
            self._of |= dict.fromkeys((part.name for part in parts), _File(folder / file, parts))
        scales = [
            s for n, kind in self.kinds.items() if is_embedding(n) and kind != "plain" for s in self._stored[n][1:]
        ]
        if scales:
            self._of |= dict.fromkeys((s.name for s in scales), _File(folder / SCALES_FILE, scales))
        size = sum(s.size_bytes for parts in self._stored.values() for s in parts if s.name in weight_map)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """The student's matrix, a few rows at a time, in the dtype of its file."""
        return self.source.rows(name, _block_rows(self.source.shape(name)[1]))

    def put(self, name: str, q: torch.Tensor, scale: torch.Tensor) -> None:
        """The next rows of a quantized matrix: q int8 ``(rows, I)``, scale float32 ``(rows, G)`` or ``(rows,)``.

        Raises:
            EdgekdError: an embedding beyond fp16's range.
        """
        module = name.removesuffix(".weight")
        self._append(f"{module}.weight_scale", scale.half())
        if is_embedding(name):
            half = dequantize(q, scale).half()
            if half.isinf().any():
                with self.source.naming(name):
                    raise EdgekdError("holds weights beyond fp16's range (65504).", "Train or save the model again.")
            self._append(name, half)
        elif self.kinds[name] == "int4":
            self._append(f"{module}.weight_packed", pack_int4(q))
        else:
            unsigned = q.view(torch.uint8) ^ 0x80
            self._append(f"{module}.weight_packed", torch.nn.functional.pad(unsigned, (0, -q.shape[1] % 4)))

    def put_plain(self, name: str, value: torch.Tensor) -> None:
        """A tensor that is not quantized, whole; it is stored in the student's dtype."""
        with self.source.naming(name):
            check_finite(value)
        self._append(name, value.to(self._stored[name][0].dtype))

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        self._of[name].append(name, tensor)

    def _finish(self, recipe: Recipe, method: str) -> None:
        """Write what is beside the weights. The digests are taken from what was written: it has been read back once."""
        for name, kind in self.kinds.items():
            if kind != "plain" and not is_embedding(name):
                self._append(f"{name.removesuffix('.weight')}.weight_shape", torch.tensor(self.source.shape(name)))
        self._close()
        if unfilled := [name for file in set(self._of.values()) for name in file.unfilled()]:
            raise AssertionError(f"rows are missing or too many: {unfilled}")
        _copy_rest(self.source, self._folder, self.kinds)
        bits = _bits_per_weight(self.source, self.kinds, self._stored)
        written = Grid(
            self._folder,
            recipe.name,
            method,
            "",
            self.source.digest,
            bits,
            self.kinds,
            Checkpoint(self._folder, beside=SCALES_FILE),
        )
        recorded = _GridFile(
            schema_version=1,
            recipe=recipe.name,
            method=method,
            group_size=32,
            student_digest=self.source.digest,
            grid_digest=_digest(written),
            plain_digest=_plain_digest(written),
            bits_per_weight=bits,
            tensors=self.kinds,
        )
        write_json(self._folder / GRID_JSON, recorded.model_dump())

    def _close(self) -> None:
        for file in set(self._of.values()):
            file.close()


@contextmanager
def new_grid(student: Path, out: Path, recipe: Recipe, method: str) -> Iterator[GridWriter]:
    """Write a quantized student; ``out`` appears when the block ends without an error, and then is whole.

    Args:
        student: a model folder.
        out: the folder to make; it must not exist.
        method: how the integers are chosen, for the record.

    Raises:
        EdgekdError: ``out`` exists, the recipe is not on the grid, or the student is quantized already.
        DoesNotFit: not enough disk space.
    """
    source = Checkpoint(student)
    check_quantizes(out, recipe)
    _check_student(source)
    plan = _plan(source, recipe)
    needed = sum(s.size_bytes for parts in plan[2].values() for s in parts)
    free = shutil.disk_usage(_existing(out)).free
    if needed > free:
        raise DoesNotFit(f"{out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.", "Free some disk space.")
    with atomic_folder(out) as folder:
        writer = GridWriter(source, folder, plan)
        try:
            yield writer
            writer._finish(recipe, method)
        except BaseException:
            writer._close()
            raise


def describe(folder: Path) -> dict[str, Any]:
    """What a quantized student is: ``digest``, ``recipe``, ``method``, ``bits_per_weight``, ``tensors`` (count by kind)
    and ``int8_by_width``."""
    _, grid = _read(folder)
    kinds = list(grid.kinds.values())
    return {
        "digest": grid.digest,
        "recipe": grid.recipe,
        "method": grid.method,
        "bits_per_weight": grid.bits_per_weight,
        "tensors": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "int8_by_width": grid.int8_by_width,
    }


def _quantization_config(kinds: dict[str, Kind], tied: bool) -> dict[str, Any]:
    """The ``quantization_config`` that compressed-tensors reads."""
    common = {"type": "int", "symmetric": True, "dynamic": False}
    groups: dict[str, Any] = {}

    def modules(kind: Kind) -> list[str]:
        return sorted(n.removesuffix(".weight") for n, k in kinds.items() if k == kind and not is_embedding(n))

    if int8 := modules("int8"):
        groups["int8"] = {"targets": int8, "weights": {**common, "num_bits": 8, "strategy": "channel"}}
    if modules("int4"):
        int4 = {**common, "num_bits": 4, "strategy": "group", "group_size": GROUP}
        groups["int4"] = {"targets": ["Linear"], "weights": int4}
    matrices = [n for n, k in kinds.items() if k == "plain" and n.endswith("_proj.weight")]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*(["lm_head"] if tied else []), *sorted(n.removesuffix(".weight") for n in matrices)],
    }


def _plan(source: Checkpoint, recipe: Recipe) -> _Plan:
    kinds: dict[str, Kind] = {}
    stored: dict[str, list[_Stored]] = {}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(source):
        if name == "lm_head.weight" and source.tied:
            continue
        shape = source.shape(name)
        kinds[name] = recipe.kind_of(name, shape)
        if kinds[name] == "plain":
            stored[name] = [_Stored(name, source.tensor(name).dtype, shape)]
        else:
            stored[name] = _storage(name, kinds[name], shape)
        size = sum(s.size_bytes for s in stored[name])
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return kinds, shards, stored


def _bits_per_weight(source: Checkpoint, kinds: dict[str, Kind], stored: dict[str, list[_Stored]]) -> float:
    """Bits of integers, scales and plain tensors as an artifact needs them, per weight."""
    bits = weights = 0.0
    for name, kind in kinds.items():
        shape = torch.Size(source.shape(name))
        count = shape.numel()
        weights += count
        if kind == "plain":
            bits += 8 * stored[name][0].size_bytes
        else:
            bits += 4 * count + 16 * count / GROUP if kind == "int4" else 8 * count + 16 * shape[0]
    return bits / weights


def _copy_rest(source: Checkpoint, folder: Path, kinds: dict[str, Kind]) -> None:
    """The configuration with its quantization, and the tokenizer's files."""
    quantization = _quantization_config(kinds, source.tied)
    write_json(folder / "config.json", {**source.config, "quantization_config": quantization})
    for path in source.folder.iterdir():
        if path.suffix in _COPIED and path.name not in ("config.json", INDEX_FILE, GRID_JSON):
            shutil.copyfile(path, folder / path.name)


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def check_quantizes(out: Path, recipe: Recipe) -> None:
    """What can be told before a student is at hand.

    Raises:
        EdgekdError: the recipe is not on the grid, or ``out`` exists.
    """
    if not recipe.on_grid:
        raise EdgekdError(f"recipe {recipe.name!r} quantizes nothing on the portable grid.", "Take portable-int4.")
    if out.exists():
        raise EdgekdError(f"{out} exists already.", "Remove it or name another folder.")


def _check_student(source: Checkpoint) -> None:
    if "quantization_config" in source.config:
        raise EdgekdError(f"{source.folder}/config.json: the model is quantized already.", "Give the student itself.")
    check_model(source.folder)
