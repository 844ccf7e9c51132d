"""What can be computed without the device: constants, and arithmetic on shapes.

The ONNX project's own reference implementation does it in NumPy, so the semantics of what we fold
are the standard's, in every opset, without a second operator table of ours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from immich_ml_metal.onnx_graph.graph import Node
from immich_ml_metal.types import Tensor


def evaluate(node: Node, arguments: Sequence[Tensor | None], opset: int) -> list[Tensor]:
    """The outputs of `node` for known inputs, in NumPy."""
    return Evaluator(node, opset)(arguments)


class Evaluator:
    """One node, prepared once for many evaluations."""

    def __init__(self, node: Node, opset: int) -> None:
        attributes = {key: _attribute(value) for key, value in node.attributes.items()}
        proto = helper.make_node(node.op, node.inputs, node.outputs, node.name, **attributes)
        unknown = helper.make_empty_tensor_value_info
        self._inputs = [name for name in node.inputs if name]
        self._positions = [index for index, name in enumerate(node.inputs) if name]
        graph = helper.make_graph(
            [proto],
            node.op,
            [unknown(name) for name in dict.fromkeys(self._inputs)],
            [unknown(name) for name in node.outputs if name],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        self._evaluator = ReferenceEvaluator(model)

    def __call__(self, arguments: Sequence[Tensor | None]) -> list[Tensor]:
        """Compute the outputs."""
        given = {
            name: arguments[position]
            for name, position in zip(self._inputs, self._positions, strict=True)
        }
        results: Any = self._evaluator.run(None, given)
        return [np.asarray(result) for result in results]


def _attribute(value: Any) -> Any:
    return numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
