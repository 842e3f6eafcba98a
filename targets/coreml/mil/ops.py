"""MIL's operators in torch: one plain function each, after the definitions coremltools documents (iOS 15 to iOS 18).

A function's positional parameters are tensors. Those after the star are settings, which come as Python values: a
number, a string, or a list. Names and defaults are MIL's own, for a program may leave an optional input out.
The functions of ``COMPUTED`` get their half-precision inputs in float32, and what they return is rounded to the type
the program declares; the functions of ``MOVED`` carry values as they are. Behaviour that MIL leaves undefined, such as
an index out of bounds, is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 18  # of a weight turned to float32 at a time: 1 MB, which stays in the processor's cache

DTYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int32": torch.int32,
    "bool": torch.bool,
}


def _axis(axis: int, rank: int) -> int:
    """An axis counted from the front.

    Raises:
        ValueError: it is out of bounds.
    """
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is out of bounds for rank {rank}")
    return axis % rank


def _check_indices(indices: Tensor, size: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(f"an index is outside the {size} values of its axis, which MIL leaves undefined")


# Shapes and views.


def identity(x: Tensor) -> Tensor:
    return x


def cast(x: Tensor, *, dtype: str) -> Tensor:
    if dtype not in DTYPES:
        raise ValueError(f"no cast to {dtype}")
    return x.to(DTYPES[dtype])


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def expand_dims(x: Tensor, *, axes: Sequence[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(_axis(axis, rank) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def reshape(x: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Where a length is 0 it is ``x``'s own, for a shape of ``x``'s rank; one may be -1."""
    if 0 in shape and len(shape) != x.ndim:
        raise ValueError(f"a length of 0 in {list(shape)} needs rank {x.ndim}")
    return x.reshape([length or x.shape[i] for i, length in enumerate(shape)])


def transpose(x: Tensor, *, perm: Sequence[int]) -> Tensor:
    return x.permute(tuple(perm))


def tile(x: Tensor, *, reps: Sequence[int]) -> Tensor:
    if len(reps) != x.ndim:
        raise ValueError(f"{len(reps)} repetitions for rank {x.ndim}")
    return x.repeat(tuple(reps))


def concat(values: Sequence[Tensor], *, axis: int, interleave: bool = False) -> Tensor:
    if interleave:
        axis = _axis(axis, values[0].ndim)
        return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)
    return torch.cat([value[None] if not value.ndim else value for value in values], axis)


def stack(values: Sequence[Tensor], *, axis: int) -> Tensor:
    return torch.stack(list(values), axis)


def split(
    x: Tensor, *, axis: int, num_splits: int | None = None, split_sizes: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return x.split(list(split_sizes), axis)
    if not num_splits or x.shape[axis] % num_splits:
        raise ValueError(f"{num_splits} even parts of {x.shape[axis]} do not exist")
    return x.split(x.shape[axis] // num_splits, axis)


def reverse(x: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    return x.flip(tuple(range(x.ndim) if axes is None else axes))


def band_part(x: Tensor, *, lower: int = -1, upper: int = -1) -> Tensor:
    below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])
    keep = ((below <= lower) | (lower < 0)) & ((-below <= upper) | (upper < 0))
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))


def fill(*, shape: Sequence[int], value: float = 0.0) -> Tensor:
    return torch.full(tuple(shape), value)


def range_1d(*, start: float, end: float, step: float) -> Tensor:
    return torch.arange(start, end, step)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


# Slices and gathers.


def _slices(
    lengths: Sequence[int],
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None,
    begin_mask: Sequence[bool] | None,
    end_mask: Sequence[bool] | None,
    squeeze_mask: Sequence[bool] | None,
) -> tuple[tuple[slice, ...], list[int], list[int]]:
    """Slices with positive steps, the axes to flip after them, and the axes to drop."""
    slices, flipped, dropped = [], [], []
    for i, length in enumerate(lengths):
        step = stride[i] if stride else 1
        start = None if begin_mask and begin_mask[i] else begin[i]
        stop = None if end_mask and end_mask[i] else end[i]
        if squeeze_mask and squeeze_mask[i]:
            dropped.append(i)
            start = _axis(start or 0, length)  # the same rule as for an axis: negative from the end, else an error
            slices.append(slice(start, start + 1))
            continue
        places = range(length)[start:stop:step]
        if step < 0:
            flipped.append(i)
            places = places[::-1]
        slices.append(slice(places.start, places.stop, places.step) if places else slice(0, 0))
    return tuple(slices), flipped, dropped


