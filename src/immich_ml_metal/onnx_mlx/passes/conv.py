"""What follows a convolution for each channel becomes part of its weights: BatchNorm, a bias."""

import numpy as np

from immich_ml_metal.onnx_mlx.graph import Editor, Node, Program
from immich_ml_metal.types import Tensor

BIAS = 2  # position of the bias among the inputs of Conv


def fold_batch_norm(program: Program) -> Program:
    """Conv → BatchNormalization to one Conv, where all their parameters are constants."""
    editor = Editor(program)
    for norm in editor:
        if norm.op != "BatchNormalization" or norm.attributes.get("training_mode"):
            continue
        conv = editor.private_producer(norm.inputs[0], "Conv")
        if conv is None or any(name not in editor.constants for name in _parameters(conv, norm)):
            continue
        _merge_norm(editor, conv, norm)
    return editor.finish()


def _parameters(conv: Node, norm: Node) -> list[str]:
    return [name for name in (*conv.inputs[1:], *norm.inputs[1:5]) if name]


def _merge_norm(editor: Editor, conv: Node, norm: Node) -> None:
    scale, shift, mean, variance = (_wide(editor, name) for name in norm.inputs[1:5])
    epsilon = norm.attributes.get("epsilon", 1e-5)
    factor = scale / np.sqrt(variance + np.asarray(epsilon, np.float64))
    weight = _wide(editor, conv.inputs[1])
    bias = _wide(editor, conv.inputs[BIAS]) if _has_bias(conv) else 0.0
    weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    names = (
        editor.add_constant(weight.astype(np.float32), conv.inputs[1]),
        editor.add_constant(((bias - mean) * factor + shift).astype(np.float32), norm.inputs[2]),
    )
    _replace(editor, conv, norm, names)


def fold_bias(program: Program) -> Program:
    """Add(Conv(x), (1, C, 1, 1) constant) → Conv with a bias: how Paddle exports it."""
    editor = Editor(program)
    for add in editor:
        if add.op != "Add":
            continue
        for product, bias in (add.inputs, add.inputs[::-1]):
            conv = editor.private_producer(product, "Conv")
            if conv is not None and not _has_bias(conv) and _fits(editor, conv.inputs[1], bias):
                flat = editor.add_constant(editor.constants[bias].reshape(-1), bias)
                _replace(editor, conv, add, (conv.inputs[1], flat))
                break
    return editor.finish()


def _fits(editor: Editor, weight: str, bias: str) -> bool:
    """Whether the constant `bias` holds one number for each channel that `weight` makes."""
    w, b = editor.constants.get(weight), editor.constants.get(bias)
    if w is None or b is None:
        return False
    channels, places = w.shape[0], w.ndim - 2
    return b.shape in ((channels, *[1] * places), (1, channels, *[1] * places))


def _has_bias(conv: Node) -> bool:
    return len(conv.inputs) > BIAS and bool(conv.inputs[BIAS])


def _replace(editor: Editor, conv: Node, last: Node, parameters: tuple[str, str]) -> None:
    inputs = (conv.inputs[0], *parameters)
    merged = Node("Conv", inputs, last.outputs[:1], conv.attributes, conv.name)
    editor.replace(conv)
    editor.replace(last, merged)


def _wide(editor: Editor, name: str) -> Tensor:
    return editor.constants[name].astype(np.float64)
