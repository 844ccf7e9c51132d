"""Pictures of rare formats, each decoded in a child that is ended when it takes too much.

A decoder on a thread cannot be ended; some formats let a small file keep it busy for minutes.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from PIL import Image

from immich_ml_metal.errors import Busy, ImageTooLarge, InvalidImage
from immich_ml_metal.system.footprint import memory_bytes
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.worker.other_formats_child import (
    CPU_LIMIT_S,
    EXIT_INVALID,
    EXIT_TOO_LARGE,
    MEMORY_LIMIT_BYTES,
)

COMMAND = (sys.executable, "-m", "immich_ml_metal.worker.other_formats_child")
_WALL_LIMIT_S = 3.0 * CPU_LIMIT_S  # the child yields to everything else
_LOOK_S = 0.1


class OtherFormats:
    """Decodes one picture at a time; who comes meanwhile is asked to come again."""

    def __init__(
        self,
        *,
        command: Sequence[str] = COMMAND,
        wall_limit_s: float = _WALL_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        self._command = command
        self._wall_limit_s = wall_limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._threads = CpuThreads(1)  # not one of those that ordinary pictures need
        self._is_busy = False

    async def decode(self, data: bytes) -> Picture:
        """Decode.

        Raises:
            InvalidImage: no picture, or one that takes too long or too much memory.
            ImageTooLarge: over the limits.
            Busy: another one is being decoded. To wait here would keep a place from others.
        """
        if self._is_busy:
            raise Busy("another picture of a rare format is being decoded")
        self._is_busy = True
        try:
            return await self._threads.run(lambda: self._decode(data))
        finally:
            self._is_busy = False

    def close(self) -> None:
        """End the thread."""
        self._threads.close()

    def _decode(self, data: bytes) -> Picture:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            with subprocess.Popen(
                self._command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as child:
                try:
                    out, err = self._follow(child)
                finally:
                    child.kill()
        return _picture(child.returncode, out, err)

    def _follow(self, child: "subprocess.Popen[bytes]") -> tuple[bytes, bytes]:
        end_s = time.monotonic() + self._wall_limit_s
        while True:
            with suppress(subprocess.TimeoutExpired):
                return child.communicate(timeout=_LOOK_S)
            if time.monotonic() > end_s:
                raise InvalidImage(_too_long(self._wall_limit_s))
            if (memory_bytes(child.pid) or 0) > self._memory_limit_bytes:
                raise InvalidImage("the image cannot be decoded: it takes too much memory")


def _picture(status: int, out: bytes, err: bytes) -> Picture:
    if status == 0:
        line, _, pixels = out.partition(b"\n")
        width, height = map(int, line.split())
        array = np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)
        return Picture(Image.fromarray(array))
    if status in (EXIT_INVALID, EXIT_TOO_LARGE):
        kind = InvalidImage if status == EXIT_INVALID else ImageTooLarge
        raise kind(err.decode(errors="replace"))
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        raise InvalidImage(_too_long(CPU_LIMIT_S))
    raise InvalidImage(f"the image cannot be decoded: its decoder ended with status {status}")


def _too_long(limit_s: float) -> str:
    return f"the image cannot be decoded within {limit_s:g} s"
