"""What goes over the wire, asked of one gateway with the default settings."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from doubles.gateway import Service, right_answer, running_gateway
from doubles.timing import until

from immich_ml_metal.gateway import http

LIMIT_BYTES = 1_000_000


# -- a refusal, message by message -----------------------------------------------------------------


async def refuse(receive: http.Receive) -> list[http.Message]:
    sent: list[http.Message] = []

    async def send(message: http.Message) -> None:
        sent.append(message)

    await http.reply_unread(receive, send, 413, "too large", (b"x-a", b"b"))
    return sent


REFUSAL: list[http.Message] = [
    {
        "type": "http.response.start",
        "status": 413,
        "headers": [
            (b"content-type", b"application/json"),
            (b"connection", b"close"),
            (b"x-a", b"b"),
            (b"content-length", b"%d" % len(b'{"detail": "too large"}')),
        ],
    },
    {"type": "http.response.body", "body": b'{"detail": "too large"}', "more_body": True},
    {"type": "http.response.body", "body": b""},
]


async def test_a_refused_client_may_finish_before_its_connection_is_closed() -> None:
    rest = [{"type": "http.request", "body": b"x", "more_body": more} for more in (True, False)]

    async def receive() -> http.Message:
        return rest.pop(0)

    assert await refuse(receive) == REFUSAL
    assert rest == []


async def test_a_refused_client_that_stops_sending_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_LINGER_S", 0.01)

    async def receive() -> http.Message:
        await asyncio.sleep(3600)
        raise AssertionError

    assert await refuse(receive) == REFUSAL


# -- over a socket ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("gateway")
    async with running_gateway(folder, max_image_size_bytes=LIMIT_BYTES) as service:
        await service.ready()
        yield service


async def test_an_answer_of_the_worker_reaches_the_client(service: Service) -> None:
    response = await service.predict(b"a picture")
    assert response.status_code == 200
    assert response.json() == right_answer(b"a picture")
    assert response.headers["content-type"] == "application/json"


async def test_a_request_id_is_kept_and_sent_back(service: Service) -> None:
    response = await service.predict(b"a picture", headers={"x-request-id": "abc123"})
    assert response.headers["x-request-id"] == "abc123"


async def test_a_failure_that_the_worker_reports_is_passed_on_and_not_repeated(
    service: Service,
) -> None:
    before = len(service.journal("start"))
    response = await service.predict(b"[status 500]")
    assert response.status_code == 500
    assert len(service.journal("start")) == before + 1
    health = (await service.client.get("/health")).json()
    assert health["failures"]["by_cause"] == {"the worker answered 500": 1}


async def test_a_client_that_hangs_up_is_hung_up_on_at_the_worker(service: Service) -> None:
    before = len(service.journal("start"))
    task = asyncio.create_task(service.predict(b"[hang]"))
    await service.started(before + 1)
    task.cancel()
    await until(lambda: service.journal("hung-up"))
    queue = service.gateway.dispatcher.queue
    assert (queue.running, queue.waiting) == (0, 0)
    await until(lambda: service.gateway.dispatcher.counts.cancelled == 1)
    assert service.gateway.holding.reception.room.held("memory") == 0


async def test_an_upload_over_the_limit_is_refused_while_it_is_read(service: Service) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(65_536)

    response = await service.client.post("/predict", content=pieces())
    assert response.status_code == 413
    assert response.headers["connection"] == "close"


async def test_an_upload_announced_over_the_limit_is_refused_before_it_is_sent(
    service: Service,
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/", 200, {"message": "Immich ML"}),
        ("GET", "/nowhere", 404, {"detail": "Not Found"}),
        ("HEAD", "/ping", 405, None),
        ("POST", "/ping", 405, {"detail": "Method Not Allowed"}),
        ("GET", "/predict", 405, {"detail": "Method Not Allowed"}),
    ],
)
async def test_other_requests_get_the_official_answers(
    service: Service, method: str, path: str, status: int, body: object
) -> None:
    response = await service.client.request(method, path)
    assert response.status_code == status
    assert body is None or response.json() == body
    allowed = "POST" if path == "/predict" else "GET"
    assert response.headers.get("allow") == (allowed if status == 405 else None)


async def test_ping_is_pong_as_plain_text(service: Service) -> None:
    response = await service.client.get("/ping")
    assert (response.status_code, response.content) == (200, b"pong")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


async def test_ping_that_says_no_says_when_to_ask_again(service: Service) -> None:
    service.gateway.is_draining = True
    try:
        response = await service.client.get("/ping")
    finally:
        service.gateway.is_draining = False
    assert (response.status_code, response.content) == (503, b"unavailable")
    assert response.headers["retry-after"] == "30"


async def test_metrics_of_both_processes_stand_side_by_side(service: Service) -> None:
    await service.predict(b"a picture")
    text = (await service.client.get("/metrics")).text
    assert 'fake_answers_total{process="worker"} 1.0' in text
    line = 'immich_ml_http_requests_total{path="/predict",process="gateway",status="200"} '
    assert line in text


async def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
    answers = await reader.readuntil(b"pong")
    assert answers.index(b"Immich ML") < answers.index(b"pong")
    writer.close()
