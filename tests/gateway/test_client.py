"""HTTP to the worker: what counts as an answer, what as a lost worker."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from immich_ml_metal.gateway.client import WorkerLost, exchange, get
from immich_ml_metal.gateway.socket_folder import SocketFolder

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder whose sockets can be bound on every system; pytest's own lie too deep on a Mac."""
    with SocketFolder() as folder:
        yield folder.find()


@asynccontextmanager
async def server(folder: Path, behave: Behaviour) -> AsyncIterator[Path]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behave(reader, writer)
        finally:
            writer.close()

    socket = folder / "s"
    listening = await asyncio.start_unix_server(connected, socket)
    try:
        yield socket
    finally:
        listening.close()
        await listening.wait_closed()


def saying(text: bytes) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text)
        await writer.drain()

    return behave


async def test_a_whole_answer_comes_without_the_headers_of_its_connection(tmp_path: Path) -> None:
    text = (
        b"HTTP/1.1 422 Unprocessable\r\nContent-Length: 2\r\nX-A: b\r\nconnection: close\r\n\r\n{}"
    )
    async with server(tmp_path, saying(text)) as socket:
        answer = await get(socket, "/", timeout_s=10)
    assert (answer.status, answer.headers, answer.body) == (422, [(b"x-a", b"b")], b"{}")


async def test_an_answer_in_chunks_is_put_together(tmp_path: Path) -> None:
    text = b"HTTP/1.1 200\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    async with server(tmp_path, saying(text)) as socket:
        assert (await get(socket, "/", timeout_s=10)).body == b"abc"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc",
        b"nonsense\r\n\r\n",
    ],
)
async def test_half_an_answer_is_a_lost_worker(tmp_path: Path, text: bytes) -> None:
    async with server(tmp_path, saying(text)) as socket:
        with pytest.raises(WorkerLost):
            await get(socket, "/", timeout_s=10)


async def test_no_socket_is_a_lost_worker(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match="cannot connect"):
        await get(tmp_path / "nothing", "/", timeout_s=10)


async def test_an_answer_before_the_whole_body_was_read_counts(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[list[bytes]]:
        for _ in range(200):
            yield [bytes(65_536)]

    early = saying(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
    async with server(tmp_path, early) as socket:
        answer = await exchange(socket, "POST /predict", [], 200 * 65_536, pieces())
    assert answer.status == 413


async def test_cancelling_closes_the_connection(tmp_path: Path) -> None:
    arrived, left = asyncio.Event(), asyncio.Event()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        arrived.set()
        assert await reader.read() == b""
        left.set()

    async with server(tmp_path, behave) as socket:
        asking = asyncio.create_task(get(socket, "/", timeout_s=60))
        await arrived.wait()
        asking.cancel()
        await asyncio.wait_for(left.wait(), 30)


async def test_no_answer_in_time_is_a_lost_worker(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with server(tmp_path, silent) as socket:
        with pytest.raises(WorkerLost, match=r"within 0\.05 s"):
            await get(socket, "/", timeout_s=0.05)
