"""How an axis gets through an operator: where in the result its elements lie, each for itself.

Axis `a` of an input is *carried* to axis `o` of the result where element i along `o` depends on
element i along `a` and on no other: so elements may be left out on both sides alike. A product
carries its rows, a norm what it does not average over. What has no rule carries nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from immich_ml_metal.onnx_graph.families import BROADCAST, REDUCTIONS, RESHAPES, UNARY
from immich_ml_metal.onnx_graph.graph import Node
from immich_ml_metal.types import Tensor

Shapes = Mapping[str, tuple[int, ...]]  # of every value that is neither empty nor free


@dataclass(frozen=True, slots=True)
class At:
    """One axis of one input of a node."""

    node: Node
    position: int
    axis: int
    shape: tuple[int, ...]
    result: tuple[int, ...]
    constants: Mapping[str, Tensor]

    def number(self, name: str, default: int) -> int:
        """An integer attribute."""
        value = self.node.attributes.get(name, default)
        return value if isinstance(value, int) else default

    def listed(self, name: str, position: int) -> tuple[int, ...] | None:
        """Integers of an attribute or of a constant input, None where there are none."""
        given = self.node.attributes.get(name)
        if isinstance(given, tuple):
            return tuple(int(v) for v in given)
        if len(self.node.inputs) > position and self.node.inputs[position] in self.constants:
            return tuple(int(v) for v in self.constants[self.node.inputs[position]].ravel())
        return None


def carried(
    node: Node, position: int, axis: int, shapes: Shapes, constants: Mapping[str, Tensor]
) -> int | None:
    """The axis of the node's first result that carries this axis of an input, if one does."""
    rule = RULES.get(node.op)
    name, result = node.inputs[position], node.outputs[0]
    shape = shapes.get(name) or (constants[name].shape if name in constants else ())
    if rule is None or axis >= len(shape) or result not in shapes:
        return None
    at = At(node, position, axis, shape, shapes[result], constants)
    found = rule(at)
    if found is None or at.result[found] != at.shape[axis]:
        return None
    return found


def _first(rule: Callable[[At], int | None]) -> Callable[[At], int | None]:
    """The rule, for an operator whose further inputs are lists or parameters."""
    return lambda at: rule(at) if at.position == 0 else None


def _same(at: At) -> int | None:
    return at.axis


def _broadcast(at: At) -> int | None:
    return at.axis + len(at.result) - len(at.shape)


def _transpose(at: At) -> int | None:
    perm = at.listed("perm", 1)
    return None if perm is None else perm.index(at.axis)


def _reshape(at: At) -> int | None:
    """The axis of the same length that as many elements precede."""
    before = math.prod(at.shape[: at.axis])
    lengths = enumerate(at.result)
    places = [i for i, n in lengths if n > 1 and math.prod(at.result[:i]) == before]
    return places[0] if places else None


def _but_axis(default: int) -> Callable[[At], int | None]:
    """All axes but the one that the operator works along."""
    return lambda at: at.axis if at.number("axis", default) % len(at.shape) != at.axis else None


def _layer_norm(at: At) -> int | None:
    return at.axis if at.axis < at.number("axis", -1) % len(at.shape) else None


def _reduce(at: At) -> int | None:
    axes = at.listed("axes", 1)
    gone = None if axes is None else {axis % len(at.shape) for axis in axes}
    if gone is None or at.axis in gone:
        return None
    return at.axis if at.number("keepdims", 1) else at.axis - sum(g < at.axis for g in gone)


def _slice(at: At) -> int | None:
    axes = at.listed("axes", 3)
    cut = None if axes is None else {axis % len(at.shape) for axis in axes}
    return None if cut is None or at.axis in cut else at.axis


def _gather(at: At) -> int | None:
    data = at.shape if at.position == 0 else ()
    along = at.number("axis", 0)
    if at.position == 1:  # places: each is looked up for itself
        return along + at.axis if along >= 0 else None
    along %= len(data)
    if at.axis == along:
        return None
    return at.axis if at.axis < along else at.axis + len(at.result) - len(data)


def _mat_mul(at: At) -> int | None:
    rank, ahead = len(at.shape), len(at.result) - len(at.shape)
    inner = rank - 1 if at.position == 0 else rank - 2
    return None if rank < 2 or at.axis == inner else at.axis + ahead


def _gemm(at: At) -> int | None:
    if at.position == 2:
        return _broadcast(at)
    turned = at.number("transA" if at.position == 0 else "transB", 0)
    inner = (1 - turned) if at.position == 0 else turned
    return None if at.axis == inner else at.position


def _attention(at: At) -> int | None:
    """Of four axes: rows of q, and what is common to all; a mask has a row for each of q's."""
    if len(at.shape) != 4 or at.number("is_causal", 0):
        return None
    if at.position == 3:
        return 2 if at.axis == 2 else None
    return at.axis if at.axis == 0 or (at.axis == 2 and at.position == 0) else None


Rule = Callable[[At], int | None]
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(UNARY, _first(_same)),
        **dict.fromkeys(BROADCAST, _broadcast),
        **dict.fromkeys(RESHAPES, _first(_reshape)),
        **dict.fromkeys(REDUCTIONS, _first(_reduce)),
        **dict.fromkeys(("Softmax", "Concat"), _but_axis(-1)),
        "Split": _first(_but_axis(0)),
        "Expand": _first(_broadcast),
        "Transpose": _first(_transpose),
        "LayerNormalization": _first(_layer_norm),
        "Slice": _first(_slice),
        "Gather": _gather,
        "MatMul": _mat_mul,
        "Gemm": _gemm,
        "Attention": _attention,
    }
)
