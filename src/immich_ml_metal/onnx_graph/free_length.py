"""A causal text tower for texts of any length: what stands behind the end token changes nothing.

Under a causal mask a token sees itself and those before it, so the vector of the end token is the
same whether padding follows or not. A search of three words then costs 5 rows instead of 77.

The tokens are followed from the input to the look-up of the end token. Each operator must carry
them one by one (`axes`); the only place where tokens meet is an attention whose mask hides all
later ones. A tower without such a mask, or whose vector is an average, is left as it is: there the
padding counts.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from immich_ml_metal.onnx_graph.axes import Shapes, carried
from immich_ml_metal.onnx_graph.ends import COUNTED, end_places
from immich_ml_metal.onnx_graph.graph import Node, Program, prune, replace_body
from immich_ml_metal.onnx_graph.match import NoMatch, Note, ignore, require
from immich_ml_metal.types import FREE_LENGTH, Tensor, TensorSpec

_LOOKUPS = frozenset({"Gather", "GatherND", "GatherRows", "GatherNDRows"})
_KEYS, _VALUES = 1, 2  # positions of an Attention's inputs
_HEADED, _TOKENS = 4, 2  # its axes where heads have one of their own, and the one of the tokens
_HIDDEN = -1e8  # from here on down, what is added to a score leaves a weight of exactly zero

Axes = frozenset[int]
_NONE: Axes = frozenset()


def free_length(program: Program, shapes: Shapes, note: Note = ignore) -> Program:
    """Let a causal text tower take any number of tokens up to its own."""
    if len(program.inputs) != 1 or program.inputs[0].dtype.kind != "i":
        return program  # no text tower, or one with a mask of its own
    (tokens,) = program.inputs
    if len(tokens.shape) != 2 or (tokens.shape[1] or 0) < 2:
        return program
    if tokens.name not in shapes:
        note(program.nodes[0], "the number of texts is free, so the shapes are not known")
        return program
    reader = _Reader(program, shapes)
    for node in program.nodes:
        try:
            reader.read(node)
        except NoMatch as exc:
            note(node, str(exc))
            return program
    last = program.nodes[-1]
    if not reader.attentions:
        note(last, "no causal attention stands before it")
        return program
    return _Writer(program, shapes, reader).run()


class _Reader:
    """Follows the tokens: along which axes of each value they lie, and where they may meet."""

    def __init__(self, program: Program, shapes: Shapes) -> None:
        self._program = program
        self._shapes = shapes
        self._ends = end_places(program)
        self._causal: set[str] = set()  # scores and weights in which each token sees no later one
        self.length = program.inputs[0].shape[1] or 0
        self.attentions = 0
        self.axes: dict[str, Axes] = {program.inputs[0].name: frozenset({1})}
        # node and position of each constant that has a value for each token, along which axes
        self.cuts: dict[tuple[Node, int], Axes] = {}

    def read(self, node: Node) -> None:
        """Follow the tokens through one node.

        Raises:
            NoMatch: they meet here, or it is not known what happens to them.
        """
        counter = COUNTED.get(node.op)
        held = {
            position: self.axes[name]
            for position, name in enumerate(node.inputs)
            if self.axes.get(name) and position != counter
        }
        if not held or set(node.outputs) & self._ends:
            return
        if node.op in ("Reshape", "Expand"):
            is_known = node.inputs[1] in self._program.constants
            require(is_known, "its lengths are not constant")
        through: set[int] = set()
        for position, axes in held.items():
            for axis in axes:
                if not self._is_met(node, position, axis, held):
                    through.add(self._follow(node, position, axis))
        if node.op == "Softmax":
            through |= held[0]
        self._cut_constants(node, through)
        self._note_mask(node)
        results = [name for name in node.outputs if name]
        last = through and set(results) & set(self._program.output_names)
        require(not last, "the model's result has a value for each token")
        self.axes.update(dict.fromkeys(results, frozenset(through)))

    def _follow(self, node: Node, position: int, axis: int) -> int:
        if node.op == "Attention" and node.attributes.get("is_causal") and position == 0:
            return axis  # `carried` means any rows, and here it is those that come first
        found = carried(node, position, axis, self._shapes, self._program.constants)
        require(found is not None, "tokens meet here and no causal mask hides the later ones")
        require(node.op != "Shape", "it takes the length of the text")
        return -1 if found is None else found

    def _is_met(self, node: Node, position: int, axis: int, held: Mapping[int, Axes]) -> bool:
        """Whether tokens end here rightly: the look-up of the last, or below a causal mask."""
        shape = self._shapes[node.inputs[position]]
        if node.op in _LOOKUPS and position == 0 and node.inputs[1] in self._ends:
            along = node.attributes.get("axis", 0)
            return axis == (along if node.op in ("Gather", "GatherRows") else 1)
        if node.op == "Softmax":
            along = node.attributes.get("axis", -1)
            last = len(shape) - 1
            is_seen = axis == last and along in (-1, last)
            return is_seen and node.inputs[0] in self._causal
        if node.op == "MatMul" and 0 in held and 1 in held:
            weights = self._shapes[node.inputs[0]]
            inner = len(weights) - 1 if position == 0 else len(shape) - 2
            return axis == inner and node.inputs[0] in self._causal
        if node.op == "Attention" and position in (_KEYS, _VALUES) and len(shape) == _HEADED:
            return self._is_causal_attention(node) and axis == _TOKENS
        return False

    def _is_causal_attention(self, node: Node) -> bool:
        mask = node.inputs[3] if len(node.inputs) > 3 else ""
        return bool(node.attributes.get("is_causal")) or self._is_mask(mask)

    def _is_mask(self, name: str) -> bool:
        """Whether it is a constant that hides all later tokens from each."""
        value = self._program.constants.get(name)
        if value is None or value.shape[-2:] != (self.length, self.length):
            return False
        later = value[..., ~np.tri(self.length, dtype=np.bool_)]
        is_hidden = ~later if value.dtype == np.bool_ else later <= _HIDDEN
        return bool(is_hidden.all())

    def _note_mask(self, node: Node) -> None:
        """Remember which scores are masked, and the weights that follow from them."""
        name = node.outputs[0]
        if node.op == "Add" and any(self._is_mask(mask) for mask in node.inputs):
            self._causal.add(name)
            self.attentions += 1
        elif node.op == "Softmax" and node.inputs[0] in self._causal:
            self._causal.add(name)
        elif node.op == "Attention":
            self.attentions += 1

    def _cut_constants(self, node: Node, through: set[int]) -> None:
        """Note the constants that have a value for each token."""
        for position, name in enumerate(node.inputs):
            value = self._program.constants.get(name)
            if value is None or not name:
                continue
            axes = {
                axis
                for axis, length in enumerate(value.shape)
                if length == self.length
                and carried(node, position, axis, self._shapes, self._program.constants) in through
            }
            if node.op == "Attention" and self._is_mask(name):
                axes = {value.ndim - 2, value.ndim - 1}
            if axes:
                self.cuts[node, position] = frozenset(axes)


class _Writer:
    """The program for any number of tokens."""

    def __init__(self, program: Program, shapes: Shapes, reader: _Reader) -> None:
        self._program = program
        self._shapes = shapes
        self._reader = reader
        self._constants = dict(program.constants)
        self._nodes: list[Node] = []
        self._short: dict[tuple[bytes, tuple[int, ...], Axes], str] = {}
        (self._tokens,) = program.inputs
        self._length = f"{self._tokens.name}@length"

    def run(self) -> Program:
        """Rewrite it."""
        self._measure()
        for node in self._program.nodes:
            inputs = list(node.inputs)
            for position, name in enumerate(node.inputs):
                axes = self._reader.cuts.get((node, position))
                inputs[position] = self._shortened(name, axes) if axes else name
            attributes = node.attributes
            axes = self._reader.axes.get(node.outputs[0], _NONE)
            if node.op in ("Reshape", "Expand") and axes:
                inputs[1] = self._lengths(node, axes)
                attributes = {k: v for k, v in attributes.items() if k != "allowzero"}
            self._nodes.append(Node(node.op, tuple(inputs), node.outputs, attributes, node.name))
        body = replace_body(self._program, tuple(self._nodes), self._constants)
        rows, _ = self._tokens.shape
        tokens = TensorSpec(self._tokens.name, self._tokens.dtype, (rows, None))
        metadata = {**self._program.metadata, FREE_LENGTH: "1"}
        return prune(replace(body, inputs=(tokens,), metadata=metadata))

    def _measure(self) -> None:
        """The number of tokens, as a list of one."""
        shape = f"{self._tokens.name}@shape"
        one, two, zero = (self._add(f"@{n}", np.array([n])) for n in (1, 2, 0))
        self._nodes += [
            Node("Shape", (self._tokens.name,), (shape,)),
            Node("Slice", (shape, one, two, zero), (self._length,)),
        ]

    def _add(self, name: str, value: Tensor) -> str:
        while name in self._constants and not np.array_equal(self._constants[name], value):
            name += "'"
        self._constants[name] = value
        return name

    def _shortened(self, name: str, axes: Axes) -> str:
        """A constant up to the length of the text; equal ones are cut once."""
        value = self._constants[name]
        key = (value.tobytes(), value.shape, axes)
        if key not in self._short:
            self._short[key] = short = f"{name}@short"
            starts = self._add(f"@{'0' * len(axes)}", np.zeros(len(axes), np.int64))
            along = self._add(f"{short}_axes", np.array(sorted(axes)))
            ends = self._length
            if len(axes) > 1:
                ends = f"{short}_ends"
                lengths = (self._length,) * len(axes)
                self._nodes.append(Node("Concat", lengths, (ends,), {"axis": 0}))
            self._nodes.append(Node("Slice", (name, starts, ends, along), (short,)))
        return self._short[key]

    def _lengths(self, node: Node, axes: Axes) -> str:
        """The target of a Reshape with the text's length in it, the cheapest way that says so."""
        given = self._program.constants[node.inputs[1]]
        source = self._reader.axes.get(node.inputs[0], _NONE)
        first = len(self._shapes[node.outputs[0]]) - len(given)
        # With several texts, an axis may hold tokens and rows together: no copy, no remainder.
        is_simple = node.op == "Reshape" and self._tokens.shape[0] == 1
        parts: list[Tensor | None] = [np.array([n]) for n in given]
        for axis in axes:
            kept = is_simple and axis in source
            if given[axis - first] > 0:  # others follow the input already
                parts[axis - first] = np.array([0]) if kept else None
        if is_simple and sum(p is None for p in parts) == 1 and -1 not in given:
            parts = [np.array([-1]) if part is None else part for part in parts]
        target = f"{node.outputs[0]}@lengths"
        if all(part is not None for part in parts):
            return self._add(target, np.concatenate([p for p in parts if p is not None]))
        pieces = [
            self._length if part is None else self._add(f"@{part.item()}", part) for part in parts
        ]
        self._nodes.append(Node("Concat", tuple(pieces), (target,), {"axis": 0}))
        return target
