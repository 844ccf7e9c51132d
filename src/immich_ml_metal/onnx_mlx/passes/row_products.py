"""How rows get through products of matrices, norms and attention; see `row_rules`."""

from immich_ml_metal.onnx_graph.graph import Node
from immich_ml_metal.onnx_mlx.passes.rows import Rows


def matmul(rows: Rows, node: Node) -> int:
    """Rows in either factor, on any axis that the product does not sum over."""
    left, right = node.inputs
    x, y, out = (len(rows.shape(name)) for name in (left, right, node.outputs[0]))
    a, b = rows.axis(left), rows.axis(right)
    rows.refuse_if(min(x, y) < 2, "a factor has one axis only")
    if b is None and y == 2 and a is not None:
        rows.refuse_if(a == x - 1, "it sums over the rows")
        rows.emit(node)
        return a
    if a is None and b == y - 1:
        rows.refuse_if(x > 2, "rows are columns of the right factor, beside a batch")
        rows.emit(node)
        return out - 1
    places = {axis + out - rank for axis, rank in ((a, x), (b, y)) if axis is not None}
    rows.refuse_if(len(places) != 1, f"its factors hold rows on the axes {sorted(places)}")
    (place,) = places
    if b is None and place == out - 2:
        batch = rows.shape(right)[:-2]
        rows.refuse_if(any(n != 1 for n in batch), f"the right factor is a batch of {batch}")
        rows.emit(node)
        return place
    rows.refuse_if(place >= out - 2, "rows lie on an axis of the matrices")
    rows.emit(node, inputs=tuple(rows.aligned(node, name, place) for name in node.inputs))
    return place


def gemm(rows: Rows, node: Node) -> int:
    """Rows on the first axis of the left factor."""
    axis = rows.carried(node)
    rows.refuse_if(axis != 0, f"rows lie on axis {axis}, not 0")
    rows.refuse_if(bool(node.attributes.get("transA")), "it turns the rows into columns")
    inputs = node.inputs
    if len(inputs) > 2 and inputs[2]:
        bias = rows.shape(inputs[2])
        rows.refuse_if(len(bias) > 1 and bias[0] != 1, f"its bias {bias} differs by row")
    rows.emit(node)
    return 0


def norm(rows: Rows, node: Node) -> int:
    """Rows before the axes that are normalised."""
    axis = rows.carried(node)
    along = rows.attribute_axis(node, -1)
    rows.refuse_if(axis >= along, f"it normalises from axis {along} on, rows lie on {axis}")
    rows.emit(node)
    return axis


def attention(rows: Rows, node: Node) -> int:
    """Rows on the first axis of q, k and v; a mask without rows must not have them either."""
    axes = [rows.axis(name) for name in node.inputs[:3]]
    rows.refuse_if(axes != [0, 0, 0], f"q, k and v hold rows on the axes {axes}")
    if len(node.inputs) > 3 and node.inputs[3]:
        mask, rank = node.inputs[3], 4
        if rows.axis(mask) is None:
            shape = rows.shape(mask)
            own = len(shape) == rank and shape[0] != 1
            rows.refuse_if(own, f"its mask has rows of its own: {shape}")
        else:
            fits = rows.axis(mask) == 0 and len(rows.shape(mask)) == rank
            rows.refuse_if(not fits, f"rows lie on axis {rows.axis(mask)} of its mask")
    rows.emit(node)
    return 0
