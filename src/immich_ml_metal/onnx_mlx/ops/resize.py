"""Resize: nearest by picking, linear and cubic as one small matrix for each axis.

The matrices depend on the lengths alone, so they are made in NumPy, and the work on the device is a
matrix product: no kernel of its own, any coordinate convention, any number of axes.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from immich_ml_metal.onnx_mlx.ops.call import Call, Operator, Table, Unsupported
from immich_ml_metal.types import Tensor

Reals = NDArray[np.float64]
LINEAR_TAPS, CUBIC_TAPS = 2, 4


def resize(
    call: Call,
    x: mx.array,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> mx.array:
    """Resize: each axis to its size, or to its length times its scale, rounded down.

    Opset 10 gives the scales in place of the region, which only crops use.
    """
    if call.opset == 10:
        scales = roi
    if call.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("Resize that keeps the aspect ratio")
    stored = (0, x.ndim - 1, *range(1, x.ndim - 1)) if call.nhwc else range(x.ndim)
    axes = [stored[axis] for axis in call.integers("axes", range(x.ndim))]
    for axis, (length, scale) in zip(axes, _factors(x, axes, scales, sizes), strict=True):
        if length != x.shape[axis] or scale != 1:
            x = _along(call, x, axis, length, scale)
    return x


def upsample(call: Call, x: mx.array, scales: Tensor | None = None) -> mx.array:
    """Upsample (opset 9): Resize by scales, picking from the top-left corner."""
    given = np.asarray(call.node.attributes["scales"]) if scales is None else scales
    return resize(call, x, None, given)


def _factors(
    x: mx.array, axes: Sequence[int], scales: Tensor | None, sizes: Tensor | None
) -> list[tuple[int, float]]:
    """(new length, scale) for each axis."""
    lengths = [x.shape[axis] for axis in axes]
    if sizes is not None and sizes.size:
        return [(int(s), int(s) / length) for s, length in zip(sizes, lengths, strict=True)]
    if scales is None or not scales.size:
        raise Unsupported("Resize without sizes or scales")
    pairs = zip(scales, lengths, strict=True)
    return [(math.floor(length * float(s)), float(s)) for s, length in pairs]


def _along(call: Call, x: mx.array, axis: int, length: int, scale: float) -> mx.array:
    where = _coordinates(call, x.shape[axis], length, scale)
    mode = call.text("mode", "nearest")
    if mode == "nearest":
        return _pick(x, axis, _nearest(call, where, x.shape[axis]))
    matrix = _weights(call, where, x.shape[axis], scale)
    moved = mx.moveaxis(x, axis, -1) @ mx.array(matrix.T.astype(np.float32)).astype(x.dtype)
    return mx.moveaxis(moved, -1, axis)


def _coordinates(call: Call, old: int, new: int, scale: float) -> Reals:
    """Where each new element lies on the old axis."""
    place = np.arange(new, dtype=np.float64)
    match call.text("coordinate_transformation_mode", _default_convention(call)):
        case "half_pixel":
            return (place + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (place + 0.5) / scale - 0.5 if new > 1 else np.zeros(1)
        case "half_pixel_symmetric":
            centre = (old / 2) * (1 - new / (scale * old))
            return centre + (place + 0.5) / scale - 0.5
        case "align_corners":
            return place * (old - 1) / (new - 1) if new > 1 else np.zeros(1)
        case "asymmetric":
            return place / scale
        case other:
            raise Unsupported(f"Resize with coordinates {other!r}")


def _default_convention(call: Call) -> str:
    return "half_pixel" if call.node.op == "Resize" and call.opset > 10 else "asymmetric"


def _nearest(call: Call, where: Reals, old: int) -> NDArray[np.int64]:
    match call.text("nearest_mode", "round_prefer_floor" if call.opset > 10 else "floor"):
        case "round_prefer_floor":
            index = np.ceil(where - 0.5)
        case "round_prefer_ceil":
            index = np.floor(where + 0.5)
        case "ceil":
            index = np.ceil(where)
        case _:
            index = np.floor(where)
    return np.clip(index, 0, old - 1).astype(np.int64)


def _pick(x: mx.array, axis: int, index: NDArray[np.int64]) -> mx.array:
    """Take the elements at `index`; whole multiples are repeated, which needs no look-up."""
    times = len(index) // x.shape[axis]
    if np.array_equal(index, np.repeat(np.arange(x.shape[axis]), max(times, 1))):
        return mx.repeat(x, times, axis=axis)
    return mx.take(x, mx.array(index.astype(np.int32)), axis=axis)


def _weights(call: Call, where: Reals, old: int, scale: float) -> Reals:
    """(new, old) matrix: how much each old element gives to each new one."""
    if call.integer("antialias") and scale < 1:
        raise Unsupported("Resize that smooths while shrinking (antialias)")
    mode = call.text("mode")
    if mode not in ("linear", "cubic"):
        raise Unsupported(f"Resize with mode {mode!r}")
    taps = LINEAR_TAPS if mode == "linear" else CUBIC_TAPS
    first = np.floor(where).astype(np.int64) - (taps // 2 - 1)
    matrix = np.zeros((len(where), old))
    for tap in range(taps):
        distance = np.abs(where - (first + tap))
        weight = 1 - distance if mode == "linear" else _cubic(distance, call)
        inside = (first + tap >= 0) & (first + tap < old)
        if call.integer("exclude_outside"):
            weight = np.where(inside, weight, 0)
        index = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(len(where)), index), weight)
    normalised: Reals = matrix / matrix.sum(1, keepdims=True)
    return normalised


def _cubic(distance: Reals, call: Call) -> Reals:
    """Keys' kernel."""
    a = call.number("cubic_coeff_a", -0.75)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    far = np.where(distance < CUBIC_TAPS / 2, far, 0.0)
    weight: Reals = np.where(distance <= 1, near, far)
    return weight


TABLE: Table = {
    "Resize": Operator(resize, host=frozenset({1, 2, 3})),
    "Upsample": Operator(upsample, host=frozenset({1})),
}
