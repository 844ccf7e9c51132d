"""Normalisation: LayerNorm and its kin on `mx.fast`, BatchNorm with running statistics.

Statistics are taken in float32 whatever the type of the network.
"""

import math

import mlx.core as mx

from immich_ml_metal.onnx_mlx.ops.call import Call, Operator, Table, Unsupported


def layer_norm(call: Call, x: mx.array, scale: mx.array, bias: mx.array | None = None) -> mx.array:
    """LayerNormalization: zero mean and unit variance over the axes from `axis` on."""
    if len([name for name in call.node.outputs if name]) > 1:
        raise Unsupported("LayerNormalization that gives its statistics")
    axis = call.integer("axis", -1) % x.ndim
    size = math.prod(x.shape[axis:])
    scale = mx.broadcast_to(scale, x.shape[axis:]).reshape(size)
    bias = None if bias is None else mx.broadcast_to(bias, x.shape[axis:]).reshape(size)
    flat = x.reshape(*x.shape[:axis], size)
    return mx.fast.layer_norm(flat, scale, bias, call.number("epsilon", 1e-5)).reshape(x.shape)


def rms_norm(call: Call, x: mx.array, scale: mx.array) -> mx.array:
    """RMSNormalization: unit mean square over the axes from `axis` on."""
    axis = call.integer("axis", -1) % x.ndim
    size = math.prod(x.shape[axis:])
    scale = mx.broadcast_to(scale, x.shape[axis:]).reshape(size)
    flat = x.reshape(*x.shape[:axis], size)
    return mx.fast.rms_norm(flat, scale, call.number("epsilon", 1e-5)).reshape(x.shape)


def batch_norm(
    call: Call, x: mx.array, scale: mx.array, bias: mx.array, mean: mx.array, var: mx.array
) -> mx.array:
    """BatchNormalization: (x - mean) / sqrt(var + epsilon) * scale + bias for each channel."""
    if call.integer("training_mode"):
        raise Unsupported("BatchNormalization in training mode")
    wide = [v.astype(mx.float32) for v in (scale, bias, mean, var)]
    factor = wide[0] * mx.rsqrt(wide[3] + call.number("epsilon", 1e-5))
    offset = wide[1] - wide[2] * factor
    shape = (-1,) if call.nhwc else (-1,) + (1,) * (x.ndim - 2)
    return x * factor.reshape(shape).astype(x.dtype) + offset.reshape(shape).astype(x.dtype)


def instance_norm(call: Call, x: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    """InstanceNormalization: zero mean and unit variance of each channel of each picture."""
    return _group_norm(call, x, scale, bias, groups=x.shape[1])


def group_norm(call: Call, x: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    """GroupNormalization: zero mean and unit variance of each group of channels.

    Before opset 21 scale and bias are given for each group, then for each channel.
    """
    groups = call.integer("num_groups")
    if call.opset < 21:
        per_group = x.shape[1] // groups
        scale, bias = mx.repeat(scale, per_group), mx.repeat(bias, per_group)
    return _group_norm(call, x, scale, bias, groups=groups)


def _group_norm(
    call: Call, x: mx.array, scale: mx.array, bias: mx.array, *, groups: int
) -> mx.array:
    flat = x.reshape(x.shape[0], groups, -1)
    flat = mx.fast.layer_norm(flat, None, None, call.number("epsilon", 1e-5))
    channels = (-1,) + (1,) * (x.ndim - 2)
    return flat.reshape(x.shape) * scale.reshape(channels) + bias.reshape(channels)


def lp_norm(call: Call, x: mx.array) -> mx.array:
    """LpNormalization: divide by the sum of magnitudes (p = 1) or by the length (p = 2)."""
    order, axis = call.integer("p", 2), call.integer("axis", -1)
    wide = x.astype(mx.float32)
    return wide / mx.linalg.norm(wide, order, axis, keepdims=True)


def softmax(call: Call, x: mx.array) -> mx.array:
    """Softmax: exponentials that sum to one along `axis`; before opset 13 over all from it on."""
    if call.opset >= 13:
        return mx.softmax(x, axis=call.integer("axis", -1), precise=True)
    axis = call.integer("axis", 1) % x.ndim
    flat = x.reshape(*x.shape[:axis], -1)
    return mx.softmax(flat, axis=-1, precise=True).reshape(x.shape)


def log_softmax(call: Call, x: mx.array) -> mx.array:
    """LogSoftmax: the logarithm of Softmax."""
    axis = call.integer("axis", -1 if call.opset >= 13 else 1) % x.ndim
    axes = [axis] if call.opset >= 13 else list(range(axis, x.ndim))
    wide = x.astype(mx.float32)
    return (wide - mx.logsumexp(wide, axis=axes, keepdims=True)).astype(x.dtype)


TABLE: Table = {
    "LayerNormalization": Operator(layer_norm, on_device=True),
    "RMSNormalization": Operator(rms_norm),
    "BatchNormalization": Operator(batch_norm),
    "InstanceNormalization": Operator(instance_norm),
    "GroupNormalization": Operator(group_norm),
    "LpNormalization": Operator(lp_norm),
    "Softmax": Operator(softmax),
    "LogSoftmax": Operator(log_softmax),
}
