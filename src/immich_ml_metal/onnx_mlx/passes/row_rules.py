"""For each operator, how rows get from its inputs to its output; see `batch`.

A rule emits the node, changed if need be, and gives the axis of the output that holds the rows. It
refuses where rows would mix.
"""

import math
from collections.abc import Mapping

import numpy as np

from immich_ml_metal.onnx_mlx.graph import Node
from immich_ml_metal.onnx_mlx.passes.families import (
    ALONG_AXIS,
    BROADCAST,
    GLOBAL_POOLS,
    REDUCTIONS,
    RESHAPES,
    UNARY,
    WINDOWS,
)
from immich_ml_metal.onnx_mlx.passes.rows import Rows, Rule

PICTURES = (
    WINDOWS
    | GLOBAL_POOLS
    | {"BatchNormalization", "InstanceNormalization", "GroupNormalization"}
    | {"Resize", "DepthToSpace", "SpaceToDepth"}
)


def _unary(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rows.emit(node)
    return axis


def _reshape(rows: Rows, node: Node) -> int:
    """The rows lie where as many elements come before them as in the input."""
    source, target = node.inputs[0], node.outputs[0]
    axis = rows.carried(node)
    before = math.prod(rows.shape(source)[:axis]) * rows.outer(source)
    found = place_rows(rows.shape(target), before)
    rows.refuse_if(found is None, node)
    axis, outer = found or (0, 1)
    if outer > 1:
        rows.interleave(target, outer)
    shape = [-1 if a == axis else length for a, length in enumerate(rows.shape(target))]
    given = rows.add_constant(target, np.asarray(shape, np.int64))
    rows.emit(node, op="Reshape", inputs=(source, given))
    return axis


def place_rows(shape: tuple[int, ...], before: int) -> tuple[int, int] | None:
    """(axis, outer) for rows that follow `before` elements of a value with this shape for one row.

    An axis of length 1 is theirs; else they come first on the axis that starts there (batch times
    heads); else, and rather than among the features on the last axis, last on the one that ends
    there (length times batch).
    """
    starts = [axis for axis in range(len(shape)) if math.prod(shape[:axis]) == before]
    alone = [axis for axis in starts if shape[axis] == 1]
    if alone or (starts and (starts[0] == 0 or starts[0] < len(shape) - 1)):
        return (alone or starts)[0], 1
    for axis in range(len(shape)):
        if math.prod(shape[: axis + 1]) == before:
            return axis, shape[axis]
    return None


def _broadcast(rows: Rows, node: Node) -> int:
    rank = len(rows.shape(node.outputs[0]))
    places = {
        axis + rank - len(rows.shape(name))
        for name in node.inputs
        if (axis := rows.axis(name)) is not None
    }
    rows.refuse_if(len(places) != 1, node)
    (place,) = places
    inputs = tuple(_aligned(rows, node, name, place, rank) for name in node.inputs)
    rows.emit(node, inputs=inputs)
    return place


def _aligned(rows: Rows, node: Node, name: str, place: int, rank: int) -> str:
    """An operand whose length at the rows' axis fits: as many for each row, or one in all."""
    shape, wanted = rows.shape(name), rows.shape(node.outputs[0])[place]
    own = place - (rank - len(shape))
    length = shape[own] if own >= 0 else 1
    if rows.axis(name) is not None:
        rows.refuse_if(length != wanted, node)
        return name
    if length == 1 and (wanted == 1 or own < 0):
        return name
    rows.refuse_if(length != wanted and length != 1, node)
    return name if length == 1 else rows.repeat(name, own)


def _matmul(rows: Rows, node: Node) -> int:
    left, right = node.inputs
    x, y, out = (len(rows.shape(name)) for name in (left, right, node.outputs[0]))
    a, b = rows.axis(left), rows.axis(right)
    rows.refuse_if(min(x, y) < 2, node)
    if b is None and y == 2 and a is not None:
        rows.refuse_if(a == x - 1, node)
        rows.emit(node)
        return a
    if a is None and b == y - 1:
        rows.refuse_if(x > 2, node)
        rows.emit(node)
        return out - 1
    places = {axis + out - rank for axis, rank in ((a, x), (b, y)) if axis is not None}
    rows.refuse_if(len(places) != 1, node)
    (place,) = places
    if b is None and place == out - 2:
        rows.refuse_if(any(n != 1 for n in rows.shape(right)[:-2]), node)
        rows.emit(node)
        return place
    rows.refuse_if(place >= out - 2, node)
    rows.emit(node, inputs=tuple(_aligned(rows, node, name, place, out) for name in node.inputs))
    return place


def _gemm(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rows.refuse_if(axis != 0 or bool(node.attributes.get("transA")), node)
    inputs = node.inputs
    if len(inputs) > 2 and inputs[2]:
        bias = rows.shape(inputs[2])
        rows.refuse_if(len(bias) > 1 and bias[0] != 1, node)
    rows.emit(node)
    return 0


def _norm(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rows.refuse_if(axis >= rows.attribute_axis(node, -1), node)
    rows.emit(node)
    return axis


def _along(rows: Rows, node: Node) -> int:
    """An operator that works along one axis, which must not be the rows' own."""
    axis = rows.carried(node)
    default = 0 if node.op in ("ArgMax", "ArgMin", "Split") else -1
    if node.op == "CumSum":
        given = rows.list_of(node, "axis", 1) or [0]
        along = given[0] % len(rows.shape(node.inputs[0]))
    else:
        along = rows.attribute_axis(node, default)
    flattens = rows.opset < 13 and node.op in ("Softmax", "LogSoftmax")
    rows.refuse_if(along == axis or (flattens and along < axis), node)
    rows.emit(node)
    dropped = node.op in ("ArgMax", "ArgMin") and not node.attributes.get("keepdims", 1)
    return axis - 1 if dropped and along < axis else axis


def _reduce(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    axes = [a % rank for a in rows.list_of(node, "axes", 1) or range(rank)]
    rows.refuse_if(axis in axes, node)
    rows.emit(node)
    if node.attributes.get("keepdims", 1):
        return axis
    return axis - sum(a < axis for a in axes)


def _picture(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rows.refuse_if(axis != 0, node)
    if node.op == "Resize" and len(node.inputs) > 3:
        sizes, old = rows.list_of(node, "sizes", 3), rows.shape(node.inputs[0])
        rows.refuse_if("axes" in node.attributes or not sizes, node)
        scales = np.asarray([new / before for new, before in zip(sizes or (), old, strict=True)])
        given = rows.add_constant(node.outputs[0], scales.astype(np.float32))
        rows.emit(node, inputs=(*node.inputs[:2], given))
    else:
        rows.emit(node)
    return 0


def _transpose(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    perm = node.attributes.get("perm") or tuple(range(len(rows.shape(node.inputs[0]))))[::-1]
    rows.emit(node)
    return list(perm).index(axis)  # type: ignore[arg-type]


def _expand(rows: Rows, node: Node) -> int:
    before = rows.carried(node)
    old, new = rows.shape(node.inputs[0]), rows.shape(node.outputs[0])
    axis = before + len(new) - len(old)
    rows.refuse_if(old[before] != new[axis], node)
    shape = [1 if a == axis else length for a, length in enumerate(new)]
    given = rows.add_constant(node.outputs[0], np.asarray(shape, np.int64))
    rows.emit(node, inputs=(node.inputs[0], given))
    return axis


def _concat(rows: Rows, node: Node) -> int:
    axes = {axis for name in node.inputs if (axis := rows.axis(name)) is not None}
    rows.refuse_if(len(axes) != 1, node)
    (axis,) = axes
    rows.refuse_if(axis == rows.attribute_axis(node), node)
    inputs = [n if rows.axis(n) is not None else rows.repeat(n, axis) for n in node.inputs]
    rows.emit(node, inputs=tuple(inputs))
    return axis


def _slice(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    starts = rows.list_of(node, "starts", 1) or []
    axes = rows.list_of(node, "axes", 3) or list(range(len(starts)))
    rows.refuse_if(axis in [a % rank for a in axes], node)
    rows.emit(node)
    return axis


def _pad(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    pads = rows.list_of(node, "pads", 1) or []
    axes = [a % rank for a in rows.list_of(node, "axes", 3) or range(rank)]
    touched = [a for i, a in enumerate(axes) if pads[i] or pads[i + len(axes)]]
    rows.refuse_if(axis in touched, node)
    rows.emit(node)
    return axis


def _gather(rows: Rows, node: Node) -> int:
    data, index = node.inputs
    along = rows.attribute_axis(node)
    places = len(rows.shape(index))
    a, i = rows.axis(data), rows.axis(index)
    if a is None and i is not None:
        rows.emit(node)
        return along + i
    if a is not None and a != along and i is None:
        rows.emit(node)
        return a if a < along else a + places - 1
    rows.refuse_if(a != along, node)
    if i is None:  # the same places of each row: they need an axis to put the rows on
        rows.refuse_if(1 not in rows.shape(index), node)
        i = rows.shape(index).index(1)
    rows.emit(node, op="GatherRows", inputs=(data, index, rows.counter), index_axis=i)
    return along + i


def _gather_elements(rows: Rows, node: Node) -> int:
    places = {axis for name in node.inputs if (axis := rows.axis(name)) is not None}
    rows.refuse_if(len(places) != 1, node)
    (axis,) = places
    rows.refuse_if(axis == rows.attribute_axis(node), node)
    lengths = {rows.shape(name)[axis] for name in node.inputs}
    rows.refuse_if(len(lengths) != 1, node)
    inputs = [n if rows.axis(n) is not None else rows.repeat(n, axis) for n in node.inputs]
    rows.emit(node, inputs=tuple(inputs))
    return axis


def _gather_nd(rows: Rows, node: Node) -> int:
    data, index = node.inputs
    a, i = rows.axis(data), rows.axis(index)
    rank = len(rows.shape(index))
    rows.refuse_if(bool(node.attributes.get("batch_dims")) or i is None or i == rank - 1, node)
    if a is None:
        rows.emit(node)
    else:
        rows.refuse_if(a >= rows.shape(index)[-1], node)
        inputs = (data, index, rows.counter)
        rows.emit(node, op="GatherNDRows", inputs=inputs, data_axis=a, index_axis=i or 0)
    return i or 0


def _attention(rows: Rows, node: Node) -> int:
    """Rows on the first axis of q, k and v; a mask without rows must not have them either."""
    rows.refuse_if(any(rows.axis(name) != 0 for name in node.inputs[:3]), node)
    if len(node.inputs) > 3 and node.inputs[3]:
        mask, rank = node.inputs[3], 4
        if rows.axis(mask) is None:
            shape = rows.shape(mask)
            rows.refuse_if(len(shape) == rank and shape[0] != 1, node)
        else:
            rows.refuse_if(rows.axis(mask) != 0 or len(rows.shape(mask)) != rank, node)
    rows.emit(node)
    return 0


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(PICTURES, _picture),
    **dict.fromkeys(ALONG_AXIS, _along),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Attention": _attention,
}
