"""Arrays on their way into a network and out of it: scaling, and the last look at the values."""

import numpy as np

from immich_ml_metal.errors import InvalidOutput
from immich_ml_metal.types import Bytes, Floats, Tensor


def bgr_planes(pixels: Bytes) -> Floats:
    """(H, W, 3) RGB bytes → (3, H, W) float32 BGR in -1..1, as PP-OCR was trained."""
    planes = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel in range(3):
        np.multiply(pixels[:, :, 2 - channel], np.float32(1 / 127.5), out=planes[channel])
    planes -= 1
    return planes


def check_finite(raw: Tensor, *, name: str) -> Floats:
    """`raw` as float32, or an error: comparing with NaN is false, which looks like *nothing found*.

    Raises:
        InvalidOutput: a value is not finite.
    """
    values = np.asarray(raw, dtype=np.float32)
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise InvalidOutput(f"{name} gave {bad} values that are not finite")
    return values


def check_vector(raw: Tensor, *, name: str, dim: int | None) -> Floats:
    """The vector as (D,) float32, or an error: a NaN or a wrong length poisons the index.

    Args:
        raw: (D,) of any float type.
        name: the model's, for the message.
        dim: the dimension the catalogue gives the model; None takes any.

    Raises:
        InvalidOutput: wrong dimension, or a value that is not finite.
    """
    vector = np.asarray(raw, dtype=np.float32).reshape(-1)
    if dim is not None and vector.size != dim:
        raise InvalidOutput(f"{name} gave {vector.size} values, the model's dimension is {dim}")
    bad = int(np.count_nonzero(~np.isfinite(vector)))
    if bad:
        raise InvalidOutput(f"{name} gave {bad} values that are not finite")
    return vector
