"""One request from its first byte to its answer: taken in, kept, sent, sent again, given up.

Knows nothing about status codes: every way to fail is an exception.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from immich_ml_metal.errors import Condemned, Overloaded
from immich_ml_metal.gateway.admission import ClientGone, Receive, Reception
from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.client import WorkerAnswer
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.replay import REMEMBER_S, Job, Quarantine

_UNAVAILABLE = 503
_MIN_PAUSE_S = 0.1


class Holding:
    """Holds requests for as long as the caller waits for them."""

    def __init__(
        self, dispatcher: Dispatcher, reception: Reception, *, hold_limit_s: float
    ) -> None:
        self.reception = reception
        self.quarantine = Quarantine()
        self._dispatcher = dispatcher
        self._hold_limit_s = hold_limit_s
        self._ended = asyncio.Event()

    async def answer(
        self, headers: Mapping[bytes, bytes], receive: Receive, request_id: str
    ) -> WorkerAnswer:
        """Get the worker's answer, whatever becomes of workers meanwhile.

        Raises:
            ImageTooLarge: the upload is over the limit.
            UploadStalled: the client stopped sending.
            ClientGone: the client hung up.
            Condemned: the request ended every worker that worked on it.
            Overloaded: it was held as long as it could be.
        """
        put_off: list[WorkerAnswer] = []
        try:
            async with asyncio.timeout(self._hold_limit_s):
                return await self._answer(headers, receive, request_id, put_off)
        except TimeoutError as exc:
            if put_off:
                return put_off[-1]  # it says why
            state = self._dispatcher.supervisor.state
            reason = f"held for {self._hold_limit_s:g} s, the worker's state is {state}"
            raise Overloaded(reason) from exc

    async def _answer(
        self,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        request_id: str,
        put_off: list[WorkerAnswer],
    ) -> WorkerAnswer:
        self._dispatcher.expect()
        body, lease = await self.reception.take(receive, _declared_bytes(headers))
        try:
            content_type = headers.get(b"content-type", b"")
            await self._refuse_known(body, content_type)
            while True:
                answer = await self._dispatch(body, content_type, receive, request_id)
                pause_s = _pause_s(answer)
                if pause_s is None:
                    return answer
                put_off[:] = [answer]
                if await self._ends_within(pause_s, receive):
                    return answer
        finally:
            body.close()
            self.reception.room.release(lease)

    def end(self) -> None:
        """Try nothing again from now on: the service ends."""
        self._ended.set()

    async def _ends_within(self, pause_s: float, receive: Receive) -> bool:
        """Wait before the next try; whether there is to be none.

        Raises:
            ClientGone: the client hung up.
        """
        gone = asyncio.ensure_future(_until_gone(receive))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({gone, ended}, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            ended.cancel()
        if gone.done() and not gone.cancelled():
            raise ClientGone
        return self._ended.is_set()

    async def _dispatch(
        self, body: Body, content_type: bytes, receive: Receive, request_id: str
    ) -> WorkerAnswer:
        job = self._dispatcher.submit(body, content_type, request_id)
        try:
            return await _answer_or_gone(job, receive)
        except Condemned as exc:
            reason = f"the worker ended each time it worked on this ({exc})"
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
