"""Core ML, MLX and the selection for real."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from immich_ml_metal.backends.coreml.engine import create_coreml
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.backends.selection import OWN_FORMAT, Candidate
from immich_ml_metal.qualification.children import measure
from immich_ml_metal.qualification.order import CHECK, Order
from immich_ml_metal.qualification.verdict import Outcome
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.faces import ARCFACE_TEMPLATE, FaceCrop
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

pytestmark = pytest.mark.apple

KEY = ModelKey(Task.FACES, Part.RECOGNITION, "buffalo_l")


@pytest.mark.anyio
async def test_vision_reads_drawn_words_the_same_every_time() -> None:
    key = ModelKey(Task.OCR, Part.DETECTION, "EN__PP-OCRv5_mobile")
    order = Order(Settings().model_dump_json(), key, Candidate("vision", OWN_FORMAT), CHECK, 130)
    verdict = await measure(order)
    assert verdict.outcome is Outcome.RIGHT, str(verdict)


def test_core_ml_recognises_faces_as_the_cpu_does_and_keeps_its_compiled_form(
    tmp_path: Path,
) -> None:
    from backends.test_coreml import save_model

    files = ModelFiles(save_model(tmp_path, side=112), tmp_path, tmp_path)
    told: list[str] = []
    coreml = create_coreml(Settings(), is_explicit=True, on_fallback=told.append)
    model = coreml.load(KEY, files)
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    crop = FaceCrop(Picture(Image.fromarray(pixels)), ARCFACE_TEMPLATE)
    vectors = model.infer([model.preprocess(crop)] * 3)
    assert told == []
    cpu = OrtEngine(Settings()).load(KEY, files)
    [expected] = cpu.infer([cpu.preprocess(crop)])
    assert all(np.allclose(vector, expected, rtol=1e-2, atol=5e-2) for vector in vectors)
    kept = [path for path in (tmp_path / "coreml").rglob("*") if path.is_file()]
    assert kept, "this ONNX Runtime ignores ModelCacheDirectory"
