"""Where numbers are computed: with `onnx_mlx` the only package that imports hardware libraries."""
