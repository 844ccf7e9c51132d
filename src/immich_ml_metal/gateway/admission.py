"""How uploads come in: bounded by bytes, never by count, and never refused for want of room.

Room is memory first, then disk. A client that finds neither is not read from until there is some:
its bytes wait in its own socket.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from immich_ml_metal.errors import ImageTooLarge, Overloaded, TimedOut
from immich_ml_metal.gateway.body import Body

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

FORM_BYTES = 64 * 1024  # what a form adds to its picture: entries, boundaries, part headers
CLIENT_TIMEOUT_S = 30.0  # in mid-upload; Immich reads its pictures from a disk and pauses never
# For uploads that wait: some hundred previews in memory, a thousand more on disk. Beyond that
# clients are not read from; nothing is refused.
_MEMORY_BYTES = 64 * 2**20
_SPOOL_BYTES = 1024 * 2**20


class ClientGone(Exception):
    """The client hung up; nobody is left to answer."""


@dataclass(slots=True)
class Lease:
    """A share of the room: where, and how much."""

    place: Literal["memory", "spool"]
    size_bytes: int


class Room:
    """The bytes that waiting uploads may take. First come, first served. Event loop only."""

    def __init__(self, *, memory_bytes: int, spool_bytes: int) -> None:
        self._free = {"memory": memory_bytes, "spool": spool_bytes}
        self._total = dict(self._free)
        self._waiters: deque[tuple[int, asyncio.Future[Lease]]] = deque()

    def __repr__(self) -> str:
        return (
            f"<Room memory={self.held('memory')} spool={self.held('spool')} waiting={self.waiting}>"
        )

    @property
    def waiting(self) -> int:
        """Clients that are not read from yet."""
        return len(self._waiters)

    def held(self, place: Literal["memory", "spool"]) -> int:
        """Bytes taken in `place`."""
        return self._total[place] - self._free[place]

    @property
    def largest_bytes(self) -> int:
        """The largest upload that an empty room takes."""
        return max(self._total.values())

    async def reserve(self, size_bytes: int) -> Lease:
        """Wait for room for `size_bytes`; the caller releases it."""
        if not self._waiters and (lease := self._take(size_bytes)):
            return lease
        turn: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._waiters.append((size_bytes, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted in the same moment
                self.release(turn.result())
            self._grant()  # those behind a caller that gave up
            raise

    def release(self, lease: Lease) -> None:
        """Give a lease back, and let in whoever fits now."""
        self.shrink(lease, 0)

    def shrink(self, lease: Lease, size_bytes: int) -> None:
        """Keep only `size_bytes` of a lease."""
        self._free[lease.place] += lease.size_bytes - size_bytes
        lease.size_bytes = size_bytes
        self._grant()

    def _take(self, size_bytes: int) -> Lease | None:
        if size_bytes <= self._free["memory"]:
            self._free["memory"] -= size_bytes
            return Lease("memory", size_bytes)
        if size_bytes <= self._free["spool"]:
            self._free["spool"] -= size_bytes
            return Lease("spool", size_bytes)
        return None

    def _grant(self) -> None:
        while self._waiters:
            size_bytes, turn = self._waiters[0]
            if not turn.done():
                if (lease := self._take(size_bytes)) is None:
                    return
                turn.set_result(lease)
            self._waiters.popleft()


def make_reception(max_image_bytes: int) -> "Reception":
    """The reception of a service that takes pictures of so many bytes; the largest always fits."""
    largest_bytes = max_image_bytes + FORM_BYTES
    room = Room(memory_bytes=_MEMORY_BYTES, spool_bytes=max(_SPOOL_BYTES, largest_bytes))
    return Reception(room, max_body_bytes=largest_bytes)


class Reception:
    """Takes uploads in under the limits."""

    def __init__(
        self, room: Room, *, max_body_bytes: int, client_timeout_s: float = CLIENT_TIMEOUT_S
    ) -> None:
        if max_body_bytes > room.largest_bytes:
            raise ValueError(f"no room for {max_body_bytes} bytes, only {room.largest_bytes}")
        self.room = room
        self._max_body_bytes = max_body_bytes
        self._client_timeout_s = client_timeout_s

    def check_declared(self, declared_bytes: int | None) -> None:
        """Refuse by the Content-Length, before a byte is read.

        Raises:
            ImageTooLarge: the client announces more than the limit.
        """
        if declared_bytes is not None and declared_bytes > self._max_body_bytes:
            raise self._too_large(declared_bytes)

    async def take(self, receive: Receive, declared_bytes: int | None) -> tuple[Body, Lease]:
        """Read one upload; the caller closes the body and releases the lease.

        Raises:
            ImageTooLarge: the client sends more than the limit.
            TimedOut: the client stopped sending.
            ClientGone: the client hung up.
            Overloaded: the spool's disk is full.
        """
        self.check_declared(declared_bytes)
        # A body of unknown length gets the most it may need, so that half-read bodies never wait
        # for each other's room.
        size_bytes = self._max_body_bytes if declared_bytes is None else declared_bytes
        lease = await self.room.reserve(size_bytes)
        body: Body | None = None
        try:
            body = Body(spooled=lease.place == "spool")
            await self._read(receive, body)
        except OSError as exc:
            self._give_back(body, lease)
            raise Overloaded(f"cannot keep an upload: {exc.strerror}") from exc
        except BaseException:
            self._give_back(body, lease)
            raise
        self.room.shrink(lease, body.size_bytes)
        return body, lease

    async def _read(self, receive: Receive, body: Body) -> None:
        more = True
        while more:
            try:
                async with asyncio.timeout(self._client_timeout_s):
                    message = await receive()
            except TimeoutError as exc:
                raise TimedOut(f"the client sent nothing for {self._client_timeout_s:g} s") from exc
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            if body.size_bytes + len(piece) > self._max_body_bytes:
                raise self._too_large(body.size_bytes + len(piece))
            await body.append(piece)
            more = message.get("more_body", False)

    def _give_back(self, body: Body | None, lease: Lease) -> None:
        if body is not None:
            body.close()
        self.room.release(lease)

    def _too_large(self, size_bytes: int) -> ImageTooLarge:
        return ImageTooLarge(f"upload is {size_bytes} bytes, limit is {self._max_body_bytes} bytes")
