"""Room for uploads, and taking them in."""

import asyncio
import errno
import os
import tempfile
import time
import tracemalloc
from collections.abc import MutableMapping
from typing import Any

import pytest
from doubles.timing import PATIENCE_S, until

from immich_ml_metal.errors import ImageTooLarge, UploadStalled
from immich_ml_metal.gateway import admission
from immich_ml_metal.gateway.admission import (
    FORM_BYTES,
    ClientGone,
    Lease,
    Reception,
    Room,
    make_reception,
)
from immich_ml_metal.gateway.body import Body


def client(*pieces: bytes, hangs_up: bool = False) -> Any:
    """An ASGI `receive` that brings `pieces`."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if hangs_up:
        messages.append({"type": "http.disconnect"})
    else:
        messages[-1]["more_body"] = False

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0)

    return receive


def reception(
    *, memory_bytes: int = 100, spool_bytes: int = 100, client_timeout_s: float = 60
) -> Reception:
    room = Room(memory_bytes=memory_bytes, spool_bytes=spool_bytes, largest_bytes=50)
    return Reception(room, max_body_bytes=50, client_timeout_s=client_timeout_s)


async def begin(room: Room, *sizes: int) -> list[Lease]:
    """Uploads of which so many bytes have arrived."""
    leases = [room.open() for _ in sizes]
    for lease, size_bytes in zip(leases, sizes, strict=True):
        await asyncio.wait_for(room.grow(lease, size_bytes), PATIENCE_S)
    return leases


async def want(room: Room, *wishes: tuple[Lease, int]) -> list[asyncio.Task[None]]:
    """Uploads that want more, as far as they get at once."""
    tasks = [asyncio.create_task(room.grow(lease, size_bytes)) for lease, size_bytes in wishes]
    await asyncio.sleep(0)
    return tasks


async def empty_body(*, spooled: bool) -> Body:
    body = Body()
    if spooled:
        await body.spill()
    return body


async def content(body: Body) -> bytes:
    return b"".join([piece async for pieces in body.pieces() for piece in pieces])


async def test_memory_is_used_first_and_then_the_disk() -> None:
    here = reception(memory_bytes=50)
    places = []
    for _ in range(2):
        body, lease = await here.take(client(b"x" * 40), 40)
        places.append((lease.place, body.spooled))
        body.close()
    assert places == [("memory", False), ("spool", True)]


class Disk:
    """Takes the place of `os.pwrite`: full until it is told otherwise, after a few bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = True
        self._write = os.pwrite
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(admission, "DISK_RETRY_S", 0.01)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if self.is_full and len(data) <= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(fd, data[:5] if self.is_full else data, offset)


async def oldest(here: Reception, piece: bytes) -> tuple[Body, Lease]:
    """An upload that finds the disk full first: it is kept in memory."""
    return await asyncio.wait_for(here.take(client(piece), len(piece)), PATIENCE_S)


async def waiting(here: Reception) -> tuple[asyncio.Task[tuple[Body, Lease]], list[str]]:
    """An upload of the bytes 0 to 39 that waits for the disk, and what it was told."""
    told = list[str]()
    pieces = [bytes(range(20)), bytes(range(20, 40))]
    taking = asyncio.create_task(here.take(client(*pieces), 40, told.append))
    await until(lambda: bool(told), "a wait for the disk")
    return taking, told


