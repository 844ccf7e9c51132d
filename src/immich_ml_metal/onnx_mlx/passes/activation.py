"""Activations written out in simpler operators become one operator again."""

import math

from immich_ml_metal.onnx_graph.facts import scaled_by
from immich_ml_metal.onnx_graph.graph import Editor, Node, Program
from immich_ml_metal.onnx_graph.match import (
    NoMatch,
    Note,
    ignore,
    made_by,
    made_for_this,
    other_input,
    require,
    rewrite,
    used_by,
)

TOLERANCE = 1e-6  # exporters round 1/6 to float32
TOLERANCE_ERF = 1e-3  # or sqrt(2) to float16; the factor itself is kept


def fuse_gelu(program: Program, note: Note = ignore) -> Program:
    """0.5 * x * (1 + erf(x / sqrt(2))), in any order of the factors → Gelu."""
    return rewrite(program, {"Erf"}, _fuse_gelu_at, note)


def _fuse_gelu_at(editor: Editor, erf: Node) -> None:
    x, scale = scaled_by(editor, made_for_this(editor, erf.inputs[0], "Mul", "Div"))
    require(
        math.isclose(scale, math.sqrt(0.5), rel_tol=TOLERANCE_ERF),
        f"erf looks at x * {scale:.6g}, not at x / sqrt(2)",
    )
    add = used_by(editor, erf.outputs[0], "Add")
    one = editor.scalar(other_input(add, erf.outputs[0]))
    require(_close(one, 1), f"{add} adds {one}, not 1")
    last = _product_with_half(editor, add.outputs[0], x)
    attributes = {"erf_scale": scale}
    editor.replace(last, Node("Gelu", (x,), last.outputs, attributes, erf.name))


def _product_with_half(editor: Editor, name: str, x: str) -> Node:
    """The node that gives 0.5 * x * name."""
    first = used_by(editor, name, "Mul", "Div")
    if any(editor.scalar(factor) is not None for factor in first.inputs):  # (name * 0.5) * x
        _require_half(editor, first)
        second = used_by(editor, first.outputs[0], "Mul")
        require(x in second.inputs, f"{second} multiplies by something else than {x!r}")
        return second
    require(first.op == "Mul", f"{first} divides by something else than a constant")
    other = other_input(first, name)
    if other == x:  # (name * x) * 0.5
        second = used_by(editor, first.outputs[0], "Mul", "Div")
        _require_half(editor, second)
        return second
    producer = made_by(editor, other, "Mul", "Div")  # name * (x * 0.5)
    require(_require_half(editor, producer) == x, f"{producer} does not halve {x!r}")
    return first


def _require_half(editor: Editor, node: Node) -> str:
    source, factor = scaled_by(editor, node)
    require(_close(factor, 0.5), f"{node} multiplies by {factor:.6g}, not by 0.5")
    return source


def fuse_swish(program: Program, note: Note = ignore) -> Program:
    """X * sigmoid(alpha * x) → Swish; CLIP's QuickGELU has alpha 1.702."""
    return rewrite(program, {"Sigmoid"}, _fuse_swish_at, note)


def _fuse_swish_at(editor: Editor, sigmoid: Node) -> None:
    product = used_by(editor, sigmoid.outputs[0], "Mul")
    x = other_input(product, sigmoid.outputs[0])
    source, alpha = sigmoid.inputs[0], 1.0
    if source != x:
        source, alpha = scaled_by(editor, made_by(editor, source, "Mul", "Div"))
    require(source == x, f"{product} multiplies by {x!r}, the sigmoid is of {source!r}")
    editor.replace(product, Node("Swish", (x,), product.outputs, {"alpha": alpha}, sigmoid.name))


def fuse_hard_swish(program: Program, note: Note = ignore) -> Program:
    """clip(x + 3, 0, 6) / 6 → HardSigmoid, and x times that → HardSwish."""
    program = rewrite(program, {"Clip"}, _fuse_hard_sigmoid_at, note)
    return rewrite(program, {"HardSigmoid"}, _fuse_product_at, note)


def _fuse_hard_sigmoid_at(editor: Editor, clip: Node) -> None:
    bounds = _bounds(editor, clip)
    require(bounds == [0, 6], f"it clips to {bounds}, not to [0, 6]")
    shift = made_for_this(editor, clip.inputs[0], "Add")
    x = next((name for name in shift.inputs if name not in editor.constants), "")
    three = editor.scalar(other_input(shift, x))
    require(_close(three, 3), f"{shift} adds {three}, not 3")
    user = used_by(editor, clip.outputs[0], "Mul", "Div")
    if any(editor.scalar(name) is not None for name in user.inputs):
        _require_sixth(editor, user)
        attributes = {"alpha": 1 / 6, "beta": 0.5}
        editor.replace(user, Node("HardSigmoid", (x,), user.outputs, attributes, clip.name))
        return
    require(user.op == "Mul", f"{user} divides by something else than a constant")
    other = other_input(user, clip.outputs[0])  # x * clip(x + 3, 0, 6) / 6
    require(other == x, f"{user} multiplies by {other!r}, the clip is of {x!r}")
    last = used_by(editor, user.outputs[0], "Mul", "Div")
    _require_sixth(editor, last)
    editor.replace(last, Node("HardSwish", (x,), last.outputs, {}, clip.name))


def _require_sixth(editor: Editor, node: Node) -> None:
    _, factor = scaled_by(editor, node)
    require(_close(factor, 1 / 6), f"{node} multiplies by {factor:.6g}, not by 1/6")


def _bounds(editor: Editor, clip: Node) -> list[float | None]:
    bounds = [clip.attributes.get("min"), clip.attributes.get("max")]
    for index, name in enumerate(clip.inputs[1:3]):
        bounds[index] = editor.scalar(name)
    return [float(b) if isinstance(b, (int, float)) else None for b in bounds]


def _fuse_product_at(editor: Editor, gate: Node) -> None:
    alpha, beta = _number(gate, "alpha", 0.2), _number(gate, "beta", 0.5)
    if not (_close(alpha, 1 / 6) and _close(beta, 0.5)):
        raise NoMatch(f"it is x * {alpha:.6g} + {beta:.6g}, not x / 6 + 0.5")
    product = used_by(editor, gate.outputs[0], "Mul")
    x = other_input(product, gate.outputs[0])
    require(x == gate.inputs[0], f"{product} multiplies by {x!r}, it is of {gate.inputs[0]!r}")
    editor.replace(product, Node("HardSwish", gate.inputs, product.outputs, {}, gate.name))


def _number(node: Node, name: str, default: float) -> float:
    value = node.attributes.get(name, default)
    return float(value) if isinstance(value, (int, float)) else default


def _close(value: float | None, wanted: float) -> bool:
    return value is not None and math.isclose(value, wanted, rel_tol=TOLERANCE)
