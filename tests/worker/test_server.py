import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import numpy as np
import pytest
from doubles.engines import FakeEngine, FakeModel, FakeStore, Gate, every_part
from doubles.live import ALL, TEXTUAL, VISUAL, face_entries, numbers, predict, serve, text_entries
from doubles.tiny_models import DIM, draw_faces, draw_text

from immich_ml_metal.settings import Settings
from immich_ml_metal.worker.compose import build_app
from immich_ml_metal.worker.server import create_app

PHOTO = draw_faces((160, 160), (400, 240))
PAGE = draw_text("abc", "cb")


# -- the small routes ------------------------------------------------------------------------------


def test_ping_is_bare_text_and_the_root_names_the_service(service: str) -> None:
    ping = httpx.get(f"{service}/ping")
    assert (ping.status_code, ping.text) == (200, "pong")
    assert ping.headers["content-type"] == "text/plain; charset=utf-8"
    root = httpx.get(f"{service}/")
    assert root.json() == {"message": "Immich ML"}


@pytest.mark.parametrize(
    ("method", "path", "status", "detail"),
    [
        ("GET", "/nowhere", 404, "Not Found"),
        ("GET", "/predict", 405, "Method Not Allowed"),
        ("POST", "/ping", 405, "Method Not Allowed"),
    ],
)
def test_other_paths_and_methods_are_refused_in_json(
    service: str, method: str, path: str, status: int, detail: str
) -> None:
    answer = httpx.request(method, service + path)
    assert (answer.status_code, answer.json()) == (status, {"detail": detail})


def test_health_tells_engines_models_and_progress(service: str) -> None:
    predict(service, VISUAL, image=PHOTO)
    health = httpx.get(f"{service}/health").json()
    assert health["status"] == "ok"
    assert health["engines"]["ocr/recognition"] == "cpu"
    assert len(health["engines"]) == 6
    assert ("ViT-B-32__openai", "visual") in {(m["model"], m["part"]) for m in health["models"]}
    assert health["loading"] == []
    assert health["in_flight"] == 0
    assert health["progress"] > 0
    assert health["uptime_s"] >= 0


def test_metrics_count_requests_and_name_engines(service: str) -> None:
    predict(service, VISUAL, image=PHOTO)
    answer = httpx.get(f"{service}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    for line in (
        'immich_ml_requests_total{status="200",task="clip"}',
        'immich_ml_engine_info{engine="cpu",task="clip/visual"} 1.0',
        'immich_ml_queue_depth{device="cpu"} 0.0',
        "immich_ml_in_flight 0.0",
        'immich_ml_stage_seconds_count{stage="read",task="request"}',
    ):
        assert line in answer.text


