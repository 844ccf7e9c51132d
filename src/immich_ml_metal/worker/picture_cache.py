"""Decoded pictures, kept for the task that asks for the same one next."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable

from immich_ml_metal.tasks.images import Picture, count_pixels
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.urgency import Urgency
from immich_ml_metal.worker.other_formats import OtherFormats

# Two of Immich's previews, at some 20 MB each: the tasks of one photo come one after the other, and
# no photo comes again after its tasks are done.
CACHE_BYTES = 48 * 2**20


class PictureCache:
    """Decoded pictures by the digest of their file, the latest kept up to a number of bytes.

    Immich sends the same preview for search, faces and text. A picture that is being decoded is
    waited for, not decoded again. Event loop only.
    """

    def __init__(
        self,
        decode: Callable[[bytes], Picture],
        threads: CpuThreads,
        *,
        others: OtherFormats | None = None,
        max_bytes: int = CACHE_BYTES,
    ) -> None:
        """`others` takes the formats that `decode` refuses; without it they stay refused."""
        self._decode = decode
        self._others = others
        self._threads = threads
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Picture] = OrderedDict()
        self._pending: dict[bytes, asyncio.Task[Picture]] = {}

    @property
    def size_bytes(self) -> int:
        """Memory held by kept pictures."""
        return sum(picture.size_bytes for picture in self._kept.values())

    async def count_pixels(self, data: bytes, urgency: Urgency) -> int | None:
        """Pixels that the header of `data` announces, before anything is decoded.

        None for a rare format, which is decoded elsewhere.
        """
        return await self._threads.run(lambda: count_pixels(data), urgency)

    async def get(self, data: bytes, urgency: Urgency = Urgency.PICTURES) -> Picture:
        """The decoded picture of `data`.

        Raises what `decode` raises; a failure is not kept.
        """
        digest = await self._threads.run(lambda: hashlib.sha256(data).digest(), urgency)
        if (picture := self._kept.get(digest)) is not None:
            self._kept.move_to_end(digest)
            return picture
        task = self._pending.get(digest)
        if task is None:
            task = asyncio.create_task(self._start(data, urgency))
            self._pending[digest] = task
            task.add_done_callback(lambda done: self._finish(digest, done))
        return await asyncio.shield(task)  # a caller that hangs up leaves the others their picture

    def clear(self) -> None:
        """Give back the memory of kept pictures: nothing is going on."""
        self._kept.clear()

    def close(self) -> None:
        """Nothing more is decoded."""
        if self._others is not None:
            self._others.close()

    async def _start(self, data: bytes, urgency: Urgency) -> Picture:
        if self._others is not None and await self.count_pixels(data, urgency) is None:
            return await self._others.decode(data)
        return await self._threads.run(lambda: self._decode(data), urgency)

    def _finish(self, digest: bytes, task: asyncio.Task[Picture]) -> None:
        del self._pending[digest]
        if task.cancelled() or task.exception() is not None:
            return
        picture = task.result()
        if picture.size_bytes > self._max_bytes:  # keeping it would cost all the others
            return
        self._kept[digest] = picture
        while self.size_bytes > self._max_bytes:
            self._kept.popitem(last=False)
