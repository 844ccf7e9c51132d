"""Of the last block, only the rows that are read: the class token's, or the end token's.

A tower computes a vector for each token, and one of them is read. Keys and values of the last
attention need all tokens; its queries, its output, the products behind it and the norms serve each
row alone. So the place where a row is taken is moved up, over everything that serves this row
alone and that nobody else looks at.

The row is a fixed one (class token), or where the highest token number stands (end token). Found by
the look-up that takes it; what is averaged over all tokens has no such look-up.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from immich_ml_metal.onnx_graph.axes import Shapes, carried
from immich_ml_metal.onnx_graph.ends import end_places
from immich_ml_metal.onnx_graph.graph import Editor, Node, Program
from immich_ml_metal.onnx_graph.match import NoMatch, Note, ignore, require

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_SHAPE_INPUT = frozenset({"Reshape", "Expand"})  # their second input names the lengths
_MIXING = frozenset({"Softmax", "Attention"})
_UNSQUEEZE_OPSET = 13  # from here on, axes are an input


@dataclass(frozen=True, slots=True)
class Lookup:
    """Where one row is taken.

    Attributes:
        source: the value it is taken of, which holds the rows along `axis`.
        place: the row's number; None where it is the end token's.
    """

    node: Node
    source: str
    axis: int
    place: int | None


def read_rows(program: Program, shapes: Shapes, note: Note = ignore) -> Program:
    """Move each look-up of one row up as far as it goes."""
    ends, editor = end_places(program), Editor(program)
    for node in program.nodes:
        if node.op not in ("Gather", "GatherND") or not editor.is_private(node.inputs[0]):
            continue
        lookup = _lookup(program, node, shapes, ends)
        if lookup is None:
            continue
        try:
            return _Cut(program, shapes, lookup).run()
        except NoMatch as exc:
            note(node, str(exc))
    return program


def _lookup(program: Program, node: Node, shapes: Shapes, ends: frozenset[str]) -> Lookup | None:
    """The look-up of one row of a computed value; None where it is of something else."""
    source, index = node.inputs
    if source in program.constants or not {source, node.outputs[0]} <= shapes.keys():
        return None
    if node.op == "GatherND":
        places = (*shapes[source][:1], *shapes.get(index, ()))
        is_row = index in ends and places == (1, 1, 2) and not node.attributes.get("batch_dims")
        return Lookup(node, source, 1, None) if is_row else None
    given = node.attributes.get("axis", 0)
    axis = given % len(shapes[source]) if isinstance(given, int) else 0
    if index in ends and shapes.get(index) == (1,):
        return Lookup(node, source, axis, None)
    place = program.constants.get(index)
    if place is None or place.size != 1:
        return None
    return Lookup(node, source, axis, int(place.item()) % shapes[source][axis])


class _Cut:
    """One look-up being moved up."""

    def __init__(self, program: Program, shapes: Shapes, lookup: Lookup) -> None:
        self._program = program
        self._shapes = shapes
        self._lookup = lookup
        self._editor = Editor(program)
        # the axes along which a value's rows are wanted; None stands for all of them
        self._wanted: dict[str, set[int | None]] = {lookup.source: {lookup.axis}}
        self._taken: dict[str, str] = {}  # value → the row of it

    def run(self) -> Program:
        """Rewrite the program.

        Raises:
            NoMatch: nothing would be saved, or the row cannot be taken where it should be.
        """
        region = self._region()
        pays = any(node.op in _PRODUCTS for node in region)
        require(pays, f"no product serves only the row that it takes of {self._lookup.source!r}")
        inside = {name for node in region for name in node.outputs}
        for node, rows in region.items():
            self._shorten(node, rows, inside)
        self._replace_lookup()
        return self._editor.finish()

    def _region(self) -> dict[Node, dict[int, int]]:
        """Each node that serves the row alone, with position → axis of the inputs that hold rows.

        In the program's order.
        """
        region: dict[Node, dict[int, int]] = {}
        readers = {self._lookup.node}
        for node in reversed(self._program.nodes):
            rows = self._rows(node, readers)
            for position, name in enumerate(node.inputs):
                if node is not self._lookup.node:
                    self._wanted.setdefault(name, set()).add(rows.get(position) if rows else None)
            if rows:
                region[node] = rows
                readers.add(node)
        return dict(reversed(region.items()))

    def _rows(self, node: Node, readers: set[Node]) -> dict[int, int]:
        """Along which axis each input of a node holds the rows; none if it serves others too."""
        results = [name for name in node.outputs if name]
        wanted = set().union(*(self._wanted.get(name, {None}) for name in results))
        is_read = all(
            set(self._editor.users(name)) <= readers and name not in self._program.output_names
            for name in results
        )
        if not is_read or len(wanted) != 1 or None in wanted or self._is_barred(node):
            return {}
        return self._inputs_along(node, next(iter(wanted)))

    def _inputs_along(self, node: Node, result_axis: int | None) -> dict[int, int]:
        found = {}
        for position, name in enumerate(node.inputs):
            known = self._program.constants.get(name)
            shape = self._shapes.get(name, ()) if known is None else known.shape
            for axis, length in enumerate(shape):
                through = carried(node, position, axis, self._shapes, self._program.constants)
                if length > 1 and through == result_axis:
                    found[position] = axis
        return found

    def _is_barred(self, node: Node) -> bool:
        """Whether the row cannot go on here: it has no length to change, or it needs its mask."""
        if node.op in _SHAPE_INPUT and node.inputs[1] not in self._program.constants:
            return True
        if node.op == "Squeeze" and len(node.inputs) < 2 and "axes" not in node.attributes:
            return True
        both = node.op == "MatMul" and not set(node.inputs) & set(self._program.constants)
        return self._lookup.place is None and (both or node.op in _MIXING)

    def _shorten(self, node: Node, rows: Mapping[int, int], inside: Collection[str]) -> None:
        """The node on one row instead of all; what lies `inside` has one row already."""
        inputs, before = list(node.inputs), []
        for position, axis in rows.items():
            if inputs[position] not in inside:
                inputs[position], new = self._row(inputs[position], axis)
                before += new
        if node.op in _SHAPE_INPUT:
            axis = next(iter(self._wanted[node.outputs[0]])) or 0
            lengths = self._program.constants[node.inputs[1]].copy()
            place = axis - len(self._shapes[node.outputs[0]])
            lengths[place] = min(lengths[place], 1)  # 0 and -1 stay: they follow the input
            inputs[1] = self._editor.add_constant(lengths, f"{node.outputs[0]}@row_shape")
        short = Node(node.op, tuple(inputs), node.outputs, node.attributes, node.name)
        self._editor.replace(node, *before, short)

    def _row(self, name: str, axis: int) -> tuple[str, list[Node]]:
        """The row of a value that others need whole: its name, and the nodes that take it."""
        if name in self._taken:
            return self._taken[name], []
        self._taken[name] = row = f"{name}@row"
        place = self._lookup.place
        if name in self._program.constants:
            require(place is not None, f"{name!r} has a value for each token")
            value = np.take(self._program.constants[name], [place or 0], axis)
            self._taken[name] = self._editor.add_constant(value, row)
            return self._taken[name], []
        if place is None:
            return row, self._end_row(name, axis, row)
        numbers = [
            self._editor.add_constant(np.array([n]), f"{row}_{n}") for n in (place, place + 1)
        ]
        along = self._editor.add_constant(np.array([axis]), f"{row}_axis")
        return row, [Node("Slice", (name, *numbers, along), (row,))]

    def _end_row(self, name: str, axis: int, row: str) -> list[Node]:
        """The end token's row, by the look-up that the exporters use: (row, token) → vector."""
        shape = self._shapes[name]
        single = [i for i, length in enumerate(shape) if length == 1]
        require(len(single) == 1, f"{name!r} has {len(single)} axes of 1, so where are its rows?")
        require(self._program.opset >= _UNSQUEEZE_OPSET, "the opset is too old for it")
        order = (single[0], axis, *(i for i in range(len(shape)) if i not in (single[0], axis)))
        back = tuple(order.index(i) for i in range(len(shape)))
        index, nodes = self._end_index(row)
        one = self._editor.add_constant(np.array([1]), f"{row}_one")
        return [
            *nodes,
            Node("Transpose", (name,), (f"{row}_first",), {"perm": order}),
            Node("GatherND", (f"{row}_first", index), (f"{row}_flat",)),
            Node("Unsqueeze", (f"{row}_flat", one), (f"{row}_turned",)),
            Node("Transpose", (f"{row}_turned",), (row,), {"perm": back}),
        ]

    def _end_index(self, row: str) -> tuple[str, list[Node]]:
        """The (1, 2) places of the end token: row of the batch, token."""
        if self._lookup.node.op == "GatherND":
            return self._lookup.node.inputs[1], []
        zero = self._editor.add_constant(np.zeros((1, 1), np.int64), f"{row}_batch")
        last = self._editor.add_constant(np.array([-1]), f"{row}_last")
        return f"{row}_index", [
            Node("Unsqueeze", (self._lookup.node.inputs[1], last), (f"{row}_token",)),
            Node("Concat", (zero, f"{row}_token"), (f"{row}_index",), {"axis": -1}),
        ]

    def _replace_lookup(self) -> None:
        """Take the one row that is left, in the shape that the look-up gave it."""
        node, source = self._lookup.node, self._lookup.source
        place = self._program.constants.get(node.inputs[1])
        if place is not None:
            first = self._editor.add_constant(np.zeros_like(place), f"{node.outputs[0]}@first")
            new = Node(node.op, (source, first), node.outputs, node.attributes, node.name)
        else:
            shape = np.array(self._shapes[node.outputs[0]])
            lengths = self._editor.add_constant(shape, f"{node.outputs[0]}@shape")
            new = Node("Reshape", (source, lengths), node.outputs, name=node.name)
        self._editor.replace(node, new)
