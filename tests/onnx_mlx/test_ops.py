"""Every operator of the table against ONNX Runtime, on several shapes and attributes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from doubles.onnx_models import (
    Array,
    assert_close,
    ints,
    make_model,
    node,
    randn,
    run_ort,
    run_ours,
    save,
    scalar,
    value,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from immich_ml_metal.onnx_mlx.ops import OPERATORS


@dataclass(frozen=True)
class Case:
    """One node: which inputs vary, which are constants, its attributes."""

    op: str
    inputs: tuple[Array | None, ...]
    constants: tuple[Array | None, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 19
    outputs: int = 1
    tolerance: float = 2e-6
    reference: bool = False  # ONNX Runtime lacks it: the ONNX project's own evaluator instead

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, i.shape)) for i in self.inputs if i is not None)
        extra = ",".join(f"{k}={v}" for k, v in self.attributes.items())
        return f"{self.op}@{self.opset}[{shapes}]{extra}"


X = randn(2, 3, 4)
PICTURE = randn(2, 4, 9, 11)
POSITIVE = np.abs(X) + 0.1
WHOLE = np.arange(-12, 12, dtype=np.int32).reshape(2, 3, 4)
BOOLS = X > 0
f32 = np.float32


UNARY = [
    *(
        Case(op, (X,))
        for op in [
            "Abs",
            "Neg",
            "Exp",
            "Sin",
            "Cos",
            "Tanh",
            "Erf",
            "Sign",
            "Floor",
            "Ceil",
            "Round",
        ]
    ),
    *(
        Case(op, (X,))
        for op in ["Sigmoid", "Relu", "LeakyRelu", "Elu", "HardSigmoid", "HardSwish", "Softplus"]
    ),
    *(Case(op, (X,)) for op in ["Identity", "IsNaN"]),
    *(Case(op, (POSITIVE,)) for op in ("Sqrt", "Log", "Reciprocal")),
    Case("LeakyRelu", (X,), attributes={"alpha": 0.3}),
    Case("Elu", (X,), attributes={"alpha": 0.3}),
    Case("HardSigmoid", (X,), attributes={"alpha": 0.5, "beta": 0.1}),
    Case("Mish", (X,)),
    Case("Gelu", (X,), opset=20),
    Case("Gelu", (X,), attributes={"approximate": "tanh"}, opset=20),
    Case("Swish", (X,), attributes={"alpha": 1.7}, opset=24, reference=True),
    Case("Not", (BOOLS,)),
    Case("Dropout", (X,)),
    Case("IsInf", (np.array([1, np.inf, -np.inf, np.nan], f32),)),
    Case("IsInf", (np.array([1, np.inf, -np.inf], f32),), attributes={"detect_negative": 0}),
    Case("Clip", (X,), (scalar(-0.5), scalar(0.5))),
    Case("Clip", (X,), (None, scalar(0.5))),
    Case("Clip", (X,), attributes={"min": -0.2, "max": 0.3}, opset=9),
    Case("Cast", (X,), attributes={"to": 6}),
    Case("Cast", (WHOLE,), attributes={"to": 1}),
    Case("Cast", (X,), attributes={"to": 9}),
    Case("Cast", (np.arange(256, dtype=np.uint8),), attributes={"to": 1}),
    Case("CastLike", (WHOLE,), (scalar(0),)),
    Case("PRelu", (X,), (randn(4),)),
    Case("PRelu", (PICTURE,), (randn(4, 1, 1),)),
]

BINARY = [
    *(
        Case(op, (X, randn(3, 1, seed=1)))
        for op in ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"]
    ),
    *(Case(op, (X,), (scalar(2.5),)) for op in ["Add", "Sub", "Mul", "Div", "Max"]),
    *(Case(op, (X, randn(2, 3, 4, seed=1))) for op in ["Equal", "Greater", "Less"]),
    *(Case(op, (X, randn(4, seed=1))) for op in ["GreaterOrEqual", "LessOrEqual"]),
    *(Case(op, (BOOLS, ~BOOLS[:, ::-1])) for op in ["And", "Or", "Xor"]),
    Case("Max", (X, randn(4, seed=1), randn(3, 1, seed=2))),
    Case("Div", (WHOLE, np.full((4,), 5, np.int32))),
    Case("Mod", (WHOLE, np.full((4,), 5, np.int32))),
    Case("Mod", (X, randn(4, seed=1)), attributes={"fmod": 1}),
    Case("Pow", (X,), (scalar(2),)),
    Case("Pow", (POSITIVE,), (scalar(0.5),)),
    Case("Pow", (POSITIVE, randn(4, seed=1))),
    Case("Where", (BOOLS, X, randn(3, 1, seed=1))),
    Case("Where", (BOOLS, X), (scalar(7),)),
]

LINEAR = [
    Case("MatMul", (X, randn(4, 5, seed=1))),
    Case("MatMul", (X,), (randn(2, 4, 5, seed=1),)),
    Case("MatMul", (randn(4), randn(4, 5, seed=1))),
    Case("Gemm", (randn(3, 4),), (randn(4, 5, seed=1), randn(5, seed=2))),
    Case(
        "Gemm",
        (randn(4, 3),),
        (randn(5, 4, seed=1), randn(1, 5, seed=2)),
        {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0},
    ),
    Case("Gemm", (randn(3, 4),), (randn(4, 5, seed=1),), {"alpha": 2.0}),
    Case("Einsum", (X, randn(2, 4, 5, seed=1)), attributes={"equation": "bij, bjk -> bik"}),
]

Q, K, V = randn(2, 3, 5, 8), randn(2, 3, 7, 8, seed=1), randn(2, 3, 7, 8, seed=2)
PACKED = (randn(2, 5, 24), randn(2, 7, 24, seed=1), randn(2, 7, 24, seed=2))
HEADS = {"q_num_heads": 3, "kv_num_heads": 3}
ATTENTION = [
    Case("Attention", (Q, K, V), opset=23),
    Case("Attention", (Q, K, V), attributes={"scale": 0.3}, opset=23),
    Case("Attention", (Q, K, V), attributes={"is_causal": 1}, opset=23),
    Case("Attention", (Q, Q, Q), attributes={"is_causal": 1}, opset=23),
    Case("Attention", (Q, K, V), (randn(5, 7, seed=3),), opset=23),
    Case("Attention", (Q, K, V), (randn(2, 1, 5, 7, seed=3) > -1,), opset=23),
    Case("Attention", PACKED, attributes=HEADS, opset=23),
    Case("Attention", PACKED, (randn(5, 7, seed=3),), {**HEADS, "is_causal": 1}, opset=23),
]

NORM = [
    Case("LayerNormalization", (X,), (randn(4), randn(4, seed=1))),
    Case("LayerNormalization", (X,), (randn(4),), {"epsilon": 0.1}),
    Case("LayerNormalization", (X,), (randn(3, 4), randn(3, 4, seed=1)), {"axis": 1}),
    Case("RMSNormalization", (X,), (randn(4),), opset=23, reference=True),
    Case(
        "BatchNormalization", (PICTURE,), (*(randn(4, seed=s) for s in (1, 2, 3)), np.ones(4, f32))
    ),
    Case(
        "BatchNormalization",
        (randn(5, 4),),
        (*(randn(4, seed=s) for s in (1, 2, 3)), np.ones(4, f32)),
    ),
    Case("InstanceNormalization", (PICTURE,), (randn(4), randn(4, seed=1)), tolerance=1e-5),
    Case(
        "GroupNormalization",
        (PICTURE,),
        (randn(2), randn(2, seed=1)),
        {"num_groups": 2},
        opset=18,
        reference=True,
    ),
    Case(
        "GroupNormalization",
        (PICTURE,),
        (randn(4), randn(4, seed=1)),
        {"num_groups": 2},
        opset=21,
        tolerance=1e-5,
    ),
    Case("LpNormalization", (X,), attributes={"axis": 1}),
    Case("LpNormalization", (X,), attributes={"axis": -1, "p": 1}),
    Case("Softmax", (X,)),
    Case("Softmax", (X,), attributes={"axis": 1}),
    Case("Softmax", (X,), attributes={"axis": 1}, opset=11),
    Case("LogSoftmax", (X,), attributes={"axis": 1}),
    Case("LogSoftmax", (X,), attributes={"axis": 1}, opset=11),
]

REDUCE = [
    *(
        Case(f"Reduce{name}", (X,), (ints(1),), opset=18)
        for name in ["Sum", "Mean", "Max", "Min", "Prod"]
    ),
    *(
        Case(f"Reduce{name}", (X,), (ints(0, -1),), {"keepdims": 0}, opset=18)
        for name in ["Mean", "L1", "L2"]
    ),
    *(
        Case(f"Reduce{name}", (POSITIVE,), (ints(2),), opset=18)
        for name in ["SumSquare", "LogSumExp"]
    ),
    Case("ReduceMean", (X,), attributes={"axes": [1, 2]}, opset=11),
    Case("ReduceSum", (X,)),
    Case("ReduceSum", (X,), attributes={"noop_with_empty_axes": 1}),
    Case("ReduceMax", (X,), opset=18),
    Case("ArgMax", (X,), attributes={"axis": 1}),
    Case(
        "ArgMax",
        (np.array([[1, 2, 2, 0]], f32),),
        attributes={"axis": -1, "keepdims": 0, "select_last_index": 1},
    ),
    Case("ArgMin", (X,), attributes={"axis": -1, "keepdims": 0}),
    Case("CumSum", (X,), (np.array(1, np.int64),)),
    Case("CumSum", (WHOLE,), (np.array(2, np.int64),), {"reverse": 1, "exclusive": 1}),
    Case("TopK", (X,), (ints(2),), {"axis": -1}, outputs=2),
    Case("TopK", (X,), (ints(2),), outputs=2),
    Case("TopK", (X,), (ints(2),), {"axis": 1, "largest": 0}, outputs=2),
    Case("GlobalAveragePool", (PICTURE,)),
    Case("GlobalMaxPool", (PICTURE,)),
]

SHAPE = [
    Case("Reshape", (X,), (ints(0, -1),)),
    Case("Reshape", (X,), (ints(4, 3, 2),)),
    Case("Flatten", (X,)),
    *(Case("Flatten", (X,), attributes={"axis": axis}) for axis in (0, 2, -1)),
    Case("Transpose", (X,)),
    Case("Transpose", (X,), attributes={"perm": [1, 2, 0]}),
    Case("Squeeze", (randn(1, 3, 1, 4),), (ints(-2),)),
    Case("Squeeze", (randn(1, 3, 1, 4),)),
    Case("Squeeze", (randn(1, 3, 1, 4),), attributes={"axes": [0]}, opset=11),
    Case("Unsqueeze", (X,), (ints(0, -1),)),
    Case("Unsqueeze", (X,), attributes={"axes": [1, 3]}, opset=11),
    Case("Expand", (randn(3, 1),), (ints(2, 1, 4),)),
    Case("Tile", (X,), (ints(1, 2, 3),)),
    Case("Concat", (X, randn(2, 1, 4, seed=1)), attributes={"axis": 1}),
    Case("Concat", (X,), (randn(2, 3, 1, seed=1),), {"axis": -1}),
    Case("Split", (X,), (ints(1, 2),), {"axis": 1}, outputs=2),
    Case("Split", (X,), attributes={"axis": 1, "num_outputs": 2}, outputs=2),
    Case("Split", (X,), attributes={"axis": 2, "split": [1, 3]}, opset=11, outputs=2),
    Case("Slice", (X,), (ints(1), ints(2**63 - 1), ints(1))),
    Case("Slice", (X,), (ints(-1, 3), ints(-(2**63), 0), ints(1, 2), ints(-1, -2))),
    Case("Slice", (X,), attributes={"starts": [0, 1], "ends": [9, -1], "axes": [1, 2]}, opset=9),
    Case("Pad", (X,), (ints(0, 1, 2, 0, 0, 1), scalar(3))),
    Case("Pad", (X,), (ints(0, -1, 2, 0, 0, -1),)),
    Case("Pad", (X,), (ints(2, 1), None, ints(2))),
    *(Case("Pad", (X,), (ints(0, 1, 2, 0, 0, 1),), {"mode": mode}) for mode in ("edge", "reflect")),
    Case("Pad", (X,), attributes={"pads": [0, 1, 0, 0, 0, 1], "value": 0.0}, opset=9),
    *(
        Case("DepthToSpace", (randn(2, 8, 3, 5),), attributes={"blocksize": 2, "mode": m})
        for m in ("DCR", "CRD")
    ),
    Case("SpaceToDepth", (randn(2, 2, 4, 6),), attributes={"blocksize": 2}),
]

INDEX = [
    Case("Gather", (X, ints(0, -1)), attributes={"axis": 1}),
    Case("Gather", (X,), (np.array(-1, np.int64),), {"axis": 2}),
    Case("Gather", (X,), (ints(1),)),
    Case("Gather", (X, np.array([[0], [1]], np.int32))),
    Case("GatherElements", (X, np.array([[[0, -1, 1, 2]]] * 2, np.int64)), attributes={"axis": 1}),
    Case("GatherND", (X, np.array([[0, 1], [1, -1]], np.int64))),
    Case("GatherND", (X, np.array([[1], [0]], np.int64)), attributes={"batch_dims": 1}),
    Case("ScatterND", (X, np.array([[0, 1], [1, 0]], np.int64), randn(2, 4, seed=1))),
    *(
        Case(
            "ScatterND",
            (X, np.array([[0], [1]], np.int64), randn(2, 3, 4, seed=1)),
            attributes={"reduction": r},
        )
        for r in ("add", "mul", "max", "min")
    ),
    Case(
        "ScatterElements",
        (X, np.array([[[0, 2, 1, 2]]] * 2, np.int64), randn(2, 1, 4, seed=1)),
        attributes={"axis": 1},
    ),
    Case("OneHot", (ints(0, -1, 2),), (np.array(4, np.int64), np.array([2, 5], f32))),
    Case("OneHot", (ints(0, 1, 2),), (np.array(4, np.int64), np.array([0, 1], f32)), {"axis": 0}),
    Case("Trilu", (randn(2, 4, 5),)),
    Case("Trilu", (randn(2, 4, 5),), (np.array(-1, np.int64),), {"upper": 0}),
]

W = randn(6, 4, 3, 3, seed=1)
BIAS = randn(6, seed=2)
POOL = {"kernel_shape": [3, 2]}
WINDOW = [
    Case("Conv", (PICTURE,), (W, BIAS)),
    Case("Conv", (PICTURE,), (W,), {"strides": [2, 1], "pads": [1, 0, 1, 2], "dilations": [1, 2]}),
    Case("Conv", (PICTURE,), (W, BIAS), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", (PICTURE,), (W, BIAS), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    # Of even sides one pad is left over, and goes before instead of behind.
    Case("Conv", (randn(1, 4, 8, 10),), (W, BIAS), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    Case("Conv", (PICTURE,), (randn(8, 1, 3, 3), randn(8)), {"group": 4, "pads": [1, 1, 1, 1]}),
    Case("Conv", (PICTURE,), (randn(6, 2, 1, 1),), {"group": 2}),
    Case("Conv", (PICTURE, W)),
    Case("Conv", (randn(2, 4, 9),), (randn(6, 4, 3), BIAS), {"pads": [1, 2]}),
    Case("ConvTranspose", (PICTURE,), (randn(4, 6, 2, 2), BIAS), {"strides": [2, 2]}),
    Case(
        "ConvTranspose",
        (PICTURE,),
        (randn(4, 6, 3, 3),),
        {"strides": [2, 1], "pads": [1, 0, 0, 1], "output_padding": [1, 0]},
    ),
    Case("ConvTranspose", (PICTURE,), (randn(4, 3, 3, 3), BIAS), {"group": 2, "dilations": [1, 2]}),
    Case(
        "ConvTranspose",
        (PICTURE,),
        (randn(4, 6, 3, 3),),
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    Case(
        "ConvTranspose",
        (PICTURE,),
        (randn(4, 6, 3, 3),),
        {"strides": [2, 2], "output_shape": [18, 21]},
    ),
    Case("MaxPool", (PICTURE,), attributes={**POOL, "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    Case("MaxPool", (PICTURE,), attributes={**POOL, "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", (PICTURE,), attributes={**POOL, "dilations": [2, 2]}),
    Case("MaxPool", (PICTURE,), attributes={**POOL, "auto_pad": "SAME_UPPER"}),
    Case("AveragePool", (PICTURE,), attributes={**POOL, "strides": [3, 2]}),
    Case("AveragePool", (PICTURE,), attributes={**POOL, "strides": [2, 2], "pads": [1, 1, 1, 0]}),
    Case(
        "AveragePool", (PICTURE,), attributes={**POOL, "pads": [1, 1, 1, 0], "count_include_pad": 1}
    ),
    Case("AveragePool", (PICTURE,), attributes={**POOL, "strides": [2, 2], "ceil_mode": 1}),
    Case(
        "AveragePool",
        (randn(1, 4, 10, 10),),
        attributes={
            "kernel_shape": [2, 2],
            "strides": [2, 2],
            "ceil_mode": 1,
            "pads": [1, 1, 1, 1],
            "count_include_pad": 1,
        },
    ),
]


def resize(
    scales: tuple[float, ...] | None, sizes: tuple[int, ...] | None, **attributes: Any
) -> Case:
    constants = (None, np.array(scales, f32) if scales else None, ints(*sizes) if sizes else None)
    return Case("Resize", (PICTURE,), constants, attributes, tolerance=1e-5)


RESIZE = [
    resize(
        (1, 1, 2, 2),
        None,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    resize((1, 1, 2, 3), None, mode="nearest"),
    resize(None, (2, 4, 13, 7), mode="nearest", nearest_mode="ceil"),
    resize(None, (2, 4, 5, 22), mode="nearest", nearest_mode="round_prefer_ceil"),
    *(
        resize(None, (2, 4, 13, 7), mode="linear", coordinate_transformation_mode=c)
        for c in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    ),
    resize((1, 1, 1.5, 0.7), None, mode="linear"),
    resize(None, (2, 4, 13, 7), mode="cubic"),
    resize(None, (2, 4, 13, 7), mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1),
    resize(
        None, (2, 4, 13, 7), mode="linear", coordinate_transformation_mode="half_pixel_symmetric"
    ),
    Case(
        "Resize",
        (PICTURE,),
        (None, None, ints(13, 7)),
        {"axes": [2, 3], "mode": "linear"},
        tolerance=1e-5,
    ),
    Case("Resize", (PICTURE,), (np.array([1, 1, 2, 2], f32),), {"mode": "nearest"}, opset=10),
    Case("Upsample", (PICTURE,), (np.array([1, 1, 2, 2], f32),), {"mode": "nearest"}, opset=9),
]

CASES = [
    *(UNARY + BINARY + LINEAR + ATTENTION + NORM),
    *(REDUCE + SHAPE + INDEX + WINDOW + RESIZE),
]


def build(case: Case) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model of one node with untyped outputs, and its feeds."""
    feeds = {f"x{i}": array for i, array in enumerate(case.inputs) if array is not None}
    constants = {f"c{i}": array for i, array in enumerate(case.constants) if array is not None}
    names = [f"x{i}" for i in range(len(case.inputs))]
    names += [f"c{i}" if array is not None else "" for i, array in enumerate(case.constants)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    proto = helper.make_node(case.op, names, outputs, **case.attributes)
    inputs = [value(name, kind_of(array), array.shape) for name, array in feeds.items()]
    unknown = [helper.make_empty_tensor_value_info(name) for name in outputs]
    return make_model([proto], inputs, unknown, constants, case.opset), feeds


def kind_of(array: Array) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def check(case: Case, folder: Path) -> None:
    """Compare our result with the reference's, which also tells the types of the outputs."""
    model, feeds = build(case)
    if case.reference:
        expected = [np.asarray(y) for y in ReferenceEvaluator(model).run(None, feeds)]
    else:
        expected = run_ort(model, feeds)
    for output, array in zip(model.graph.output, expected, strict=True):
        output.CopyFrom(value(output.name, kind_of(array), [None] * array.ndim))
    assert_close(run_ours(save(model, folder), feeds), expected, case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case}" for i, case in enumerate(CASES)])
def test_an_operator_gives_what_the_reference_gives(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


INTERNAL = {
    "ToHalf",
    "ToFloat",
    "Linear",
    "Sdpa",
    "ExpandBatch",
    "GatherRows",
    "GatherNDRows",
}  # made by passes
HOST_RESULTS = {"Shape", "Size"}  # tested where shapes are


def test_every_operator_of_the_table_has_a_case() -> None:
    assert OPERATORS.keys() - {case.op for case in CASES} == INTERNAL | HOST_RESULTS


def test_shape_and_size_are_known_before_the_network_runs(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s", start=1),
        node("ConstantOfShape", "s", "zeros"),
        node("Size", "x", "n"),
        node("Cast", "n", "f", to=1),
        node("Add", "x zeros", "sum"),
        node("Mul", "sum f", "y"),
    ]
    x = helper.make_tensor_value_info("x", 1, ["n", "m"])
    model = make_model(nodes, [x], ["y"])
    feeds = {"x": randn(3, 5)}
    assert_close(run_ours(save(model, tmp_path), feeds), run_ort(model, feeds))


lengths = st.integers(1, 6)
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(
    size=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    op=st.sampled_from(["Conv", "MaxPool", "AveragePool"]),
    ceil=st.booleans(),
)
def test_any_window_gives_what_onnx_runtime_gives(
    tmp_path: Path,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int, int, int],
    op: str,
    ceil: bool,
) -> None:
    if any(p >= k for p, k in zip(pads, kernel * 2, strict=True)):
        pads = (0, 0, 0, 0)  # a pool must not see padding alone
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": pads}
    constants: tuple[Array, ...] = (randn(2, 3, *kernel),) if op == "Conv" else ()
    if op != "Conv":
        attributes["ceil_mode"] = int(ceil)
    case = Case(op, (randn(2, 3, *size),), constants, attributes)
    check(case, tmp_path)


@relaxed
@given(
    length=st.integers(1, 9),
    start=st.integers(-12, 12),
    end=st.integers(-12, 12),
    step=st.integers(-3, 3).filter(bool),
)
def test_any_slice_gives_what_onnx_runtime_gives(
    tmp_path: Path, length: int, start: int, end: int, step: int
) -> None:
    check(
        Case("Slice", (randn(2, length),), (ints(start), ints(end), ints(1), ints(step))), tmp_path
    )
