"""The page over HTTP: who gets it, with which headers, and what it is told."""

import json
from pathlib import Path

import pytest
from doubles.gateway import Service, running_gateway

from immich_ml_metal.gateway.terminal import models_on_disk
from immich_ml_metal.settings import Settings

UI = Path(__file__).parents[2] / "src/immich_ml_metal/gateway/ui"
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
MAX_PAGE_BYTES = 100_000


async def test_a_browser_is_sent_to_the_page_and_immich_gets_its_json(service: Service) -> None:
    browser = await service.client.get("/", headers=BROWSER)
    assert (browser.status_code, browser.headers["location"]) == (302, "/ui/")
    assert (await service.client.get("/ui")).headers["location"] == "/ui/"
    for accept in ("*/*", "application/json"):
        immich = await service.client.get("/", headers={"accept": accept})
        assert (immich.status_code, immich.json()) == (200, {"message": "Immich ML"})


@pytest.mark.parametrize("name", ["", *sorted(path.name for path in UI.iterdir())])
async def test_every_file_is_served_safely(service: Service, name: str) -> None:
    response = await service.client.get(f"/ui/{name}")
    assert response.status_code == 200
    assert response.content == (UI / (name or "index.html")).read_bytes()
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in response.headers
    again = await service.client.get(
        f"/ui/{name}", headers={"if-none-match": response.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/ui/no", "/ui/../app.py", "/ui/%2e%2e/app.py", "/ui//etc"])
async def test_nothing_else_is_served(service: Service, path: str) -> None:
    assert (await service.client.get(path)).status_code == 404


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    contents = {path.name: path.read_text() for path in UI.iterdir()}
    assert sum(len(content.encode()) for content in contents.values()) <= MAX_PAGE_BYTES
    for name, content in contents.items():
        outside = content.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in outside, name
        assert "https://" not in outside, name
    assert "<script>" not in contents["index.html"]
    assert "style=" not in contents["index.html"]


async def test_a_post_from_another_site_is_refused(service: Service) -> None:
    before = service.gateway.dispatcher.counts.received
    for origin in ("https://evil.example", "null", f"http://localhost:{service.port}"):
        response = await service.predict(b"picture", headers={"origin": origin})
        assert (response.status_code, "Origin" in response.json()["detail"]) == (403, True)
    assert service.gateway.dispatcher.counts.received == before


async def test_a_post_of_the_page_itself_and_of_immich_are_taken(service: Service) -> None:
    own = {"origin": f"http://127.0.0.1:{service.port}"}
    assert (await service.predict(b"picture", headers=own)).status_code == 200
    assert (await service.predict(b"picture")).status_code == 200


async def test_health_is_indented_for_people_only(service: Service) -> None:
    plain = await service.client.get("/health")
    assert b"\n" not in plain.content
    for response in (
        await service.client.get("/health?pretty"),
        await service.client.get("/health", headers=BROWSER),
    ):
        assert response.text.startswith('{\n  "status"')
        assert set(response.json()) == set(plain.json())


async def test_the_state_counts_what_was_answered(service: Service) -> None:
    await service.predict(b'{"ocr":{"detection":{}}}')
    await service.predict(b'{"ocr":{"detection":{}}} [status 500]')
    state = (await service.client.get("/ui/state.json")).json()
    assert state["totals"]["ocr"] == {"answered": 1, "failed": 1}
    assert state["history"]["kinds"]["ocr"]["answered"][-1] <= 1
    assert state["steps"] == {"asked": True, "model": True, "answered": True}
    usual = Settings()
    assert state["models"]["usual"] == {
        "clip": usual.clip_model,
        "facial-recognition": usual.face_model,
        "ocr": usual.ocr_model,
    }
    assert state["addresses"] == [f"http://127.0.0.1:{service.port}"]
    assert json.dumps(state).count("picture") == 0  # nothing of any request


async def test_the_page_shows_the_engines_that_the_worker_told_of(tmp_path: Path) -> None:
    (tmp_path / "health.json").write_text(json.dumps({"engines": {"ocr": "ort"}}))
    async with running_gateway(tmp_path) as service:
        assert (await service.client.get("/ui/state.json")).json()["engines"] == {}
        await service.ready()
        await service.client.get("/health")
        state = (await service.client.get("/ui/state.json")).json()
    assert state["engines"] == {"ocr": {"engine": "ort"}}


def test_models_on_disk_are_those_with_a_graph(tmp_path: Path) -> None:
    (tmp_path / "clip/ViT-B-32__openai/visual").mkdir(parents=True)
    (tmp_path / "clip/half/visual").mkdir(parents=True)
    (tmp_path / "clip/ViT-B-32__openai/visual/model.onnx").write_bytes(b"x")
    (tmp_path / "clip/.DS_Store").write_bytes(b"")
    assert models_on_disk(tmp_path) == {
        "clip": ["ViT-B-32__openai"],
        "facial-recognition": [],
        "ocr": [],
    }
