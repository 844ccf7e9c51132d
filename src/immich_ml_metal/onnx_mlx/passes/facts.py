"""What the graph itself says about a value: its rank, whether an axis is its last, its parameters."""

from immich_ml_metal.onnx_mlx.graph import Editor, Node

# operators whose result has the rank of their first input
_SAME_RANK = frozenset(
    "Add Sub Mul Div Pow Cast Softmax Where Relu Sigmoid Erf Sqrt LayerNormalization Identity "
    "Slice Linear Swish Gelu HardSwish Clip".split()
)
_DEPTH = 64  # nodes to look back through


def rank_of(editor: Editor, name: str) -> int | None:
    """The number of axes of a value, where a nearby node or constant gives it away."""
    for _ in range(_DEPTH):
        if name in editor.constants:
            return editor.constants[name].ndim
        node = editor.producer(name)
        if node is None:
            return None
        if node.op == "Transpose" and "perm" in node.attributes:
            return len(node.attributes["perm"])  # type: ignore[arg-type]
        if node.op == "Reshape" and node.inputs[1] in editor.constants:
            return editor.constants[node.inputs[1]].size
        if node.op not in _SAME_RANK:
            return None
        name = next((i for i in node.inputs if i not in editor.constants), node.inputs[0])
    return None


def is_last_axis(editor: Editor, name: str, axis: int) -> bool:
    """Whether `axis` is provably the last of the value."""
    return axis == -1 or (axis >= 0 and rank_of(editor, name) == axis + 1)


def constant_list(editor: Editor, node: Node, name: str, position: int) -> list[int] | None:
    """Integers from an attribute or a constant input; None if absent or not constant."""
    given = node.attributes.get(name)
    if isinstance(given, tuple):
        return [int(v) for v in given]
    if len(node.inputs) > position and node.inputs[position] in editor.constants:
        return [int(v) for v in editor.constants[node.inputs[position]].ravel()]
    return None


def factor_of(editor: Editor, node: Node) -> tuple[str, float] | None:
    """(x, c) if the node is x * c or x / c' = x * c for a constant of one element."""
    if node.op == "Div":
        divisor = editor.scalar(node.inputs[1])
        return (node.inputs[0], 1 / divisor) if divisor else None
    if node.op == "Mul":
        for x, c in (node.inputs, node.inputs[::-1]):
            value = editor.scalar(c)
            if value is not None:
                return x, value
    return None