def slice_by_index(
    x: Tensor,
    *,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Tensor:
    slices, flipped, dropped = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    x = x[slices]
    if flipped:
        x = x.flip(flipped)
    return x.squeeze(tuple(dropped)) if dropped else x


def slice_by_size(x: Tensor, *, begin: Sequence[int], size: Sequence[int]) -> Tensor:
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        start = start + x.shape[axis] if start < 0 else start
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


def slice_update(
    x: Tensor,
    update: Tensor,
    *,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
    in_place: bool = False,
) -> Tensor:
    """``in_place`` is no input of MIL's: it spares a copy where nothing reads ``x`` any more."""
    slices, flipped, dropped = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x if in_place else x.clone()
    part = result[slices]
    kept = [length for i, length in enumerate(part.shape) if i not in dropped]
    if list(update.shape) != kept:
        raise ValueError(f"the update has shape {list(update.shape)}, the slice {kept}")
    part.copy_(update.reshape(part.shape).flip(flipped))
    return result


def gather(x: Tensor, indices: Tensor, *, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Indices out of bounds are an error either way; since iOS 17 negative ones are out of bounds."""
    axis = _axis(axis, x.ndim)
    _check_indices(indices, x.shape[axis])
    if batch_dims:
        parts = x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1)
        rows = [gather(one, places, axis=axis - batch_dims) for one, places in zip(*parts, strict=True)]
        return torch.stack(rows).unflatten(0, x.shape[:batch_dims])
    taken = x.index_select(axis, indices.reshape(-1).long())
    return taken.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def gather_along_axis(x: Tensor, indices: Tensor, *, axis: int = 0, validate_indices: bool = False) -> Tensor:
    axis = _axis(axis, x.ndim)
    _check_indices(indices, x.shape[axis])
    return torch.take_along_dim(x, indices.long(), axis)


# Constants that are stored compressed.


def _by_rows(
    weight: Tensor, groups: Sequence[int], out: Tensor, expand: Callable[[Tensor, slice, Tensor], None]
) -> Tensor:
    """Unpack a weight some rows at a time, so that nothing of its size is held in a wider type.

    Args:
        groups: into how many groups each axis of ``weight`` is divided.
        expand: rows, split into ``(rows, groups, length, groups, length, ...)``; which rows; the group of each.
    """
    if any(length % count for length, count in zip(weight.shape, groups, strict=True)):
        raise ValueError(f"{list(groups)} groups do not divide {list(weight.shape)}")
    rows = weight.shape[0]
    split = [part for n, count in zip(weight.shape[1:], groups[1:], strict=True) for part in (count, n // count)]
    per_step = max(1, TILE_ELEMENTS * rows // max(1, weight.numel()))
    for start in range(0, rows, per_step):
        chosen = slice(start, min(start + per_step, rows))
        group = torch.arange(chosen.start, chosen.stop) // (rows // groups[0])
        expand(weight[chosen].reshape(-1, *split), chosen, group)
    return out


def _per_group(values: Tensor, group: Tensor) -> Tensor:
    """Rows of a parameter with one value per group, to be broadcast over rows as ``_by_rows`` splits them."""
    return values[group].reshape(len(group), *(part for n in values.shape[1:] for part in (n, 1)))


def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """``scale · (data − offset)``, each scale and offset for a block."""
    out = torch.empty(data.shape, dtype=scale.dtype)

    def expand(rows: Tensor, chosen: slice, group: Tensor) -> None:
        values = rows.float()
        if offset is not None:
            values -= _per_group(offset, group).float()
        values *= _per_group(scale, group).float()
        out[chosen] = values.reshape(-1, *data.shape[1:])

    return _by_rows(data, scale.shape, out, expand)


def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, *, vector_axis: int | None = None) -> Tensor:
    """Each index replaced by its group's entry of the table ``(groups..., entries, vector)``: iOS 18's form."""
    entries, vector = lut.shape[-2:]
    if lut.ndim != indices.ndim + 2 or (vector > 1 and vector_axis is None):
        raise ValueError(f"a table of shape {list(lut.shape)} does not fit indices of shape {list(indices.shape)}")
    groups, table = lut.shape[:-2], lut.reshape(-1, vector)
    first = (torch.arange(math.prod(groups)) * entries).reshape(groups)
    out = torch.empty((*indices.shape, vector), dtype=lut.dtype)

    def expand(rows: Tensor, chosen: slice, group: Tensor) -> None:
        places = rows.long() + _per_group(first, group)
        out[chosen] = table[places].reshape(-1, *indices.shape[1:], vector)

    _check_indices(indices, entries)
    _by_rows(indices, groups, out, expand)
    if vector_axis is None or vector == 1:
        return out.reshape(indices.shape)
    axis = _axis(vector_axis, indices.ndim)
    return out.movedim(-1, axis + 1).flatten(axis, axis + 1)


def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, *, axis: int) -> Tensor:
    """``scale · (data − zero point)``, each a scalar or one along ``axis``."""
    along = [-1 if i == _axis(axis, quantized_data.ndim) else 1 for i in range(quantized_data.ndim)]
    scales, zeros = torch.broadcast_tensors(scale.reshape(along), zero_point.reshape(along))
    return constexpr_blockwise_shift_scale(quantized_data, scales, zeros)


# Products.


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """``x · weightᵀ`` in float32, the weight ``(O, I)`` turned to it in tiles: half the memory, a fifth more time."""
    x = _single(x)
    if weight.dtype != torch.float16 or weight.numel() <= TILE_ELEMENTS:
        return torch.matmul(x, _single(weight).t())
    rows = max(1, TILE_ELEMENTS // weight.shape[1])
    out = torch.empty((*x.shape[:-1], weight.shape[0]))
    tile = torch.empty((rows, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        out[..., start : start + rows] = torch.matmul(x, tile[: len(part)].copy_(part).t())
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _project(x, weight)
    return out if bias is None else out + _single(bias)


def matmul(x: Tensor, y: Tensor, *, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    if transpose_x and x.ndim > 1:
        x = x.mT
    if y.ndim == 2 and x.ndim > 1:
        return _project(x, y if transpose_y else y.t())
    if transpose_y and y.ndim > 1:
        y = y.mT
    return torch.matmul(_single(x), _single(y))


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


# Element by element.


def clip(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def inverse(x: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


def log(x: Tensor, *, epsilon: float = 1e-45) -> Tensor:
    return (x + epsilon).log()


def rsqrt(x: Tensor, *, epsilon: float = 1e-12) -> Tensor:
    return (x + epsilon).rsqrt()


def gelu(x: Tensor, *, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * (1.702 * x).sigmoid()
    modes = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    if mode not in modes:
        raise ValueError(f"no mode {mode}")
    return torch.nn.functional.gelu(x, approximate=modes[mode])


def cumsum(x: Tensor, *, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    x = x.flip(axis) if reverse else x
    total = x.cumsum(axis)
    if exclusive:  # total − x would not be exact
        total = torch.cat([torch.zeros_like(total.narrow(axis, 0, 1)), total.narrow(axis, 0, x.shape[axis] - 1)], axis)
    return total.flip(axis) if reverse else total


# Along axes.


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def l2_norm(x: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes."""
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


def layer_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    axes: Sequence[int] | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    over = sorted(_axis(axis, x.ndim) for axis in (range(x.ndim) if axes is None else axes))
    lengths = [length if i in over else 1 for i, length in enumerate(x.shape)]
    x = x - x.mean(over, keepdim=True)
    x = x / (x.square().mean(over, keepdim=True) + epsilon).sqrt()
    x = x if gamma is None else x * gamma.reshape(lengths)
    return x if beta is None else x + beta.reshape(lengths)


def _reduction(reduce: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Callable[..., Tensor]:
    """An operator that reduces the axes given, or all. No axes given, it reduces none, as NumPy does."""

    def reduced(x: Tensor, *, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Tensor:
        if axes is not None and not len(axes):
            return reduce(x[None], (0,), False)
        return reduce(x, tuple(range(x.ndim) if axes is None else axes), keep_dims)

    return reduced


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.double()


def reduce_argmax(x: Tensor, *, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """The first of the largest; MIL leaves open which. The type is that which the program declares."""
    return x.argmax(axis, keepdim=keep_dims)


MOVED: dict[str, Callable[..., Any]] = {
    "band_part": band_part,
    "cast": cast,
    "concat": concat,
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "expand_dims": expand_dims,
    "fill": fill,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "identity": identity,
    "linear": linear,  # it turns its weight to float32 itself, in tiles
    "matmul": matmul,  # likewise
    "range_1d": range_1d,
    "reshape": reshape,
    "reverse": reverse,
    "select": select,
    "shape": shape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
COMPUTED: dict[str, Callable[..., Any]] = {
    "abs": lambda x: x.abs(),
    "add": lambda x, y: x + y,
    "ceil": lambda x: x.ceil(),
    "clip": clip,
    "cos": lambda x: x.cos(),
    "cumsum": cumsum,
    "equal": lambda x, y: x == y,
    "erf": lambda x: x.erf(),
    "exp": lambda x: x.exp(),
    "exp2": lambda x: _floating(x).exp2(),
    "floor": lambda x: x.floor(),
    "floor_div": lambda x, y: x.floor_divide(y),
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "inverse": inverse,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "log": log,
    "logical_and": lambda x, y: x & y,
    "logical_not": lambda x: ~x,
    "logical_or": lambda x, y: x | y,
    "logical_xor": lambda x, y: x ^ y,
    "maximum": lambda x, y: x.maximum(y),
    "minimum": lambda x, y: x.minimum(y),
    "mod": lambda x, y: x.remainder(y),
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pow": lambda x, y: x.pow(y),
    "real_div": lambda x, y: x / y,
    "reduce_argmax": reduce_argmax,
    "reduce_l2_norm": _reduction(lambda x, axes, keep: _floating(x).square().sum(axes, keep).sqrt()),
    "reduce_log_sum_exp": _reduction(lambda x, axes, keep: _floating(x).logsumexp(axes, keep)),
    "reduce_max": _reduction(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_mean": _reduction(lambda x, axes, keep: _floating(x).mean(axes, keep)),
    "reduce_min": _reduction(lambda x, axes, keep: x.amin(axes, keep)),
    "reduce_sum": _reduction(lambda x, axes, keep: x.sum(axes, keep)),
    "reduce_sum_square": _reduction(lambda x, axes, keep: x.square().sum(axes, keep)),
    "relu": lambda x: x.relu(),
    "round": lambda x: x.round(),
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "sigmoid": lambda x: x.sigmoid(),
    "sign": lambda x: x.sign(),
    "silu": lambda x: x * x.sigmoid(),
    "sin": lambda x: x.sin(),
    "softmax": softmax,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x.square(),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: x.tanh(),
}
