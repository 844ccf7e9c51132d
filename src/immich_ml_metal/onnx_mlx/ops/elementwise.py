"""Operators that work on each element alone, with NumPy broadcasting between operands."""

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from immich_ml_metal.onnx_mlx.ops.call import (
    Call,
    Operator,
    Table,
    Value,
    device_type,
    is_floating,
    to_device,
)
from immich_ml_metal.types import Tensor

HALF_MAX = 65504.0  # the largest finite number of float16


def align(call: Call, *values: Value) -> list[mx.array]:
    """Bring operands to the device; constants take the type of the operand that is there."""
    on_device = [v for v in values if isinstance(v, mx.array)]
    floats = [v.dtype for v in on_device if is_floating(v)]
    dtype = floats[0] if floats else call.dtype
    return [v if isinstance(v, mx.array) else to_device(v, dtype) for v in values]


def _binary(function: Callable[[mx.array, mx.array], mx.array]) -> Operator:
    def apply(call: Call, x: Value, y: Value) -> mx.array:
        return function(*align(call, x, y))

    return Operator(apply, keep_scalars=True)


def _variadic(function: Callable[[mx.array, mx.array], mx.array]) -> Operator:
    def apply(call: Call, *values: Value) -> mx.array:
        first, *others = align(call, *values)
        for other in others:
            first = function(first, other)
        return first

    return Operator(apply, keep_scalars=True)


def _unary(function: Callable[[mx.array], mx.array]) -> Operator:
    def apply(call: Call, x: mx.array) -> mx.array:
        return function(x)

    return Operator(apply)


def divide(x: mx.array, y: mx.array) -> mx.array:
    """Div: x / y; integers are divided towards zero."""
    if is_floating(x):
        return x / y
    magnitude = mx.floor_divide(mx.abs(x), mx.abs(y))
    return mx.where((x < 0) != (y < 0), -magnitude, magnitude).astype(x.dtype)


def modulo(call: Call, x: Value, y: Value) -> mx.array:
    """Mod: the remainder has the sign of the divisor, or of the dividend with `fmod`."""
    a, b = align(call, x, y)
    if not call.integer("fmod"):
        return mx.remainder(a, b)
    return mx.sign(a) * mx.remainder(mx.abs(a), mx.abs(b))


def power(call: Call, x: Value, y: Value) -> mx.array:
    """Pow: x ** y in the type of x. Squares and roots take their cheaper form."""
    if isinstance(x, mx.array) and isinstance(y, np.ndarray) and y.size == 1 and y.ndim <= x.ndim:
        if y.item() == 2:
            return x * x
        if y.item() == 0.5:
            return mx.sqrt(x)
    base, exponent = align(call, x, y)
    return mx.power(base, exponent.astype(base.dtype))


def cast(call: Call, x: mx.array) -> mx.array:
    """Cast: every floating type becomes the network's own, every large integer 32 bits.

    Floats become integers by dropping the fraction, anything becomes a boolean by `!= 0`.
    """
    import onnx

    target = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(call.integer("to")))
    return x.astype(device_type(target, call.dtype))


def to_half(call: Call, x: mx.array) -> mx.array:
    """What `passes.mixed` puts before a product: float16, if x is floating at all.

    What lies beyond the range becomes infinite, or with `finite` the largest number there is.
    """
    if not is_floating(x):
        return x
    if call.integer("finite"):
        x = mx.where(mx.isinf(x), x, mx.clip(x, -HALF_MAX, HALF_MAX))
    return x.astype(mx.float16)


def to_float(call: Call, x: mx.array) -> mx.array:
    """What `passes.mixed` puts after a product: float32, if x is floating at all."""
    return x.astype(mx.float32) if is_floating(x) else x


def cast_like(call: Call, x: mx.array, other: Value) -> mx.array:
    """CastLike: cast to the type of the second input."""
    if isinstance(other, mx.array):
        return x.astype(other.dtype)
    return x.astype(device_type(other.dtype, call.dtype))


def where(call: Call, condition: Value, x: Value, y: Value) -> mx.array:
    """Where: x where the condition holds, else y."""
    if not isinstance(condition, mx.array):
        condition = to_device(condition, call.dtype)
    return mx.where(condition, *align(call, x, y))


def clip(call: Call, x: mx.array, low: Value | None = None, high: Value | None = None) -> mx.array:
    """Clip: limit to [min, max]; either may be absent. Opsets below 11 keep them in attributes."""
    if low is None and call.has("min"):
        low = np.float32(call.number("min")) * np.ones((), np.float32)
    if high is None and call.has("max"):
        high = np.float32(call.number("max")) * np.ones((), np.float32)
    if low is not None:
        x = mx.maximum(*align(call, x, low))
    if high is not None:
        x = mx.minimum(*align(call, x, high))
    return x


def relu(x: mx.array) -> mx.array:
    """Relu: max(x, 0)."""
    return mx.maximum(x, 0)


def leaky_relu(call: Call, x: mx.array) -> mx.array:
    """LeakyRelu: alpha * x below zero."""
    return mx.where(x < 0, x * call.number("alpha", 0.01), x)


def prelu(call: Call, x: mx.array, slope: mx.array) -> mx.array:
    """PRelu: slope * x below zero; the slope broadcasts to x."""
    return mx.where(x < 0, x * slope, x)


