"""One Gelu for the five operators that write it out around a rounded root of two.

    x * (1 + erf(x / c)) * 0.5   with c = 1.4140625, as files in half precision have it

ONNX Runtime has a kernel for the exact root only, and rounding it would move the result by 1e-4. So
the difference goes into the weights: with k = sqrt(2) / c, the convolution before gives k * x, and
those behind take Gelu(k * x) / k. Nothing but the last digits changes.
"""

import math

import numpy as np

from immich_ml_metal.onnx_graph.axes import Shapes
from immich_ml_metal.onnx_graph.graph import Editor, Node, Program
from immich_ml_metal.onnx_graph.match import (
    NoMatch,
    Note,
    ignore,
    made_by,
    other_input,
    require,
    rewrite,
    used_by,
)

GELU = "com.microsoft.Gelu"
_NEAR = 1e-3  # how far c may be from the root of two, relatively
_EXACT = 1e-6  # nearer than this, the runtime fuses it by itself


def fuse_gelu(program: Program, shapes: Shapes, note: Note = ignore) -> Program:
    """Every written-out GELU between convolutions → Gelu."""
    return rewrite(program, {"Erf"}, _fuse_at, note)


def _fuse_at(editor: Editor, erf: Node) -> None:
    divide = made_by(editor, erf.inputs[0], "Div")
    x, divisor = divide.inputs[0], editor.scalar(divide.inputs[1])
    require(divisor, f"{divide} does not divide by a constant")
    factor = math.sqrt(2) / (divisor or 1)
    require(abs(factor - 1) < _NEAR, f"it divides by {divisor}, not by the root of two")
    require(abs(factor - 1) > _EXACT, "the root of two is exact, the runtime fuses it")
    last = _last(editor, erf, x)
    before = made_by(editor, x, "Conv")
    behind = editor.users(last.outputs[0])
    require(len(editor.users(x)) == 2, f"{x!r} is needed elsewhere too")
    for user in behind:
        reads = user.op == "Conv" and user.inputs[0] == last.outputs[0]
        require(reads, f"{last.outputs[0]!r} goes to {user}, not to a Conv")
    require(behind and not editor.is_result(last.outputs[0]), "it makes a result of the model")
    editor.replace(last, Node(GELU, (x,), last.outputs, {}, erf.name))
    _scale(editor, before, before.inputs[1:], factor)
    for user in behind:
        _scale(editor, user, user.inputs[1:2], 1 / factor)


def _last(editor: Editor, erf: Node, x: str) -> Node:
    """The node that gives x * (1 + erf) * 0.5."""
    shifted = used_by(editor, erf.outputs[0], "Add")
    require(editor.scalar(other_input(shifted, erf.outputs[0])) == 1, f"{shifted} does not add 1")
    product = used_by(editor, shifted.outputs[0], "Mul")
    require(other_input(product, shifted.outputs[0]) == x, f"{product} multiplies something else")
    last = used_by(editor, product.outputs[0], "Mul")
    half = editor.scalar(other_input(last, product.outputs[0]))
    require(half == 0.5, f"{last} does not halve")
    return last


def _scale(editor: Editor, conv: Node, names: tuple[str, ...], factor: float) -> None:
    """Multiply these constants of a convolution."""
    inputs = list(conv.inputs)
    for name in names:
        value = editor.constants.get(name)
        if value is None:
            raise NoMatch(f"{conv} has weights that are not constant")
        scaled = (value.astype(np.float64) * factor).astype(value.dtype)
        inputs[inputs.index(name)] = editor.add_constant(scaled, name)
    editor.replace(conv, Node(conv.op, tuple(inputs), conv.outputs, conv.attributes, conv.name))
