"""MLX in every number format against ONNX Runtime on the CPU, one network of each family.

The first half runs wherever MLX does, so that a rehearsal on Linux proves the test itself.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from doubles.shared_models import make_shared_models

from immich_ml_metal.types import Graph, Tensor

pytestmark = [pytest.mark.apple, pytest.mark.timeout(600)]
RUNS_ON_LINUX = True

# family: model of the shared cache, part
FAMILIES = {
    "vit": ("clip/ViT-B-32__openai", "visual"),
    "text tower": ("clip/ViT-B-32__openai", "textual"),
    "arcface": ("facial-recognition/buffalo_l", "recognition"),
    "scrfd": ("facial-recognition/buffalo_s", "detection"),
    "ocr reader": ("ocr/PP-OCRv6_tiny", "recognition"),
}
LEAST_COSINE = {"float32": 0.99999, "mixed": 0.9998, "float16": 0.9998, "bfloat16": 0.99}


@pytest.mark.parametrize("number_format", LEAST_COSINE)
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_computes_what_onnx_runtime_computes(
    shared: Path, family: str, number_format: str, report: Callable[[str], None]
) -> None:
    from immich_ml_metal.backends.ort.session import OrtGraph, session_options
    from immich_ml_metal.onnx_mlx.compiled import MlxGraph, Options
    from immich_ml_metal.onnx_mlx.formats import NumberFormat

    model, part = FAMILIES[family]
    path = make_shared_models(shared) / model / part / "model.onnx"
    reference = OrtGraph(path, options=session_options(2))
    feeds = inputs_for(reference)
    graph = MlxGraph(path, Options(NumberFormat(number_format), max_batch=1))
    try:
        found, took_s = graph.run(feeds), []
        for _ in range(3):
            start_s = time.perf_counter()
            graph.run(feeds)
            took_s.append(time.perf_counter() - start_s)
    finally:
        graph.close()
    worst = min(
        cosine(ours, theirs) for ours, theirs in zip(found, reference.run(feeds), strict=True)
    )
    report(f"mlx {number_format:9} {family:11} cosine {worst:.6f}  {min(took_s) * 1000:8.1f} ms")
    assert worst >= LEAST_COSINE[number_format]


def inputs_for(graph: Graph) -> dict[str, Tensor]:
    """Smooth pictures or a short text: noise alone would hide what real inputs show."""
    feeds = {}
    for spec in graph.inputs:
        if spec.dtype.kind in "iu" and spec.dtype != np.uint8:
            tokens = np.zeros((1, *(n or 77 for n in spec.shape[1:])), spec.dtype)
            tokens[0, :4] = (49406, 320, 1929, 49407)
            feeds[spec.name] = tokens
            continue
        shape = (1, *(n or 320 for n in spec.shape[1:]))
        waves = np.sin(np.arange(np.prod(shape), dtype=np.float32) / 37).reshape(shape)
        feeds[spec.name] = waves.astype(np.float32)
    return feeds


def cosine(ours: Tensor, theirs: Tensor) -> float:
    one, two = (np.asarray(values, np.float64).ravel() for values in (ours, theirs))
    assert np.isfinite(one).all()
    lengths = float(np.linalg.norm(one)) * float(np.linalg.norm(two))
    return float(one @ two) / max(lengths, 1e-12)
