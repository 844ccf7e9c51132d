"""The mlx engine: its thread, its limits, its number format, and a process that ends well."""

import asyncio
import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from doubles.onnx_models import FLOAT, ints, make_model, node, randn, run_ort, save, value
from PIL import Image

from immich_ml_metal.backends.base import AnyModel, Engine
from immich_ml_metal.backends.batcher import Batcher
from immich_ml_metal.backends.mlx import MlxEngine, choose_format
from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.onnx_mlx.formats import NumberFormat
from immich_ml_metal.settings import MIB, Settings
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

KEY = ModelKey(Task.CLIP, Part.VISUAL, "ViT-B-32__openai")
SIDE = 8
CONFIG = {
    "size": SIDE,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    """A picture tower that does a little of everything: 8 px in, a unit vector of 512 out."""
    nodes = [
        node("Conv", "image w", "c", strides=[4, 4]),
        node("Reshape", "c flat", "f"),
        node("MatMul", "f fc", "v"),
        node("ReduceL2", "v", "n", axes=[-1]),
        node("Div", "v n", "embedding"),
    ]
    constants = {"w": randn(8, 3, 4, 4), "fc": randn(32, 512, seed=1), "flat": ints(1, 32)}
    inputs, outputs = value("image", FLOAT, [1, 3, SIDE, SIDE]), value("embedding", FLOAT, [1, 512])
    folder = tmp_path / "visual"
    folder.mkdir()
    graph = save(make_model(nodes, [inputs], [outputs], constants, 17), folder)
    (folder / "preprocess_cfg.json").write_text(json.dumps(CONFIG))
    return ModelFiles(graph, folder, tmp_path)


def picture(seed: int) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return type("Picture", (), {"image": Image.fromarray(pixels)})()


async def load(engine: MlxEngine, files: ModelFiles) -> AnyModel:
    return await engine.device.call(lambda: engine.load(KEY, files))


async def test_twelve_callers_each_get_their_own_vector_from_shared_batches(
    files: ModelFiles,
) -> None:
    engine = MlxEngine(Settings())
    model = await load(engine, files)
    sizes: list[int] = []

    def infer(batch: Any) -> Any:
        sizes.append(len(batch))
        return model.infer(batch)

    batcher: Batcher[Any, Any] = Batcher(infer, name="tower", max_batch=model.max_batch)
    blobs = [model.preprocess(picture(seed)) for seed in range(12)]
    try:
        vectors = await asyncio.gather(*(engine.device.submit(batcher, blob) for blob in blobs))
        await engine.device.call(model.close)
    finally:
        await asyncio.to_thread(engine.device.close)
    for blob, vector in zip(blobs, vectors, strict=True):
        (expected,) = run_ort(files.graph, {"image": blob[None]})
        assert float(vector @ expected[0]) > 0.999999
    assert max(sizes) == 8  # what waits while the device is busy goes together
    assert sum(sizes) == 12


async def test_unloading_returns_the_memory(files: ModelFiles) -> None:
    engine = MlxEngine(Settings())
    gc.collect()  # graphs of other tests, never closed
    before = engine.memory().active_bytes
    try:
        for _ in range(3):
            model = await load(engine, files)
            blob = model.preprocess(picture(0))
            await engine.device.call(partial(model.infer, [blob]))
            assert engine.memory().active_bytes >= before + model.size_bytes
            await engine.device.call(model.close)
            assert engine.memory().active_bytes <= before
            assert engine.memory().cache_bytes == 0
    finally:
        await asyncio.to_thread(engine.device.close)


async def test_a_model_that_mlx_cannot_run_fails_to_load_and_says_why(files: ModelFiles) -> None:
    x = value("image", FLOAT, [1, 3, SIDE, SIDE])
    save(make_model([node("Det", "image", "embedding")], [x], ["embedding"]), files.folder)
    engine = MlxEngine(Settings())
    try:
        with pytest.raises(LoadFailed, match="operator Det has no translation; the cpu engine can"):
            await load(engine, files)
    finally:
        await asyncio.to_thread(engine.device.close)


async def test_a_model_whose_side_file_is_missing_leaves_no_weights_behind(
    files: ModelFiles,
) -> None:
    (files.folder / "preprocess_cfg.json").unlink()
    engine = MlxEngine(Settings())
    gc.collect()
    before = engine.memory().active_bytes
    try:
        with pytest.raises(LoadFailed, match=r"preprocess_cfg\.json"):
            await load(engine, files)
        assert engine.memory().active_bytes <= before
    finally:
        await asyncio.to_thread(engine.device.close)


async def test_settings_reach_the_model(files: ModelFiles) -> None:
    engine = MlxEngine(Settings(mlx_dtype="float16"), prepared=False)
    try:
        model = await load(engine, files)
        assert model.max_batch == 8
        assert model.size_bytes == 2 * (8 * 48 + 32 * 512)
        assert not (files.folder / "mlx").exists()
    finally:
        await asyncio.to_thread(engine.device.close)


async def test_weights_are_prepared_unless_told_otherwise(files: ModelFiles) -> None:
    engine = MlxEngine(Settings())
    try:
        await load(engine, files)
        (form,) = (files.folder / "mlx").iterdir()
        assert (form / "model.safetensors").is_file()
    finally:
        await asyncio.to_thread(engine.device.close)


def test_the_memory_that_mlx_keeps_for_reuse_is_bounded() -> None:
    mx.set_cache_limit(7 * MIB)
    engine = MlxEngine(Settings())
    limit_bytes = engine.memory().cache_limit_bytes
    assert mx.set_cache_limit(limit_bytes) == limit_bytes == 512 * MIB  # it gives the one before
    engine.device.close()


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "expected"),
    [
        ("auto", True, NumberFormat.FLOAT16),
        ("auto", False, NumberFormat.FLOAT32),
        ("float32", True, NumberFormat.FLOAT32),
        ("bfloat16", False, NumberFormat.BFLOAT16),
        ("mixed", True, NumberFormat.MIXED),
    ],
)
def test_the_number_format_suits_the_device(
    wanted: str, on_gpu: bool, expected: NumberFormat
) -> None:
    assert choose_format(wanted, on_gpu=on_gpu) == expected


