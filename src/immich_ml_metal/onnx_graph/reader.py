"""From an ONNX file to a `Program`: opsets, attributes, weights inside or beside the file.

Knows the file format and nothing about what operators mean. Weights that lie in their own file are
mapped, not read.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.external_data_helper import ExternalDataInfo
from onnx.inliner import inline_local_functions
from onnx.numpy_helper import to_array

from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.onnx_files.references import check_location
from immich_ml_metal.onnx_graph.graph import Attribute, Node, Program
from immich_ml_metal.types import Tensor, TensorSpec

OWN_DOMAINS = ("", "ai.onnx")
SUBGRAPH = "graph"  # in place of the body of an If or a Loop: it is refused by name later
OPSETS = range(9, 25)  # 11..23 are what Immich's files use; the table follows 9..24


def read(path: Path) -> Program:
    """Read the network in `path`.

    Raises:
        LoadFailed: it is not an ONNX file, is damaged, or is of an unknown version.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as exc:
        raise LoadFailed(f"cannot read {path}: {exc}") from exc
    if not model.graph.node:
        raise LoadFailed(f"{path} holds no graph")
    if model.functions:
        model = inline_local_functions(model)
    try:
        return _program(model, path)
    except (ValueError, KeyError, TypeError) as exc:
        raise LoadFailed(f"{path} is damaged: {exc}") from exc


def _program(model: ModelProto, path: Path) -> Program:
    graph = model.graph
    constants = {tensor.name: _array(tensor, path) for tensor in graph.initializer}
    nodes: list[Node] = []
    for proto in graph.node:
        attributes = {a.name: _attribute(a, path) for a in proto.attribute}
        if proto.op_type == "Constant" and proto.domain in OWN_DOMAINS:
            constants[proto.output[0]] = _constant(attributes)
        else:
            nodes.append(_node(proto, attributes))
    return Program(
        path.name,
        tuple(nodes),
        constants,
        tuple(_spec(value) for value in graph.input if value.name not in constants),
        tuple(_spec(value) for value in graph.output),
        _opset(model, path),
        {entry.key: entry.value for entry in model.metadata_props},
    )


def _opset(model: ModelProto, path: Path) -> int:
    opset = next((o.version for o in model.opset_import if o.domain in OWN_DOMAINS), 0)
    if opset not in OPSETS:
        raise LoadFailed(
            f"{path} uses ONNX opset {opset}, known are {OPSETS.start} to {OPSETS.stop - 1}"
        )
    return opset


def _node(proto: NodeProto, attributes: dict[str, Attribute]) -> Node:
    op = proto.op_type if proto.domain in OWN_DOMAINS else f"{proto.domain}.{proto.op_type}"
    return Node(op, tuple(proto.input), tuple(proto.output), attributes, proto.name)


def _attribute(proto: AttributeProto, path: Path) -> Attribute:
    value: Any = helper.get_attribute_value(proto)
    if isinstance(value, TensorProto):
        return _array(value, path)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Iterable):
        return tuple(v.decode() if isinstance(v, bytes) else v for v in value)
    return SUBGRAPH


def _constant(attributes: dict[str, Attribute]) -> Tensor:
    ((kind, value),) = attributes.items()
    if kind.startswith("value_"):
        floating = kind.startswith("value_float")
        return np.asarray(value, np.float32 if floating else np.int64)
    return np.asarray(value)


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _location(tensor: TensorProto) -> str:
    name = str(ExternalDataInfo(tensor).location)
    check_location(name)
    return name


def _array(tensor: TensorProto, path: Path) -> Tensor:
    value = _mapped(tensor, path) if _is_external(tensor) else to_array(tensor)
    if value.dtype.name == "bfloat16":  # NumPy's own types end at float16
        value = value.astype(np.float32)
    return value


def _mapped(tensor: TensorProto, path: Path) -> Tensor:
    info = ExternalDataInfo(tensor)
    file = path.parent / _location(tensor)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(tensor.dims)
    if 0 in shape:
        return np.empty(shape, dtype)
    try:
        # both are None in a file that does not say, whatever the annotations claim
        offset = int(info.offset or 0)  # type: ignore[redundant-expr]
        flat: Tensor = np.memmap(file, dtype, "r", offset=offset, shape=(math.prod(shape),))
    except (OSError, ValueError) as exc:
        raise LoadFailed(f"cannot read the weights {tensor.name!r} in {file}: {exc}") from exc
    return flat.reshape(shape)


def _spec(value: ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
        for d in tensor.shape.dim
    )
    return TensorSpec(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), dims)
