"""A float16 form of an ONNX model, with float32 inputs and outputs.

Core ML runs a program of float32 on the GPU and the CPU only; one of float16 may go to the Neural
Engine. The length of an embedding stays in float32: a sum of squares is what overflows first.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from immich_ml_metal.errors import LoadFailed

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
FILE, WEIGHTS = "half.onnx", "half.weights"
_MAX = float(np.finfo(np.float16).max)
_WIDE = frozenset({"ReduceL2", "ReduceSumSquare", "LpNormalization"})
_ALWAYS_FLOAT = {"Resize": (1, 2), "Upsample": (1,)}  # positions of inputs that are never float16


def write_half(path: Path, folder: Path) -> None:
    """Write the float16 form of the model at `path`, weights beside it, into `folder`.

    Raises:
        LoadFailed: it cannot be read, or has a part that cannot be converted.
    """
    try:
        model = onnx.load(path)
    except Exception as exc:  # protobuf's errors derive from Exception directly
        raise LoadFailed(f"{path} cannot be read: {exc}") from exc
    narrow(model)
    onnx.save_model(model, folder / FILE, save_as_external_data=True, location=WEIGHTS)


def narrow(model: ModelProto) -> None:
    """Make every float32 inside a model float16, in place.

    Raises:
        LoadFailed: it has a graph inside (If, Loop).
    """
    graph = model.graph
    for node in graph.node:
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise LoadFailed(f"{node.op_type} {node.name!r} has a graph inside")
    _keep_constants(model)
    kept = {name for node in graph.node for name in _always_float(node)}
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT and tensor.name not in kept:
            tensor.CopyFrom(_half(tensor))
    nodes = [each for node in graph.node for each in _narrow_node(node)]
    before = [_cast_input(nodes, value.name) for value in graph.input if _is_float(value)]
    after = [_cast_output(nodes, value.name) for value in graph.output if _is_float(value)]
    del graph.node[:]
    graph.node.extend([*before, *nodes, *after])
    del graph.value_info[:]


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == FLOAT)


def _always_float(node: NodeProto) -> list[str]:
    positions = _ALWAYS_FLOAT.get(node.op_type, ())
    return [name for at, name in enumerate(node.input) if at in positions and name]


def _keep_constants(model: ModelProto) -> None:
    """Give inputs that are never float16 constants of their own."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for at in _ALWAYS_FLOAT.get(node.op_type, ()):
            tensor = tensors.get(node.input[at]) if at < len(node.input) else None
            if tensor is not None and tensor.data_type == FLOAT:
                own = model.graph.initializer.add()
                own.CopyFrom(tensor)
                own.name = node.input[at] = f"{tensor.name}.{node.output[0]}.{at}"


def _half(tensor: TensorProto) -> TensorProto:
    """In float16; what is finite stays so, as a mask of -3.4e38 has to."""
    value = numpy_helper.to_array(tensor)
    finite = np.clip(value, -_MAX, _MAX)
    return numpy_helper.from_array(
        np.where(np.isinf(value), value, finite).astype(np.float16), tensor.name
    )


def _narrow_node(node: NodeProto) -> Iterator[NodeProto]:
    """The node for float16, between casts where it stays wide."""
    for attribute in node.attribute:
        _narrow_attribute(node, attribute)
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = numpy_helper.from_array(np.zeros(1, np.float16))
        node.attribute.append(helper.make_attribute("value", zero))
    if node.op_type not in _WIDE:
        yield node
        return
    source, result = node.input[0], node.output[0]
    node.input[0], node.output[0] = f"{result}.wide-in", f"{result}.wide"
    yield helper.make_node("Cast", [source], [node.input[0]], to=FLOAT)
    yield node
    yield helper.make_node("Cast", [node.output[0]], [result], to=HALF)


def _narrow_attribute(node: NodeProto, attribute: AttributeProto) -> None:
    if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == FLOAT:
        attribute.t.CopyFrom(_half(attribute.t))
    elif attribute.name in ("to", "dtype") and attribute.i == FLOAT:
        attribute.i = HALF
    elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
        value = np.asarray(helper.get_attribute_value(attribute), np.float32)
        attribute.CopyFrom(helper.make_attribute("value", _half(numpy_helper.from_array(value))))


def _cast_input(nodes: list[NodeProto], name: str) -> NodeProto:
    inner = f"{name}.half"
    for node in nodes:
        node.input[:] = [inner if each == name else each for each in node.input]
    return helper.make_node("Cast", [name], [inner], to=HALF)


def _cast_output(nodes: list[NodeProto], name: str) -> NodeProto:
    inner = f"{name}.half"
    for node in nodes:
        node.input[:] = [inner if each == name else each for each in node.input]
        node.output[:] = [inner if each == name else each for each in node.output]
    return helper.make_node("Cast", [inner], [name], to=FLOAT)
