"""Transpositions that follow each other become one, or none."""

from immich_ml_metal.onnx_graph.graph import Attribute, Editor, Node, Program
from immich_ml_metal.onnx_graph.match import Note, ignore

Order = tuple[int, ...]


def merge_transposes(program: Program, note: Note = ignore) -> Program:
    """Transpose(Transpose(x)) → one Transpose; those that change nothing vanish."""
    editor = Editor(program)
    alias: dict[str, str] = {}
    for node in editor:
        inputs = tuple(alias.get(name, name) for name in node.inputs)
        merged = _merged(editor, node, inputs)
        if merged is None:
            if inputs != node.inputs:
                editor.replace(node, _with_inputs(node, inputs))
            continue
        source, order, is_layout = merged
        if order == tuple(range(len(order))):
            if node.outputs[0] not in program.output_names:
                alias[node.outputs[0]] = source
                editor.replace(node)
                continue
            note(node, "it changes nothing, but makes a result of the model")
        attributes: dict[str, Attribute] = {"perm": order}
        if is_layout:
            attributes["layout"] = 1
        editor.replace(node, Node("Transpose", (source,), node.outputs, attributes, node.name))
    return editor.finish()


def _merged(editor: Editor, node: Node, inputs: tuple[str, ...]) -> tuple[str, Order, bool] | None:
    """(source, order, whether only the layout wants it) of a Transpose and the one before it."""
    order = _order(node)
    if order is None:
        return None
    is_layout = bool(node.attributes.get("layout"))
    inner = editor.producer(inputs[0], "Transpose")
    before = _order(inner) if inner else None
    if inner is None or before is None:
        return inputs[0], order, is_layout
    both = is_layout and bool(inner.attributes.get("layout"))
    return inner.inputs[0], tuple(before[axis] for axis in order), both


def _order(node: Node) -> Order | None:
    perm = node.attributes.get("perm") if node.op == "Transpose" else None
    return tuple(int(axis) for axis in perm) if isinstance(perm, tuple) else None


def _with_inputs(node: Node, inputs: tuple[str, ...]) -> Node:
    return Node(node.op, inputs, node.outputs, node.attributes, node.name)
