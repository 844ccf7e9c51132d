"""Core ML through ONNX Runtime."""
