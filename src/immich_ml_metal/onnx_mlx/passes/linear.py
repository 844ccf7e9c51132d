"""A matrix product with a constant matrix, and the bias after it, become one operation."""

from immich_ml_metal.onnx_mlx.graph import Editor, Node, Program

MATRIX = 2


def fuse_linear(program: Program) -> Program:
    """Add(MatMul(x, weight), bias) → Linear, for a (K, N) weight and an (N,) bias."""
    editor = Editor(program)
    for add in editor:
        if add.op != "Add":
            continue
        for product, bias in (add.inputs, add.inputs[::-1]):
            matmul = editor.private_producer(product, "MatMul")
            if matmul is not None and _fits(editor, matmul.inputs[1], bias):
                editor.replace(matmul)
                inputs = (*matmul.inputs, bias)
                editor.replace(add, Node("Linear", inputs, add.outputs, {}, matmul.name))
                break
    return editor.finish()


def _fits(editor: Editor, weight: str, bias: str) -> bool:
    w, b = editor.constants.get(weight), editor.constants.get(bias)
    return w is not None and b is not None and w.ndim == MATRIX and b.shape == w.shape[1:]
