"""The shape of every value of a program, as far as ONNX's own inference knows it."""

import onnx
from onnx import helper

from immich_ml_metal.onnx_graph.axes import Shapes
from immich_ml_metal.onnx_graph.graph import Program
from immich_ml_metal.onnx_graph.writer import describe

_LENGTHS_BYTES = 1024  # values that may say how long others are; weights only have a shape


def infer_shapes(program: Program) -> Shapes:
    """Shapes of the values that have a fixed one, without computing any."""
    small = {n: v for n, v in program.constants.items() if v.nbytes < _LENGTHS_BYTES}
    model = describe(program, small)
    for name, value in program.constants.items():
        if name not in small:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    for output in model.graph.output:  # as the file claims; what is computed counts
        output.type.tensor_type.ClearField("shape")
    found = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {}
    for value in (*found.input, *found.value_info, *found.output):
        lengths = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        if value.type.tensor_type.HasField("shape") and all(lengths):
            shapes[value.name] = lengths
    return shapes
