"""Activations written out in simpler operators become one operator again."""

import math

from immich_ml_metal.onnx_mlx.graph import Editor, Node, Program
from immich_ml_metal.onnx_mlx.passes.facts import factor_of

TOLERANCE = 1e-6  # exporters round 1/6 to float32
TOLERANCE_ERF = 1e-3  # or sqrt(2) to float16; the factor itself is kept


def fuse_gelu(program: Program) -> Program:
    """0.5 * x * (1 + erf(x / sqrt(2))), in any order of the factors → Gelu."""
    editor = Editor(program)
    for erf in editor:
        if erf.op == "Erf":
            _fuse_gelu_at(editor, erf)
    return editor.finish()


def _fuse_gelu_at(editor: Editor, erf: Node) -> None:
    inner = editor.private_producer(erf.inputs[0], "Mul", "Div")
    scaled = factor_of(editor, inner) if inner else None
    add = editor.user(erf.outputs[0], "Add")
    if scaled is None or add is None:
        return
    if not math.isclose(scaled[1], math.sqrt(0.5), rel_tol=TOLERANCE_ERF):
        return
    if not any(_close(editor.scalar(name), 1) for name in add.inputs):
        return
    last = _product_with_half(editor, add.outputs[0], scaled[0])
    if last is not None:
        attributes = {"erf_scale": scaled[1]}
        editor.replace(last, Node("Gelu", (scaled[0],), last.outputs, attributes, erf.name))


def _product_with_half(editor: Editor, name: str, x: str) -> Node | None:
    """The node that gives 0.5 * x * name."""
    first = editor.user(name, "Mul", "Div")
    if first is None:
        return None
    half = factor_of(editor, first)
    if half is not None:  # (name * 0.5) * x
        second = editor.user(first.outputs[0], "Mul")
        return second if _close(half[1], 0.5) and second and x in second.inputs else None
    other = first.inputs[1] if first.inputs[0] == name else first.inputs[0]
    if other == x:  # (name * x) * 0.5
        second = editor.user(first.outputs[0], "Mul", "Div")
        half = factor_of(editor, second) if second else None
        return second if half and _close(half[1], 0.5) else None
    producer = editor.producer(other, "Mul", "Div")  # name * (x * 0.5)
    half = factor_of(editor, producer) if producer else None
    return first if half and half[0] == x and _close(half[1], 0.5) else None


def fuse_swish(program: Program) -> Program:
    """X * sigmoid(alpha * x) → Swish; CLIP's QuickGELU has alpha 1.702."""
    editor = Editor(program)
    for sigmoid in editor:
        if sigmoid.op != "Sigmoid":
            continue
        product = editor.user(sigmoid.outputs[0], "Mul")
        if product is None:
            continue
        x = _partner(product, sigmoid.outputs[0])
        inner = editor.producer(sigmoid.inputs[0], "Mul", "Div")
        scaled = factor_of(editor, inner) if inner else None
        if sigmoid.inputs[0] == x:
            scaled = (x, 1.0)
        if scaled is not None and scaled[0] == x:
            fused = Node("Swish", (x,), product.outputs, {"alpha": scaled[1]}, sigmoid.name)
            editor.replace(product, fused)
    return editor.finish()


def fuse_hard_swish(program: Program) -> Program:
    """clip(x + 3, 0, 6) / 6 → HardSigmoid, and x times that → HardSwish."""
    editor = Editor(program)
    for node in editor:
        if node.op == "Clip":
            _fuse_hard_sigmoid(editor, node)
    return _fuse_product(editor.finish())


def _fuse_hard_sigmoid(editor: Editor, clip: Node) -> None:
    shift = editor.private_producer(clip.inputs[0], "Add")
    user = editor.user(clip.outputs[0], "Mul", "Div")
    if shift is None or user is None or not _is_zero_to_six(editor, clip):
        return
    x = next((n for n in shift.inputs if n not in editor.constants), "")
    if not any(_close(editor.scalar(name), 3) for name in shift.inputs):
        return
    attributes = {"alpha": 1 / 6, "beta": 0.5}
    scaled = factor_of(editor, user)
    if scaled is not None and _close(scaled[1], 1 / 6):
        editor.replace(user, Node("HardSigmoid", (x,), user.outputs, attributes, clip.name))
        return
    last = editor.user(user.outputs[0], "Mul", "Div")  # x * clip(x + 3, 0, 6) / 6
    scaled = factor_of(editor, last) if last else None
    if last and scaled and _close(scaled[1], 1 / 6) and _partner(user, clip.outputs[0]) == x:
        editor.replace(last, Node("HardSwish", (x,), last.outputs, {}, clip.name))


def _is_zero_to_six(editor: Editor, clip: Node) -> bool:
    bounds = [clip.attributes.get("min"), clip.attributes.get("max")]
    for index, name in enumerate(clip.inputs[1:3]):
        bounds[index] = editor.scalar(name)
    return [float(b) if isinstance(b, (int, float)) else None for b in bounds] == [0, 6]


def _fuse_product(program: Program) -> Program:
    editor = Editor(program)
    for gate in editor:
        if gate.op != "HardSigmoid" or not _close(_number(gate, "alpha", 0.2), 1 / 6):
            continue
        product = editor.user(gate.outputs[0], "Mul")
        if (
            product
            and _partner(product, gate.outputs[0]) == gate.inputs[0]
            and (_close(_number(gate, "beta", 0.5), 0.5))
        ):
            fused = Node("HardSwish", gate.inputs, product.outputs, {}, gate.name)
            editor.replace(product, fused)
    return editor.finish()


def _number(node: Node, name: str, default: float) -> float:
    value = node.attributes.get(name, default)
    return float(value) if isinstance(value, (int, float)) else default


def _partner(node: Node, name: str) -> str:
    return node.inputs[1] if node.inputs[0] == name else node.inputs[0]


def _close(value: float | None, wanted: float) -> bool:
    return value is not None and math.isclose(value, wanted, rel_tol=TOLERANCE)
