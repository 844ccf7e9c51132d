"""Decoded pictures that are kept for their next task."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from doubles.timing import until
from PIL import Image

from immich_ml_metal.errors import InvalidImage
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.urgency import Urgency
from immich_ml_metal.worker.picture_cache import PictureCache

T = TypeVar("T")


class Decoder:
    """Counts its work, and holds it until it is let go. One picture is 10x10: 700 bytes."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.let_go = threading.Event()
        self.let_go.set()

    def __call__(self, data: bytes) -> Picture:
        self.seen.append(data)
        assert self.let_go.wait(timeout=10)
        if data.startswith(b"bad"):
            raise InvalidImage("bad")
        side = 100 if data.startswith(b"large") else 10
        return Picture(Image.new("RGB", (side, side)))


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder()
    yield decoder
    decoder.let_go.set()


class CountedThreads(CpuThreads):
    """Counts the calls whose caller has been given its result."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.done = 0

    async def run(self, func: Callable[[], T], urgency: Urgency = Urgency.PICTURES) -> T:
        result = await super().run(func, urgency)
        self.done += 1
        return result


@pytest.fixture
def threads() -> Iterator[CountedThreads]:
    threads = CountedThreads(2)
    yield threads
    threads.close()


async def test_a_picture_comes_back_without_decoding(
    decoder: Decoder, threads: CountedThreads
) -> None:
    cache = PictureCache(decoder, threads, max_bytes=10_000)
    first = await cache.get(b"a")
    assert await cache.get(b"a") is first
    assert await cache.get(b"b") is not first
    assert (decoder.seen, cache.size_bytes) == ([b"a", b"b"], 1400)


async def test_callers_at_the_same_time_share_one_decoding(
    decoder: Decoder, threads: CountedThreads
) -> None:
    cache = PictureCache(decoder, threads, max_bytes=10_000)
    decoder.let_go.clear()
    calls = [asyncio.create_task(cache.get(b"a")) for _ in range(5)]
    await until(lambda: threads.done == 5)  # all have their digest, and wait for the picture
    decoder.let_go.set()
    pictures = await asyncio.gather(*calls)
    assert len({id(picture) for picture in pictures}) == 1
    assert decoder.seen == [b"a"]


async def test_the_least_recently_used_picture_goes_first(
    decoder: Decoder, threads: CountedThreads
) -> None:
    cache = PictureCache(decoder, threads, max_bytes=1400)
    for data in (b"a", b"b", b"a", b"c", b"a", b"b"):
        await cache.get(data)
        assert cache.size_bytes <= 1400
    assert decoder.seen == [b"a", b"b", b"c", b"b"]


async def test_a_picture_over_the_bound_is_answered_and_displaces_nothing(
    decoder: Decoder, threads: CountedThreads
) -> None:
    cache = PictureCache(decoder, threads, max_bytes=1400)
    await cache.get(b"a")
    assert (await cache.get(b"large")).size == (100, 100)
    await cache.get(b"a")
    assert (decoder.seen, cache.size_bytes) == ([b"a", b"large"], 700)


async def test_a_bound_of_zero_keeps_nothing(decoder: Decoder, threads: CountedThreads) -> None:
    cache = PictureCache(decoder, threads, max_bytes=0)
    await cache.get(b"a")
    await cache.get(b"a")
    assert (decoder.seen, cache.size_bytes) == ([b"a", b"a"], 0)


async def test_a_failure_reaches_every_caller_and_is_not_kept(
    decoder: Decoder, threads: CountedThreads
) -> None:
    cache = PictureCache(decoder, threads, max_bytes=10_000)
    decoder.let_go.clear()
    calls = [asyncio.create_task(cache.get(b"bad")) for _ in range(2)]
    await until(lambda: threads.done == 2)
    decoder.let_go.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [InvalidImage, InvalidImage]
    with pytest.raises(InvalidImage):
        await cache.get(b"bad")
    assert (decoder.seen, cache.size_bytes) == ([b"bad", b"bad"], 0)


async def test_a_caller_that_hangs_up_leaves_the_others_their_picture(
    decoder: Decoder, threads: CountedThreads
) -> None:
    cache = PictureCache(decoder, threads, max_bytes=10_000)
    decoder.let_go.clear()
    first, second = (asyncio.create_task(cache.get(b"a")) for _ in range(2))
    await until(lambda: threads.done == 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    decoder.let_go.set()
    assert (await second).size == (10, 10)
    await cache.get(b"a")
    assert decoder.seen == [b"a"]


def test_a_stop_while_decoding_keeps_nothing(decoder: Decoder, threads: CountedThreads) -> None:
    async def start() -> PictureCache:
        cache = PictureCache(decoder, threads, max_bytes=10_000)
        call = asyncio.create_task(cache.get(b"a"))
        await until(lambda: decoder.seen)
        assert not call.done()
        return cache

    decoder.let_go.clear()
    cache = asyncio.run(start())  # which cancels what still runs
    decoder.let_go.set()
    assert cache.size_bytes == 0
