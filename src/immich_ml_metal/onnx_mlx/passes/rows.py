"""Bookkeeping for `batch`: along which axis each value holds its rows, and the rewritten nodes.

Knows no operator: `row_rules` says for each how the rows get from its inputs to its output.
"""

from collections.abc import Callable, Mapping

from immich_ml_metal.onnx_graph.families import RESHAPES, UNARY
from immich_ml_metal.onnx_graph.graph import Attribute, Node, Program, prune, replace_body
from immich_ml_metal.onnx_graph.match import NoMatch, require
from immich_ml_metal.onnx_mlx.executor import infer_shapes
from immich_ml_metal.types import Tensor, TensorSpec

INTERLEAVED = RESHAPES | UNARY | {"Gemm"}  # what does not care about the order of the rows


class RowsMix(Exception):
    """No rule keeps the rows apart here; says where and why."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(f"{node}: {reason}")
        self.node = node
        self.reason = reason


class Rows:
    """The rewriting of one program: where the rows of each value lie, and the new nodes."""

    def __init__(self, program: Program, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._program = program
        values = infer_shapes(program, shapes)
        self._shapes = {name: tuple(value.shape) for name, value in values.items()}
        self._axis = dict.fromkeys(shapes, 0)  # value name → axis that holds the rows
        self._outer: dict[str, int] = {}  # value name → elements of that axis outside the rows
        self._constants = dict(program.constants)
        self.opset = program.opset
        self._nodes: list[Node] = []
        self._counter = next(iter(shapes))  # an input tells the number of rows

    def rewrite(self, rules: Mapping[str, "Rule"]) -> Program:
        """The program for any number of rows.

        Raises:
            RowsMix: names the node that no rule follows.
        """
        for node in self._program.nodes:
            if any(name in self._axis for name in node.inputs):
                self._rewrite(node, rules)
            else:
                self._nodes.append(node)
        for name in self._program.output_names:
            if self._axis.get(name) != 0 or self._shapes[name][0] != 1:
                maker = next(node for node in self._program.nodes if name in node.outputs)
                raise RowsMix(maker, f"output {name!r} does not hold one row for each input row")
        program = replace_body(self._program, tuple(self._nodes), self._constants)
        return prune(_with_free_batch(program))

    def _rewrite(self, node: Node, rules: Mapping[str, "Rule"]) -> None:
        rule = rules.get(node.op)
        if rule is None:
            raise RowsMix(node, "there is no rule for rows through this operator")
        interleaved = max(self.outer(name) for name in node.inputs)
        if interleaved > 1 and node.op not in INTERLEAVED:
            raise RowsMix(node, "it gets interleaved rows")
        try:
            axis = rule(self, node)
        except NoMatch as exc:
            raise RowsMix(node, str(exc)) from exc
        if interleaved > 1 and node.op not in RESHAPES:
            self._outer.update(dict.fromkeys(node.outputs, interleaved))
        for name in node.outputs:
            if name:
                self._axis[name] = axis

    # -- what rules are made of ---------------------------------------------------------------

    def emit(
        self, node: Node, *, op: str = "", inputs: tuple[str, ...] = (), **extra: Attribute
    ) -> None:
        """Add the node to the new program, changed as told."""
        attributes = {**node.attributes, **extra}
        self._nodes.append(
            Node(op or node.op, inputs or node.inputs, node.outputs, attributes, node.name)
        )

    def carried(self, node: Node, *positions: int) -> int:
        """The axis of the one input (of those at `positions`) that holds rows; others must not."""
        carriers = [i for i, name in enumerate(node.inputs) if name in self._axis]
        if set(carriers) - set(positions or (0,)):
            raise NoMatch(f"rows reach it through input {carriers[-1]}")
        return self._axis[node.inputs[carriers[0]]]

    def axis(self, name: str) -> int | None:
        """The axis of a value that holds the rows, or None."""
        return self._axis.get(name)

    def outer(self, name: str) -> int:
        """How many groups of rows the axis holds: 1 unless the rows are interleaved."""
        return self._outer.get(name, 1)

    def interleave(self, name: str, outer: int) -> None:
        """Note that the rows of a value are interleaved."""
        self._outer[name] = outer

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape for one row."""
        return self._shapes[name]

    def attribute_axis(self, node: Node, default: int = 0) -> int:
        """The node's `axis`, counted from the start."""
        axis = node.attributes.get("axis", default)
        if not isinstance(axis, int):
            raise NoMatch("it has no single axis")
        return axis % len(self._shapes[node.inputs[0]])

    def list_of(self, node: Node, name: str, position: int) -> list[int] | None:
        """A list in an attribute or a constant input."""
        given = node.attributes.get(name)
        if isinstance(given, tuple):
            return [int(v) for v in given]
        if len(node.inputs) > position and node.inputs[position]:
            value = self._constants.get(node.inputs[position])
            if value is None:
                raise NoMatch(f"it takes {name} from the data")
            return [int(v) for v in value.ravel()]
        return None

    def add_constant(self, near: str, value: Tensor) -> str:
        """Store a constant that belongs to the value `near`."""
        name = f"{near}@rows"
        self._constants[name] = value
        return name

    def repeat(self, name: str, axis: int) -> str:
        """A constant repeated for each row along `axis`."""
        repeated = f"{name}@rows{axis}"
        if repeated not in {n.outputs[0] for n in self._nodes if n.op == "ExpandBatch"}:
            attributes: dict[str, Attribute] = {"axis": axis}
            inputs = (name, self._counter)
            self._nodes.append(Node("ExpandBatch", inputs, (repeated,), attributes, name))
        return repeated

    @property
    def counter(self) -> str:
        """A value with one element of its first axis for each row."""
        return self._counter

    def aligned(self, node: Node, name: str, place: int) -> str:
        """An operand whose length at the rows' axis fits: as many for each row, or one in all.

        `place` is that axis in the node's result.
        """
        shape, result = self._shapes[name], self._shapes[node.outputs[0]]
        wanted, own = result[place], place - (len(result) - len(shape))
        length = shape[own] if own >= 0 else 1
        if name in self._axis:
            self.refuse_if(length != wanted, f"{name!r} has {length} for each row, not {wanted}")
            return name
        if length == 1 and (wanted == 1 or own < 0):
            return name
        self.refuse_if(length not in (wanted, 1), f"{name!r} has {length} beside rows of {wanted}")
        return name if length == 1 else self.repeat(name, own)

    def refuse_if(self, condition: bool, reason: str) -> None:
        """Give up on a node that mixes rows.

        Raises:
            NoMatch: `condition` holds.
        """
        require(not condition, reason)


Rule = Callable[[Rows, Node], int]  # emits the node, gives the axis of its rows


def _with_free_batch(program: Program) -> Program:
    def free(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.name, spec.dtype, (None, *spec.shape[1:]))

    return Program(
        program.name,
        program.nodes,
        program.constants,
        tuple(free(spec) for spec in program.inputs),
        tuple(free(spec) for spec in program.outputs),
        program.opset,
        program.metadata,
    )
