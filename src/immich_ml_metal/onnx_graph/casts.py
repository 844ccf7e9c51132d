"""Constants in the type in which they are used: a cast of a constant is done now."""

from onnx import helper

from immich_ml_metal.onnx_graph.graph import Editor, Program


def fold_casts(program: Program) -> Program:
    """Do every cast of a constant."""
    editor = Editor(program)
    for node in editor:
        value = editor.constants.get(node.inputs[0]) if node.op == "Cast" else None
        to = node.attributes.get("to")
        if value is not None and isinstance(to, int) and not editor.is_result(node.outputs[0]):
            editor.constants[node.outputs[0]] = value.astype(helper.tensor_dtype_to_np_dtype(to))
            editor.replace(node)
    return editor.finish()