def test_the_engine_tells_its_number_format_device_and_memory() -> None:
    engine = MlxEngine(Settings(mlx_dtype="bfloat16"))
    told = engine.describe()
    assert (told["dtype"], told["on_gpu"], told["max_batch"]) == ("bfloat16", engine.on_gpu, 8)
    assert set(told["memory"]) == {"active_bytes", "cache_bytes", "peak_bytes", "cache_limit_bytes"}
    assert json.loads(json.dumps(told)) == told
    engine.device.close()


def test_the_engine_fits_the_seam() -> None:
    engine: Engine = MlxEngine(Settings())
    assert (engine.name, engine.needs_files, engine.device.width) == ("mlx", True, 1)
    engine.device.close()


PROGRAM = """
import asyncio, sys
from functools import partial
from pathlib import Path
import numpy as np
from immich_ml_metal.backends.mlx import MlxEngine
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

async def main():
    folder = Path(sys.argv[1])
    engine = MlxEngine(Settings())
    key = ModelKey(Task.CLIP, Part.VISUAL, "ViT-B-32__openai")
    files = ModelFiles(folder / "model.onnx", folder, folder)
    model = await engine.device.call(lambda: engine.load(key, files))
    blob = np.ones((3, 8, 8), np.float32)
    for rows in (1, 2, 3):
        await engine.device.call(lambda: model.infer([blob] * rows))
    engine.device.close()

asyncio.run(main())
"""


def test_a_process_that_ran_compiled_functions_ends_with_zero(files: ModelFiles) -> None:
    """MLX aborts at exit if the thread that compiled ends without giving up its streams."""
    command = [sys.executable, "-c", PROGRAM, str(files.folder)]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert (done.returncode, done.stderr) == (0, "")
