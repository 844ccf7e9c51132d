"""Where numbers are computed: the only package, with `onnx_mlx`, that imports hardware libraries."""