def stages(answer: httpx.Response) -> dict[str, float]:
    parts = (part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    return {name: float(ms) for name, ms in parts}


def test_an_answer_tells_how_long_each_of_its_own_stages_took(service: str) -> None:
    predict(service, ALL, image=PHOTO)
    started_s = time.perf_counter()
    told = stages(predict(service, VISUAL, image=PHOTO))
    elapsed_ms = 1000 * (time.perf_counter() - started_s)
    assert list(told) == ["read", "decode", "preprocess", "queue", "infer", "postprocess"]
    assert 0 < told["infer"] <= sum(told.values()) <= elapsed_ms
    assert list(stages(predict(service, TEXTUAL, text="red sea"))) == [
        *("read", "preprocess", "queue", "infer", "postprocess")
    ]
    assert "server-timing" not in predict(service, VISUAL, image=b"no picture").headers


# -- answers ---------------------------------------------------------------------------------------


def test_a_picture_becomes_a_unit_vector_as_a_string(service: str) -> None:
    answer = predict(service, VISUAL, image=PHOTO)
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["clip", "imageHeight", "imageWidth"]
    assert (body["imageWidth"], body["imageHeight"]) == (640, 480)
    vector = numbers(body["clip"])
    assert len(vector) == DIM
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert " " not in body["clip"]


def test_a_text_becomes_a_vector_and_nothing_else(service: str) -> None:
    body = predict(service, TEXTUAL, text="a photo of dog").json()
    assert list(body) == ["clip"]
    other = predict(service, TEXTUAL, text="red sea").json()
    assert len(numbers(body["clip"])) == DIM
    assert body != other


def test_faces_are_found_and_told_apart(service: str) -> None:
    body = predict(service, face_entries(), image=PHOTO).json()
    first, second = body["facial-recognition"]
    assert first["boundingBox"] == {"x1": 128.0, "y1": 128.0, "x2": 192.0, "y2": 192.0}
    assert second["boundingBox"] == {"x1": 368.0, "y1": 208.0, "x2": 432.0, "y2": 272.0}
    assert first["score"] > second["score"] > 0.7
    assert len(numbers(first["embedding"])) == DIM
    assert first["embedding"] != second["embedding"]


def test_a_face_of_a_reduced_picture_is_told_in_its_own_pixels(service: str) -> None:
    large = draw_faces((320, 320), size=(1280, 960))  # the square is 32 px on the canvas
    (face,) = predict(service, face_entries(), image=large).json()["facial-recognition"]
    assert face["boundingBox"] == {"x1": 288.0, "y1": 288.0, "x2": 352.0, "y2": 352.0}


def test_text_is_read_in_order(service: str) -> None:
    body = predict(service, text_entries(), image=PAGE).json()["ocr"]
    assert body["text"] == ["abc", "cb"]
    assert len(body["box"]) == 16
    assert all(0 <= value <= 1 for value in body["box"])
    assert all(score > 0.9 for score in body["textScore"])
    assert all(score > 0.5 for score in body["boxScore"])


def test_nothing_found_is_empty_and_200(service: str) -> None:
    blank = draw_text(size=(64, 64))
    body = predict(service, face_entries() | text_entries(), image=blank).json()
    assert body["facial-recognition"] == []
    assert body["ocr"] == {"box": [], "text": [], "boxScore": [], "textScore": []}


def test_detection_alone_answers_boxes_scores_and_landmarks(service: str) -> None:
    entries = face_entries() | text_entries()
    for task in entries.values():
        del task["recognition"]
    body = predict(service, entries, image=PHOTO).json()
    faces = body["facial-recognition"]
    assert faces["boxes"][0] == [128.0, 128.0, 192.0, 192.0]
    assert len(faces["scores"]) == 2
    assert np.shape(faces["landmarks"]) == (2, 5, 2)
    assert set(body["ocr"]) == {"boxes", "scores"}
    assert np.shape(body["ocr"]["boxes"])[1:] == (4, 2)


def test_several_tasks_at_once_answer_as_each_alone(service: str) -> None:
    together = predict(service, ALL, image=PHOTO).json()
    for entries in (VISUAL, face_entries(), text_entries()):
        alone = predict(service, entries, image=PHOTO).json()
        assert {key: together[key] for key in alone} == alone


def test_the_order_of_keys_does_not_matter(service: str) -> None:
    entries = face_entries()
    entries["facial-recognition"] = dict(reversed(entries["facial-recognition"].items()))
    answers = [predict(service, e, image=PHOTO).content for e in (entries, face_entries())]
    assert answers[0] == answers[1]


def test_an_image_wins_over_a_text(service: str) -> None:
    both = predict(service, VISUAL, image=PHOTO, text="cat")
    assert both.content == predict(service, VISUAL, image=PHOTO).content


def test_options_of_a_request_are_its_own(service: str) -> None:
    strict, loose = face_entries(0.98), face_entries(0.6)
    counts = [
        len(predict(service, entries, image=PHOTO).json()["facial-recognition"])
        for entries in (loose, strict, loose)
    ]
    assert counts == [2, 1, 2]


def test_the_fused_exports_of_revision_v2_answer_the_same(service: str, models: Path) -> None:
    settings = Settings(models_dir=models, offline=True, model_revision="v2")
    with serve(build_app(settings)) as fused:
        for image in (PHOTO, PAGE):
            one, two = (predict(url, ALL, image=image).json() for url in (service, fused))
            assert numbers(one["clip"]) == pytest.approx(numbers(two["clip"]), abs=1e-5)
            assert one["ocr"]["text"] == two["ocr"]["text"]
            for a, b in zip(one["facial-recognition"], two["facial-recognition"], strict=True):
                assert a["boundingBox"] == b["boundingBox"]
                assert numbers(a["embedding"]) == pytest.approx(numbers(b["embedding"]), abs=1e-4)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "image", "text", "status", "words"),
    [
        ("nope", None, "cat", 422, "entries is not JSON"),
        ("[]", None, "cat", 422, "invalid entries"),
        ("{}", None, "cat", 422, "No model task requested."),
        ({"clip": {"textual": {}}}, None, "cat", 422, "modelName"),
        ({"video": {}}, None, "cat", 422, "video"),
        ({"clip": {"textual": {"modelName": "Vit"}}}, None, "cat", 422, "Vit"),
        ({"clip": {"textual": {"modelName": "buffalo_s"}}}, None, "cat", 422, "buffalo_s"),
        (TEXTUAL, None, None, 400, "Either image or text must be provided"),
        (TEXTUAL, None, "", 400, "Either image or text must be provided"),
        (TEXTUAL, PHOTO, None, 400, "clip textual needs text, the request has an image"),
        (VISUAL, None, "cat", 400, "clip visual needs image, the request has a text"),
        (VISUAL, b"", None, 400, "the image is empty"),
        (VISUAL, b"not a picture", None, 400, "cannot be decoded"),
        (VISUAL, PHOTO[:200], None, 400, "cannot be decoded"),
        (VISUAL, bytes(2_000_001), None, 413, "2000001 bytes, limit 2000000"),
        ("0" * 65_537, None, "cat", 422, "'entries' has 65537 bytes, limit 65536"),
        (
            {"facial-recognition": {"recognition": {"modelName": "buffalo_s"}}},
            PHOTO,
            None,
            400,
            "depends on output of (detection, facial-recognition)",
        ),
        (
            {"clip": {"visual": {"modelName": "ViT-L-14__openai"}}},
            PHOTO,
            None,
            503,
            "on disk and downloads are switched off; fetch immich-app/ViT-L-14__openai",
        ),
    ],
)
def test_a_request_that_cannot_be_answered_gets_its_status_and_the_reason(
    service: str, entries: Any, image: bytes | None, text: str | None, status: int, words: str
) -> None:
    answer = predict(service, entries, image=image, text=text)
    assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text


