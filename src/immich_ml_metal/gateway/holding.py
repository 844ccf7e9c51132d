"""One request from its first byte to its answer: taken in, kept, sent, sent again, given up.

Knows nothing about status codes: every way to fail is an exception.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from immich_ml_metal.errors import Condemned, Overloaded
from immich_ml_metal.gateway.admission import ClientGone, Lease, Receive, Reception
from immich_ml_metal.gateway.asked import Asked, Upload
from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.client import WorkerAnswer
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.replay import REMEMBER_S, Job, Quarantine
from immich_ml_metal.gateway.troubles import Troubles

_UNAVAILABLE = 503
_MIN_PAUSE_S = 0.1


@dataclass(slots=True)
class _PutOff:
    """Why a request waits: the worker's last answer, or what its upload waits for."""

    answer: WorkerAnswer | None = None
    reason: str = ""


class Holding:
    """Holds requests for as long as the caller waits for them."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        reception: Reception,
        troubles: Troubles,
        *,
        hold_limit_s: float,
    ) -> None:
        self.reception = reception
        self._troubles = troubles
        self.quarantine = Quarantine()
        self._dispatcher = dispatcher
        self._hold_limit_s = hold_limit_s
        self._ended = asyncio.Event()

    async def answer(
        self, headers: Mapping[bytes, bytes], upload: Upload, request_id: str
    ) -> WorkerAnswer:
        """Get the worker's answer, whatever becomes of workers meanwhile.

        Raises:
            ImageTooLarge: the upload is over the limit.
            UploadStalled: the client stopped sending.
            ClientGone: the client hung up.
            Condemned: the request ended every worker that worked on it.
            Overloaded: it was held as long as it could be.
        """
        put_off = _PutOff()
        try:
            async with asyncio.timeout(self._hold_limit_s):
                return await self._answer(headers, upload, request_id, put_off)
        except TimeoutError as exc:
            if put_off.answer is not None:
                return put_off.answer  # it says why
            why = put_off.reason or f"the worker's state is {self._dispatcher.supervisor.state}"
            reason = f"held for {self._hold_limit_s:g} s, {why}"
            self._troubles.note_failure(upload.asked, reason, is_lasting=False)
            raise Overloaded(reason) from exc

    async def _answer(
        self,
        headers: Mapping[bytes, bytes],
        upload: Upload,
        request_id: str,
        put_off: _PutOff,
    ) -> WorkerAnswer:
        self._dispatcher.expect()
        body, lease = await self._take_in(headers, upload, put_off)
        try:
            asked, content_type = upload.asked, headers.get(b"content-type", b"")
            await self._refuse_known(body, content_type)
            while True:
                if await self._is_hopeless(asked, body, upload, put_off):
                    assert put_off.answer is not None, "it is why"
                    return put_off.answer
                answer = await self._dispatch(body, content_type, upload, request_id)
                self._troubles.note_answer(asked, answer)
                if self._troubles.find_holding(asked, body.size_bytes) is not None:
                    continue
                pause_s = _pause_s(answer)
                if pause_s is None:
                    return answer
                put_off.answer = answer
                if await self._ends_within(pause_s, upload):
                    return answer
        finally:
            body.close()
            self.reception.room.release(lease)

    async def _take_in(
        self, headers: Mapping[bytes, bytes], upload: Upload, put_off: _PutOff
    ) -> tuple[Body, Lease]:
        def wait(reason: str) -> None:
            put_off.reason = reason
            self._troubles.note_failure(upload.asked, reason, is_lasting=False)

        taken = await self.reception.take(upload, _declared_bytes(headers), wait)
        put_off.reason = ""
        return taken

    async def _is_hopeless(
        self, asked: Asked, body: Body, upload: Upload, put_off: _PutOff
    ) -> bool:
        """Wait while its task cannot be answered; whether there is to be no further try."""
        trouble = self._troubles.find_holding(asked, body.size_bytes)
        if trouble is None or trouble.answer is None:
            return False
        put_off.answer = trouble.answer
        with self._troubles.held(trouble, body.size_bytes):
            return await self._ends_within(self._hold_limit_s, upload, trouble.mended)

    def end(self) -> None:
        """Try nothing again from now on: the service ends."""
        self._ended.set()

    async def _ends_within(
        self, pause_s: float, receive: Receive, mended: asyncio.Event | None = None
    ) -> bool:
        """Wait before the next try, or until `mended`; whether there is to be none.

        Raises:
            ClientGone: the client hung up.
        """
        gone = asyncio.ensure_future(_until_gone(receive))
        others = [asyncio.ensure_future(self._ended.wait())]
        if mended is not None:
            others.append(asyncio.ensure_future(mended.wait()))
        try:
            await asyncio.wait(
                {gone, *others}, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for waiting in (gone, *others):
                waiting.cancel()
        if gone.done() and not gone.cancelled():
            raise ClientGone
        return self._ended.is_set()

    async def _dispatch(
        self, body: Body, content_type: bytes, upload: Upload, request_id: str
    ) -> WorkerAnswer:
        asked = upload.asked
        job = self._dispatcher.submit(body, content_type, request_id, kind=asked.job)
        try:
            return await _answer_or_gone(job, upload)
        except Condemned as exc:
            reason = f"the worker ended each time it worked on this ({exc})"
            self._troubles.note_failure(asked, reason, is_lasting=False)
            self.quarantine.add(await body.digest(content_type), reason, time.monotonic())
            raise Condemned(reason) from exc
        finally:
            self._dispatcher.withdraw(job)

    async def _refuse_known(self, body: Body, content_type: bytes) -> None:
        self.quarantine.forget_old(time.monotonic())
        if not len(self.quarantine):
            return
        if reason := self.quarantine.find(await body.digest(content_type)):
            raise Condemned(f"{reason}; it is not tried again for {REMEMBER_S:g} s")


def _pause_s(answer: WorkerAnswer) -> float | None:
    """When the worker wants to be asked again, None if its answer is final.

    Only what may pass by itself, a download above all, is answered 503 with `Retry-After`.
    """
    after = dict(answer.headers).get(b"retry-after", b"")
    if answer.status != _UNAVAILABLE or not after.isdigit():
        return None
    return max(_MIN_PAUSE_S, float(after))


async def _answer_or_gone(job: Job, receive: Receive) -> WorkerAnswer:
    gone = asyncio.ensure_future(_until_gone(receive))
    either: set[asyncio.Future[Any]] = {job.answer, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if job.answer.done():
        return job.answer.result()
    raise ClientGone


async def _until_gone(receive: Receive) -> None:
    message: Mapping[str, Any] = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


def _declared_bytes(headers: Mapping[bytes, bytes]) -> int | None:
    """The body's length as announced: 0 for none at all, None when it comes in chunks."""
    if b"transfer-encoding" in headers:
        return None
    return int(headers.get(b"content-length", b"0"))
