"""Broken model files and archives: an error of ours that says why, whatever was changed in them."""

import contextlib
import random
import shutil
from pathlib import Path

import pytest
from doubles.tiny_models import CLIP, OCR
from fuzz.storm import mutate

from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import ServiceError
from immich_ml_metal.models.importing import export_models, find_models, import_model, open_tree
from immich_ml_metal.models.shelf import Shelf
from immich_ml_metal.onnx_files.protobuf import NotOnnx
from immich_ml_metal.onnx_files.references import weight_files
from immich_ml_metal.onnx_graph.reader import read
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, Part, Task
from immich_ml_metal.worker.pool import _load_with

WORDS = (
    *(b"\0", b"\xff" * 8, b"\x80" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"../../../etc/passwd"),
    *(b"[" * 3000, b'{"a":' * 500, b"null", b"-1", b"1e999", b"NaN", b'"\\ud800"'),
    *(b"PK\x05\x06", b"PK\x01\x02"),
)
SEEDS = [0, pytest.param(1, marks=pytest.mark.soak)]
COUNT = {0: 60, 1: 2_000}
TEXTUAL = model_key(CLIP, Task.CLIP, Part.TEXTUAL)


@pytest.fixture
def models_copy(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models, tmp_path / "models"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("file", ["textual/model.onnx", "textual/tokenizer.json", "config.json"])
def test_a_broken_file_of_a_model_is_a_failed_load(seed: int, file: str, models_copy: Path) -> None:
    root, rng = models_copy / "clip" / CLIP, random.Random(seed)
    files = ModelFiles(root / "textual/model.onnx", root / "textual", root)
    engine, right = OrtEngine(Settings(models_dir=models_copy)), (root / file).read_bytes()
    refused = 0
    for _ in range(COUNT[seed]):
        (root / file).write_bytes(mutate(rng, right, WORDS))
        try:
            _load_with(engine, TEXTUAL, files).close()
        except ServiceError:
            refused += 1
    assert refused > COUNT[seed] // 4
    engine.device.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_broken_bytes_are_no_graph(seed: int, models: Path, tmp_path: Path) -> None:
    rng, path = random.Random(seed), tmp_path / "model.onnx"
    right = (models / f"ocr/{OCR}/detection/model.onnx").read_bytes()
    for _ in range(5 * COUNT[seed]):
        path.write_bytes(mutate(rng, right, WORDS))
        for look in (weight_files, read):
            with contextlib.suppress(NotOnnx, ServiceError):
                look(path)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_broken_archive_imports_nothing_or_what_is_whole(
    seed: int, models: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.zip"
    export_models(Shelf(models, "main"), [OCR], whole)
    rng, right, broken = random.Random(seed), whole.read_bytes(), tmp_path / "broken.zip"
    for number in range(COUNT[seed]):
        broken.write_bytes(mutate(rng, right, WORDS))
        shelf = Shelf(tmp_path / f"shelf{number}", "main")
        try:
            with open_tree(broken) as tree:
                for found in find_models(tree):
                    import_model(shelf, found)
        except ServiceError:
            pass
        outside = {path.name for path in tmp_path.iterdir()} - {"whole.zip", "broken.zip"}
        assert all(name.startswith("shelf") for name in outside)
