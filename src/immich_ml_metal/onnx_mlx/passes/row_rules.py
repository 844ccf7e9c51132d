"""For each operator, how rows get from its inputs to its output; see `batch`.

A rule emits the node, changed if need be, and gives the axis of the output that holds the rows. It
refuses where rows would mix.
"""

import math
from collections.abc import Mapping

import numpy as np

from immich_ml_metal.onnx_graph.families import (
    ALONG_AXIS,
    BROADCAST,
    GLOBAL_POOLS,
    REDUCTIONS,
    RESHAPES,
    UNARY,
    WINDOWS,
)
from immich_ml_metal.onnx_graph.graph import Node
from immich_ml_metal.onnx_mlx.passes.row_lookup import gather, gather_elements, gather_nd
from immich_ml_metal.onnx_mlx.passes.row_products import attention, gemm, matmul, norm
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
    rows.refuse_if(found is None, f"no axis of {rows.shape(target)} can hold the rows")
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
    rows.refuse_if(len(places) != 1, f"its operands hold rows on the axes {sorted(places)}")
    (place,) = places
    inputs = tuple(rows.aligned(node, name, place) for name in node.inputs)
    rows.emit(node, inputs=inputs)
    return place


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
    mixes = along == axis or (flattens and along < axis)
    rows.refuse_if(mixes, f"it works along axis {along}, rows lie on {axis}")
    rows.emit(node)
    dropped = node.op in ("ArgMax", "ArgMin") and not node.attributes.get("keepdims", 1)
    return axis - 1 if dropped and along < axis else axis


def _reduce(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    axes = [a % rank for a in rows.list_of(node, "axes", 1) or range(rank)]
    rows.refuse_if(axis in axes, f"it reduces the axes {axes}, rows lie on {axis}")
    rows.emit(node)
    if node.attributes.get("keepdims", 1):
        return axis
    return axis - sum(a < axis for a in axes)


def _picture(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rows.refuse_if(axis != 0, f"rows lie on axis {axis}, not 0")
    if node.op == "Resize" and len(node.inputs) > 3:
        sizes, old = rows.list_of(node, "sizes", 3), rows.shape(node.inputs[0])
        rows.refuse_if("axes" in node.attributes, "it names its axes")
        rows.refuse_if(not sizes, "it has no sizes")
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
    rows.refuse_if(old[before] != new[axis], f"it repeats the rows {new[axis]} times")
    shape = [1 if a == axis else length for a, length in enumerate(new)]
    given = rows.add_constant(node.outputs[0], np.asarray(shape, np.int64))
    rows.emit(node, inputs=(node.inputs[0], given))
    return axis


def _concat(rows: Rows, node: Node) -> int:
    axes = {axis for name in node.inputs if (axis := rows.axis(name)) is not None}
    rows.refuse_if(len(axes) != 1, f"its inputs hold rows on the axes {sorted(axes)}")
    (axis,) = axes
    rows.refuse_if(axis == rows.attribute_axis(node), "it joins along the rows")
    inputs = [n if rows.axis(n) is not None else rows.repeat(n, axis) for n in node.inputs]
    rows.emit(node, inputs=tuple(inputs))
    return axis


def _slice(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    starts = rows.list_of(node, "starts", 1) or []
    axes = rows.list_of(node, "axes", 3) or list(range(len(starts)))
    rows.refuse_if(axis in [a % rank for a in axes], "it cuts along the rows")
    rows.emit(node)
    return axis


def _pad(rows: Rows, node: Node) -> int:
    axis = rows.carried(node)
    rank = len(rows.shape(node.inputs[0]))
    pads = rows.list_of(node, "pads", 1) or []
    axes = [a % rank for a in rows.list_of(node, "axes", 3) or range(rank)]
    touched = [a for i, a in enumerate(axes) if pads[i] or pads[i + len(axes)]]
    rows.refuse_if(axis in touched, "it pads along the rows")
    rows.emit(node)
    return axis


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(PICTURES, _picture),
    **dict.fromkeys(ALONG_AXIS, _along),
    "MatMul": matmul,
    "Gemm": gemm,
    "LayerNormalization": norm,
    "RMSNormalization": norm,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Attention": attention,
}
