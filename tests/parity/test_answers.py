"""Parity against our own engine on small models: itself, and copies that are deliberately wrong."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from doubles.live import serve
from doubles.tiny_models import CLIP, FACES, OCR, draw_faces, draw_text
from onnx import numpy_helper
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from immich_ml_metal.cli import app
from immich_ml_metal.client.calls import ModelNames
from immich_ml_metal.doctor.selftest import run_tests
from immich_ml_metal.settings import Settings
from immich_ml_metal.worker.compose import build_app

MODELS = ["--clip-model", CLIP, "--face-model", FACES, "--ocr-model", OCR]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "faces.png").write_bytes(draw_faces((200, 200), (420, 240)))
    (folder / "one.png").write_bytes(draw_faces((304, 224), (96, 96)))
    (folder / "text.png").write_bytes(draw_text("abc", "cab"))
    coarse = np.random.default_rng(3).integers(0, 256, (5, 9, 3), np.uint8)
    Image.fromarray(coarse).resize((360, 200)).save(folder / "colours.png")
    return folder


@pytest.fixture
def changed(models: Path, tmp_path: Path) -> Path:
    """A copy of the models to spoil."""
    return Path(shutil.copytree(models, tmp_path / "changed"))


def run(ours: str, theirs: str, photos: Path) -> tuple[int, dict[str, Any]]:
    words = [str(photos), "--url", ours, "--against", theirs, "--json", *MODELS]
    result = CliRunner().invoke(app, ["parity", *words])
    assert result.stdout, result.output
    return result.exit_code, json.loads(result.stdout)


def served(folder: Path) -> Any:
    return serve(build_app(Settings(models_dir=folder, offline=True)))


def test_the_engine_against_itself_is_safe_to_switch(service: str, photos: Path) -> None:
    code, report = run(service, service, photos)
    assert (code, report["verdict"]) == (0, "safe to switch")
    assert report["tasks"]["clip image"]["minimum"] == pytest.approx(1, abs=1e-6)
    assert report["tasks"]["faces"]["faces_both"] >= 1
    assert report["tasks"]["text"]["median"] == 1


def test_squash_instead_of_crop_is_found_and_named(
    service: str, photos: Path, changed: Path
) -> None:
    file = changed / "clip" / CLIP / "visual" / "preprocess_cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resize_mode": "squash"}))
    with served(changed) as theirs:
        code, report = run(service, theirs, photos)
    assert (code, report["verdict"]) == (4, "do not mix")
    assert "resize rule differs" in report["cause"]


def test_other_weights_are_found_and_named(service: str, photos: Path, changed: Path) -> None:
    file = changed / "clip" / CLIP / "visual" / "model.onnx"
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 2:
            noise = np.random.default_rng(9).normal(size=values.shape).astype(values.dtype)
            tensor.CopyFrom(numpy_helper.from_array(values + noise, tensor.name))
    onnx.save(graph, file)
    with served(changed) as theirs:
        code, report = run(service, theirs, photos)
    assert (code, report["verdict"]) == (4, "do not mix")
    assert "other weights" in report["cause"]
    assert report["tasks"]["clip text"]["minimum"] == pytest.approx(1, abs=1e-6)


@pytest.fixture
def swapping(service: str) -> Iterator[str]:
    """Our engine behind a proxy that swaps red and blue of every picture."""

    async def ping(_: Request) -> Response:
        return PlainTextResponse("pong")

    async def predict(request: Request) -> Response:
        async with request.form() as form:
            fields = {k: v for k, v in form.items() if isinstance(v, str)}
            upload = form.get("image")
            image = await upload.read() if isinstance(upload, UploadFile) else None
        files = None if image is None else {"image": ("blob", swap(image))}
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{service}/predict", data=fields, files=files)
        return Response(answer.content, answer.status_code, media_type="application/json")

    routes = [Route("/ping", ping), Route("/predict", predict, methods=["POST"])]
    with serve(Starlette(routes=routes)) as url:
        yield url


def swap(image: bytes) -> bytes:
    picture, out = Image.open(io.BytesIO(image)).convert("RGB"), io.BytesIO()
    Image.merge("RGB", picture.split()[::-1]).save(out, "PNG")
    return out.getvalue()


def test_swapped_channels_are_found_and_named(service: str, photos: Path, swapping: str) -> None:
    code, report = run(service, swapping, photos)
    assert (code, report["verdict"]) == (4, "do not mix")
    assert "swaps red and blue" in report["cause"]


def test_doctors_self_test_passes_on_the_engine(service: str) -> None:
    names = ModelNames(CLIP, FACES, OCR)
    tests = run_tests(service, (), names, draw_text("abc"))
    assert [(test.engine, test.error) for test in tests] == [("cpu", "")] * 4
