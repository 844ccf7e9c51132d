"""Pictures channels-last from end to end, because that is what MLX's convolutions want.

ONNX pictures are (N, C, H, W). Each value is given in one of two layouts or both: as ONNX has it,
or as (N, H, W, C) under a name of its own. A convolution asks for the second; operators that do not
mind follow their inputs; all others ask for the first. Asking for what is not there inserts a
Transpose, marked `layout`, once for each value; `transpose` then merges or drops what it can.
"""

from collections.abc import Callable, Mapping

import numpy as np

from immich_ml_metal.onnx_graph.families import (
    BROADCAST,
    GLOBAL_POOLS,
    REDUCTIONS,
    UNARY,
    WINDOWS,
)
from immich_ml_metal.onnx_graph.graph import Attribute, Node, Program, prune, replace_body
from immich_ml_metal.onnx_graph.match import NoMatch, Note, ignore, require
from immich_ml_metal.types import Tensor

TO_LAST, TO_SECOND = (0, 2, 3, 1), (0, 3, 1, 2)
RANK = 4
STORED = (0, 3, 1, 2)  # where each axis of ONNX is stored
MARK = "@nhwc"  # after the name of a value that is kept channels-last

FOLLOW = UNARY | GLOBAL_POOLS | {"BatchNormalization", "Resize"}
AXIS = frozenset({"Concat", "Softmax"})


def lay_out(program: Program, note: Note = ignore) -> Program:
    """Keep pictures channels-last between convolutions."""
    return _Layout(program, note).run()


