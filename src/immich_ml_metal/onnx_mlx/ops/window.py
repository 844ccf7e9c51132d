"""Operators that slide a window over a picture: convolutions and pools.

MLX wants pictures channels-last. The layout pass sees to it and marks the node with `nhwc`; without
the mark, the picture is turned on the way in and out. Weights follow the same mark.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from immich_ml_metal.onnx_mlx.ops.call import Call, Operator, Table, Unsupported
from immich_ml_metal.types import Tensor

Pads = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Window:
    """A window's geometry, one entry for each spatial axis.

    Attributes:
        pads: elements added before and after each axis.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    pads: Pads

    @property
    def reach(self) -> list[int]:
        """Elements from the first to the last that the window touches."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]


def read_window(call: Call, kernel: Sequence[int], size: Sequence[int]) -> Window:
    """The window of a node over a picture of `size`, with `auto_pad` resolved."""
    ones = [1] * len(kernel)
    stride = call.integers("strides", ones)
    dilation = call.integers("dilations", ones)
    flat = call.integers("pads", [0] * 2 * len(kernel))
    pads = list(zip(flat[: len(kernel)], flat[len(kernel) :], strict=True))
    window = Window(list(kernel), stride, dilation, pads)
    mode = call.text("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = [
            _same(*axis, upper=mode == "SAME_UPPER")
            for axis in zip(size, stride, window.reach, strict=True)
        ]
        return Window(window.kernel, stride, dilation, pads)
    return window


def _same(size: int, stride: int, reach: int, *, upper: bool) -> tuple[int, int]:
    """Pads that make the output as long as the input divided by the stride, rounded up."""
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if upper else (more, less)


def to_last(x: mx.array) -> mx.array:
    """Move channels from the second axis to the last."""
    return mx.moveaxis(x, 1, -1)


def to_second(x: mx.array) -> mx.array:
    """Move channels from the last axis to the second."""
    return mx.moveaxis(x, -1, 1)


def conv(call: Call, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Conv: weighted sums under the window.

    Weights are (O, I / group, ...), with `nhwc` (O, ..., I / group).
    """
    if not call.nhwc:
        x, weight = to_last(x), to_last(weight)
    window = read_window(call, weight.shape[1:-1], x.shape[1:-1])
    out = mx.conv_general(
        x,
        weight,
        stride=window.stride,
        padding=([before for before, _ in window.pads], [after for _, after in window.pads]),
        kernel_dilation=window.dilation,
        groups=call.integer("group", 1),
    )
    out = out if bias is None else out + bias
    return out if call.nhwc else to_second(out)


def conv_transpose(
    call: Call, x: mx.array, weight: mx.array, bias: mx.array | None = None
) -> mx.array:
    """ConvTranspose: each pixel spreads under the window; weights are (I, O / group, ...)."""
    x = x if call.nhwc else to_last(x)
    window = read_window(call, weight.shape[2:], x.shape[1:-1])
    extra = call.integers("output_padding", [0] * len(window.kernel))
    out = _spread(call, x, weight, window, extra)
    crops = [
        _crop(call, window, *axis) for axis in enumerate(zip(x.shape[1:-1], extra, strict=True))
    ]
    out = out[(slice(None), *crops)]
    out = out if bias is None else out + bias
    return out if call.nhwc else to_second(out)


def _spread(
    call: Call, x: mx.array, weight: mx.array, window: Window, extra: list[int]
) -> mx.array:
    """All that the windows touch, and `extra` zeros: a convolution over pixels set apart."""
    groups = call.integer("group", 1)
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    kernel = weight.reshape(groups, inputs, outputs, *window.kernel)
    kernel = mx.moveaxis(kernel.swapaxes(1, 2), 2, -1)  # (G, O, ..., I)
    around = [reach - 1 for reach in window.reach]
    return mx.conv_general(
        x,
        kernel.reshape(groups * outputs, *window.kernel, inputs),
        padding=(around, [pad + more for pad, more in zip(around, extra, strict=True)]),
        kernel_dilation=window.dilation,
        input_dilation=window.stride,
        groups=groups,
        flip=True,
    )


def _crop(call: Call, window: Window, axis: int, lengths: tuple[int, int]) -> slice:
    """The part of an axis to keep: `pads` name what to cut, or the wanted length does."""
    length, extra = lengths
    stride, (before, after) = window.stride[axis], window.pads[axis]
    whole = (length - 1) * stride + window.reach[axis] + extra
    mode, wanted = call.text("auto_pad", "NOTSET"), call.integers("output_shape")
    if wanted or mode.startswith("SAME"):
        total = whole - (wanted[axis] if wanted else length * stride)
        before = total // 2 if mode == "SAME_UPPER" else total - total // 2
        after = total - before
    return slice(before, whole - after)


