"""Small changes to an ONNX model in memory: node for nodes, new constants, shapes of values."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from immich_ml_metal.types import Tensor

_KNOWN_BYTES = (
    1024  # constants that may say how long a value is; of larger ones the shape is enough
)


class ModelEditor:
    """A model whose nodes are replaced one by one."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._count = 0

    def nodes(self, *ops: str) -> list[NodeProto]:
        """The nodes of ONNX's own domain with one of these operators."""
        own = (node for node in self.model.graph.node if node.domain in ("", "ai.onnx"))
        return [node for node in own if node.op_type in ops]

    def constant(self, value: Tensor) -> str:
        """Add a constant; gives its name."""
        self._count += 1
        name = f"coreml.constant.{len(self.model.graph.initializer)}.{self._count}"
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def replace(self, written: Mapping[str, Sequence[NodeProto]]) -> None:
        """Put other nodes where the ones are that make these values."""
        nodes: list[NodeProto] = []
        for node in self.model.graph.node:
            nodes.extend(written.get(node.output[0], [node]))
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def attributes(self, node: NodeProto) -> dict[str, Any]:
        """A node's attributes by name."""
        return {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def types(self) -> Mapping[str, int]:
        """The element type of every value, as a number of ONNX's."""
        found = onnx.shape_inference.infer_shapes(self._without_weights()).graph
        values = (*found.input, *found.value_info, *found.output)
        return {value.name: value.type.tensor_type.elem_type for value in values}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every value that has a fixed one, by ONNX's own inference."""
        found = onnx.shape_inference.infer_shapes(self._without_weights(), data_prop=True).graph
        shapes = {name: tuple(tensor.dims) for name, tensor in self.constants.items()}
        for value in (*found.input, *found.value_info, *found.output):
            lengths = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            if value.type.tensor_type.HasField("shape") and all(lengths):
                shapes[value.name] = lengths
        return shapes

    def _without_weights(self) -> ModelProto:
        """The same graph with an input for each weight: nothing large is copied."""
        graph = self.model.graph
        small = [each for each in graph.initializer if np.prod(each.dims) * 8 <= _KNOWN_BYTES]
        large = [each for each in graph.initializer if np.prod(each.dims) * 8 > _KNOWN_BYTES]
        weights = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large]
        light = helper.make_graph(
            graph.node, graph.name, [*graph.input, *weights], graph.output, small
        )
        return helper.make_model(light, opset_imports=self.model.opset_import)
