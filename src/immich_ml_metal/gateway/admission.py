"""How uploads come in: bounded by bytes, never by count, and never refused for want of room.

Room is memory first, then disk, and taken for bytes that have arrived. A client that finds neither
is not read from until there is some: its bytes wait in its own socket.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from immich_ml_metal.errors import ImageTooLarge, Overloaded, UploadStalled
from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.remedies import remedy_of

log = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

Place = Literal["memory", "spool"]

# The slowest upload, over its whole length: a tenth of a poor DSL line. What a client may be behind
# is its time limit for sending nothing.
MIN_BYTES_PER_S = 8 * 1024
FORM_BYTES = 64 * 1024  # what a form adds to its picture: entries, boundaries, part headers
CLIENT_TIMEOUT_S = 30.0  # in mid-upload; Immich reads its pictures from a disk and pauses never
# For uploads that wait: some hundred previews in memory, a thousand more on disk. Beyond that
# clients are not read from; nothing is refused.
_MEMORY_BYTES = 64 * 2**20
_SPOOL_BYTES = 1024 * 2**20
DISK_RETRY_S = 1.0  # between two tries to write while the disk is full
_QUIET_S = 60.0  # between two log lines about it


class ClientGone(Exception):
    """The client hung up; nobody is left to answer."""


@dataclass(slots=True, eq=False)
class Lease:
    """What one upload takes of the room: where, and how many bytes have arrived."""

    place: Place = "memory"
    size_bytes: int = 0
    is_without_disk: bool = False  # kept in memory though its place is the spool


class Room:
    """The bytes that waiting uploads may take, taken as they arrive. Event loop only.

    Half-read uploads never wait for each other: of the larger place, as much as the largest upload
    needs is kept for the oldest unfinished one. That one finishes, then the next is the oldest.
    """

    def __init__(self, *, memory_bytes: int, spool_bytes: int, largest_bytes: int = 0) -> None:
        self._free: dict[Place, int] = {"memory": memory_bytes, "spool": spool_bytes}
        self._total = dict(self._free)
        self._kept: dict[Place, int] = {"memory": 0, "spool": 0}
        self.keep(largest_bytes)
        self._unfinished: dict[Lease, None] = {}  # the oldest first
        self._without_disk: Lease | None = None
        self._waiters: dict[Lease, tuple[int, asyncio.Future[None]]] = {}

    def __repr__(self) -> str:
        return (
            f"<Room memory={self.held('memory')} spool={self.held('spool')} waiting={self.waiting}>"
        )

    @property
    def waiting(self) -> int:
        """Clients that are not read from for want of room."""
        return len(self._waiters)

    def held(self, place: Place) -> int:
        """Bytes taken in `place`."""
        return self._total[place] - self._free[place]

    @property
    def largest_bytes(self) -> int:
        """The largest upload that an empty room takes."""
        return max(self._total.values())

    def keep(self, largest_bytes: int) -> None:
        """Keep what the largest upload needs for the oldest one."""
        main: Place = "spool" if self._total["spool"] >= self._total["memory"] else "memory"
        self._kept[main] = largest_bytes

    def open(self) -> Lease:
        """Begin an upload; the caller releases its lease."""
        lease = Lease()
        self._unfinished[lease] = None
        return lease

    def may_do_without_disk(self, lease: Lease) -> bool:
        """Whether a spooled upload may be in memory after all, for the length of its lease.

        One at a time, the oldest unfinished one: half-read uploads would wait for each other on a
        disk that is smaller than the spool.
        """
        if self._without_disk is None and next(iter(self._unfinished), None) is lease:
            self._without_disk = lease
        return self._without_disk is lease

    async def grow(self, lease: Lease, size_bytes: int) -> None:
        """Wait for room for `size_bytes` more; all of the lease may move to the spool."""
        is_first = next(iter(self._unfinished), None) is lease
        if (is_first or not self._waiters) and self._take(lease, size_bytes):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[lease] = (size_bytes, turn)
        try:
            await turn
        finally:
            self._waiters.pop(lease, None)

    def finish(self, lease: Lease) -> None:
        """The upload is complete; it waits for nothing any more."""
        self._unfinished.pop(lease, None)
        self._grant()

    def release(self, lease: Lease) -> None:
        """Give a lease back, and let in whoever fits now."""
        self._free[lease.place] += lease.size_bytes
        lease.size_bytes = 0
        if self._without_disk is lease:
            self._without_disk = None
        self.finish(lease)

    def _take(self, lease: Lease, more_bytes: int) -> bool:
        if self._fits(lease, more_bytes, lease.place):
            self._free[lease.place] -= more_bytes
            lease.size_bytes += more_bytes
            return True
        size_bytes = lease.size_bytes + more_bytes
        if lease.place == "spool" or not self._fits(lease, size_bytes, "spool"):
            return False
        self._free["memory"] += lease.size_bytes
        self._free["spool"] -= size_bytes
        lease.place, lease.size_bytes = "spool", size_bytes
        return True

    def _fits(self, lease: Lease, size_bytes: int, place: Place) -> bool:
        is_first = next(iter(self._unfinished), None) is lease
        return size_bytes <= self._free[place] - (0 if is_first else self._kept[place])

    def _grant(self) -> None:
        for lease in [one for one in self._unfinished if one in self._waiters]:
            size_bytes, turn = self._waiters[lease]
            if not turn.done():  # else it was given up
                if not self._take(lease, size_bytes):
                    return
                turn.set_result(None)
            del self._waiters[lease]


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
        room.keep(max_body_bytes)
        self._max_body_bytes = max_body_bytes
        self._client_timeout_s = client_timeout_s
        self._told_s = float("-inf")

    def check_declared(self, declared_bytes: int | None) -> None:
        """Refuse by the Content-Length, before a byte is read.

        Raises:
            ImageTooLarge: the client announces more than the limit.
        """
        if declared_bytes is not None and declared_bytes > self._max_body_bytes:
            raise self._too_large(declared_bytes)

    async def take(
        self,
        receive: Receive,
        declared_bytes: int | None,
        on_wait: Callable[[str], None] = lambda reason: None,
    ) -> tuple[Body, Lease]:
        """Read one upload; the caller closes the body and releases the lease.

        While the spool's disk is full the upload waits and `on_wait` is told why, once.

        Raises:
            ImageTooLarge: the client sends more than the limit.
            UploadStalled: the client stopped sending, or sends too slowly.
            ClientGone: the client hung up.
            Overloaded: what lies on the disk cannot be read back.
        """
        self.check_declared(declared_bytes)
        lease, body = self.room.open(), Body()
        try:
            await self._read(receive, body, lease, on_wait)
        except OSError as exc:
            self._give_back(body, lease)
            raise Overloaded(f"cannot keep an upload: {exc.strerror}") from exc
        except BaseException:
            self._give_back(body, lease)
            raise
        self.room.finish(lease)
        return body, lease

    async def _read(
        self, receive: Receive, body: Body, lease: Lease, on_wait: Callable[[str], None]
    ) -> None:
        more, patience_s = True, self._client_timeout_s
        while more:
            started_s = time.monotonic()
            try:
                async with asyncio.timeout(min(patience_s, self._client_timeout_s)):
                    message = await receive()
            except TimeoutError as exc:
                raise UploadStalled(self._too_slow(body, patience_s)) from exc
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            # Only the time that we waited for the client counts, never its wait for room.
            patience_s += len(piece) / MIN_BYTES_PER_S - (time.monotonic() - started_s)
            if body.size_bytes + len(piece) > self._max_body_bytes:
                raise self._too_large(body.size_bytes + len(piece))
            await self.room.grow(lease, len(piece))
            await self._keep(body, lease, piece, on_wait)
            more = message.get("more_body", False)

    async def _keep(
        self, body: Body, lease: Lease, piece: bytes, on_wait: Callable[[str], None]
    ) -> None:
        """Add a piece. A disk that is full passes: the client is not read from until then."""
        reason = ""
        while True:
            try:
                if lease.place == "spool" and not (body.spooled or lease.is_without_disk):
                    await body.spill()
                await body.append(piece)
            except OSError as exc:
                if self.room.may_do_without_disk(lease):
                    lease.is_without_disk = True
                    await body.recall()
                    continue
                if not reason:
                    reason = self._explain(exc)
                    on_wait(reason)
                await asyncio.sleep(DISK_RETRY_S)
            else:
                return

    def _explain(self, exc: OSError) -> str:
        folder = tempfile.tempdir or "a temporary folder"
        reason = f"an upload waits for the disk: cannot write to {folder}: {exc.strerror}"
        if time.monotonic() - self._told_s >= _QUIET_S:
            self._told_s = time.monotonic()
            log.warning("%s; %s", reason, remedy_of(reason))
        return reason

    def _too_slow(self, body: Body, patience_s: float) -> str:
        if patience_s >= self._client_timeout_s:
            return f"the client sent nothing for {self._client_timeout_s:g} s"
        return (
            f"the client sends too slowly: {body.size_bytes} bytes, then nothing for "
            f"{max(0, patience_s):.1f} s; {MIN_BYTES_PER_S} bytes a second are the least"
        )

    def _give_back(self, body: Body, lease: Lease) -> None:
        body.close()
        self.room.release(lease)

    def _too_large(self, size_bytes: int) -> ImageTooLarge:
        return ImageTooLarge(f"upload is {size_bytes} bytes, limit is {self._max_body_bytes} bytes")
