"""HTTP to the worker over its unix socket: one connection per exchange, so that none is ever stale.

httpx was measured first: it adds 2.8 ms to a 500 KB picture and 5 MB to the process.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httptools

Headers = list[tuple[bytes, bytes]]

ERROR_HEADER = b"x-ml-error"  # the worker names the class of its failure in it
_READ_BYTES = 64 * 1024
# Per connection, not about the answer (RFC 9110 §7.6.1); the gateway's own server sets the date.
_HOP_HEADERS = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"date", b"server"}
)

# No descriptors left here, or no place in the worker's backlog: the worker is not lost for that.
_TRY_AGAIN = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EAGAIN, errno.ENOTCONN})
_TRY_AGAIN_S = 0.1


class WorkerLost(Exception):
    """The worker closed the connection, or was not there, before its answer was complete."""


@dataclass(slots=True)
class WorkerAnswer:
    """A complete answer of the worker; `headers` without those of the connection."""

    status: int = 0
    headers: Headers = field(default_factory=list)
    body: bytes = b""

    @property
    def error(self) -> str:
        """The class of its failure, as the worker names it; empty for a good answer."""
        return dict(self.headers).get(ERROR_HEADER, b"").decode("latin-1")


class _AnswerParser:
    """Collects one answer; httptools calls these methods while it is fed."""

    def __init__(self) -> None:
        self.answer = WorkerAnswer()
        self.complete = False
        self._chunks: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in _HOP_HEADERS:
            self.answer.headers.append((name.lower(), value))

    def on_body(self, chunk: bytes) -> None:
        self._chunks.append(chunk)

    def on_message_complete(self) -> None:
        self.answer.body = b"".join(self._chunks)
        self.complete = True


async def get(path: Path, page: str, *, timeout_s: float) -> WorkerAnswer:
    """Ask the worker a question of our own.

    Raises:
        WorkerLost: no complete answer within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await exchange(path, f"GET {page}", [], 0, None)
    except TimeoutError as exc:
        raise WorkerLost(f"no answer to {page} within {timeout_s:g} s") from exc


async def exchange(
    path: Path,
    request: str,
    headers: Headers,
    size_bytes: int,
    body: AsyncIterator[Sequence[bytes | bytearray]] | None,
) -> WorkerAnswer:
    """Send one request (`GET /ping`) to the socket at `path`, and read the whole answer.

    Cancelling closes the connection, which the worker sees as a client that hung up.

    Raises:
        WorkerLost: the connection ended before the answer was complete.
    """
    connection = await _connect(path)
    try:
        await _send(connection, _request(request, headers, size_bytes, body))
        return await _read_answer(connection)
    finally:
        connection.close()


async def _connect(path: Path) -> socket.socket:
    while True:
        try:
            return await _try_to_connect(path)
        except OSError as exc:
            if exc.errno not in _TRY_AGAIN:
                raise WorkerLost(f"cannot connect to the worker: {exc.strerror}") from exc
        await asyncio.sleep(_TRY_AGAIN_S)


async def _try_to_connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, str(path))
        connection.getpeername()  # asyncio takes a full backlog on Linux for a connection
    except BaseException:
        connection.close()
        raise
    return connection


async def _request(
    request: str,
    headers: Headers,
    size_bytes: int,
    body: AsyncIterator[Sequence[bytes | bytearray]] | None,
) -> AsyncIterator[Sequence[bytes | bytearray]]:
    lines = [f"{request} HTTP/1.1".encode(), b"host: worker", b"connection: close"]
    lines += [name + b": " + value for name, value in headers]
    if body is not None:
        lines.append(b"content-length: %d" % size_bytes)
    yield [b"\r\n".join([*lines, b"", b""])]
    if body is not None:
        async for pieces in body:
            yield pieces


async def _send(
    connection: socket.socket, pieces: AsyncIterator[Sequence[bytes | bytearray]]
) -> None:
    """Send as much as the worker takes.

    It may answer before it has read everything; then that answer counts, not the broken pipe. An
    asyncio transport would close both directions: hence the plain socket.
    """
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        async for some in pieces:
            for piece in some:
                await loop.sock_sendall(connection, piece)


async def _read_answer(connection: socket.socket) -> WorkerAnswer:
    loop = asyncio.get_running_loop()
    parser = _AnswerParser()
    try:
        while not parser.complete:
            if not (received := await loop.sock_recv(connection, _READ_BYTES)):
                raise WorkerLost("the worker closed the connection before it answered")
            parser.feed(received)
    except (OSError, httptools.HttpParserError) as exc:
        raise WorkerLost(f"the connection to the worker broke: {exc}") from exc
    return parser.answer
