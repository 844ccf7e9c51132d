"""Brings the waiting requests and the worker together; decides alone when a worker may stop.

Every decision is a synchronous step on the event loop, so no request can slip in between "nobody is
waiting" and "stop the worker".
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from immich_ml_metal.errors import Condemned, InferenceError, OutOfMemory, Overloaded
from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.client import WorkerAnswer, WorkerLost, exchange
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.process import OUT_OF_MEMORY, WorkerProcess
from immich_ml_metal.gateway.replay import Job, JobQueue
from immich_ml_metal.gateway.supervisor import LAST_WORDS_S, End, Order, Supervisor, WorkerState
from immich_ml_metal.logs import REQUEST_ID_HEADER
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.urgency import urgency_of_request

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What happened to requests since the gateway started."""

    received: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    replayed: int = 0
    cancelled: int = 0


class Dispatcher:
    """Sends requests to the worker in their turn, `limit` at once, and sends them again."""

    def __init__(
        self,
        command: Sequence[str],
        settings_json: str,
        *,
        limit: int,
        crashes: CrashRecord,
        metrics: Metrics,
        slow_jobs: Callable[[], frozenset[tuple[str, str]]] = frozenset,
    ) -> None:
        self.queue = JobQueue()
        self.counts = Counts()
        self.ends: Counter[str] = Counter()  # of workers, by reason
        self.crashes = crashes
        self.last_active_s = time.monotonic()
        self.served_by_worker = 0
        self.supervisor = Supervisor(
            command,
            settings_json,
            crashes=crashes,
            on_ready=self._worker_ready,
            on_end=self._worker_ended,
        )
        self._limit = limit
        self._metrics = metrics
        self._slow_jobs = slow_jobs
        self._numbers = itertools.count()
        self._sending: dict[Job, asyncio.Task[None]] = {}
        self._stop_when_clear: Order | None = None

    def expect(self) -> None:
        """A request is on its way: a worker may start while the upload comes in."""
        self.last_active_s = time.monotonic()
        self.supervisor.wake()

    def submit(
        self,
        body: Body,
        content_type: bytes,
        request_id: str,
        *,
        kind: tuple[str, str] | None = None,
    ) -> Job:
        """Queue a request; its `answer` gets the worker's answer or raises `Condemned`."""
        answer: asyncio.Future[WorkerAnswer] = asyncio.get_running_loop().create_future()
        urgency = urgency_of_request(body.head, body.size_bytes)
        job = Job(next(self._numbers), body, content_type, request_id, answer, kind, urgency)
        self.queue.add(job)
        self.expect()
        self._pump()
        return job

    def withdraw(self, job: Job) -> None:
        """Forget a request, answered or not; the worker sees its connection close."""
        if (task := self._sending.pop(job, None)) is not None:
            task.cancel()
        self.queue.remove(job)
        self.last_active_s = time.monotonic()
        self._pump()

    def recycle(self, order: Order) -> None:
        """End the worker as soon as it works on nothing; requests wait meanwhile."""
        self._stop_when_clear = order
        self._pump()

    def stop_if_idle(self, order: Order) -> bool:
        """End the worker if no request is here."""
        if (
            self.supervisor.state is not WorkerState.READY
            or self.queue.waiting
            or self.queue.running
        ):
            return False
        self.supervisor.end(order)
        return True

    def refuse_all(self, reason: str) -> None:
        """Answer every request that is still here: the service ends."""
        for job in self.queue.everything():
            if not job.answer.done():
                job.answer.set_exception(Overloaded(reason))

    def _pump(self) -> None:
        worker = self.supervisor.worker
        if self.supervisor.state is not WorkerState.READY or worker is None:
            return
        if self._stop_when_clear is not None:
            if not self.queue.running:
                self.supervisor.end(self._stop_when_clear)
            return
        for job in self.queue.take(self._limit, self._slow_jobs()):
            self._sending[job] = asyncio.create_task(self._send(job, worker))

    async def _send(self, job: Job, worker: WorkerProcess) -> None:
        headers = [
            (b"content-type", job.content_type),
            (REQUEST_ID_HEADER.lower().encode(), job.request_id.encode()),
        ]
        size_bytes = job.body.size_bytes
        try:
            answer = await exchange(
                worker.socket, "POST /predict", headers, size_bytes, job.body.pieces()
            )
        except WorkerLost as exc:  # the request is sent again once that worker is known to be gone
            self.supervisor.end(Order(str(exc), fault=True, grace_s=LAST_WORDS_S))
            return
        except OSError as exc:
            job.answer.set_exception(InferenceError(f"cannot read an upload back: {exc.strerror}"))
            return
        self._sending.pop(job, None)
        self.served_by_worker += 1
        if answer.error == OutOfMemory.__name__:
            self._replace_for_memory(job)
            return
        self.crashes.note_answer()
        job.answer.set_result(answer)

    def _replace_for_memory(self, job: Job) -> None:
        """Keep a request for the next worker: this one got no memory for it.

        It ends after its other requests. As for any death, one request that takes all the memory
        there is would end every worker.
        """
        logger.error("worker is out of memory request_id=%s", job.request_id)
        self._settle(1, [job] if self.queue.blame(job, OUT_OF_MEMORY) else [])
        self.recycle(Order(OUT_OF_MEMORY, fault=True))

    def _worker_ready(self) -> None:
        self.served_by_worker = 0
        self.last_active_s = time.monotonic()
        if suspects := self.queue.suspects:
            logger.info("sending requests again one_by_one=%d", suspects)
        self._pump()

    def _worker_ended(self, end: End) -> None:
        for task in self._sending.values():
            task.cancel()
        self._sending.clear()
        self._stop_when_clear = None
        reason = "crash" if end.fault else end.cause
        self.ends[reason] += 1
        self._metrics.worker_restarts.labels(reason).inc()
        in_flight = self.queue.running
        if not end.fault:
            self.queue.return_running()
            return
        condemned = self.queue.blame_running(end.cause, from_outside=end.from_outside)
        self._settle(in_flight, condemned)

    def _settle(self, in_flight: int, condemned: Sequence[Job]) -> None:
        """Of so many requests that a worker left, these are not sent again."""
        self.counts.replayed += in_flight - len(condemned)
        self._metrics.replays.inc(in_flight - len(condemned))
        for job in condemned:
            if not job.answer.done():
                job.answer.set_exception(Condemned(", ".join(job.causes)))
