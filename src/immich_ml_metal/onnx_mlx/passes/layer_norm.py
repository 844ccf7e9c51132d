"""LayerNorm written out in means and roots becomes LayerNormalization again."""

from immich_ml_metal.onnx_mlx.graph import Editor, Node, Program
from immich_ml_metal.onnx_mlx.passes.facts import constant_list, is_last_axis


def fuse_layer_norm(program: Program) -> Program:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias → LayerNormalization."""
    editor = Editor(program)
    for division in editor:
        if division.op != "Div":
            continue
        found = _match(editor, division)
        if found is not None:
            source, last, inputs, epsilon = found
            attributes = {"axis": -1, "epsilon": epsilon}
            fused = Node(
                "LayerNormalization", (source, *inputs), last.outputs, attributes, last.name
            )
            editor.replace(last, fused)
    return editor.finish()


def _match(editor: Editor, division: Node) -> tuple[str, Node, tuple[str, str], float] | None:
    """(input, last node, (scale, bias), epsilon)."""
    centred, deviation = division.inputs
    source = _centred(editor, centred)
    epsilon = _deviation(editor, deviation, source) if source else None
    scaled = editor.user(division.outputs[0], "Mul")
    shifted = editor.user(scaled.outputs[0], "Add") if scaled else None
    if source is None or epsilon is None or scaled is None or shifted is None:
        return None
    scale = _other(scaled, division.outputs[0])
    bias = _other(shifted, scaled.outputs[0])
    if any(
        name not in editor.constants or editor.constants[name].ndim != 1 for name in (scale, bias)
    ):
        return None
    return source, shifted, (scale, bias), epsilon


def _other(node: Node, name: str) -> str:
    return node.inputs[1] if node.inputs[0] == name else node.inputs[0]


def _mean_of(editor: Editor, name: str) -> str | None:
    """What `name` is the mean of over the last axis, if it is one that keeps the axis."""
    node = editor.producer(name, "ReduceMean")
    if node is None or not node.attributes.get("keepdims", 1):
        return None
    axes = constant_list(editor, node, "axes", 1)
    if axes is None or len(axes) != 1 or not is_last_axis(editor, node.inputs[0], axes[0]):
        return None
    return node.inputs[0]


def _centred(editor: Editor, name: str) -> str | None:
    """x, if `name` is x minus its mean."""
    node = editor.producer(name, "Sub")
    if node is None or _mean_of(editor, node.inputs[1]) != node.inputs[0]:
        return None
    return node.inputs[0]


def _deviation(editor: Editor, name: str, source: str) -> float | None:
    """epsilon, if `name` is the standard deviation of `source` with epsilon under the root."""
    root = editor.producer(name, "Sqrt")
    total = editor.producer(root.inputs[0], "Add") if root else None
    if total is None:
        return None
    for variance, epsilon in (total.inputs, total.inputs[::-1]):
        value = editor.scalar(epsilon)
        squares = _mean_of(editor, variance)
        if value is not None and squares and _square_of(editor, squares, source):
            return value
    return None


def _square_of(editor: Editor, name: str, source: str) -> bool:
    power = editor.producer(name, "Pow")
    if power is not None and editor.scalar(power.inputs[1]) == 2:
        return _centred(editor, power.inputs[0]) == source
    product = editor.producer(name, "Mul")
    return product is not None and all(_centred(editor, i) == source for i in product.inputs)