class _Layout:
    def __init__(self, program: Program, note: Note) -> None:
        self._program = program
        self._note = note
        self._constants = dict(program.constants)
        self._nodes: list[Node] = []
        self._last: dict[str, str] = {}  # ONNX name → name of the channels-last value
        self._plain = {spec.name for spec in program.inputs}  # names that exist as ONNX has them
        self._rules: Mapping[str, Callable[[Node], bool]] = {
            **dict.fromkeys(WINDOWS, self._window),
            **dict.fromkeys(FOLLOW, self._follow),
            **dict.fromkeys(BROADCAST, self._broadcast),
            **dict.fromkeys(REDUCTIONS, self._reduce),
            **dict.fromkeys(AXIS, self._axis),
            "Pad": self._pad,
            "Shape": self._shape,
            "Transpose": self._transpose,
        }

    def run(self) -> Program:
        for node in self._program.nodes:
            rule = self._rules.get(node.op, self._unknown)
            try:
                is_done = rule(node)
            except NoMatch as exc:
                self._note(node, str(exc))
                is_done = False
            if not is_done:
                self._emit_plain(node)
        for name in self._program.output_names:
            self._to_plain(name)
        return prune(replace_body(self._program, tuple(self._nodes), self._constants))

    # -- the two forms of a value -------------------------------------------------------------

    def _to_plain(self, name: str) -> str:
        if name in self._last and name not in self._plain:
            self._turn(self._last[name], name, TO_SECOND)
            self._plain.add(name)
        return name

    def _to_last(self, name: str) -> str:
        if name not in self._last:
            self._last[name] = name + MARK
            self._turn(name, name + MARK, TO_LAST)
        return self._last[name]

    def _turn(self, source: str, target: str, perm: tuple[int, ...]) -> None:
        attributes: dict[str, Attribute] = {"perm": perm, "layout": 1}
        self._nodes.append(Node("Transpose", (source,), (target,), attributes, target))

    # -- emitting a node ----------------------------------------------------------------------

    def _emit_plain(self, node: Node) -> None:
        for name in node.inputs:
            self._to_plain(name)
        self._nodes.append(node)
        self._plain.update(node.outputs)

    def _emit_last(
        self, node: Node, inputs: tuple[str, ...], attributes: Mapping[str, Attribute] | None = None
    ) -> bool:
        outputs = tuple(name + MARK if name else "" for name in node.outputs)
        self._last.update(zip(node.outputs, outputs, strict=True))
        marked = {**(node.attributes if attributes is None else attributes), "nhwc": 1}
        self._nodes.append(Node(node.op, inputs, outputs, marked, node.name))
        return True

    def _constant(self, name: str, value: Tensor) -> str:
        self._constants[name + MARK] = np.ascontiguousarray(value)
        return name + MARK

    # -- rules: True when the node was emitted channels-last, False when none of its inputs is;
    # -- NoMatch where one is and the node does not take it so: that costs a turn -------------

    def _unknown(self, node: Node) -> bool:
        """An operator that knows channels-first only."""
        turned = [name for name in node.inputs if name in self._last and name not in self._plain]
        require(not turned, f"it knows channels-first only, and {turned} is channels-last")
        return False

    def _window(self, node: Node) -> bool:
        if node.op in ("Conv", "ConvTranspose"):
            weight = self._constants.get(node.inputs[1])
            require(weight is not None, f"the weights {node.inputs[1]!r} are no constant")
            assert weight is not None
            require(weight.ndim == RANK, f"its weights have {weight.ndim} axes, not {RANK}")
            inputs = list(node.inputs)
            if node.op == "Conv":
                inputs[1] = self._constant(inputs[1], weight.transpose(TO_LAST))
        else:
            kernel = node.attributes.get("kernel_shape")
            is_picture = isinstance(kernel, tuple) and len(kernel) == RANK - 2
            require(is_picture, f"its window is {kernel}, not one over a picture")
            inputs = list(node.inputs)
        return self._emit_last(node, (self._to_last(inputs[0]), *inputs[1:]))

    def _follow(self, node: Node) -> bool:
        if node.inputs[0] not in self._last:
            return False
        return self._emit_last(node, (self._last[node.inputs[0]], *node.inputs[1:]))

    def _broadcast(self, node: Node) -> bool:
        if not any(name in self._last for name in node.inputs):
            return False
        for name in node.inputs:
            fits = name in self._last or self._bends(name)
            require(fits, f"{name!r} is neither channels-last nor a constant")
        return self._emit_last(node, tuple(self._bent(name) for name in node.inputs))

    def _bends(self, name: str) -> bool:
        value = self._constants.get(name)
        return value is not None and value.ndim <= RANK

    def _bent(self, name: str) -> str:
        """The channels-last form of an operand; constants are turned here and now."""
        if name in self._last:
            return self._last[name]
        value = self._constants[name]
        if value.size == 1:
            return name
        return self._constant(
            name, value.reshape((1,) * (RANK - value.ndim) + value.shape).transpose(TO_LAST)
        )

    def _reduce(self, node: Node) -> bool:
        axes = self._integers(node, "axes")
        if node.inputs[0] not in self._last:
            return False
        require(axes, "its axes are no constant")
        source = (self._last[node.inputs[0]],)
        stored = tuple(STORED[axis % RANK] for axis in axes)
        attributes: dict[str, Attribute] = {**node.attributes, "axes": stored}
        if node.attributes.get("keepdims", 1):
            return self._emit_last(node, source, attributes)
        # what remains of other axes would be in another order
        require({axis % RANK for axis in axes} == {2, 3}, f"it drops the axes {axes}, not [2, 3]")
        self._nodes.append(Node(node.op, source, node.outputs, attributes, node.name))
        self._plain.update(node.outputs)
        return True

    def _integers(self, node: Node, name: str) -> list[int]:
        """A list in an attribute or in the constant second input; empty if in neither."""
        given = node.attributes.get(name)
        if isinstance(given, tuple):
            return [int(v) for v in given]
        value = self._constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        return [] if value is None else [int(v) for v in value.ravel()]

    def _axis(self, node: Node) -> bool:
        if not any(name in self._last for name in node.inputs):
            return False
        flattens = self._program.opset < 13 and node.op == "Softmax"
        require(not flattens, "before opset 13 it flattens its axes")
        plain = [name for name in node.inputs if name not in self._last]
        require(not plain, f"{plain} is not channels-last")
        axis = node.attributes.get("axis", -1)
        if not isinstance(axis, int):
            raise NoMatch("it has no single axis")
        attributes = {**node.attributes, "axis": STORED[axis % RANK]}
        return self._emit_last(node, tuple(self._last[name] for name in node.inputs), attributes)

    def _pad(self, node: Node) -> bool:
        pads = self._integers(node, "pads")
        if node.inputs[0] not in self._last:
            return False
        require(len(node.inputs) <= 3, "it names its axes")
        require(len(pads) == 2 * RANK, "its pads are no constant for four axes")
        turned = tuple(pads[side * RANK + axis] for side in (0, 1) for axis in TO_LAST)
        inputs = (self._last[node.inputs[0]], "", *node.inputs[2:])
        return self._emit_last(node, inputs, {**node.attributes, "pads": turned})

    def _shape(self, node: Node) -> bool:
        """Asking for the lengths is no reason to turn a picture."""
        if node.inputs[0] not in self._last:
            return False
        attributes: dict[str, Attribute] = {**node.attributes, "nhwc": 1}
        source = (self._last[node.inputs[0]],)
        self._nodes.append(Node(node.op, source, node.outputs, attributes, node.name))
        self._plain.update(node.outputs)
        return True

    def _transpose(self, node: Node) -> bool:
        """Making a picture of a channels-last value gives its other form for free."""
        self._emit_plain(node)
        if node.attributes.get("perm") == TO_SECOND:
            self._last[node.outputs[0]] = node.inputs[0]
        return True
