"""An upload, kept until it is answered so that it can be sent to the worker again."""

import asyncio
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Sequence
from typing import IO

_PIECE_BYTES = 1024 * 1024
_SMALL_BYTES = 4096
_HEAD_BYTES = 4096
_BOUNDARY = re.compile(rb'boundary="?([^";,]+)"?', re.IGNORECASE)


class Body:
    """The bytes of one request, in memory or in a file that has no name."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.head = b""  # how the body begins: `entries` name the tasks
        self._pieces: list[bytes | bytearray] = []
        self._file: IO[bytes] | None = None

    @property
    def spooled(self) -> bool:
        """Whether the bytes lie in a file."""
        return self._file is not None

    async def append(self, piece: bytes) -> None:
        """Add what the client sent next.

        Raises:
            OSError: the disk is full. Nothing was added; the piece can be tried again.
        """
        if self._file is not None:
            await asyncio.to_thread(_write_all, self._file.fileno(), piece, self.size_bytes)
        elif len(piece) >= _SMALL_BYTES:
            self._pieces.append(piece)
        elif self._pieces and isinstance(last := self._pieces[-1], bytearray) and _has_room(last):
            last += piece
        else:  # an object of its own for each byte would take fifty times its size
            self._pieces.append(bytearray(piece))
        self.size_bytes += len(piece)
        self.head += piece[: _HEAD_BYTES - len(self.head)]

    async def spill(self) -> None:
        """Move to a file.

        Raises:
            OSError: the disk is full, or no file can be opened. The bytes stay where they were.
        """
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            written = 0
            for piece in self._pieces:
                await asyncio.to_thread(_write_all, file.fileno(), piece, written)
                written += len(piece)
        except BaseException:
            file.close()
            raise
        self._file, self._pieces = file, []

    async def recall(self) -> None:
        """Move back to memory; the file gives its space back.

        Raises:
            OSError: the file cannot be read.
        """
        if self._file is not None:
            pieces = [piece async for some in self.pieces() for piece in some]
            self._file.close()
            self._file, self._pieces = None, pieces

    async def pieces(self) -> AsyncIterator[Sequence[bytes | bytearray]]:
        """Yield the bytes from the beginning, as often as asked."""
        if self._file is None:
            yield self._pieces
            return
        offset = 0
        while offset < self.size_bytes:  # pread: a cancelled reader does not move the next one
            # behind the last byte may lie what an append that failed has left
            count = min(_PIECE_BYTES, self.size_bytes - offset)
            piece = await asyncio.to_thread(os.pread, self._file.fileno(), count, offset)
            offset += len(piece)
            yield [piece]

    async def digest(self, content_type: bytes) -> bytes:
        """Name the content: the same form has the same digest, whatever its boundary."""
        pieces = [piece async for some in self.pieces() for piece in some]
        return await asyncio.to_thread(_digest, pieces, content_type)

    def close(self) -> None:
        """Forget the bytes."""
        self._pieces = []
        if self._file is not None:
            self._file.close()


def _write_all(fd: int, piece: bytes | bytearray, offset: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _has_room(piece: bytearray) -> bool:
    return len(piece) < _PIECE_BYTES


def _digest(pieces: Sequence[bytes | bytearray], content_type: bytes) -> bytes:
    content = b"".join(pieces)
    if found := _BOUNDARY.search(content_type):  # Node draws a new boundary for every request
        content = content.replace(found[1], b"")
    return hashlib.sha256(content).digest()
