"""What follows a convolution for each channel becomes part of its weights: BatchNorm, a bias."""

import numpy as np

from immich_ml_metal.onnx_graph.graph import Editor, Node, Program
from immich_ml_metal.onnx_graph.match import (
    NoMatch,
    Note,
    ignore,
    made_for_this,
    other_input,
    require,
    rewrite,
    used_by,
)
from immich_ml_metal.types import Tensor

BIAS = 2  # position of the bias among the inputs of Conv


def fold_batch_norm(program: Program, note: Note = ignore) -> Program:
    """Conv → BatchNormalization to one Conv, where all their parameters are constants."""
    return rewrite(program, {"BatchNormalization"}, _fold_norm_at, note)


def _fold_norm_at(editor: Editor, norm: Node) -> None:
    require(not norm.attributes.get("training_mode"), "it is in training mode")
    conv = made_for_this(editor, norm.inputs[0], "Conv")
    for name in _parameters(conv, norm):
        require(name in editor.constants, f"{name!r} is no constant")
    _merge_norm(editor, conv, norm)


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


def fold_bias(program: Program, note: Note = ignore) -> Program:
    """Add(Conv(x), (1, C, 1, 1) constant) → Conv with a bias: how Paddle exports it."""
    return rewrite(program, {"Conv"}, _fold_bias_at, note)


def _fold_bias_at(editor: Editor, conv: Node) -> None:
    if _has_bias(conv):
        return
    add = used_by(editor, conv.outputs[0], "Add")
    name = other_input(add, conv.outputs[0])
    _require_bias(editor, conv.inputs[1], name)
    flat = editor.add_constant(editor.constants[name].reshape(-1), name)
    _replace(editor, conv, add, (conv.inputs[1], flat))


def _require_bias(editor: Editor, weight: str, bias: str) -> None:
    """The constant `bias` must hold one number for each channel that `weight` makes."""
    w, b = editor.constants.get(weight), editor.constants.get(bias)
    if w is None or b is None:
        raise NoMatch(f"{weight if w is None else bias!r} is no constant")
    channels, places = w.shape[0], w.ndim - 2
    shapes = ((channels, *[1] * places), (1, channels, *[1] * places))
    require(b.shape in shapes, f"{bias!r} has the shape {b.shape}, not {shapes[1]}")


def _has_bias(conv: Node) -> bool:
    return len(conv.inputs) > BIAS and bool(conv.inputs[BIAS])


def _replace(editor: Editor, conv: Node, last: Node, parameters: tuple[str, str]) -> None:
    inputs = (conv.inputs[0], *parameters)
    merged = Node("Conv", inputs, last.outputs[:1], conv.attributes, conv.name)
    editor.replace(conv)
    editor.replace(last, merged)


def _wide(editor: Editor, name: str) -> Tensor:
    return editor.constants[name].astype(np.float64)
