"""The number formats in which a network can run."""

from enum import StrEnum

import mlx.core as mx


class NumberFormat(StrEnum):
    """Which numbers a network computes with, fastest first.

    `mixed` multiplies matrices and convolves in float16 and does everything else in float32: for
    networks whose sums (the residual stream above all) leave the range of float16 or lose too much
    in it. See `passes.mixed`.
    """

    FLOAT16 = "float16"
    MIXED = "mixed"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @property
    def dtype(self) -> mx.Dtype:
        """The floating type of values that no pass has given another."""
        return _DTYPES[self]


_DTYPES = {
    NumberFormat.FLOAT16: mx.float16,
    NumberFormat.MIXED: mx.float32,
    NumberFormat.BFLOAT16: mx.bfloat16,
    NumberFormat.FLOAT32: mx.float32,
}
