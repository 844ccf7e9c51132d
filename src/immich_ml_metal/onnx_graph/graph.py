"""The compiler's own picture of a network: nodes, constants, inputs and outputs. Immutable.

Every pass takes a `Program` and gives a new one. Knows nothing about files (`reader`), about what
an operator computes (`ops`) or about MLX.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from immich_ml_metal.types import Tensor, TensorSpec

Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation. Compared by identity: two equal nodes of a graph are still two nodes.

    Attributes:
        op: ONNX operator name, prefixed by its domain unless that is ONNX's own.
        inputs: value names; an empty name is an optional input that is absent.
        attributes: with an `nhwc` flag where the node works on channels-last pictures (`layout`).
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.name or self.outputs[0]!r}"


@dataclass(frozen=True, slots=True)
class Program:
    """A network in topological order.

    Attributes:
        constants: weights and other fixed values, by name; read-only.
        opset: version of the ONNX operators.
        metadata: the file's own key-value pairs.
    """

    name: str
    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the results, in order."""
        return tuple(spec.name for spec in self.outputs)


class Editor:
    """A program being rewritten by one pass; `finish` gives the new program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._slots: list[list[Node]] = [[node] for node in program.nodes]
        self._slot_of = {node: index for index, node in enumerate(program.nodes)}
        self._producer = {name: node for node in program.nodes for name in node.outputs}
        self._users: dict[str, list[Node]] = {}
        for node in program.nodes:
            self._link(node)
        self.constants: dict[str, Tensor] = dict(program.constants)
        self._results = set(program.output_names)
        self._is_changed = False

    def __iter__(self) -> Iterator[Node]:
        """Nodes as they were at the start, without those that were replaced meanwhile."""
        for node in self._program.nodes:
            if node in self._slot_of:
                yield node

    def _link(self, node: Node) -> None:
        for name in node.inputs:
            self._users.setdefault(name, []).append(node)

    def producer(self, name: str, *ops: str) -> Node | None:
        """The node that makes `name`, if it is one of `ops` (any operator when none is named)."""
        node = self._producer.get(name)
        return node if node is not None and (not ops or node.op in ops) else None

    def private_producer(self, name: str, *ops: str) -> Node | None:
        """Like `producer`, but only where nothing else looks at the value."""
        return self.producer(name, *ops) if self.is_private(name) else None

    def user(self, name: str, *ops: str) -> Node | None:
        """The only node that looks at `name`, if it is one of `ops`."""
        if not self.is_private(name):
            return None
        node = self._users[name][0]
        return node if not ops or node.op in ops else None

    def users(self, name: str) -> tuple[Node, ...]:
        """Every node that looks at `name`."""
        return tuple(self._users.get(name, ()))

    def is_result(self, name: str) -> bool:
        """Whether the value is a result of the program."""
        return name in self._results

    def is_private(self, name: str) -> bool:
        """Whether exactly one node looks at `name` and it is not a result of the program."""
        return len(self._users.get(name, ())) == 1 and not self.is_result(name)

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one element, else None."""
        value = self.constants.get(name)
        return float(value.item()) if value is not None and value.size == 1 else None

    def add_constant(self, value: Tensor, near: str) -> str:
        """Store `value` under a new name that recalls `near`."""
        name = near
        while name in self.constants or name in self._producer:
            name += "'"
        self.constants[name] = value
        return name

    def replace(self, old: Node, *new: Node) -> None:
        """Put `new` where `old` is."""
        self._is_changed = True
        slot = self._slot_of.pop(old)
        for name in old.inputs:
            self._users[name].remove(old)
        at = self._slots[slot].index(old)
        self._slots[slot][at : at + 1] = new
        for node in new:
            self._slot_of[node] = slot
            self._link(node)
            self._producer.update(dict.fromkeys(node.outputs, node))

    def finish(self) -> Program:
        """The rewritten program, without nodes and constants that nothing needs any more.

        The very program where nothing was replaced.
        """
        if not self._is_changed:
            return self._program
        nodes = tuple(node for slot in self._slots for node in slot)
        return prune(sort_nodes(replace_body(self._program, nodes, self.constants)))


def replace_body(
    program: Program, nodes: tuple[Node, ...], constants: Mapping[str, Tensor]
) -> Program:
    """The same program with another body."""
    return Program(
        program.name,
        nodes,
        constants,
        program.inputs,
        program.outputs,
        program.opset,
        program.metadata,
    )


def sort_nodes(program: Program) -> Program:
    """Put each node behind those that make its inputs; the order stays where it is right."""
    makers = {name: node for node in program.nodes for name in node.outputs}
    placed: dict[Node, None] = {}
    for node in program.nodes:
        waiting = [node]
        while waiting:
            missing = [makers[i] for i in waiting[-1].inputs if i in makers]
            missing = [maker for maker in missing if maker not in placed]
            if missing:
                waiting += missing
            else:
                placed[waiting.pop()] = None
    return replace_body(program, tuple(placed), program.constants)


def prune(program: Program) -> Program:
    """Drop what no output needs."""
    needed = set(program.output_names)
    kept: list[Node] = []
    for node in reversed(program.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    constants = {name: value for name, value in program.constants.items() if name in needed}
    return replace_body(program, tuple(reversed(kept)), constants)
