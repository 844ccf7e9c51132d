import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from doubles.live import TEXTUAL, VISUAL, predict, serve
from doubles.odd_engines import odd_mac, write_scenario
from doubles.odd_service_main import PROBE
from doubles.tiny_models import draw_faces, make_models
from starlette.testclient import TestClient

from immich_ml_metal.qualification.children import measure
from immich_ml_metal.qualification.order import Order
from immich_ml_metal.qualification.verdict import Outcome, Verdict
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


def test_an_engine_set_aside_is_used_again_once_a_probe_finds_it_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("immich_ml_metal.worker.second_try.ASIDE_S", 0.2)
    make_models(tmp_path)
    write_scenario(tmp_path, mlx_float16="throw")
    verdicts: list[Verdict] = []

    async def probe(order: Order) -> Verdict:
        verdicts.append(await measure(order, PROBE))
        return verdicts[-1]

    settings = Settings(
        models_dir=tmp_path, state_dir=tmp_path / "state", offline=True, clip_engine="mlx"
    )
    with serve(build_app(settings, odd_mac(tmp_path), probe=probe)) as url:
        picture = draw_faces((200, 200))
        answers = set()

        def ask_until(times_set_aside: range, outcome: Outcome) -> None:
            end_s = time.monotonic() + 60
            while (
                not verdicts or verdicts[-1].outcome is not outcome or not is_aside(times_set_aside)
            ):
                assert time.monotonic() < end_s, verdicts
                answers.add(predict(url, VISUAL, image=picture).text)

        def is_aside(times: range) -> bool:
            failures = httpx.get(f"{url}/health").json()["engine_failures"]
            return bool(failures) and failures[0]["times_set_aside"] in times

        ask_until(range(2, 100), Outcome.FAILED)  # it was found to fail still
        write_scenario(tmp_path)
        ask_until(range(1), Outcome.RIGHT)
    assert len(answers) == 1
    assert "clip" in answers.pop()


def test_a_worker_that_downloads_nothing_imports_no_http_client_and_no_framework() -> None:
    code = "import sys, immich_ml_metal.worker.compose; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {"httpx", "httpx2", "huggingface_hub", "fastapi", "rich"} & set(found.stdout.split())
