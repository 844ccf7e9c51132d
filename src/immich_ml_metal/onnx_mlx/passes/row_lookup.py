"""How rows get through look-ups: data and places may both have rows; see `row_rules`."""

from immich_ml_metal.onnx_graph.graph import Node
from immich_ml_metal.onnx_mlx.passes.rows import Rows


def gather(rows: Rows, node: Node) -> int:
    """Places along one axis: shifted to their row where they count from its start."""
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
    rows.refuse_if(a != along, f"it looks up along axis {along}, rows lie on {a}")
    if i is None:  # the same places of each row: they need an axis to put the rows on
        has_place = 1 in rows.shape(index)
        rows.refuse_if(not has_place, "its places have no axis of 1 to put the rows on")
        i = rows.shape(index).index(1)
    rows.emit(node, op="GatherRows", inputs=(data, index, rows.counter), index_axis=i)
    return along + i


def gather_elements(rows: Rows, node: Node) -> int:
    """A place for each element: data and places side by side on one axis of rows."""
    places = {axis for name in node.inputs if (axis := rows.axis(name)) is not None}
    rows.refuse_if(len(places) != 1, f"its inputs hold rows on the axes {sorted(places)}")
    (axis,) = places
    rows.refuse_if(axis == rows.attribute_axis(node), "it looks up along the rows")
    lengths = {rows.shape(name)[axis] for name in node.inputs}
    rows.refuse_if(len(lengths) != 1, f"its inputs have {sorted(lengths)} for each row")
    inputs = [n if rows.axis(n) is not None else rows.repeat(n, axis) for n in node.inputs]
    rows.emit(node, inputs=tuple(inputs))
    return axis


def gather_nd(rows: Rows, node: Node) -> int:
    """Places of several axes at once; those that reach the rows get their row."""
    data, index = node.inputs
    a, i = rows.axis(data), rows.axis(index)
    rank = len(rows.shape(index))
    rows.refuse_if(bool(node.attributes.get("batch_dims")), "it has batch dimensions of its own")
    rows.refuse_if(i is None or i == rank - 1, f"rows lie on axis {i} of its places")
    if a is None:
        rows.emit(node)
    else:
        rows.refuse_if(a >= rows.shape(index)[-1], "its places do not reach the rows' axis")
        inputs = (data, index, rows.counter)
        rows.emit(node, op="GatherNDRows", inputs=inputs, data_axis=a, index_axis=i or 0)
    return i or 0
