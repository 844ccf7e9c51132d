"""Transposed convolutions that double a picture: 1x1 convolutions, and pixels put side by side.

With a kernel of 2x2 and a stride of 2, no two inputs meet in an output: each pixel becomes four,
each by a product of its own. That is a convolution with four times the channels, for which there
are fast kernels, and DepthToSpace. The bias and an activation behind it go before the move.
"""

import numpy as np

from immich_ml_metal.onnx_graph.axes import Shapes
from immich_ml_metal.onnx_graph.graph import Attribute, Editor, Node, Program
from immich_ml_metal.onnx_graph.match import Note, ignore, require, rewrite, used_by
from immich_ml_metal.types import Tensor

_DOUBLE = 2
_ACTIVATIONS = ("Relu", "Sigmoid", "HardSwish")
_WANTED: dict[str, tuple[tuple[int, ...], ...]] = {  # attribute → what fits; absent fits too
    "strides": ((2, 2),),
    "pads": ((0, 0, 0, 0),),
    "dilations": ((1, 1),),
    "output_padding": ((0, 0),),
}


def upscale_by_products(program: Program, shapes: Shapes, note: Note = ignore) -> Program:
    """Every ConvTranspose of 2x2 with a stride of 2 → Conv of 1x1, DepthToSpace."""
    rewritten = rewrite(program, {"ConvTranspose"}, _rewrite_at, note)
    if rewritten is program:
        return program
    return rewrite(rewritten, {"DepthToSpace"}, _merge_at, ignore)


def _rewrite_at(editor: Editor, node: Node) -> None:
    weight = editor.constants.get(node.inputs[1])
    require(weight is not None, "its weights are not constant")
    assert weight is not None
    require(weight.shape[2:] == (2, 2), f"its kernel is {weight.shape[2:]}, not (2, 2)")
    require(node.attributes.get("strides") == (2, 2), "its stride is not 2")
    require(node.attributes.get("group", 1) == 1, "it has groups")
    for name, fitting in _WANTED.items():
        given = node.attributes.get(name, fitting[0])
        require(given in fitting, f"its {name} are {given}")
    is_plain = node.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    require(is_plain and "output_shape" not in node.attributes, "it pads by itself")
    bias = editor.constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
    _replace(editor, node, weight, bias)


def _replace(editor: Editor, node: Node, weight: Tensor, bias: Tensor | None) -> None:
    channels, made = weight.shape[:2]
    last, bias = _with_bias(editor, node, made, bias)
    kernel = weight.transpose(2, 3, 1, 0).reshape(4 * made, channels, 1, 1)
    inputs = [node.inputs[0], editor.add_constant(np.ascontiguousarray(kernel), node.inputs[1])]
    if bias is not None:
        inputs.append(editor.add_constant(np.tile(bias, 4), f"{node.inputs[1]}_bias"))
    out = last.outputs[0]
    user = editor.user(out, *_ACTIVATIONS)
    products = f"{node.outputs[0]}@products"
    attributes: dict[str, Attribute] = {"kernel_shape": (1, 1)}
    nodes = [Node("Conv", tuple(inputs), (products,), attributes, node.name)]
    if user is not None:
        nodes.append(Node(user.op, (products,), (f"{products}_on",), user.attributes, user.name))
    moved = nodes[-1].outputs
    end = user or last
    nodes.append(Node("DepthToSpace", moved, end.outputs, {"blocksize": 2, "mode": "DCR"}))
    for old in {node, last, end} - {end}:
        editor.replace(old)
    editor.replace(end, *nodes)


def _with_bias(
    editor: Editor, node: Node, made: int, bias: Tensor | None
) -> tuple[Node, Tensor | None]:
    """The node behind which the sum is done, and the bias: of the node, or added behind it."""
    add = editor.user(node.outputs[0], "Add")
    if add is None or bias is not None:
        return node, bias
    other = add.inputs[1] if add.inputs[0] == node.outputs[0] else add.inputs[0]
    value = editor.constants.get(other)
    if value is None or value.size != made or value.shape[-3:] != (made, 1, 1):
        return node, bias
    return add, value.ravel()


def _merge_at(editor: Editor, move: Node) -> None:
    """DepthToSpace, Conv of 1x1 to one channel's four, DepthToSpace → both moves in one behind it.

    The products are then made for all 4x4 pixels of a place at once, most of them with zeros: cheap
    where one channel is left, and the large picture is written once instead of twice.
    """
    require(move.attributes.get("blocksize") == _DOUBLE, "it is not one of ours")
    conv = used_by(editor, move.outputs[0], "Conv")
    weight = editor.constants.get(conv.inputs[1])
    fits = weight is not None and weight.shape[0] == _DOUBLE**2 and weight.shape[2:] == (1, 1)
    require(fits and conv.attributes.get("kernel_shape") == (1, 1), f"{conv} is no product for 4")
    last = editor.user(conv.outputs[0], *_ACTIVATIONS) or conv
    end = used_by(editor, last.outputs[0], "DepthToSpace")
    require(end.attributes.get("blocksize") == _DOUBLE, f"{end} does not double")
    constants = [editor.constants[name] for name in conv.inputs[1:]]
    biases = (np.tile(b.reshape(1, 2, 1, 2), (2, 1, 2, 1)).ravel() for b in constants[1:])
    made = (_for_each_pixel(constants[0]), *biases)
    names = (editor.add_constant(v, n) for v, n in zip(made, conv.inputs[1:], strict=True))
    editor.replace(move)
    inputs = (move.inputs[0], *names)
    editor.replace(conv, Node("Conv", inputs, conv.outputs, conv.attributes, conv.name))
    attributes: dict[str, Attribute] = {"blocksize": _DOUBLE**2, "mode": "DCR"}
    editor.replace(end, Node("DepthToSpace", end.inputs, end.outputs, attributes, end.name))


def _for_each_pixel(weight: Tensor) -> Tensor:
    """(4, C, 1, 1) → (16, 4C, 1, 1): the four of each of the 2x2 pixels that lie in the channels.

    The result counts the rows of the 4x4 pixels before the columns, as DepthToSpace does.
    """
    channels = weight.shape[1]
    block = np.zeros((2, 2, 2, 2, 2, 2, channels), weight.dtype)  # y, y', x, x'; y, x of the input
    for y, x in np.ndindex(2, 2):
        block[y, :, x, :, y, x] = weight.reshape(2, 2, channels)
    return block.reshape(16, 4 * channels, 1, 1)
