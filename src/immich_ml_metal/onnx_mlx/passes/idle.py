"""What changes nothing vanishes: Identity, + 0, * 1, and casts between floating types.

The whole network computes in one floating type of our choice, whatever the file casts to.
"""

import numpy as np
from onnx import TensorProto

from immich_ml_metal.onnx_graph.families import FLOATING, SAME_TYPE
from immich_ml_metal.onnx_graph.graph import Editor, Node, Program
from immich_ml_metal.onnx_graph.match import Note, ignore

FLOATS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
)
_DEPTH = 32


def drop_idle(program: Program, note: Note = ignore) -> Program:
    """Remove operations without effect."""
    editor = Editor(program)
    alias: dict[str, str] = {}
    for node in editor:
        inputs = tuple(alias.get(name, name) for name in node.inputs)
        is_idle = _is_idle(editor, node, inputs)
        if is_idle and node.outputs[0] not in program.output_names:
            alias[node.outputs[0]] = inputs[0]
            editor.replace(node)
            continue
        if is_idle:
            note(node, "it makes a result of the model")
        elif node.op == "Cast" and node.attributes.get("to") in FLOATS:
            note(node, f"{inputs[0]!r} is not known to be floating already")
        if inputs != node.inputs:
            editor.replace(node, Node(node.op, inputs, node.outputs, node.attributes, node.name))
    return editor.finish()


def _is_idle(editor: Editor, node: Node, inputs: tuple[str, ...]) -> bool:
    if node.op == "Identity":
        return True
    if node.op in ("Add", "Mul"):
        return _is_neutral(editor, node, inputs)
    wide = node.op == "Cast" and node.attributes.get("to") in FLOATS
    return wide and _is_computed_float(editor, inputs[0])


def _is_neutral(editor: Editor, node: Node, inputs: tuple[str, ...]) -> bool:
    """X + 0 and x * 1, as Paddle's `scale` leaves them; the constant has no axes to give to x."""
    constant = editor.constants.get(inputs[1])
    if constant is None or constant.ndim or inputs[0] in editor.constants:
        return False
    return bool(constant == (0 if node.op == "Add" else 1))


def _is_computed_float(editor: Editor, name: str) -> bool:
    for _ in range(_DEPTH):
        if name in editor.constants:
            return editor.constants[name].dtype == np.float32
        node = editor.producer(name)
        if node is None or node.op in FLOATING:
            return node is not None
        if node.op == "Cast":
            return node.attributes.get("to") in FLOATS
        if node.op not in SAME_TYPE:
            return False
        name = next((i for i in node.inputs if i not in editor.constants), node.inputs[0])
    return False
