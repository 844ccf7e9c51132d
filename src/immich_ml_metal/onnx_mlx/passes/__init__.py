"""The passes, in the order in which they run. Each takes a program and gives an equivalent one.

Each tells `note` where it might have done something and did not, and why (`match`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from immich_ml_metal.onnx_graph.graph import Program
from immich_ml_metal.onnx_graph.match import Note
from immich_ml_metal.onnx_mlx.passes.activation import fuse_gelu, fuse_hard_swish, fuse_swish
from immich_ml_metal.onnx_mlx.passes.attention import fuse_attention
from immich_ml_metal.onnx_mlx.passes.conv import fold_batch_norm, fold_bias
from immich_ml_metal.onnx_mlx.passes.idle import drop_idle
from immich_ml_metal.onnx_mlx.passes.layer_norm import fuse_layer_norm
from immich_ml_metal.onnx_mlx.passes.layout import lay_out
from immich_ml_metal.onnx_mlx.passes.linear import fuse_linear
from immich_ml_metal.onnx_mlx.passes.transpose import merge_transposes

Pass = Callable[[Program, Note], Program]

PASSES: Mapping[str, Pass] = MappingProxyType(
    {
        "idle": drop_idle,
        "batch_norm": fold_batch_norm,
        "conv_bias": fold_bias,
        "attention": fuse_attention,
        "linear": fuse_linear,
        "layer_norm": fuse_layer_norm,
        "gelu": fuse_gelu,
        "swish": fuse_swish,
        "hard_swish": fuse_hard_swish,
        "layout": lay_out,
        "transposes": merge_transposes,
    }
)
