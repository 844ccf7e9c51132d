"""Attention written out in products and a softmax becomes one fused operation.

    softmax(q k^T * scale + mask) v  →  Sdpa(q, k, v, mask)

The scale may sit on the scores, on q, on k or on both; the mask is optional; a guard that turns the
NaN of a row that sees nothing into zeros (as PyTorch exports it) is kept as an attribute.
"""

from dataclasses import dataclass, replace

import numpy as np

from immich_ml_metal.onnx_graph.facts import (
    constant_list,
    factor_of,
    is_last_axis,
    scaled_by,
)
from immich_ml_metal.onnx_graph.graph import Editor, Node, Program
from immich_ml_metal.onnx_graph.match import (
    NoMatch,
    Note,
    ignore,
    made_for_this,
    require,
    rewrite,
    used_by,
)


@dataclass(frozen=True, slots=True)
class Scores:
    """What goes into the softmax: left @ right * scale + mask."""

    left: str
    right: str
    scale: float
    mask: str


def fuse_attention(program: Program, note: Note = ignore) -> Program:
    """Every attention around a softmax over its last axis → Sdpa."""
    default = -1 if program.opset >= 13 else 1
    return rewrite(program, {"Softmax"}, lambda e, node: _fuse_at(e, node, default), note)


def _fuse_at(editor: Editor, softmax: Node, default_axis: int) -> None:
    axis = softmax.attributes.get("axis", default_axis)
    is_last = isinstance(axis, int) and is_last_axis(editor, softmax.inputs[0], axis)
    require(is_last, f"axis {axis} is not known to be the last")
    weights, guarded = _guarded(editor, softmax)
    product = used_by(editor, weights, "MatMul")
    require(product.inputs[0] == weights, f"{product} takes the weights as its right factor")
    scores = _scores(editor, softmax.inputs[0])
    left, scale = _unscaled(editor, scores.left, scores.scale)
    right, scale = _unscaled(editor, scores.right, scale)
    keys, attributes, before = _keys(editor, right)
    causal = _is_causal(editor, scores.mask)
    masks = () if causal or not scores.mask else (scores.mask,)
    inputs = (left, keys, product.inputs[1], *masks)
    attributes |= {"scale": scale, "guarded": int(guarded), "causal": int(causal)}
    fused = Node("Sdpa", inputs, product.outputs, attributes, softmax.name)
    editor.replace(product, *before, fused)


def _is_causal(editor: Editor, mask: str) -> bool:
    """Whether the mask lets row i see the columns 0..i and no others: the kernel skips those.

    A square cut from its first row and column on does so too.
    """
    cut = editor.producer(mask, "Slice")
    if cut is not None and _is_leading_square(editor, cut):
        mask = cut.inputs[0]
    value = editor.constants.get(mask)
    if value is None or value.ndim < 2 or value.dtype.kind != "f":
        return False
    rows, columns = value.shape[-2:]
    wanted = np.where(np.tri(rows, dtype=np.bool_), 0, -np.inf)
    return rows == columns and value.size == rows**2 and bool((value == wanted).all())


def _is_leading_square(editor: Editor, cut: Node) -> bool:
    """Whether it keeps as many of the first rows as of the first columns."""
    source, starts, ends, axes = cut.inputs[:4] if len(cut.inputs) > 3 else ("",) * 4
    lengths = editor.producer(ends, "Concat")
    if source not in editor.constants or lengths is None or starts not in editor.constants:
        return False
    rank = editor.constants[source].ndim
    along = {int(axis) % rank for axis in editor.constants.get(axes, ())}
    is_square = along == {rank - 2, rank - 1} and len(set(lengths.inputs)) == 1
    return is_square and not editor.constants[starts].any()


def _guarded(editor: Editor, softmax: Node) -> tuple[str, bool]:
    """The attention weights, seen through Where(IsNaN(weights), 0, weights)."""
    name = softmax.outputs[0]
    users = {user.op: user for user in editor.users(name)}
    if set(users) != {"IsNaN", "Where"}:
        return name, False
    where = users["Where"]
    expected = (users["IsNaN"].outputs[0], name)
    if (where.inputs[0], where.inputs[2]) == expected and editor.scalar(where.inputs[1]) == 0:
        return where.outputs[0], True
    return name, False


def _scores(editor: Editor, name: str) -> Scores:
    """Take apart what the softmax gets; every step must serve this attention alone."""
    node = made_for_this(editor, name, "Add", "MatMul", "Mul", "Div")
    if node.op == "MatMul":
        left, right = node.inputs
        return Scores(left, right, scale=1.0, mask="")
    if node.op != "Add":
        source, factor = scaled_by(editor, node)
        inner = _scores(editor, source)
        require(not inner.mask, f"{node} scales the mask too")
        return replace(inner, scale=inner.scale * factor)
    return _masked(editor, node)


def _masked(editor: Editor, add: Node) -> Scores:
    reasons = []
    for product, mask in (add.inputs, add.inputs[::-1]):
        try:
            inner = _scores(editor, product)
            require(not inner.mask, f"{add} adds a second mask")
        except NoMatch as exc:
            reasons.append(str(exc))
        else:
            return replace(inner, mask=mask)
    raise NoMatch("; ".join(reasons))


def _unscaled(editor: Editor, name: str, scale: float) -> tuple[str, float]:
    """Move a constant factor of q or k into the scale."""
    node = editor.private_producer(name, "Mul", "Div")
    scaled = factor_of(editor, node) if node else None
    return (scaled[0], scale * scaled[1]) if scaled else (name, scale)


def _keys(editor: Editor, right: str) -> tuple[str, dict[str, int | float], list[Node]]:
    """K for the k^T that the product takes: undo its transposition if that is visible."""
    turned = editor.producer(right, "Transpose")
    perm = constant_list(editor, turned, "perm", 1) if turned else None
    if turned is None or perm is None:
        return right, {"transposed_keys": 1}, []
    order = (*perm[:-2], perm[-1], perm[-2])
    if order == tuple(range(len(order))):
        return turned.inputs[0], {}, []
    name = f"{right}@keys"
    return name, {}, [Node("Transpose", turned.inputs, (name,), {"perm": order}, turned.name)]
