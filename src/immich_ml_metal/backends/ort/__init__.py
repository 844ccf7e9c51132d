"""ONNX Runtime on the CPU: the portable engine, and the reference for the others."""
