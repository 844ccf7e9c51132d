"""A compiler from ONNX graphs to MLX; see docs/onnx-mlx.md."""
