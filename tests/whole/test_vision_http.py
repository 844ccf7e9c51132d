"""The Vision engine behind the real app: Immich's requests in, Immich's JSON out."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from doubles.engines import FakeStore, FixedEngines, every_part
from doubles.live import face_entries, predict, serve, text_entries
from doubles.tiny_models import draw_text
from doubles.vision import Double
from doubles.vision_scene import FaceTruth, LineTruth, Scene
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from immich_ml_metal.backends.base import Engine
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.backends.vision.bridge import VisionBridge
from immich_ml_metal.backends.vision.setup import create_vision
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task
from immich_ml_metal.worker.server import create_app

WIDTH, HEIGHT = 400, 300
FACES = {
    "facial-recognition": {
        "detection": {"modelName": "buffalo_l", "options": {"minScore": 0.7}},
        "recognition": {"modelName": "buffalo_l"},
    }
}
TEXT = {
    "ocr": {
        "detection": {
            "modelName": "EN__PP-OCRv5_mobile",
            "options": {"minScore": 0.5, "maxResolution": 736},
        },
        "recognition": {"modelName": "EN__PP-OCRv5_mobile", "options": {"minScore": 0.8}},
    }
}


class Store(FakeStore):
    """Holds the face recogniser and nothing else."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def ensure(self, key: ModelKey) -> ModelFiles:
        if (key.task, key.part) != (Task.FACES, Part.RECOGNITION):
            raise ModelUnavailable(f"{key} is not here")
        return ModelFiles(self._folder / "model.onnx", self._folder, self._folder)


def save_recogniser(folder: Path) -> None:
    """A recogniser whose vector is the crop's mean colour, 512 numbers long."""
    spread = np.tile(np.eye(3, dtype=np.float32), (1, 171))[:, :512]
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 512])],
        [numpy_helper.from_array(spread, "w")],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), folder / "model.onnx")


@contextmanager
def service(folder: Path, double: Double) -> Iterator[httpx.Client]:
    save_recogniser(folder)
    settings, store = Settings(model_ttl_s=0, request_threads=2), Store(folder)
    vision = create_vision(
        settings,
        files_of=store.ensure,
        on_fallback=lambda reason: None,
        bridge=VisionBridge(double.frameworks),
    )
    engines: dict[tuple[Task, Part], Engine] = {
        (Task.FACES, Part.DETECTION): vision,
        (Task.OCR, Part.DETECTION): vision,
        (Task.FACES, Part.RECOGNITION): OrtEngine(settings),
    }
    with (
        serve(create_app(settings, FixedEngines(engines), store)) as url,
        httpx.Client(base_url=url) as client,
    ):
        yield client


