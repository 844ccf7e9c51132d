"""Tries whether a task is answered, with a picture of our own, so that no job has to be risked."""

import asyncio
import json
import struct
import time
import zlib

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.gateway.asked import Asked
from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.troubles import Trouble, Troubles
from immich_ml_metal.types import SLOTS, Part

_LIMIT_S = 280.0  # a model may have to be loaded, or fetched
_TICK_S = 1.0
_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 60.0
_SIDE_PX = 64
_BOUNDARY = b"immich-ml-metal-probe"
# A try shows a picture, so the half that reads texts is left out.
_PICTURE_SLOTS = tuple(slot for slot in SLOTS if slot[1] is not Part.TEXTUAL)


class Prober:
    """Sends tries through the dispatcher, so that one that ends a worker is known for it."""

    def __init__(self, dispatcher: Dispatcher, troubles: Troubles) -> None:
        self._dispatcher = dispatcher
        self._troubles = troubles
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Try again and again what requests are held for, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            for trouble in self._troubles:
                if trouble.held and trouble.is_lasting:
                    self._try_in_turn(trouble)
            for trouble in self._troubles.suspects():
                self._try_in_turn(trouble)
            self._running = {k: task for k, task in self._running.items() if not task.done()}

    def _try_in_turn(self, trouble: Trouble) -> None:
        now_s = time.monotonic()
        pause_s = min(max(_PAUSE_S, (now_s - trouble.first_s) / 4), _LONGEST_PAUSE_S)
        name = (trouble.task, trouble.model)
        if name not in self._running and now_s - trouble.tried_s >= pause_s:
            trouble.tried_s = now_s
            self._running[name] = asyncio.create_task(self._try(trouble))

    async def _try(self, trouble: Trouble) -> None:
        if await self.probe(trouble.task, trouble.model):
            trouble.is_confirmed = True

    async def probe(self, task: str, model: str) -> str:
        """Ask for one answer; why there is none, empty when there is."""
        asked = Asked((task,), model)
        body = Body()
        await body.append(_form(task, model))
        kind = b"multipart/form-data; boundary=" + _BOUNDARY
        job = self._dispatcher.submit(body, kind, "probe", kind=asked.job)
        try:
            async with asyncio.timeout(_LIMIT_S):
                answer = await job.answer
        except TimeoutError:
            return f"a try of our own was not answered within {_LIMIT_S:g} s"
        except ServiceError as exc:
            self._troubles.note_failure(asked, str(exc), is_lasting=False)
            return str(exc)
        finally:
            self._dispatcher.withdraw(job)
            body.close()
        self._troubles.note_answer(asked, answer)
        return "" if answer.status == 200 else f"a try of our own was answered {answer.status}"


def _form(task: str, model: str) -> bytes:
    parts = {part: {"modelName": model} for known, part in _PICTURE_SLOTS if known == task}
    edge, name = b"--" + _BOUNDARY, b"Content-Disposition: form-data; name="
    return b"\r\n".join(
        [
            *(edge, name + b'"entries"', b"", json.dumps({task: parts}).encode()),
            *(edge, name + b'"image"; filename="blob"', b"", _picture()),
            *(edge + b"--", b""),
        ]
    )


def _picture() -> bytes:
    """A grey PNG without any library: the gateway has none for pictures."""
    header = struct.pack(">IIBBBBB", _SIDE_PX, _SIDE_PX, 8, 0, 0, 0, 0)
    rows = (b"\0" + b"\x80" * _SIDE_PX) * _SIDE_PX
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
