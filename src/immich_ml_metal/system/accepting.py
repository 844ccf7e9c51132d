"""Takes connections in only while there is room for them; without any, clients wait outside.

libuv, on which uvloop builds, takes a connection in although no descriptor is left, and closes it:
its client gets an empty answer. Goes when uvloop leaves it in the socket's backlog.
"""

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvicorn

logger = logging.getLogger(__name__)

_AT_ONCE = 64  # between two turns of the event loop
_AGAIN_S = 0.05  # until it is tried again
_QUIET_S = 60.0  # between two log lines about it
_NONE_LEFT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Accepts from one listening socket, for as long as it is open. Event loop only."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        has_room: Callable[[int], bool] = lambda coming: True,
    ) -> None:
        """Begin at once; `has_room` is told how many connections are not yet made."""
        self._listener = listener
        self._make_protocol = make_protocol
        self._has_room = has_room
        self._loop = asyncio.get_running_loop()
        self._coming: set[asyncio.Task[None]] = set()
        self._again: asyncio.TimerHandle | None = None
        self._told_s = float("-inf")
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Take nobody in any more; who waits is refused."""
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener)
        if self._again is not None:
            self._again.cancel()
        self._listener.close()

    async def wait_closed(self) -> None:
        """It is closed at once; uvicorn asks."""

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._has_room(len(self._coming)):
                self._pause("as many are open as files allow")
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in _NONE_LEFT:
                    raise
                self._pause(exc.strerror or str(exc))
                return
            made = self._loop.create_task(self._make(connection))
            self._coming.add(made)
            made.add_done_callback(self._coming.discard)

    async def _make(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:  # as asyncio does for its own servers
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:  # it is gone already
            connection.close()

    def _pause(self, reason: str) -> None:
        self._loop.remove_reader(self._listener)
        self._again = self._loop.call_later(_AGAIN_S, self._go_on)
        if time.monotonic() - self._told_s >= _QUIET_S:
            logger.warning("new connections wait: %s; allow more files with ulimit -n", reason)
            self._told_s = time.monotonic()

    def _go_on(self) -> None:
        self._again = None
        self._loop.add_reader(self._listener, self._accept)


class AcceptingServer(uvicorn.Server):
    """uvicorn with acceptors of ours on the sockets that it is given.

    `has_room` says whether one more connection fits, beside so many that are on their way in.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_room: Callable[[int], bool] = lambda coming: True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and take connections in."""
        assert sockets, "it opens none itself"
        await super().startup([])
        protocol: Callable[[], asyncio.BaseProtocol] = partial(
            cast("Any", self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        taking = [Acceptor(one, protocol, self.has_room) for one in sockets]
        self.servers = cast("list[asyncio.Server]", taking)
