"""Operators by how they treat the axes of their inputs: what passes may assume of each."""

from collections.abc import Mapping
from types import MappingProxyType

_ACTIVATIONS = frozenset({"Relu", "LeakyRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish"}) | {
    *{"Swish", "Gelu", "Softplus", "Mish", "Tanh", "Erf", "Clip"}
}
_MATHS = frozenset({"Abs", "Neg", "Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos", "Sign"}) | {
    *{"Floor", "Ceil", "Round"}
}
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Pow", "Max", "Min", "Sum", "Mean"})
_LOGIC = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}) | {
    *{"And", "Or", "Xor", "Where"}
}

# each element of the first input alone; further inputs are bounds and the like
UNARY = _ACTIVATIONS | _MATHS | {"Not", "IsNaN", "IsInf", "Identity", "Dropout", "Cast", "CastLike"}
# element by element over inputs that are broadcast to each other
BROADCAST = _ARITHMETIC | _LOGIC | {"PRelu"}
# same elements in the same order under another shape
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
REDUCTIONS = frozenset({"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"}) | {
    *{"ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"}
}
# one axis that the attribute or input `axis` names
ALONG_AXIS = frozenset({"Softmax", "LogSoftmax", "CumSum", "TopK", "Split", "ArgMax", "ArgMin"}) | {
    "LpNormalization"
}
WINDOWS = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool"})
GLOBAL_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool"})
# float in, float out, whatever the constants hold
FLOATING = (
    _ACTIVATIONS
    | WINDOWS
    | GLOBAL_POOLS
    | {"MatMul", "Gemm", "LayerNormalization", "BatchNormalization", "Softmax", "Attention"}
    | {"Sqrt", "Exp", "Log", "ReduceMean", "ReduceL2"}
) - {"Relu", "Clip"}
# the type of the result is that of the first input
SAME_TYPE = (
    _ARITHMETIC
    | RESHAPES
    | {"Transpose", "Slice", "Split", "Expand", "Identity", "Relu", "Clip", "Neg", "Abs"}
)
# results that follow from lengths alone
SHAPE_ONLY = frozenset({"Shape", "Size"})
# multiply and add up: what takes the time; with the positions of their factors and addends
PRODUCTS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("Linear", "Gemm", "Conv", "ConvTranspose"), (0, 1, 2)),
        **dict.fromkeys(("MatMul", "Einsum"), (0, 1)),
        **dict.fromkeys(("Sdpa", "Attention"), (0, 1, 2)),
    }
)
# give elements of their input as they are, in any type; with the positions of what they move
_FIRST_MOVED = frozenset({"Transpose", "Slice", "Split", "Expand", "Tile", "Identity", "Pad"}) | {
    *{"ExpandBatch", "Gather", "GatherElements", "GatherND", "GatherRows", "GatherNDRows"},
    *{"DepthToSpace", "SpaceToDepth", "Relu", "Neg", "Abs", "MaxPool", "GlobalMaxPool"},
}
_ALL = tuple(range(64))
MOVES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {**dict.fromkeys(_FIRST_MOVED | RESHAPES, (0,)), "Concat": _ALL}
)