def _pool(reduce: Callable[[mx.array, Call, Window, list[int]], mx.array]) -> Operator:
    def apply(call: Call, x: mx.array) -> mx.array:
        x = x if call.nhwc else to_last(x)
        size = list(x.shape[1:-1])
        window = read_window(call, call.integers("kernel_shape"), size)
        out = reduce(x, call, _ceil(call, window, size), size)
        return out if call.nhwc else to_second(out)

    return Operator(apply)


def _ceil(call: Call, window: Window, size: Sequence[int]) -> Window:
    """With `ceil_mode`, a last window may hang over the end: pad until it fits.

    It must start inside the picture or its leading pad, so a window in the tail is dropped.
    """
    if not call.integer("ceil_mode"):
        return window
    pads = []
    for axis, (before, after) in enumerate(window.pads):
        stride, reach = window.stride[axis], window.reach[axis]
        steps = -(-(size[axis] + before + after - reach) // stride)
        if steps * stride >= size[axis] + before:
            steps -= 1
        pads.append((before, steps * stride + reach - size[axis] - before))
    return Window(window.kernel, window.stride, window.dilation, pads)


def _windows(x: mx.array, window: Window, fill: float) -> mx.array:
    """(N, ..., C) → (N, places..., taps..., C), a view of the padded picture."""
    low = [(max(before, 0), max(after, 0)) for before, after in window.pads]
    if any(before or after for before, after in low):
        x = mx.pad(x, [(0, 0), *low, (0, 0)], constant_values=mx.array(fill, x.dtype))
    x = mx.contiguous(x)
    steps = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
    places = [
        (length - reach) // stride + 1
        for length, reach, stride in zip(x.shape[1:-1], window.reach, window.stride, strict=True)
    ]
    return mx.as_strided(
        x,
        (x.shape[0], *places, *window.kernel, x.shape[-1]),
        (
            steps[0],
            *(step * stride for step, stride in zip(steps[1:-1], window.stride, strict=True)),
            *(step * apart for step, apart in zip(steps[1:-1], window.dilation, strict=True)),
            1,
        ),
    )


def _tap_axes(window: Window) -> list[int]:
    rank = len(window.kernel)
    return list(range(1 + rank, 1 + 2 * rank))


def _max(x: mx.array, call: Call, window: Window, size: list[int]) -> mx.array:
    """MaxPool: the largest value under the window; padding never wins."""
    if len([name for name in call.node.outputs if name]) > 1:
        raise Unsupported("MaxPool that gives positions")
    return _windows(x, window, -math.inf).max(axis=_tap_axes(window))


def _average(x: mx.array, call: Call, window: Window, size: list[int]) -> mx.array:
    """AveragePool: the mean under the window; padding counts only with `count_include_pad`.

    Elements beyond the declared padding (`ceil_mode`) never count.
    """
    total = _windows(x.astype(mx.float32), window, 0.0).sum(axis=_tap_axes(window))
    declared = read_window(call, window.kernel, size).pads
    counted = declared if call.integer("count_include_pad") else [(0, 0)] * len(size)
    counts = np.ones((1,) * (len(size) + 1))
    for axis, (before, _) in enumerate(window.pads):
        inside = (-counted[axis][0], size[axis] + counted[axis][1])
        count = _taps_inside(window, axis, total.shape[1 + axis], before, inside)
        counts = counts * count.reshape([-1 if a == axis else 1 for a in range(len(size) + 1)])
    return (total / mx.array(counts.astype(np.float32))).astype(x.dtype)


def _taps_inside(
    window: Window, axis: int, places: int, before: int, inside: tuple[int, int]
) -> Tensor:
    """How many taps of each window lie inside the picture: (places,)."""
    starts = np.arange(places)[:, None] * window.stride[axis] - before
    taps = starts + np.arange(window.kernel[axis]) * window.dilation[axis]
    counts: Tensor = np.count_nonzero((taps >= inside[0]) & (taps < inside[1]), axis=1)
    return counts


TABLE: Table = {
    "Conv": Operator(conv),
    "ConvTranspose": Operator(conv_transpose),
    "MaxPool": _pool(_max),
    "AveragePool": _pool(_average),
}
