"""ONNX files on disk: which files a model consists of, and forms derived from them."""
