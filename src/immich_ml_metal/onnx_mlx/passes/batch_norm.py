"""BatchNormalization after a convolution becomes part of its weights."""

import numpy as np

from immich_ml_metal.onnx_mlx.graph import Editor, Node, Program
from immich_ml_metal.types import Tensor


def fold_batch_norm(program: Program) -> Program:
    """Conv → BatchNormalization to one Conv, where all their parameters are constants."""
    editor = Editor(program)
    for norm in editor:
        if norm.op != "BatchNormalization" or norm.attributes.get("training_mode"):
            continue
        conv = editor.private_producer(norm.inputs[0], "Conv")
        if conv is None or any(name not in editor.constants for name in _parameters(conv, norm)):
            continue
        _merge(editor, conv, norm)
    return editor.finish()


def _parameters(conv: Node, norm: Node) -> list[str]:
    return [name for name in (*conv.inputs[1:], *norm.inputs[1:5]) if name]


def _merge(editor: Editor, conv: Node, norm: Node) -> None:
    scale, shift, mean, variance = (_wide(editor, name) for name in norm.inputs[1:5])
    epsilon = norm.attributes.get("epsilon", 1e-5)
    factor = scale / np.sqrt(variance + np.float64(epsilon))  # type: ignore[arg-type]
    weight = _wide(editor, conv.inputs[1])
    bias = _wide(editor, conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] else 0.0  # noqa: PLR2004
    weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    names = (
        editor.add_constant(weight.astype(np.float32), conv.inputs[1]),
        editor.add_constant(((bias - mean) * factor + shift).astype(np.float32), norm.inputs[2]),
    )
    merged = Node("Conv", (conv.inputs[0], *names), norm.outputs[:1], conv.attributes, conv.name)
    editor.replace(conv)
    editor.replace(norm, merged)


def _wide(editor: Editor, name: str) -> Tensor:
    return editor.constants[name].astype(np.float64)