def post(url: str, **kw: Any) -> httpx.Response:
    return httpx.post(f"{url}/predict", timeout=30, **kw)


def test_entries_must_be_there_and_must_be_a_text(service: str) -> None:
    for kw, words in (
        ({}, "'entries' is missing"),
        ({"json": {"entries": "{}"}}, "'entries' is missing"),
        ({"data": {"text": "cat"}}, "'entries' is missing"),
        ({"files": {"entries": b"{}"}}, "'entries' is a file"),
    ):
        answer = post(service, **kw)
        assert answer.status_code == 422
        assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"x", "multipart/form-data"),
        (b"not a part", "multipart/form-data; boundary=b"),
        (b"--b\r\nno header\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (
            b"--b\r\nContent-Disposition: form-data\r\n\r\n1\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
        ),
    ],
)
def test_a_form_that_breaks_its_format_is_422(service: str, content: bytes, kind: str) -> None:
    answer = post(service, content=content, headers={"content-type": kind})
    assert answer.status_code == 422
    assert "form" in answer.json()["detail"]


# Starlette forgets the part that is not whole; its memory goes with the last reference.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_form_cut_short_is_never_answered_with_success(service: str) -> None:
    request = httpx.Request(
        "POST", service, data={"entries": json.dumps(VISUAL)}, files={"image": PHOTO}
    )
    body = request.read()
    for length in (len(body) - 30, len(body) // 2, 60):
        answer = post(
            service,
            content=body[:length],
            headers={"content-type": request.headers["content-type"]},
        )
        assert answer.status_code in (400, 422), length
        assert answer.json()["detail"]


def test_an_image_field_that_is_no_file_is_taken_for_its_bytes(service: str) -> None:
    answer = post(service, data={"entries": json.dumps(VISUAL), "image": "text"})
    assert answer.status_code == 400
    assert "cannot be decoded" in answer.json()["detail"]


def test_a_urlencoded_form_is_accepted_for_texts(service: str) -> None:
    answer = post(service, data={"entries": json.dumps(TEXTUAL), "text": "red sea"})
    assert answer.request.headers["content-type"] == "application/x-www-form-urlencoded"
    assert numbers(answer.json()["clip"])


def chunks(size: int, count: int) -> Iterator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="blob"\r\n\r\n'
    for _ in range(count):
        yield bytes(size)
    yield b"\r\n--b--\r\n"


def test_a_chunked_upload_over_the_limit_is_stopped(service: str) -> None:
    answer = post(
        service,
        content=chunks(100_000, 32),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert answer.status_code == 413
    assert "limit 2000000" in answer.json()["detail"]
    assert "content-length" not in answer.request.headers


def test_a_chunked_upload_within_the_limit_is_read(service: str) -> None:
    request = httpx.Request(
        "POST", service, data={"entries": json.dumps(VISUAL)}, files={"image": PHOTO}
    )
    body = request.read()
    answer = post(
        service,
        content=(body[at : at + 500] for at in range(0, len(body), 500)),
        headers={"content-type": request.headers["content-type"]},
    )
    assert answer.content == predict(service, VISUAL, image=PHOTO).content


def test_a_length_over_the_limit_is_refused_before_the_body_comes(service: str) -> None:
    with connect(service) as sock:
        sock.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 999999999\r\n\r\n"
        )
        assert sock.recv(64).startswith(b"HTTP/1.1 413 ")


# -- the app around a fake engine ------------------------------------------------------------------


class VectorEngine(FakeEngine):
    """Its models answer a vector of ones; `prepare` is called before each item."""

    prepare: Callable[[], None] = staticmethod(lambda: None)

    def load(self, key: Any, files: Any) -> Any:
        model, engine = super().load(key, files), self

        class Vectors(FakeModel):
            def preprocess(self, item: Any) -> Any:
                engine.prepare()
                return super().preprocess(item)

            def postprocess(self, raw: Any, item: Any) -> Any:
                super().postprocess(raw, item)
                return np.ones(3, np.float32)

        self.models[-1] = Vectors(**self._model)
        assert model is not self.models[-1]
        return self.models[-1]


class Rig:
    """A service around fakes: requests for CLIP vectors of texts reach the fake model."""

    def __init__(self, **settings: Any) -> None:
        self.gate = Gate(is_open=True)
        self.engine = VectorEngine(gate=self.gate, max_batch=1)
        self.store = FakeStore()
        self.app = create_app(Settings(**settings), every_part(self.engine), self.store)

    @property
    def model(self) -> FakeModel:
        return self.engine.models[-1]

    async def ask(self, client: httpx.AsyncClient, text: str = "cat") -> httpx.Response:
        return await client.post(
            "/predict", data={"entries": json.dumps(TEXTUAL), "text": text}, timeout=30
        )


@pytest.fixture
def caught(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


async def health(client: httpx.AsyncClient) -> dict[str, Any]:
    body: dict[str, Any] = (await client.get("/health")).json()
    return body


async def until_health(
    client: httpx.AsyncClient, condition: Callable[[dict[str, Any]], bool]
) -> None:
    async with asyncio.timeout(30):
        while not condition(await health(client)):
            await asyncio.sleep(0.005)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    with serve(rig.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            yield client


def connect(url: str) -> socket.socket:
    address = urlparse(url)
    return socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=10)


def raw_request(url: str, entries: Any, text: str) -> bytes:
    request = httpx.Request(
        "POST", f"{url}/predict", data={"entries": json.dumps(entries), "text": text}
    )
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return b"POST /predict HTTP/1.1\r\n" + head.encode() + b"\r\n" + request.read()


async def test_ping_and_health_answer_while_a_model_loads(
    rig: Rig, client: httpx.AsyncClient
) -> None:
    rig.engine.gate.close()
    work = asyncio.create_task(rig.ask(client))
    await until_health(client, lambda h: h["loading"] == ["ViT-B-32__openai/textual"])
    assert (await client.get("/ping", timeout=30)).text == "pong"
    assert (await health(client))["in_flight"] == 1
    rig.engine.gate.open()
    assert (await work).json() == {"clip": "[1.0,1.0,1.0]"}


async def test_a_caller_that_hangs_up_frees_the_queue(rig: Rig, client: httpx.AsyncClient) -> None:
    rig.gate.close()
    first = asyncio.create_task(rig.ask(client, "first"))
    await until_health(client, lambda _: rig.gate.waiting == 1)
    sock = connect(str(client.base_url))
    sock.sendall(raw_request(str(client.base_url), TEXTUAL, "second"))
    await until_health(client, lambda h: h["in_flight"] == 2)
    await until_health(client, lambda _: rig.engine.device.queued == 1)
    sock.close()
    await until_health(client, lambda h: h["in_flight"] == 1)
    rig.gate.open()
    assert (await first).status_code == 200
    assert (await rig.ask(client, "third")).status_code == 200
    assert [batch[0].text for batch in rig.model.batches] == ["first", "third"]
    metrics = (await client.get("/metrics")).text
    assert 'immich_ml_requests_total{status="499",task="clip"} 1.0' in metrics
    assert 'immich_ml_requests_total{status="200",task="clip"} 2.0' in metrics


async def test_a_caller_that_hangs_up_in_mid_upload_is_no_error(
    rig: Rig, client: httpx.AsyncClient, caught: pytest.LogCaptureFixture
) -> None:
    sock = connect(str(client.base_url))
    body = raw_request(str(client.base_url), TEXTUAL, "x" * 1000)
    sock.sendall(body[:-500])
    await health(client)
    sock.close()
    assert (await rig.ask(client)).status_code == 200
    assert [r for r in caught.records if r.levelno >= logging.WARNING] == []


async def test_more_requests_than_allowed_at_once_wait_their_turn() -> None:
    rig = Rig(max_concurrent_requests=2, request_threads=8)
    rig.gate.close()
    with serve(rig.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            work = [asyncio.create_task(rig.ask(client, str(row))) for row in range(4)]
            await until_health(client, lambda h: h["in_flight"] == 4)
            await until_health(client, lambda _: rig.gate.waiting + rig.engine.device.queued == 2)
            await asyncio.sleep(0.02)
            assert rig.gate.waiting + rig.engine.device.queued == 2
            rig.gate.open()
            assert [answer.status_code for answer in await asyncio.gather(*work)] == [200] * 4


@pytest.mark.parametrize("count", [1, 3])
async def test_as_many_pictures_are_prepared_at_once_as_there_are_threads(count: int) -> None:
    rig, gate = Rig(request_threads=count), Gate()
    rig.engine.prepare = gate.pass_through
    with serve(rig.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            work = [asyncio.create_task(rig.ask(client, str(row))) for row in range(5)]
            await until_health(client, lambda h: h["in_flight"] == 5 and gate.waiting == count)
            gate.open()
            assert [answer.status_code for answer in await asyncio.gather(*work)] == [200] * 5


async def test_a_request_over_its_time_is_503_and_the_next_one_is_answered() -> None:
    rig = Rig(request_timeout_s=0.2)
    with serve(rig.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await rig.ask(client)).status_code == 200
            rig.gate.close()
            answer = await rig.ask(client)
            assert answer.status_code == 503
            assert answer.json() == {"detail": "no answer within 0.2 s"}
            rig.gate.open()
            assert (await rig.ask(client)).status_code == 200


async def test_our_own_failure_is_logged_once_with_its_traceback_and_the_requests_id(
    rig: Rig, client: httpx.AsyncClient, caught: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, str | None]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from immich_ml_metal.logs import request_id

            if record.levelno >= logging.ERROR:
                seen.append((record.getMessage(), request_id.get()))

    listener = Listener()
    logging.getLogger().addHandler(listener)
    await rig.ask(client)
    rig.model.fail["postprocess"] = ZeroDivisionError("forced")
    answer = await client.post(
        "/predict",
        data={"entries": json.dumps(TEXTUAL), "text": "cat"},
        headers={"X-Request-Id": "abc-1"},
    )
    logging.getLogger().removeHandler(listener)
    assert answer.status_code == 500
    assert answer.json() == {"detail": "internal error: ZeroDivisionError: forced"}
    assert seen == [("request failed status=500", "abc-1")]
    assert any(record.exc_info for record in caught.records if record.levelno == logging.ERROR)


async def test_a_callers_own_mistake_is_not_logged(
    rig: Rig, client: httpx.AsyncClient, caught: pytest.LogCaptureFixture
) -> None:
    answer = await client.post("/predict", data={"entries": "nope"})
    assert answer.status_code == 422
    assert [record for record in caught.records if record.levelno >= logging.WARNING] == []


async def test_texts_are_never_logged(
    rig: Rig, client: httpx.AsyncClient, caught: pytest.LogCaptureFixture
) -> None:
    caught.set_level(logging.DEBUG, logger="immich_ml_metal")
    await rig.ask(client, "grandmother")
    assert "grandmother" not in caught.text


async def test_an_unused_model_is_unloaded_and_loaded_again() -> None:
    rig = Rig(model_ttl_s=0.05)
    with serve(rig.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            await rig.ask(client)
            # it leaves the list first, and is closed in its turn on the device's thread
            await until_health(
                client, lambda h: not h["models"] and rig.engine.models[0].closed == 1
            )
            assert (await rig.ask(client)).status_code == 200
    assert all(model.closed == 1 for model in rig.engine.models)


async def test_a_life_of_zero_keeps_models() -> None:
    rig = Rig(model_ttl_s=0)
    with serve(rig.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            await rig.ask(client)
            await asyncio.sleep(0.1)
            assert len((await health(client))["models"]) == 1
    assert rig.engine.models[0].closed == 1  # at the stop


def test_a_stop_breaks_off_a_download() -> None:
    rig = Rig()
    rig.store.gate.close()
    with serve(rig.app, timeout_graceful_shutdown=1) as url, connect(url) as sock:
        sock.sendall(raw_request(url, TEXTUAL, "cat"))
        while not rig.store.gate.waiting:
            time.sleep(0.005)
    assert rig.store.is_closed
