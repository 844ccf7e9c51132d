"""What the graph itself says of a value: its rank, whether an axis is its last, its parameters."""

from immich_ml_metal.onnx_graph.families import BROADCAST, UNARY
from immich_ml_metal.onnx_graph.graph import Editor, Node
from immich_ml_metal.onnx_graph.match import NoMatch

# operators whose result has the rank of their first input that is not a constant
_SAME_RANK = UNARY | (BROADCAST - {"PRelu"}) | {"Softmax", "LayerNormalization", "Slice", "Linear"}
_DEPTH = 32  # nodes to look back through


def rank_of(editor: Editor, name: str, depth: int = _DEPTH) -> int | None:
    """The number of axes of a value, where constants and nearby nodes give it away."""
    if name in editor.constants:
        return editor.constants[name].ndim
    node = editor.producer(name)
    if node is None or not depth:
        return None
    perm = node.attributes.get("perm")
    if isinstance(perm, tuple):
        return len(perm)
    if node.op == "Reshape":
        shape = editor.constants.get(node.inputs[1])
        return None if shape is None else shape.size
    if node.op in ("Squeeze", "Unsqueeze"):
        return _changed_rank(editor, node, depth)
    ranks = [rank_of(editor, i, depth - 1) for i in _sources(editor, node)]
    return None if None in ranks else max((r for r in ranks if r is not None), default=None)


def _sources(editor: Editor, node: Node) -> tuple[str, ...]:
    """The inputs whose highest rank the result has; none where that is not known."""
    if node.op == "MatMul":
        return node.inputs
    if node.op not in _SAME_RANK:
        return ()
    return (next((i for i in node.inputs if i not in editor.constants), node.inputs[0]),)


def _changed_rank(editor: Editor, node: Node, depth: int) -> int | None:
    rank = rank_of(editor, node.inputs[0], depth - 1)
    axes = constant_list(editor, node, "axes", 1)
    if rank is None or axes is None:
        return None
    return rank - len(axes) if node.op == "Squeeze" else rank + len(axes)


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


def scaled_by(editor: Editor, node: Node) -> tuple[str, float]:
    """Like `factor_of`, for a node that must be of this form.

    Raises:
        NoMatch: neither operand is a constant of one element.
    """
    found = factor_of(editor, node)
    if found is None:
        raise NoMatch(f"{node} has no constant factor of one element")
    return found
