"""uvicorn's HTTP protocol, with limits for what a client may send around its body.

Bytes that are neither body nor a complete head are counted, so a connection costs the same memory
whatever arrives on it. Knows nothing about paths or requests.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import cast

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

logger = logging.getLogger(__name__)

HEADER_LIMIT_S = 30.0
MAX_HEAD_BYTES = 32 * 1024  # request line and headers; proxies allow 8 to 32 KB
MAX_URL_BYTES = 8 * 1024
SILENT_S = 0.5  # without a byte, when room is sought for another client
MAX_PIPELINED = 64  # requests that wait behind another one on one connection
_LINGER_S = 1.0  # a refused client may read why; closed with bytes unread, TCP resets it
_LOG_EVERY_S = 60.0


class _Refusals:
    """One line in the log for all refusals of a minute: they cost their sender next to nothing."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._unsaid = 0

    def note(self, status: int, reason: str) -> None:
        now = time.monotonic()
        if now < self._next_s:
            self._unsaid += 1
            return
        logger.warning("no HTTP request: %d %s others_before=%d", status, reason, self._unsaid)
        self._next_s, self._unsaid = now + _LOG_EVERY_S, 0


_refusals = _Refusals()


class PatientProtocol(HttpToolsProtocol):
    """Closes a connection whose request line and headers are not complete in time, or too long.

    uvicorn itself waits for ever, from the connection on and after the first byte of each request,
    and keeps all that comes. Goes when uvicorn has such limits.
    """

    header_limit_s = HEADER_LIMIT_S
    max_connections = 1_000_000  # what files allow is known to the server: `limited`
    url = b""
    _deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0  # since the last piece of a body, the last complete head or request
    _is_refused = False
    _running: RequestResponseCycle | None = None
    _opened_s = _heard_s = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether its client could have sent something, and has not."""
        now_s = self.loop.time()
        is_slow = now_s - self._heard_s >= SILENT_S or now_s - self._opened_s >= self.header_limit_s
        return is_slow and not self.flow.read_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._opened_s = self._heard_s = self.loop.time()
        self._begin_wait()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Parse what came; refuse what is no request, or too long for one."""
        self._unset_keepalive_if_required()
        if not (self._is_refused or self.transport.is_closing()):
            self._heard_s = self.loop.time()
            self._head_bytes += len(data)
            self._feed(data)
            self._check_lengths()

    def on_message_begin(self) -> None:
        """Begin to wait for the headers of a request whose first byte is here."""
        super().on_message_begin()
        self._begin_wait()

    def on_headers_complete(self) -> None:
        """The request is known; its body has its own time limit."""
        self._head_bytes = len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers)
        self._check_lengths()
        self._end_wait()
        if not (self._is_refused or self.parser.should_upgrade()):  # else it is parsed again
            self._head_bytes = 0
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        if not self._is_refused:
            self._head_bytes = 0
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        if not (self._is_refused or self.parser.should_upgrade()):
            self._head_bytes = 0
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Let go of a client that never reads its last answer."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for long; what was not read by now is not waited for."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._end_wait()
        super().connection_lost(exc)
        # uvicorn tells the newest request only; goes when it tells the one that runs.
        if self._running is not None:
            _hang_up(self._running)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _feed(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as exc:
            self._ignore_upgrade(piece[exc.args[0] :])
        except httptools.HttpParserError:
            self._refuse(HTTPStatus.BAD_REQUEST, "this is not HTTP/1.1")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer as HTTP/1.1 a client that offers another protocol (RFC 9110 §7.8).

        The parser stops at such a head and takes no body: a new one gets it without the offer. Goes
        when uvicorn passes the body on.
        """
        if self._is_refused:
            return
        head = self._head_without_offer()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        try:
            self.parser.feed_data(head)
        except httptools.HttpParserUpgrade:  # the method is the offer: CONNECT
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "Method Not Allowed")
        else:
            self._feed(rest)

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            if name == b"connection":
                tokens = (token.strip() for token in value.split(b","))
                kept = b", ".join(one for one in tokens if one.lower() != b"upgrade")
                lines.append(b"connection: " + kept)
            elif name not in (b"upgrade", b"http2-settings"):
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def _check_lengths(self) -> None:
        if self._is_refused:
            return
        if self._deadline is not None and len(self.url) > MAX_URL_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_URI_TOO_LONG,
                f"the request line is over {MAX_URL_BYTES} bytes",
            )
        elif self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"request line and headers are over {MAX_HEAD_BYTES} bytes",
            )
        elif len(self.pipeline) > MAX_PIPELINED:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        """Say why, and read nothing more; a complete request before it is answered first."""
        self._is_refused = True
        self._end_wait()
        _refusals.note(status, reason)
        if self._running is not None and _is_being_answered(self._running):
            self.pipeline.clear()
            self._running.keep_alive = False
            return
        if self._running is not None:  # it waits for the rest of its body
            _hang_up(self._running)
        body = json.dumps({"detail": reason}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.pause_reading()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _make_room(self) -> None:
        """Close connections before files run out: those first that never asked for anything.

        Then the oldest uploads, then those between two requests; a request that is complete is
        never broken off. Some at once, as looking through thousands takes a millisecond.
        """
        for chosen in _DISPENSABLE:
            found = [one for one in _open(self.connections) - {self} if chosen(one)]
            if found:
                found.sort(key=lambda one: one._opened_s)
                for one in found[: 1 + self.max_connections // 32]:
                    one.transport.abort()
                return

    def _begin_wait(self) -> None:
        self._end_wait()
        self._deadline = self.loop.call_later(self.header_limit_s, self.transport.close)

    def _end_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def limited(max_connections: int) -> type[PatientProtocol]:
    """The protocol of a server that may hold so many connections."""
    return type("LimitedProtocol", (PatientProtocol,), {"max_connections": max_connections})


def _hang_up(cycle: RequestResponseCycle) -> None:
    if not cycle.response_complete:
        cycle.disconnected = True
    cycle.message_event.set()


def _is_being_answered(cycle: RequestResponseCycle) -> bool:
    return not cycle.response_complete and (cycle.response_started or not cycle.more_body)


def has_room(connections: Iterable[object], limit: int, coming: int) -> bool:
    """Whether a new connection fits into `limit` beside those that are coming, or another may go.

    Nobody is closed for it who only just came: of many clients at once, each would cost the one
    before it its answer. They wait outside.
    """
    here = _open(connections)
    if len(here) + coming < limit:
        return True
    return not coming and any(chosen(one) for one in here for chosen in _DISPENSABLE)


def _open(connections: Iterable[object]) -> set[PatientProtocol]:
    everyone = cast("Iterable[PatientProtocol]", connections)  # this server makes no others
    return {one for one in everyone if not one.transport.is_closing()}


def _never_asked(connection: PatientProtocol) -> bool:
    return _last_request(connection) is None and connection.is_silent


def _is_uploading(connection: PatientProtocol) -> bool:
    request = _last_request(connection)
    if request is None or not request.more_body or request.response_complete:
        return False
    return connection.is_silent


def _is_idle(connection: PatientProtocol) -> bool:
    request = _last_request(connection)
    return request is not None and request.response_complete


def _last_request(connection: PatientProtocol) -> RequestResponseCycle | None:
    """None before the first one, which uvicorn's own types leave out."""
    return cast("RequestResponseCycle | None", connection.cycle)


_DISPENSABLE = (_never_asked, _is_uploading, _is_idle)
