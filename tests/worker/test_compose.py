import subprocess
import sys
from pathlib import Path

from doubles.live import TEXTUAL
from starlette.testclient import TestClient

from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Part, Task
from immich_ml_metal.worker.compose import build_app


def test_the_portable_engine_serves_every_half(models: Path) -> None:
    with TestClient(build_app(Settings(models_dir=models, offline=True))) as client:
        engines = client.get("/health").json()["engines"]
    halves = {
        Task.CLIP: (Part.VISUAL, Part.TEXTUAL),
        Task.FACES: (Part.DETECTION, Part.RECOGNITION),
        Task.OCR: (Part.DETECTION, Part.RECOGNITION),
    }
    assert set(engines) == {f"{task}/{part}" for task in halves for part in halves[task]}


def test_building_the_app_loads_nothing_and_needs_no_model(tmp_path: Path) -> None:
    with TestClient(build_app(Settings(models_dir=tmp_path / "none", offline=True))) as client:
        assert client.get("/health").json()["models"] == []
        answer = client.post(
            "/predict",
            data={"entries": '{"clip":{"textual":{"modelName":"ViT-B-32__openai"}}}', "text": "a"},
        )
        assert answer.status_code == 503
        assert "immich-ml-metal models pull ViT-B-32__openai" in answer.json()["detail"]


def test_one_process_can_hold_two_apps(models: Path) -> None:
    one, two = (TestClient(build_app(Settings(models_dir=models, offline=True))) for _ in range(2))
    with one, two:
        import json

        form = {"entries": json.dumps(TEXTUAL), "text": "red sea"}
        assert one.post("/predict", data=form).content == two.post("/predict", data=form).content
        assert [len(c.get("/health").json()["models"]) for c in (one, two)] == [1, 1]


def test_a_worker_that_downloads_nothing_imports_no_http_client_and_no_framework() -> None:
    code = "import sys, immich_ml_metal.worker.compose; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {"httpx", "httpx2", "huggingface_hub", "fastapi", "rich"} & set(found.stdout.split())