def upload() -> bytes:
    """A PNG whose left half is red and whose right half is blue."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2, 0] = 255
    pixels[:, WIDTH // 2 :, 2] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def ask(client: httpx.Client, entries: dict[str, Any]) -> Any:
    form = {"entries": json.dumps(entries)}
    return client.post("/predict", data=form, files={"image": ("blob", upload())})


def test_faces_go_out_with_whole_pixel_boxes_and_vectors_of_their_own_crops(
    tmp_path: Path,
) -> None:
    red, blue = FaceTruth((90, 150), 60, confidence=0.8), FaceTruth((310, 150), 60, turned_deg=90)
    with service(tmp_path, Double(Scene(faces=[red, blue]))) as client:
        body = ask(client, FACES).json()
    found = body["facial-recognition"]
    assert (body["imageWidth"], body["imageHeight"]) == (WIDTH, HEIGHT)
    assert [face["score"] for face in found] == pytest.approx([0.925, 0.85])
    assert list(found[0]["boundingBox"].values()) == np.rint(blue.box).tolist()
    vectors = [json.loads(face["embedding"]) for face in found]
    assert [len(vector) for vector in vectors] == [512, 512]
    assert vectors[0][:3] == pytest.approx([-1, -1, 1], abs=0.02)  # blue, normalised
    assert vectors[1][:3] == pytest.approx([1, -1, -1], abs=0.02)  # red


def test_text_goes_out_in_fractions_and_needs_no_recogniser(tmp_path: Path) -> None:
    corners = [(40, 30), (200, 30), (200, 60), (40, 60)]
    lines = [
        LineTruth(corners, "likely", 0.5),
        LineTruth([(x, y + 90) for x, y in corners], "?", 0.3),
    ]
    with service(tmp_path, Double(Scene(lines=lines))) as client:
        body = ask(client, TEXT).json()["ocr"]
    assert body["text"] == ["likely"]
    assert body["box"] == pytest.approx([0.1, 0.1, 0.5, 0.1, 0.5, 0.2, 0.1, 0.2])
    assert body["boxScore"] == pytest.approx([0.8])
    assert body["textScore"] == pytest.approx([0.85])


@pytest.mark.parametrize(("entries", "empty"), [(FACES, []), (TEXT, None)], ids=["faces", "text"])
def test_nothing_to_see_is_a_full_and_empty_answer(
    tmp_path: Path, entries: dict[str, Any], empty: Any
) -> None:
    with service(tmp_path, Double(Scene())) as client:
        answer = ask(client, entries)
    assert answer.status_code == 200
    nothing: dict[str, list[Any]] = {"box": [], "text": [], "boxScore": [], "textScore": []}
    assert answer.json()[next(iter(entries))] == (nothing if empty is None else empty)


def failing_call(scene: Scene, folder: Path, entries: dict[str, Any]) -> int:
    """The number of the call in which Vision does its work."""
    clean = Double(scene)
    with service(folder, clean) as client:
        ask(client, entries)
    return [call.name for call in clean.calls].index("performRequests_error_")


@pytest.mark.parametrize("fail_by", ["raise", "nil"])
@pytest.mark.parametrize("entries", [FACES, TEXT], ids=["faces", "text"])
def test_a_framework_that_fails_once_is_asked_again(
    tmp_path: Path, entries: dict[str, Any], fail_by: str
) -> None:
    at = failing_call(Scene(), tmp_path, entries)
    with service(tmp_path, Double(Scene(), fail_at=at, fail_by=fail_by)) as client:
        answer = ask(client, entries)
        failures = client.get("/metrics").text
    assert answer.status_code == 200
    assert 'engine_failures_total{cause="error",engine="vision"} 1.0' in failures


@pytest.mark.parametrize("fail_by", ["raise", "nil"])
@pytest.mark.parametrize("entries", [FACES, TEXT], ids=["faces", "text"])
def test_a_framework_that_fails_for_good_without_a_spare_is_a_failed_request(
    tmp_path: Path, entries: dict[str, Any], fail_by: str
) -> None:
    at = failing_call(Scene(), tmp_path, entries)
    with service(tmp_path, Double(Scene(), at, fail_by, for_good=True)) as client:
        answer = ask(client, entries)
    assert answer.status_code == 500
    assert re.search("apple vision|core graphics|NoneType", answer.json()["detail"])


@pytest.mark.parametrize("fail_by", ["raise", "nil"])
def test_immichs_models_answer_faces_and_text_when_vision_fails_for_good(
    tmp_path: Path, models: Path, fail_by: str
) -> None:
    """The same answers as without Vision, and later ones do not ask it again and again."""
    entries = face_entries() | text_entries()
    picture = draw_text("abc")
    settings = Settings(models_dir=models, offline=True, model_ttl_s=0)
    store = ModelStore(settings)
    with serve(create_app(settings, every_part(OrtEngine(settings)), store)) as url:
        expected = predict(url, entries, image=picture).json()
    double = Double(Scene(), fail_at=2, fail_by=fail_by, for_good=True)
    vision = create_vision(
        settings,
        files_of=store.ensure,
        on_fallback=lambda reason: None,
        bridge=VisionBridge(double.frameworks),
    )
    spare = OrtEngine(settings)
    engines: dict[tuple[Task, Part], Engine] = {
        (Task.FACES, Part.DETECTION): vision,
        (Task.OCR, Part.DETECTION): vision,
        (Task.FACES, Part.RECOGNITION): spare,
    }
    with serve(create_app(settings, FixedEngines(engines), store, spare=lambda: spare)) as url:
        for _ in range(5):
            answer = predict(url, entries, image=picture)
            assert answer.status_code == 200, answer.text
            assert answer.json() == expected
        asked = len(double.calls)
        assert predict(url, entries, image=picture).json() == expected
        assert len(double.calls) == asked, "set aside: not asked again"
        told = httpx.get(f"{url}/health").json()["engine_failures"]
    assert {row["engine"] for row in told} == {"vision"}
    assert all(row["set_aside_for_s"] > 0 for row in told)
    assert expected["ocr"]["text"]


def test_a_face_without_landmarks_and_without_the_official_model_is_a_failed_request(
    tmp_path: Path,
) -> None:
    scene = Scene(faces=[FaceTruth((90, 150), 60, has_landmarks=False)])
    with service(tmp_path, Double(scene)) as client:
        answer = ask(client, FACES)
    assert answer.status_code == 503
    assert "buffalo_l/detection is not here" in answer.json()["detail"]


def test_vision_runs_on_its_own_threads_and_never_on_the_event_loop(tmp_path: Path) -> None:
    double = Double(Scene(faces=[FaceTruth((90, 150), 60)]))
    with service(tmp_path, double) as client:
        ask(client, FACES)
    assert double.calls
    assert all(call.thread.startswith("vision") for call in double.calls)
