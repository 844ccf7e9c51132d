"""Room for uploads, and taking them in."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from immich_ml_metal.errors import ImageTooLarge
from immich_ml_metal.gateway.admission import (
    FORM_BYTES,
    ClientGone,
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


def reception(*, memory_bytes: int = 100, spool_bytes: int = 100) -> Reception:
    room = Room(memory_bytes=memory_bytes, spool_bytes=spool_bytes)
    return Reception(room, max_body_bytes=50, client_timeout_s=60)


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


async def test_a_spooled_body_reads_the_same_as_often_as_asked() -> None:
    body, _ = await reception(memory_bytes=1).take(client(b"abc", b"def"), 6)
    assert [await content(body), await content(body)] == [b"abcdef"] * 2
    body.close()


async def test_without_room_uploads_wait_in_order() -> None:
    room = Room(memory_bytes=10, spool_bytes=0)
    first = await room.reserve(8)
    waiting = [asyncio.ensure_future(room.reserve(size)) for size in (9, 1)]
    await asyncio.sleep(0)
    assert room.waiting == 2  # the small one would fit, but does not overtake
    room.release(first)
    await asyncio.gather(*waiting)
    assert (room.held("memory"), room.waiting) == (10, 0)


async def test_a_waiter_that_gives_up_lets_the_next_one_in() -> None:
    room = Room(memory_bytes=10, spool_bytes=0)
    await room.reserve(8)
    large, small = (asyncio.ensure_future(room.reserve(size)) for size in (9, 1))
    await asyncio.sleep(0)
    large.cancel()
    assert (await small).size_bytes == 1
    assert room.waiting == 0


async def test_a_waiter_that_is_cancelled_as_it_gets_room_gives_it_back() -> None:
    room = Room(memory_bytes=10, spool_bytes=0)
    first = await room.reserve(10)
    waiting = asyncio.ensure_future(room.reserve(10))
    await asyncio.sleep(0)
    room.release(first)  # grants, but the waiter has not run yet
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert room.held("memory") == 0


async def test_a_body_of_unknown_length_keeps_only_what_it_needs() -> None:
    here = reception()
    body, lease = await here.take(client(b"x" * 10), None)
    assert (body.size_bytes, lease.size_bytes, here.room.held("memory")) == (10, 10, 10)


@pytest.mark.parametrize(
    ("receive", "declared_bytes", "error"),
    [
        (client(b"x" * 30, b"x" * 30), None, ImageTooLarge),
        (client(b"x" * 30, b"x" * 30), 10, ImageTooLarge),
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
        body = Body(spooled=spooled)
        await body.append(b"--" + boundary + b" picture --" + boundary + b"--")
        digests.add(await body.digest(b"multipart/form-data; boundary=" + boundary))
        body.close()
    other = Body(spooled=spooled)
    await other.append(b"------one another picture ------one--")
    digest = await other.digest(b"multipart/form-data; boundary=----one")
    other.close()
    assert len(digests) == 1
    assert digest not in digests
