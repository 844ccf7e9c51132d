"""Clients that never finish their headers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from doubles.timing import until

from immich_ml_metal.gateway.http import reply
from immich_ml_metal.gateway.patient import PatientProtocol
from immich_ml_metal.system.listen import listen


class Hasty(PatientProtocol):
    header_limit_s = 0.2


async def app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.4)  # longer than headers may take
    await reply(send, 200, [], b"done")


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(app, http=Hasty, lifespan="off", log_config=None, log_level="error")
    server = uvicorn.Server(config)
    sockets = listen("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    serving = asyncio.create_task(server.serve(sockets))
    await until(lambda: server.started)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


async def test_a_connection_without_a_request_is_closed() -> None:
    async with connection() as (reader, _):
        assert await reader.read() == b""


async def test_a_connection_with_half_a_header_is_closed() -> None:
    async with connection() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost:")
        assert await reader.read() == b""


async def test_a_second_request_has_the_limit_too() -> None:
    async with connection() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await reader.read() == b""


async def test_a_request_that_takes_longer_than_its_headers_may_is_answered() -> None:
    async with connection() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"done")
