"""Products in float16, everything else in float32: the number format `mixed`.

Matrix products and convolutions are what takes the time, and MLX adds them up in float32 whatever
their operands are. What fails in float16 lies between them: the residual stream, which grows from
layer to layer past 65,504, and sums, norms and softmaxes over it. So the operands of each product
become float16 and its result float32 again, and values that are only moved stay as they are on the
way. Each value is turned at most once in each direction.

MLX has no product of float16 that gives float32, so the result of one product must fit float16:
where it does not, it is infinite and the comparison with float32 says so.
"""

from collections.abc import Collection, Mapping
from enum import StrEnum

import numpy as np

from immich_ml_metal.onnx_graph.families import MOVES, PRODUCTS, SHAPE_ONLY
from immich_ml_metal.onnx_graph.graph import Attribute, Node, Program, prune, replace_body
from immich_ml_metal.types import Tensor

HALF_MAX = float(np.finfo(np.float16).max)
TABLE_SIZE = 2**20  # elements from which on a table of embeddings is kept in float16
TO_HALF, TO_FLOAT = "ToHalf", "ToFloat"  # operators of ours, see `ops.elementwise`


MASKED, MASK = ("Sdpa", "Attention"), 3  # where the mask lies, which is added to their products


class Width(StrEnum):
    """The type of a floating value."""

    HALF = "@half"
    WIDE = "@wide"


Wishes = Mapping[str, Collection[Width]]


def mix(program: Program) -> Program:
    """Give the operands of every product 16 bits, and 32 to whatever computes otherwise."""
    return _Mixing(program).run()


class _Mixing:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._constants = dict(program.constants)
        self._nodes: list[Node] = []
        self._width: dict[str, Width] = {}  # computed values; what is missing is wide
        self._wishes = _wishes(program)

    def run(self) -> Program:
        for node in self._program.nodes:
            if node.op in PRODUCTS:
                self._emit(node, PRODUCTS[node.op], Width.HALF)
            elif node.op in MOVES:
                self._emit(node, MOVES[node.op], self._moved(node))
            elif node.op in SHAPE_ONLY:
                self._nodes.append(node)
            else:
                self._emit(node, range(len(node.inputs)), Width.WIDE)
        return prune(replace_body(self._program, tuple(self._nodes), self._constants))

    def _emit(self, node: Node, positions: Collection[int], width: Width) -> None:
        """Add the node with its inputs at `positions`, and its results, in this width."""
        inputs = list(node.inputs)
        for position, name in enumerate(node.inputs):
            if name and position in positions:
                inputs[position] = self._as(name, width, node)
            elif name and node.op in MASKED and position == MASK:
                inputs[position] = self._as(name, Width.HALF, node, finite=True)
        self._nodes.append(Node(node.op, tuple(inputs), node.outputs, node.attributes, node.name))
        self._width.update(dict.fromkeys(node.outputs, width))

    def _moved(self, node: Node) -> Width:
        """How to move a value: a large table small, else as all who get it want it, else as is."""
        source = self._program.constants.get(node.inputs[0])
        if source is not None and source.dtype.kind == "f" and source.size >= TABLE_SIZE:
            return Width.HALF
        wishes = _wishes_of(node, self._wishes)
        if len(wishes) == 1:
            return wishes.pop()
        return self._width.get(node.inputs[0], Width.WIDE)

    def _as(self, name: str, width: Width, node: Node, *, finite: bool = False) -> str:
        """The value in this width: itself, or a copy that is made once.

        With `finite`, what lies beyond the range becomes the largest number of float16.
        """
        if name in self._program.constants:
            return self._constant(name, width)
        if self._width.get(name, Width.WIDE) is width:
            return name
        turned = f"{name}{width}{'-mask' if finite else ''}"
        if turned not in self._width:
            op = TO_HALF if width is Width.HALF else TO_FLOAT
            attributes: dict[str, Attribute] = {"finite": 1} if finite else {}
            self._nodes.append(Node(op, (name,), (turned,), attributes, node.name))
            self._width[turned] = width
        return turned

    def _constant(self, name: str, width: Width) -> str:
        value = self._constants[name]
        if width is Width.WIDE or value.dtype.kind != "f" or value.dtype == np.float16:
            return name
        turned = f"{name}{width}"
        if turned not in self._constants:
            self._constants[turned] = _half(value)
        return turned


def _half(value: Tensor) -> Tensor:
    """In float16; what is finite stays so, as a mask of -3.4e38 has to."""
    finite = np.clip(value, -HALF_MAX, HALF_MAX)
    return np.where(np.isinf(value), value, finite).astype(np.float16)


def _wishes(program: Program) -> Wishes:
    """In which widths each value is wanted by what computes with it, however far it is moved."""
    wishes: dict[str, set[Width]] = {}
    for node in reversed(program.nodes):
        if node.op in SHAPE_ONLY:
            continue
        if node.op in MOVES:
            wanted, positions = _wishes_of(node, wishes), MOVES[node.op]
        elif node.op in PRODUCTS:
            wanted, positions = {Width.HALF}, PRODUCTS[node.op]
        else:
            wanted, positions = {Width.WIDE}, tuple(range(len(node.inputs)))
        for position, name in enumerate(node.inputs):
            if position in positions:
                wishes.setdefault(name, set()).update(wanted)
    return wishes


def _wishes_of(node: Node, wishes: Wishes) -> set[Width]:
    return {width for name in node.outputs for width in wishes.get(name, ())}