def elu(call: Call, x: mx.array) -> mx.array:
    """Elu: alpha * (exp(x) - 1) below zero."""
    return mx.where(x < 0, call.number("alpha", 1.0) * mx.expm1(x), x)


def hard_sigmoid(call: Call, x: mx.array) -> mx.array:
    """HardSigmoid: alpha * x + beta limited to [0, 1]."""
    return mx.clip(x * call.number("alpha", 0.2) + call.number("beta", 0.5), 0, 1)


def hard_swish(x: mx.array) -> mx.array:
    """HardSwish: x * clip(x / 6 + 0.5, 0, 1)."""
    return x * mx.clip(x * (1 / 6) + 0.5, 0, 1)


def swish(call: Call, x: mx.array) -> mx.array:
    """Swish: x * sigmoid(alpha * x). CLIP calls the one with alpha 1.702 QuickGELU."""
    alpha = call.number("alpha", 1.0)
    return x * mx.sigmoid(x if alpha == 1 else x * alpha)


def gelu(call: Call, x: mx.array) -> mx.array:
    """Gelu: x * Phi(x), exactly or by the tanh approximation.

    `erf_scale` is the root of 1/2 as the file has it, where the operator was written out.
    """
    if call.text("approximate", "none") == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + mx.tanh(inner))
    return 0.5 * x * (1 + mx.erf(x * call.number("erf_scale", math.sqrt(0.5))))


def softplus(x: mx.array) -> mx.array:
    """Softplus: log(1 + exp(x)), without overflow."""
    return mx.logaddexp(x, 0)


def mish(x: mx.array) -> mx.array:
    """Mish: x * tanh(softplus(x))."""
    return x * mx.tanh(softplus(x))


def is_inf(call: Call, x: mx.array) -> mx.array:
    """IsInf: true for infinities of the signs asked for."""
    positive, negative = call.integer("detect_positive", 1), call.integer("detect_negative", 1)
    found = mx.zeros(x.shape, mx.bool_)
    if positive:
        found = found | mx.isposinf(x)
    return found | mx.isneginf(x) if negative else found


def mean(call: Call, *values: Value) -> mx.array:
    """Mean: the average of all operands."""
    aligned = align(call, *values)
    total = aligned[0]
    for other in aligned[1:]:
        total = total + other
    return total / len(aligned)


def _identity(x: mx.array) -> mx.array:
    return x


def dropout(call: Call, x: mx.array, *training: Tensor | None) -> mx.array:
    """Dropout: the input itself; nothing is dropped outside training."""
    return x


TABLE: Table = {
    "Add": _binary(mx.add),
    "Sub": _binary(mx.subtract),
    "Mul": _binary(mx.multiply),
    "Div": _binary(divide),
    "Mod": Operator(modulo, keep_scalars=True),
    "Pow": Operator(power, keep_scalars=True),
    "Equal": _binary(mx.equal),
    "Greater": _binary(mx.greater),
    "GreaterOrEqual": _binary(mx.greater_equal),
    "Less": _binary(mx.less),
    "LessOrEqual": _binary(mx.less_equal),
    "And": _binary(mx.logical_and),
    "Or": _binary(mx.logical_or),
    "Xor": _binary(mx.not_equal),
    "Max": _variadic(mx.maximum),
    "Min": _variadic(mx.minimum),
    "Sum": _variadic(mx.add),
    "Mean": Operator(mean, keep_scalars=True),
    "Abs": _unary(mx.abs),
    "Neg": _unary(mx.negative),
    "Not": _unary(mx.logical_not),
    "Sqrt": _unary(mx.sqrt),
    "Reciprocal": _unary(mx.reciprocal),
    "Exp": _unary(mx.exp),
    "Log": _unary(mx.log),
    "Sin": _unary(mx.sin),
    "Cos": _unary(mx.cos),
    "Tanh": _unary(mx.tanh),
    "Erf": _unary(mx.erf),
    "Sign": _unary(mx.sign),
    "Floor": _unary(mx.floor),
    "Ceil": _unary(mx.ceil),
    "Round": _unary(mx.round),
    "IsNaN": _unary(mx.isnan),
    "IsInf": Operator(is_inf),
    "Identity": _unary(_identity),
    "Dropout": Operator(dropout, host=frozenset({1, 2})),
    "Relu": _unary(relu),
    "LeakyRelu": Operator(leaky_relu),
    "PRelu": Operator(prelu),
    "Elu": Operator(elu),
    "Sigmoid": _unary(mx.sigmoid),
    "HardSigmoid": Operator(hard_sigmoid),
    "HardSwish": Operator(lambda call, x: hard_swish(x), on_device=True),
    "Swish": Operator(swish, on_device=True),
    "Gelu": Operator(gelu, on_device=True),
    "Softplus": _unary(softplus),
    "Mish": _unary(mish),
    "Clip": Operator(clip, keep_scalars=True),
    "Cast": Operator(cast),
    "ToHalf": Operator(to_half, on_device=True),
    "ToFloat": Operator(to_float, on_device=True),
    "CastLike": Operator(cast_like, keep_scalars=True),
    "Where": Operator(where, keep_scalars=True),
}
