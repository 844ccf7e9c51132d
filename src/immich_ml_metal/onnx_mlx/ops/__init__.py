"""The operator table: what each ONNX operator means on MLX arrays."""

from immich_ml_metal.onnx_mlx.ops import (
    attention,
    elementwise,
    index,
    linear,
    norm,
    reduce,
    resize,
    shape,
    window,
)
from immich_ml_metal.onnx_mlx.ops.call import Table

OPERATORS: Table = {
    **elementwise.TABLE,
    **linear.TABLE,
    **attention.TABLE,
    **norm.TABLE,
    **reduce.TABLE,
    **shape.TABLE,
    **index.TABLE,
    **window.TABLE,
    **resize.TABLE,
}
# Results that follow from lengths and constants alone are computed by NumPy (`host`).
HOST_ONLY = frozenset({"ConstantOfShape", "Range", "NonZero", "EyeLike"})
