"""Operators that look elements up by position, or put them there."""

import mlx.core as mx
import numpy as np

from immich_ml_metal.onnx_mlx.ops.call import Call, Operator, Table, Unsupported, Value
from immich_ml_metal.types import Tensor


def gather(call: Call, x: mx.array, index: Value) -> mx.array:
    """Gather: slices of x along `axis` at the positions of `index`, negative ones from the end."""
    axis = call.integer("axis")
    length = x.shape[axis]
    if isinstance(index, np.ndarray):  # known: a single position needs no kernel
        if index.ndim == 0:
            return mx.take(x, int(index) % length, axis=axis)
        return mx.take(
            x, mx.array(np.where(index < 0, index + length, index).astype(np.int32)), axis
        )
    return mx.take(x, _from_start(index, length), axis=axis)


def _from_start(index: mx.array, length: int) -> mx.array:
    return mx.where(index < 0, index + length, index)


def gather_elements(call: Call, x: mx.array, index: mx.array) -> mx.array:
    """GatherElements: for each place of `index`, the element of x at that position along `axis`."""
    axis = call.integer("axis")
    return mx.take_along_axis(x, _from_start(index, x.shape[axis]), axis=axis)


def gather_nd(call: Call, x: mx.array, index: mx.array) -> mx.array:
    """GatherND: the last axis of `index` holds coordinates of slices of x.

    The first `batch_dims` axes of both run in step.
    """
    steps = call.integer("batch_dims")
    coordinates = []
    for axis in range(steps):
        shape = [1] * (index.ndim - 1)
        shape[axis] = x.shape[axis]
        coordinates.append(mx.arange(x.shape[axis]).reshape(shape))
    coordinates += [
        _from_start(index[..., column], x.shape[steps + column])
        for column in range(index.shape[-1])
    ]
    return x[tuple(coordinates)]


def gather_rows(call: Call, x: mx.array, index: mx.array, counter: mx.array) -> mx.array:
    """Gather for several rows side by side on `axis` of x and on `index_axis` of the index.

    Each position counts from the start of its own row; see `passes.batch`.
    """
    axis, index_axis, count = call.integer("axis"), call.integer("index_axis"), counter.shape[0]
    length = x.shape[axis] // count
    places = _in_rows(_from_start(index, length), index_axis, count, length)
    return mx.take(x, places, axis=axis)


def gather_nd_rows(call: Call, x: mx.array, index: mx.array, counter: mx.array) -> mx.array:
    """GatherND likewise, the rows on `data_axis` of x and on `index_axis` of the index."""
    axis, count = call.integer("data_axis"), counter.shape[0]
    length = x.shape[axis] // count
    places = []
    for column in range(index.shape[-1]):
        inside = length if column == axis else x.shape[column]
        place = _from_start(index[..., column], inside)
        if column == axis:
            place = _in_rows(place, call.integer("index_axis"), count, length)
        places.append(place)
    return x[tuple(mx.broadcast_arrays(*places))]


def _in_rows(index: mx.array, axis: int, count: int, length: int) -> mx.array:
    """Shift the positions of each of `count` rows to where that row starts."""
    shape = [1] * index.ndim
    if index.shape[axis] > count:  # several positions for each row
        each = index.shape[axis] // count
        starts = mx.repeat(mx.arange(count) * length, each)
    else:
        starts = mx.arange(count) * length
    shape[axis] = starts.size
    return index + starts.reshape(shape)


def scatter_nd(call: Call, x: mx.array, index: mx.array, updates: mx.array) -> mx.array:
    """ScatterND: x with the slices at the coordinates in `index` replaced or combined."""
    where = tuple(_from_start(index[..., c], x.shape[c]) for c in range(index.shape[-1]))
    target = x.at[where]
    match call.text("reduction", "none"):
        case "none":
            out = x + 0  # a copy: assignment works in place
            out[where] = updates.astype(x.dtype)
            return out
        case "add":
            return target.add(updates)
        case "mul":
            return target.multiply(updates)
        case "max":
            return target.maximum(updates)
        case "min":
            return target.minimum(updates)
        case other:
            raise Unsupported(f"ScatterND with reduction {other!r}")


def scatter_elements(call: Call, x: mx.array, index: mx.array, updates: mx.array) -> mx.array:
    """ScatterElements: x with single elements along `axis` replaced."""
    if call.text("reduction", "none") != "none":
        raise Unsupported(f"ScatterElements with reduction {call.text('reduction')!r}")
    axis = call.integer("axis")
    places = _from_start(index, x.shape[axis])
    return mx.put_along_axis(x, places, updates.astype(x.dtype), axis=axis)


def one_hot(call: Call, index: mx.array, depth: Tensor, values: Tensor) -> mx.array:
    """OneHot: `values` is (off, on); a new axis of length `depth` marks each index."""
    count = int(depth.item())
    off, on = (v.item() for v in values)
    axis = call.integer("axis", -1)
    places = mx.expand_dims(_from_start(index.astype(mx.int32), count), axis)
    shape = [1] * places.ndim
    shape[axis] = count
    dtype = call.dtype if values.dtype.kind == "f" else mx.int32
    hit = places == mx.arange(count).reshape(shape)
    return mx.where(hit, mx.array(on, dtype), mx.array(off, dtype))


def trilu(call: Call, x: mx.array, k: Tensor | None = None) -> mx.array:
    """Trilu: the upper (or lower) triangle of the last two axes, zeros elsewhere."""
    offset = int(k.item()) if k is not None else 0
    return mx.triu(x, offset) if call.integer("upper", 1) else mx.tril(x, offset)


TABLE: Table = {
    "Gather": Operator(gather, keep_scalars=True),
    "GatherElements": Operator(gather_elements),
    "GatherND": Operator(gather_nd),
    "GatherRows": Operator(gather_rows),
    "GatherNDRows": Operator(gather_nd_rows),
    "ScatterND": Operator(scatter_nd),
    "ScatterElements": Operator(scatter_elements),
    "OneHot": Operator(one_hot, host=frozenset({1, 2})),
    "Trilu": Operator(trilu, host=frozenset({1})),
}
