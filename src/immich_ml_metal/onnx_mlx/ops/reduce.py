"""Operators that shorten an axis: sums, means, extremes, norms, positions. Sums run in float32."""

import math
from collections.abc import Callable

import mlx.core as mx

from immich_ml_metal.onnx_mlx.ops.call import Call, Operator, Table, Unsupported, is_floating
from immich_ml_metal.types import Tensor

Reduction = Callable[[mx.array, tuple[int, ...], bool], mx.array]


def _reduction(function: Reduction, *, widen: bool = True, narrow: bool = True) -> Operator:
    """Reduce over `axes`; over all axes when none are named, unless told to do nothing then.

    Args:
        function: takes the values, the axes and whether to keep them with length 1.
        widen: compute in float32.
        narrow: return to the type of the network.
    """

    def apply(call: Call, x: mx.array, given: Tensor | None = None) -> mx.array:
        axes = call.parameter("axes", given)
        if not axes:
            if call.integer("noop_with_empty_axes"):
                return x
            axes = list(range(x.ndim))
        wide = x.astype(mx.float32) if widen and is_floating(x) else x
        out = function(wide, tuple(axes), bool(call.integer("keepdims", 1)))
        return out.astype(x.dtype) if narrow else out

    return Operator(apply, host=frozenset({1}))


def _sum(x: mx.array, axes: tuple[int, ...], keep: bool) -> mx.array:
    """Sum one axis after the other, last first.

    MLX's CPU kernels add the elements of joined axes in one long float32 chain: over the 200 000
    pixels of a text detector's picture that costs four digits.
    """
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = mx.sum(x, axis=axis, keepdims=keep)
    return x


def mean_over(x: mx.array, axes: tuple[int, ...], keep: bool) -> mx.array:
    """The mean over several axes, with the sums of `_sum`."""
    count = math.prod(x.shape[axis] for axis in axes)
    return _sum(x, axes, keep) / count


def _max(x: mx.array, axes: tuple[int, ...], keep: bool) -> mx.array:
    return mx.max(x, axis=axes, keepdims=keep)


def _l2(x: mx.array, axes: tuple[int, ...], keep: bool) -> mx.array:
    return mx.sqrt(_sum(x * x, axes, keep))


def _extreme(function: Callable[..., mx.array]) -> Operator:
    def apply(call: Call, x: mx.array) -> mx.array:
        axis, keep = call.integer("axis"), bool(call.integer("keepdims", 1))
        if not call.integer("select_last_index"):
            return function(x, axis=axis, keepdims=keep).astype(mx.int32)
        backwards = mx.take(x, mx.arange(x.shape[axis] - 1, -1, -1), axis=axis)
        found = function(backwards, axis=axis, keepdims=keep).astype(mx.int32)
        return x.shape[axis] - 1 - found

    return Operator(apply)


def cumulative_sum(call: Call, x: mx.array, axis: Tensor) -> mx.array:
    """CumSum: running totals along `axis`, backwards or without the element itself on request."""
    total = mx.cumsum(
        x.astype(mx.float32) if is_floating(x) else x,
        axis=int(axis.item()),
        reverse=bool(call.integer("reverse")),
        inclusive=not call.integer("exclusive"),
    )
    return total.astype(x.dtype)


def top_k(call: Call, x: mx.array, k: Tensor | None = None) -> list[mx.array]:
    """TopK: the k largest (or smallest) values along `axis` in order, and where they are."""
    count = int(k.item()) if k is not None else call.integer("k")
    axis = call.integer("axis", -1)
    order = mx.argsort(-x if call.integer("largest", 1) else x, axis=axis)
    found = mx.take(order, mx.arange(count), axis=axis).astype(mx.int32)
    return [mx.take_along_axis(x, found, axis=axis), found]


def _global_pool(function: Reduction) -> Operator:
    def apply(call: Call, x: mx.array) -> mx.array:
        axes = tuple(range(1, x.ndim - 1)) if call.nhwc else tuple(range(2, x.ndim))
        if not axes:
            raise Unsupported(f"a picture of {x.ndim} axes")
        return function(x.astype(mx.float32), axes, True).astype(x.dtype)

    return Operator(apply)


TABLE: Table = {
    "ReduceSum": _reduction(_sum),
    "ReduceMean": _reduction(mean_over),
    "ReduceMax": _reduction(_max, widen=False),
    "ReduceMin": _reduction(lambda x, axes, keep: mx.min(x, axis=axes, keepdims=keep), widen=False),
    "ReduceProd": _reduction(lambda x, axes, keep: mx.prod(x, axis=axes, keepdims=keep)),
    "ReduceL1": _reduction(lambda x, axes, keep: _sum(mx.abs(x), axes, keep)),
    # the length of an embedding stays wide, and with it the embedding that is divided by it
    "ReduceL2": _reduction(_l2, narrow=False),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(x * x, axes, keep), narrow=False),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: mx.logsumexp(x, axis=axes, keepdims=keep)),
    "ArgMax": _extreme(mx.argmax),
    "ArgMin": _extreme(mx.argmin),
    "CumSum": Operator(cumulative_sum, host=frozenset({1})),
    "TopK": Operator(top_k, host=frozenset({1})),
    "GlobalAveragePool": _global_pool(mean_over),
    "GlobalMaxPool": _global_pool(_max),
}
