"""Operators that move elements without changing them."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from immich_ml_metal.onnx_mlx.ops.call import (
    Call,
    Operator,
    Table,
    Unsupported,
    Value,
    is_floating,
    to_device,
)
from immich_ml_metal.types import Tensor


def shape_of(call: Call, x: mx.array) -> Tensor:
    """Shape: the lengths of the axes `start` to `end`, known before anything is computed."""
    lengths = (x.shape[0], x.shape[-1], *x.shape[1:-1]) if call.nhwc else tuple(x.shape)
    end = call.integer("end") if call.has("end") else None
    return np.asarray(lengths[call.integer("start") : end], np.int64)


def size_of(call: Call, x: mx.array) -> Tensor:
    """Size: the number of elements."""
    return np.asarray(x.size, np.int64)


def reshape(call: Call, x: mx.array, given: Tensor | None = None) -> mx.array:
    """Reshape: same elements, same order; -1 is what remains, 0 copies the old length."""
    shape = call.parameter("shape", given) or []
    if not call.integer("allowzero"):
        shape = [x.shape[i] if length == 0 else length for i, length in enumerate(shape)]
    return x.reshape(shape)


def flatten(call: Call, x: mx.array) -> mx.array:
    """Flatten: a matrix; its rows are the axes before `axis`."""
    axis = call.integer("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(call: Call, x: mx.array) -> mx.array:
    """Transpose: axes in the order of `perm`, reversed without it."""
    return x.transpose(call.integers("perm", range(x.ndim)[::-1]))


def squeeze(call: Call, x: mx.array, given: Tensor | None = None) -> mx.array:
    """Squeeze: drop the named axes of length 1, or all such axes."""
    axes = call.parameter("axes", given)
    return mx.squeeze(x, axis=axes) if axes else mx.squeeze(x)


def unsqueeze(call: Call, x: mx.array, given: Tensor | None = None) -> mx.array:
    """Unsqueeze: insert axes of length 1 at the named places of the result."""
    axes = call.parameter("axes", given) or []
    rank = x.ndim + len(axes)
    return mx.expand_dims(x, sorted(axis % rank for axis in axes))


def expand(call: Call, x: mx.array, shape: Tensor) -> mx.array:
    """Expand: repeat along axes of length 1; broadcasts in both directions."""
    return mx.broadcast_to(x, np.broadcast_shapes(tuple(x.shape), tuple(map(int, shape))))


def expand_batch(call: Call, x: mx.array, counter: mx.array) -> mx.array:
    """Repeat x along `axis`, once for each row that `counter` counts; see `passes.batch`."""
    axis, count = call.integer("axis"), counter.shape[0]
    if x.shape[axis] == 1:
        return mx.broadcast_to(x, (*x.shape[:axis], count, *x.shape[axis + 1 :]))
    return mx.tile(x, [count if a == axis else 1 for a in range(x.ndim)])


def tile(call: Call, x: mx.array, repeats: Tensor) -> mx.array:
    """Tile: the whole array again and again along each axis."""
    return mx.tile(x, [int(r) for r in repeats])


def concat(call: Call, *values: Value) -> mx.array:
    """Concat: one after the other along `axis`."""
    floats = [v.dtype for v in values if isinstance(v, mx.array) and is_floating(v)]
    dtype = floats[0] if floats else call.dtype
    parts = [v if isinstance(v, mx.array) else to_device(v, dtype) for v in values]
    return mx.concatenate(parts, axis=call.integer("axis"))


def split(call: Call, x: mx.array, given: Tensor | None = None) -> Sequence[mx.array]:
    """Split: parts of the given lengths along `axis`, equal parts without them."""
    axis = call.integer("axis")
    lengths = call.parameter("split", given)
    if lengths is None:
        parts = call.integer("num_outputs", len(call.node.outputs))
        each = -(-x.shape[axis] // parts)  # the last part may be shorter
        lengths = [each] * (parts - 1)
        lengths.append(x.shape[axis] - sum(lengths))
    cuts = [sum(lengths[:index]) for index in range(1, len(lengths))]
    return list(mx.split(x, cuts, axis=axis))


def slice_(
    call: Call,
    x: mx.array,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> mx.array:
    """Slice: start, end and step for the named axes; positions out of range are clamped."""
    first = call.parameter("starts", starts) or []
    last = call.parameter("ends", ends) or []
    which = call.parameter("axes", axes) or list(range(len(first)))
    stride = call.parameter("steps", steps) or [1] * len(first)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(first, last, which, stride, strict=True):
        index[axis] = _bounded(start, end, step, x.shape[axis])
    return x[tuple(index)]


def _bounded(start: int, end: int, step: int, length: int) -> slice:
    """The slice with both ends inside the axis, or None beyond it, as Python wants it."""
    if step > 0:
        return slice(min(max(start, -length), length), min(max(end, -length), length), step)
    begin = None if start >= length else max(start, -length)
    return slice(begin, None if end < -length else min(end, length), step)


def pad(
    call: Call,
    x: mx.array,
    given: Tensor | None = None,
    fill: Tensor | None = None,
    axes: Tensor | None = None,
) -> mx.array:
    """Pad: constant, edge or reflected elements before and after each axis; negative pads crop."""
    pads = call.parameter("pads", given) or []
    named = list(range(x.ndim)) if axes is None else [int(a) % x.ndim for a in axes]
    before, after = pads[: len(named)], pads[len(named) :]
    widths = [(0, 0)] * x.ndim
    for axis, low, high in zip(named, before, after, strict=True):
        x = (
            mx.take(x, mx.arange(max(-low, 0), x.shape[axis] - max(-high, 0)), axis=axis)
            if (low < 0 or high < 0)
            else x
        )
        widths[axis] = (max(low, 0), max(high, 0))
    return _fill(call, x, widths, 0.0 if fill is None else fill.item())


def _fill(call: Call, x: mx.array, widths: Sequence[tuple[int, int]], value: float) -> mx.array:
    mode = call.text("mode", "constant")
    if mode == "constant":
        return mx.pad(x, list(widths), constant_values=mx.array(value, x.dtype))
    if mode not in ("edge", "reflect", "wrap"):
        raise Unsupported(f"Pad with mode {mode!r}")
    for axis, (low, high) in enumerate(widths):
        if low or high:  # NumPy knows which element comes to which place
            order = np.pad(np.arange(x.shape[axis]), (low, high), mode=mode)  # type: ignore[call-overload]
            x = mx.take(x, mx.array(order.astype(np.int32)), axis=axis)
    return x


def depth_to_space(call: Call, x: mx.array) -> mx.array:
    """DepthToSpace: channels become blocks of pixels, in the order DCR or CRD."""
    n, c, h, w = x.shape
    b = call.integer("blocksize")
    if call.text("mode", "DCR") == "DCR":
        x = x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // b**2, h * b, w * b)


def space_to_depth(call: Call, x: mx.array) -> mx.array:
    """SpaceToDepth: blocks of pixels become channels."""
    n, c, h, w = x.shape
    b = call.integer("blocksize")
    x = x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b**2, h // b, w // b)


TABLE: Table = {
    "Shape": Operator(shape_of, host_result=True),
    "Size": Operator(size_of, host_result=True),
    "Reshape": Operator(reshape, host=frozenset({1})),
    "Flatten": Operator(flatten),
    "Transpose": Operator(transpose),
    "Squeeze": Operator(squeeze, host=frozenset({1})),
    "Unsqueeze": Operator(unsqueeze, host=frozenset({1})),
    "Expand": Operator(expand, host=frozenset({1})),
    "ExpandBatch": Operator(expand_batch),
    "Tile": Operator(tile, host=frozenset({1})),
    "Concat": Operator(concat, keep_scalars=True),
    "Split": Operator(split, host=frozenset({1})),
    "Slice": Operator(slice_, host=frozenset({1, 2, 3, 4})),
    "Pad": Operator(pad, host=frozenset({1, 2, 3})),
    "DepthToSpace": Operator(depth_to_space),
    "SpaceToDepth": Operator(space_to_depth),
}
