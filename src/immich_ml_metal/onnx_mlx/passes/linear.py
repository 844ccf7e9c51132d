"""A matrix product with a constant matrix, and the bias after it, become one operation."""

from immich_ml_metal.onnx_graph.graph import Editor, Node, Program
from immich_ml_metal.onnx_graph.match import (
    Note,
    ignore,
    other_input,
    require,
    rewrite,
    used_by,
)

MATRIX = 2


def fuse_linear(program: Program, note: Note = ignore) -> Program:
    """Add(MatMul(x, weight), bias) → Linear, for a (K, N) weight and an (N,) bias."""
    return rewrite(program, {"MatMul"}, _fuse_at, note)


def _fuse_at(editor: Editor, matmul: Node) -> None:
    weight = editor.constants.get(matmul.inputs[1])
    require(weight is not None, f"its right factor {matmul.inputs[1]!r} is no constant")
    assert weight is not None
    require(weight.ndim == MATRIX, f"its right factor has {weight.ndim} axes, not 2")
    add = used_by(editor, matmul.outputs[0], "Add")
    bias = editor.constants.get(other_input(add, matmul.outputs[0]))
    require(bias is not None, f"{add} adds no constant")
    assert bias is not None
    wanted = weight.shape[1:]
    require(bias.shape == wanted, f"{add} adds a constant of shape {bias.shape}, not {wanted}")
    editor.replace(matmul)
    inputs = (*matmul.inputs, other_input(add, matmul.outputs[0]))
    editor.replace(add, Node("Linear", inputs, add.outputs, {}, matmul.name))
