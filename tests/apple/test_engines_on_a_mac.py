"""Core ML, MLX and the selection for real."""

from pathlib import Path

import numpy as np
import pytest
from immich_ml_metal.backends.self_tests import SystemProbe
from PIL import Image

from immich_ml_metal.backends.coreml.engine import create_coreml
from immich_ml_metal.backends.selection import choose_engines, create_engines
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.faces import ARCFACE_TEMPLATE, FaceCrop
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

pytestmark = pytest.mark.apple

KEY = ModelKey(Task.FACES, Part.RECOGNITION, "buffalo_l")


@pytest.mark.parametrize("engine", ["cpu", "vision", "coreml", "mlx"])
def test_every_engine_of_apple_silicon_passes_its_self_test(engine: str) -> None:
    assert SystemProbe().check(engine) is None


def test_the_plan_of_this_mac_is_the_one_that_is_documented() -> None:
    plan = choose_engines(Settings(), SystemProbe())
    assert plan.warnings == (), plan.as_table()
    assert [choice.engine for choice in plan.choices] == [
        *("mlx", "mlx", "vision", "coreml", "vision", "vision")
    ]
    engines = create_engines(plan, Settings())
    assert set(engines) == {"mlx", "vision", "coreml"}


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
    assert np.allclose(vectors[0], vectors[2], rtol=1e-2)
    kept = [path for path in (tmp_path / "coreml").rglob("*") if path.is_file()]
    assert kept, "this ONNX Runtime ignores ModelCacheDirectory"
