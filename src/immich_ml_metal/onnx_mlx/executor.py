"""Walks a program's nodes: NumPy for what is known beforehand, MLX for the rest.

Called under `mx.compile` it traces; called with lazy zeros it finds every shape without computing
anything; called plainly it computes node by node.
"""

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.onnx_graph.graph import Node, Program
from immich_ml_metal.onnx_mlx.host import Evaluator
from immich_ml_metal.onnx_mlx.ops import HOST_ONLY, OPERATORS
from immich_ml_metal.onnx_mlx.ops.call import (
    Call,
    Operator,
    Result,
    Unsupported,
    Value,
    device_type,
    to_device,
)

Values = Mapping[str, Value]
_NOWHERE = Operator(
    lambda call: []
)  # stands for HOST_ONLY operators, which never get to the device


def require_operators(program: Program) -> None:
    """Check that every operator has a translation.

    Raises:
        LoadFailed: names the first operator without one, its node and the model.
    """
    for node in program.nodes:
        if node.op not in OPERATORS and node.op not in HOST_ONLY:
            raise refusal(program, node, f"the operator {node.op} has no translation")


def refusal(program: Program, node: Node, reason: object) -> LoadFailed:
    """The error for a node that this engine cannot run."""
    return LoadFailed(
        f"{program.name}: the mlx engine cannot run {node}: {reason}; the cpu engine can"
    )


class Executor:
    """A program with its constants in place, ready to be called."""

    def __init__(self, program: Program, constants: Values, dtype: mx.Dtype) -> None:
        """Prepare the nodes.

        Args:
            program: only operators that `require_operators` accepts.
            constants: the program's, as `place` put them.
            dtype: floating type of the network.
        """
        self._program = program
        self._constants = constants
        self._dtype = dtype
        self._operators = [OPERATORS.get(node.op, _NOWHERE) for node in program.nodes]
        self._evaluators: dict[Node, Evaluator] = {}
        self._last_use = _last_uses(program)

    def __call__(self, feeds: Values) -> list[mx.array]:
        """Compute every output."""
        values: dict[str, Value] = {**self._constants, **feeds}
        for node in self._walk(values):
            for name in self._last_use.get(node, ()):
                values.pop(name, None)
        results = [values[name] for name in self._program.output_names]
        return [r if isinstance(r, mx.array) else to_device(r, self._dtype) for r in results]

    def trace(self, feeds: Values) -> Iterator[tuple[Node, dict[str, Value]]]:
        """Compute node by node, giving each node with its outputs."""
        values: dict[str, Value] = {**self._constants, **feeds}
        for node in self._walk(values):
            yield node, {name: values[name] for name in node.outputs if name}

    def _walk(self, values: dict[str, Value]) -> Iterator[Node]:
        for node, operator in zip(self._program.nodes, self._operators, strict=True):
            arguments = [values[name] if name else None for name in node.inputs]
            try:
                results = self._compute(node, operator, arguments)
            except Unsupported as exc:
                raise refusal(self._program, node, exc) from exc
            named = (name for name in node.outputs if name)
            values.update(zip(named, results, strict=True))
            yield node

    def _compute(
        self, node: Node, operator: Operator, arguments: Sequence[Value | None]
    ) -> Sequence[Value]:
        known = [a for a in arguments if not isinstance(a, mx.array)]
        is_known = len(known) == len(arguments)
        if is_known and not operator.host_result and not operator.on_device:
            return self._evaluate(node, known)
        if operator is _NOWHERE:
            raise Unsupported("its result depends on the data, not only on shapes")
        call = Call(node, self._program.opset, self._dtype)
        placed = [self._place(operator, at, value) for at, value in enumerate(arguments)]
        result: Result = operator.function(call, *placed)
        return result if isinstance(result, (list, tuple)) else [result]  # type: ignore[list-item]

    def _evaluate(self, node: Node, arguments: Sequence[Value | None]) -> Sequence[Value]:
        if node not in self._evaluators:
            self._evaluators[node] = Evaluator(node, self._program.opset)
        return self._evaluators[node]([a for a in arguments if not isinstance(a, mx.array)])

    def _place(self, operator: Operator, position: int, value: Value | None) -> Value | None:
        if value is None:
            return None
        if operator.is_host(position):
            if isinstance(value, mx.array):
                raise Unsupported(f"input {position} is not known before the network runs")
            return value
        if isinstance(value, mx.array) or (operator.keep_scalars and value.size == 1):
            return value
        return to_device(value, self._dtype)


def _last_uses(program: Program) -> dict[Node, list[str]]:
    last: dict[str, Node] = {}
    for node in program.nodes:
        last.update(dict.fromkeys(node.inputs, node))
        last.update(dict.fromkeys(node.outputs, node))
    for name in ("", *program.output_names):
        last.pop(name, None)
    uses: dict[Node, list[str]] = {}
    for name, node in last.items():
        uses.setdefault(node, []).append(name)
    return uses


def device_constants(program: Program) -> set[str]:
    """The constants that some node needs on the device, rather than to know their values."""
    known = set(program.constants)
    needed: set[str] = set()
    for node in program.nodes:
        operator = OPERATORS.get(node.op, _NOWHERE)
        is_known = all(name in known or not name for name in node.inputs)
        if operator.host_result or (is_known and not operator.on_device):
            known.update(node.outputs)
            continue
        for position, name in enumerate(node.inputs):
            value = program.constants.get(name)
            if value is None or operator.is_host(position):
                continue
            if not (operator.keep_scalars and value.size == 1):
                needed.add(name)
    return needed


def place(program: Program, dtype: mx.Dtype) -> dict[str, Value]:
    """The constants where the nodes want them: converted and evaluated on the device, or NumPy.

    To be called on the thread that will run the program.
    """
    constants: dict[str, Value] = dict(program.constants)
    place_in(constants, device_constants(program), dtype)
    return constants


def place_in(constants: dict[str, Value], on_device: set[str], dtype: mx.Dtype) -> None:
    """Move the named constants to the device, each leaving NumPy before the next is converted."""
    for name in on_device:
        value = constants.pop(name)
        array = value if isinstance(value, mx.array) else to_device(value, dtype)
        del value
        mx.eval(array)
        constants[name] = array


def infer_shapes(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Value]:
    """Every value for inputs of these shapes: NumPy where known, else lazy zeros of its shape.

    Nothing is computed: MLX is lazy, and nothing asks for the zeros.
    """
    dtype = mx.float32
    on_device = device_constants(program)
    values: dict[str, Value] = {
        name: _zeros(value.shape, value.dtype) if name in on_device else value
        for name, value in program.constants.items()
    }
    feeds = {spec.name: _zeros(shapes[spec.name], spec.dtype) for spec in program.inputs}
    executor = Executor(program, values, dtype)
    for _, outputs in executor.trace(feeds):
        values.update(outputs)
    return {**values, **feeds}


def _zeros(shape: tuple[int, ...], dtype: "np.dtype[np.generic]") -> mx.array:
    return mx.zeros(shape, device_type(dtype, mx.float32))
