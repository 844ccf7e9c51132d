"""What may stand around a body: lengths, offers of other protocols, things that are no HTTP."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from doubles.gateway import Service, gateway_process, right_answer
from doubles.timing import PATIENCE_S, until

from immich_ml_metal.gateway import patient
from immich_ml_metal.gateway.patient import MAX_HEAD_BYTES, MAX_PIPELINED, MAX_URL_BYTES, SILENT_S
from immich_ml_metal.system.footprint import memory_bytes


@asynccontextmanager
async def connection(
    port: int | None,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def ask(service: Service, request: bytes) -> tuple[int, bytes, bytes]:
    """Send bytes as they are; status, head and body of the first answer."""
    async with connection(service.port) as (reader, writer):
        writer.write(request)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), head, await reader.readexactly(length)


def with_head_of(size_bytes: int) -> bytes:
    """A request whose URL and headers count so many bytes."""
    rest = size_bytes - len("/ping") - (4 + 1 + 4) - (4 + 4)
    return b"GET /ping HTTP/1.1\r\nhost: x\r\nlong: " + b"a" * rest + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (with_head_of(MAX_HEAD_BYTES), 200),
        (with_head_of(MAX_HEAD_BYTES + 1), 431),
        (b"GET /" + b"a" * (MAX_URL_BYTES - 1) + b" HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET /" + b"a" * MAX_URL_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414),
        (b"GET /ping HTTP/1.1\r\n" + b"a: b\r\n" * 10_000, 431),
        (b"GET /ping HTTP/1.1\r\na: " + b"b" * 100_000, 431),
        (b"GET /" + b"a" * 100_000, 414),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n", 405),
    ],
)
async def test_what_is_no_request_or_too_long_is_refused_in_json(
    service: Service, request_bytes: bytes, status: int
) -> None:
    answered, head, body = await ask(service, request_bytes)
    assert answered == status
    if status != 200:
        assert b"content-type: application/json" in head
        assert json.loads(body)["detail"]


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"TLS/1.0"])
async def test_a_client_that_offers_another_protocol_is_answered_as_http_1_with_its_body(
    service: Service, offer: bytes
) -> None:
    head = (
        b"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\n"
        b"upgrade: " + offer + b"\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    )
    for framed in (
        b"content-length: 9\r\n\r\na picture",
        b"transfer-encoding: chunked\r\n\r\n4\r\na pi\r\n5\r\ncture\r\n0\r\n\r\n",
    ):
        status, _, body = await ask(service, head + framed)
        assert (status, json.loads(body)) == (200, right_answer(b"a picture"))


async def test_a_connection_goes_on_behind_an_offer_that_was_ignored(service: Service) -> None:
    offer = b"connection: upgrade\r\nupgrade: h2c\r\n"
    async with connection(service.port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n" + offer + b"\r\n")
        await reader.readuntil(b"Immich ML")
        writer.write(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await asyncio.wait_for(reader.readuntil(b"pong"), PATIENCE_S)


@pytest.mark.parametrize(
    "endless",
    [
        b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"trailer: x\r\n" * 20_000,
        b"transfer-encoding: chunked\r\n\r\n1;" + b"extension" * 20_000,
    ],
)
async def test_what_stands_around_the_pieces_of_a_body_has_the_limit_too(
    service: Service, endless: bytes
) -> None:
    status, _, _ = await ask(service, b"POST /predict HTTP/1.1\r\nhost: x\r\n" + endless)
    assert status == 431
    await until(lambda: service.gateway.open_requests == 0)


@pytest.mark.parametrize("wait", [b"", b"[sleep 0.2]"])
async def test_nonsense_behind_a_whole_request_does_not_cost_its_answer(
    service: Service, wait: bytes
) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(wait)
    async with connection(service.port) as (reader, writer):
        writer.write(head + wait + b"nonsense\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer
    assert answer.endswith(json.dumps(right_answer(wait)).encode())


async def test_too_many_requests_behind_one_another_close_the_connection(service: Service) -> None:
    more = b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n" * (MAX_PIPELINED + 900)
    first = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\n[hang]"
    async with connection(service.port) as (reader, writer):
        writer.write(first + more)
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
    await until(lambda: service.gateway.open_requests == 0)


async def test_refusals_leave_one_line_in_the_log_a_minute(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "_refusals", patient._Refusals())
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            await ask(service, b"nonsense\r\n\r\n")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["no HTTP request: 400 this is not HTTP/1.1 others_before=0"]


async def test_more_connections_than_files_leave_the_gateway_and_its_answers_alone(
    tmp_path: Path,
) -> None:
    async with (
        gateway_process(tmp_path, open_files=128, hard_files=128) as gateway,
        AsyncExitStack() as held,
    ):
        upload = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\na"
        for number in range(300):
            opening = connection(gateway.client.base_url.port)
            _, writer = await held.enter_async_context(opening)
            if number % 3 == 0:
                writer.write(upload)
        for _ in range(3):
            assert (await gateway.client.get("/ping", timeout=PATIENCE_S)).text == "pong"
            answer = await gateway.client.post("/predict", content=b"good", timeout=PATIENCE_S)
            assert answer.json() == right_answer(b"good")
        assert gateway.process.returncode is None


async def test_many_more_clients_at_once_than_files_are_all_answered(tmp_path: Path) -> None:
    bodies = [b"%d" % number * 1000 for number in range(500)]
    async with gateway_process(tmp_path, open_files=128, hard_files=128) as gateway:
        posts = (gateway.client.post("/predict", content=body) for body in bodies)
        answers = await asyncio.wait_for(asyncio.gather(*posts), 2 * PATIENCE_S)
    assert [answer.json() for answer in answers] == [right_answer(body) for body in bodies]


async def test_an_upload_that_comes_slowly_is_not_closed_for_another_client(
    tmp_path: Path,
) -> None:
    async with (
        gateway_process(tmp_path, open_files=64, hard_files=64) as gateway,
        AsyncExitStack() as held,
    ):
        port = gateway.client.base_url.port
        reader, writer = await held.enter_async_context(connection(port))
        writer.write(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 30\r\n\r\n")
        for _ in range(30):
            writer.write(b"a")
            await asyncio.sleep(SILENT_S / 5)
            _, other = await held.enter_async_context(connection(port))
            other.write(b"P")
        assert b" 200 " in await asyncio.wait_for(reader.readline(), PATIENCE_S)


async def test_headers_without_end_cost_the_gateway_no_memory(tmp_path: Path) -> None:
    async with gateway_process(tmp_path) as gateway:
        before = memory_bytes(gateway.process.pid) or 0
        async with connection(gateway.client.base_url.port) as (reader, writer):
            writer.write(b"GET /ping HTTP/1.1\r\nX-A: " + b"a" * 20_000_000)
            assert b" 431 " in await asyncio.wait_for(reader.readline(), PATIENCE_S)
            assert (memory_bytes(gateway.process.pid) or 0) - before < 3_000_000
            writer.transport.abort()