@pytest.mark.parametrize("memory_bytes", [0, 20], ids=["into a file", "on the way to one"])
async def test_uploads_wait_for_a_full_disk_and_lose_nothing(
    memory_bytes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(monkeypatch)
    here = reception(memory_bytes=memory_bytes)
    first, _ = await oldest(here, b"x" * 40)
    taking, told = await waiting(here)
    await asyncio.sleep(0.05)
    assert (taking.done(), len(told), len(caplog.records)) == (False, 1, 1)
    assert f"cannot write to {tempfile.gettempdir()}: No space left" in told[0]
    disk.is_full = False
    body, lease = await asyncio.wait_for(taking, PATIENCE_S)
    assert (await content(body), body.head) == (bytes(range(40)), bytes(range(40)))
    assert (await content(first), body.spooled) == (b"x" * 40, True)
    assert (lease.place, lease.size_bytes) == ("spool", 40)
    body.close()


async def test_on_a_full_disk_one_upload_after_the_other_is_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Disk(monkeypatch)
    here = reception(memory_bytes=0)
    first, lease = await oldest(here, b"x" * 40)
    taking, _ = await waiting(here)
    first.close()
    here.room.release(lease)
    body, lease = await asyncio.wait_for(taking, PATIENCE_S)
    assert (await content(body), body.spooled) == (bytes(range(40)), False)
    assert body.head == bytes(range(40))
    here.room.release(lease)
    assert here.room.held("spool") == 0


@pytest.mark.parametrize("recalled", [False, True])
async def test_what_a_failed_write_left_behind_is_no_part_of_an_upload(
    recalled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    body = Body()
    await body.spill()
    disk.is_full = False
    await body.append(b"begin ")
    disk.is_full = True
    with pytest.raises(OSError, match="No space left"):
        await body.append(b"the rest that does not fit")
    assert await content(body) == b"begin "
    if recalled:
        await body.recall()
    disk.is_full = False
    await body.append(b"and end")
    assert (await content(body), body.size_bytes) == (b"begin and end", 13)
    body.close()


async def test_an_upload_that_waits_for_the_disk_can_be_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Disk(monkeypatch)
    here = reception(memory_bytes=0)
    _, lease = await oldest(here, b"x" * 40)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(here.take(client(b"x" * 40), 40), 0.1)
    here.room.release(lease)
    assert here.room.held("spool") == 0


async def test_a_spooled_body_reads_the_same_as_often_as_asked() -> None:
    body, _ = await reception(memory_bytes=1).take(client(b"abc", b"def"), 6)
    assert [await content(body), await content(body)] == [b"abcdef"] * 2
    body.close()


async def test_room_is_taken_for_bytes_that_have_arrived_and_for_no_others() -> None:
    room = Room(memory_bytes=100, spool_bytes=1000, largest_bytes=100)
    slow = await begin(room, *([1] * 40))  # each may become 100 bytes
    assert (room.held("memory"), room.held("spool")) == (40, 0)
    (good,) = await begin(room, 60)
    assert (good.place, room.held("memory")) == ("memory", 100)
    await room.grow(slow[0], 1)
    assert (slow[0].place, slow[0].size_bytes) == ("spool", 2)
    assert (room.held("memory"), room.held("spool")) == (99, 2)


async def test_without_room_uploads_wait_in_order() -> None:
    room = Room(memory_bytes=10, spool_bytes=0)
    (first,) = await begin(room, 8)
    second, third = room.open(), room.open()
    waiting = await want(room, (second, 9), (third, 1))
    assert room.waiting == 2  # the small one would fit, but does not overtake
    room.release(first)
    await asyncio.gather(*waiting)
    assert (room.held("memory"), room.waiting) == (10, 0)


async def test_the_oldest_upload_always_comes_to_its_end() -> None:
    room = Room(memory_bytes=0, spool_bytes=100, largest_bytes=60)
    oldest, *others = await begin(room, 1, 20, 19)
    waiting = await want(room, *((one, 1) for one in others))
    assert room.waiting == 2
    await asyncio.wait_for(room.grow(oldest, 59), PATIENCE_S)
    room.finish(oldest)  # now the second is the oldest, and may take what is left
    await asyncio.wait_for(waiting[0], PATIENCE_S)
    assert (room.held("spool"), room.waiting) == (100, 1)
    room.finish(others[0])
    room.release(oldest)
    await asyncio.wait_for(waiting[1], PATIENCE_S)


async def test_uploads_that_all_grow_at_once_are_all_taken() -> None:
    here = reception(memory_bytes=0, spool_bytes=100)
    pieces = [b"12345"] * 10

    async def upload() -> None:
        body, lease = await here.take(client(*pieces), None)
        await asyncio.sleep(0.001)
        body.close()
        here.room.release(lease)

    await asyncio.wait_for(asyncio.gather(*(upload() for _ in range(40))), 30)
    assert (here.room.held("spool"), here.room.waiting) == (0, 0)


async def test_a_waiter_that_gives_up_lets_the_next_one_in() -> None:
    room = Room(memory_bytes=10, spool_bytes=0)
    await begin(room, 8)
    second, third = room.open(), room.open()
    large, small = await want(room, (second, 9), (third, 1))
    large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    room.release(second)
    await asyncio.wait_for(small, PATIENCE_S)
    assert (third.size_bytes, room.waiting) == (1, 0)


async def test_a_waiter_that_is_cancelled_as_it_gets_room_gives_it_back() -> None:
    room = Room(memory_bytes=10, spool_bytes=0)
    (first,) = await begin(room, 10)
    second = room.open()
    (waiting,) = await want(room, (second, 10))
    room.release(first)  # grants, but the waiter has not run yet
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    room.release(second)
    assert room.held("memory") == 0


async def test_a_client_that_sends_a_byte_now_and_then_is_timed_out() -> None:
    async def receive() -> MutableMapping[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    here = reception(client_timeout_s=0.2)
    started_s = time.monotonic()
    with pytest.raises(UploadStalled, match="sends too slowly"):
        await here.take(receive, None)
    assert time.monotonic() - started_s > 0.15
    assert here.room.held("memory") == 0


async def test_a_client_is_not_blamed_for_the_time_it_waited_for_room() -> None:
    here = reception(memory_bytes=50, spool_bytes=0, client_timeout_s=0.1)
    blocker = here.room.open()
    await here.room.grow(blocker, 50)
    upload = asyncio.create_task(here.take(client(b"x", b"y"), 2))
    await asyncio.sleep(0.3)
    here.room.release(blocker)
    body, _ = await asyncio.wait_for(upload, PATIENCE_S)
    assert body.size_bytes == 2


async def test_a_body_in_many_small_pieces_takes_little_more_than_its_bytes() -> None:
    body = Body()
    tracemalloc.start()
    for _ in range(20_000):
        await body.append(b"x")
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert await content(body) == b"x" * 20_000
    assert taken < 60_000


async def test_a_body_of_unknown_length_keeps_only_what_it_needs() -> None:
    here = reception()
    body, lease = await here.take(client(b"x" * 10), None)
    assert (body.size_bytes, lease.size_bytes, here.room.held("memory")) == (10, 10, 10)


@pytest.mark.parametrize(
    ("receive", "declared_bytes", "error"),
    [
        (client(b"x" * 30, b"x" * 30), None, ImageTooLarge),
        (client(b"x" * 30, b"x" * 30), 10, ImageTooLarge),
        pytest.param(client(b"x" * 50, b"x"), None, ImageTooLarge, id="one byte too many"),
        (client(b"x"), 51, ImageTooLarge),
        (client(b"x", hangs_up=True), 10, ClientGone),
    ],
)
async def test_a_failed_upload_gives_its_room_back(
    receive: Any, declared_bytes: int | None, error: type[Exception]
) -> None:
    here = reception()
    with pytest.raises(error):
        await here.take(receive, declared_bytes)
    assert (here.room.held("memory"), here.room.held("spool")) == (0, 0)


@pytest.mark.parametrize("declared_bytes", [None, 50])
async def test_an_upload_of_just_the_limit_is_taken(declared_bytes: int | None) -> None:
    body, _ = await reception().take(client(b"x" * 30, b"x" * 20), declared_bytes)
    assert body.size_bytes == 50


def test_a_room_that_is_too_small_for_one_upload_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for 50 bytes"):
        reception(memory_bytes=49, spool_bytes=49)


@pytest.mark.parametrize("limit_bytes", [1, 2**40])
def test_the_largest_picture_always_finds_room(limit_bytes: int) -> None:
    assert make_reception(limit_bytes).room.largest_bytes >= limit_bytes + FORM_BYTES


@pytest.mark.parametrize("spooled", [False, True])
async def test_the_same_form_has_the_same_digest_under_any_boundary(spooled: bool) -> None:
    digests = set()
    for boundary in (b"----one", b"----another"):
        body = await empty_body(spooled=spooled)
        await body.append(b"--" + boundary + b" picture --" + boundary + b"--")
        digests.add(await body.digest(b"multipart/form-data; boundary=" + boundary))
        body.close()
    other = await empty_body(spooled=spooled)
    await other.append(b"------one another picture ------one--")
    digest = await other.digest(b"multipart/form-data; boundary=----one")
    other.close()
    assert len(digests) == 1
    assert digest not in digests
