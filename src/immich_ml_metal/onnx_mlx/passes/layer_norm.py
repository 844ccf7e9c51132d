"""LayerNorm written out in means and roots becomes LayerNormalization again."""

from immich_ml_metal.onnx_graph.facts import constant_list, is_last_axis
from immich_ml_metal.onnx_graph.graph import Editor, Node, Program
from immich_ml_metal.onnx_graph.match import (
    NoMatch,
    Note,
    ignore,
    made_by,
    other_input,
    require,
    rewrite,
    used_by,
)


def fuse_layer_norm(program: Program, note: Note = ignore) -> Program:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias → LayerNormalization."""
    return rewrite(program, {"Div"}, _fuse_at, note)


def _fuse_at(editor: Editor, division: Node) -> None:
    centred, deviation = division.inputs
    if editor.producer(deviation, "Sqrt") is None:
        return  # any other division
    source = _centred(editor, centred)
    epsilon = _epsilon(editor, deviation, source)
    scaled = used_by(editor, division.outputs[0], "Mul")
    shifted = used_by(editor, scaled.outputs[0], "Add")
    scale = other_input(scaled, division.outputs[0])
    bias = other_input(shifted, scaled.outputs[0])
    for name in (scale, bias):
        value = editor.constants.get(name)
        require(value is not None and value.ndim == 1, f"{name!r} is no constant of one axis")
    attributes = {"axis": -1, "epsilon": epsilon}
    inputs = (source, scale, bias)
    fused = Node("LayerNormalization", inputs, shifted.outputs, attributes, shifted.name)
    editor.replace(shifted, fused)


def _mean_of(editor: Editor, name: str) -> str:
    """What `name` is the mean of, over the last axis, which stays."""
    node = made_by(editor, name, "ReduceMean")
    require(node.attributes.get("keepdims", 1), f"{node} drops its axis")
    axes = constant_list(editor, node, "axes", 1) or []
    is_last = len(axes) == 1 and is_last_axis(editor, node.inputs[0], axes[0])
    require(is_last, f"{node} is over the axes {axes}, not known to be the last")
    return node.inputs[0]


def _centred(editor: Editor, name: str) -> str:
    """The x of a `name` that is x minus its mean."""
    node = made_by(editor, name, "Sub")
    source = _mean_of(editor, node.inputs[1])
    require(source == node.inputs[0], f"{node} subtracts the mean of {source!r}")
    return source


def _epsilon(editor: Editor, deviation: str, source: str) -> float:
    """The epsilon under the root, if `deviation` is the standard deviation of `source`."""
    root = made_by(editor, deviation, "Sqrt")
    total = made_by(editor, root.inputs[0], "Add")
    epsilon = next((v for name in total.inputs if (v := editor.scalar(name)) is not None), None)
    if epsilon is None:
        raise NoMatch(f"{total} adds no constant of one element")
    variance = next(name for name in total.inputs if editor.scalar(name) is None)
    _require_square(editor, _mean_of(editor, variance), source)
    return epsilon


def _require_square(editor: Editor, name: str, source: str) -> None:
    node = made_by(editor, name, "Pow", "Mul")
    if node.op == "Pow":
        power = editor.scalar(node.inputs[1])
        require(power == 2, f"{node} has the exponent {power}, not 2")
    for factor in node.inputs[: 1 if node.op == "Pow" else 2]:
        found = _centred(editor, factor)
        require(found == source, f"{node} squares the deviation of {found!r}, not of {source!r}")
