"""From a `Program` to an ONNX file, its weights beside it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
    save_model,
)
from onnx.external_data_helper import set_external_data

from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.onnx_graph.graph import Node, Program
from immich_ml_metal.onnx_graph.reader import SUBGRAPH
from immich_ml_metal.types import Tensor, TensorSpec

_INSIDE_BYTES = 1024  # smaller values stay in the file: shapes, axes, scalars
_ALIGNMENT = 4096  # of each weight, so that it can be mapped


def write(program: Program, path: Path) -> None:
    """Write the network to `path` and its weights to a file beside it, `<name>.weights`.

    Raises:
        LoadFailed: it has a node with a graph inside (If, Loop).
    """
    small = {n: v for n, v in program.constants.items() if v.nbytes < _INSIDE_BYTES}
    model = describe(program, small)
    with path.with_name(f"{path.name}.weights").open("wb") as weights:
        for name, value in program.constants.items():
            if name in small:
                continue
            weights.seek(-weights.tell() % _ALIGNMENT, 1)
            tensor = model.graph.initializer.add()
            _refer(tensor, name, value, Path(weights.name).name, weights.tell())
            np.ascontiguousarray(value).tofile(weights)
    save_model(model, path)


def describe(program: Program, constants: Mapping[str, Tensor]) -> ModelProto:
    """The network in ONNX's words, with these of its constants."""
    graph = helper.make_graph(
        [_node(node) for node in program.nodes],
        program.name,
        [_spec(spec) for spec in program.inputs],
        [_spec(spec) for spec in program.outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return _model(program, graph)


def _refer(tensor: TensorProto, name: str, value: Tensor, file: str, offset: int) -> None:
    tensor.name = name
    tensor.dims.extend(value.shape)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor.raw_data = b""  # what `set_external_data` asks for
    set_external_data(tensor, file, offset=offset, length=value.nbytes)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")


def _model(program: Program, graph: GraphProto) -> ModelProto:
    domains = {_domain(node.op)[0] for node in program.nodes} - {""}
    opsets = [helper.make_opsetid("", program.opset)]
    opsets += [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
    version = helper.find_min_ir_version_for(opsets[:1])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=version)
    helper.set_model_props(model, dict(program.metadata))
    return model


def _domain(op: str) -> tuple[str, str]:
    domain, _, name = op.rpartition(".")
    return domain, name


def _node(node: Node) -> NodeProto:
    domain, op = _domain(node.op)
    proto = helper.make_node(op, node.inputs, node.outputs, node.name, domain=domain)
    for name, value in node.attributes.items():
        if isinstance(value, np.ndarray):
            proto.attribute.append(helper.make_attribute(name, numpy_helper.from_array(value)))
        elif value == SUBGRAPH:
            raise LoadFailed(f"{node} has a graph inside, which cannot be written again")
        elif value != ():
            proto.attribute.append(helper.make_attribute(name, value))
    return proto


def _spec(spec: TensorSpec) -> ValueInfoProto:
    lengths = [f"{spec.name}_{i}" if n is None else n for i, n in enumerate(spec.shape)]
    kind = helper.np_dtype_to_tensor_dtype(spec.dtype)
    return helper.make_tensor_value_info(spec.name, kind, lengths)
