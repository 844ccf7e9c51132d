"""Keeps a worker running for as long as one is wanted. Knows nothing about requests.

idle ──wake──▶ pause ──▶ starting ──▶ ready ──▶ stopping ──▶ idle or pause
                 ▲                      │
                 └──── it died ◀────────┘
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from immich_ml_metal.errors import ConfigError
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.process import WorkerProcess, describe
from immich_ml_metal.gateway.socket_folder import SocketFolder
from immich_ml_metal.worker.process import EXIT_BAD_SETTINGS

logger = logging.getLogger(__name__)

# Importing every model library from a cold disk takes tens of seconds on a small Mac.
START_LIMIT_S = 120.0
STOP_LIMIT_S = 10.0
# When the gateway itself stops, every answer is out already.
_LAST_STOP_LIMIT_S = 2.0
# A connection breaks a moment before its process is gone, whose exit status tells why.
LAST_WORDS_S = 1.0

# What a person or the kernel sends; failing libraries raise SIGABRT, SIGSEGV, SIGBUS, SIGTRAP. An
# worker that somebody else tells to end (SIGTERM, SIGINT) does so tidily, with status 0.
_FROM_OUTSIDE = {0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}


class WorkerState(StrEnum):
    """Where the worker stands, as on `/health`."""

    IDLE = "idle"
    PAUSE = "pause"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Order:
    """Ends the worker: for a fault at once (or after `grace_s` to end by itself), else politely.

    `again` wants another worker afterwards, whether a request waits or not.
    """

    reason: str
    fault: bool = False
    again: bool = True
    grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class End:
    """How a worker ended. `from_outside`: by a signal that was neither ours nor a crash."""

    cause: str
    fault: bool
    from_outside: bool = False


class Supervisor:
    """Owns the worker process. Event loop only.

    `on_ready` and `on_end` are called synchronously at those transitions.
    """

    def __init__(
        self,
        command: Sequence[str],
        settings_json: str,
        *,
        crashes: CrashRecord,
        on_ready: Callable[[], None],
        on_end: Callable[[End], None],
    ) -> None:
        self.state = WorkerState.IDLE
        self.worker: WorkerProcess | None = None
        self.starts = 0
        self._command = command
        self._settings_json = settings_json
        self._crashes = crashes
        self._on_ready = on_ready
        self._on_end = on_end
        self._was_ready = False
        self._wanted = asyncio.Event()
        self._order: asyncio.Future[Order] | None = None

    def __repr__(self) -> str:
        return f"<Supervisor: {self.state}, {self.starts} starts>"

    def wake(self) -> None:
        """A worker is wanted: start one if there is none and none is on its way."""
        self._wanted.set()

    def end(self, order: Order) -> None:
        """End the current worker. The first order counts; a worker that is ending needs none."""
        if self._order is None or self._order.done():
            return
        if not order.again:
            self._wanted.clear()
        self._order.set_result(order)

    async def run(self) -> None:
        """Start, watch, restart, until cancelled; then stop the worker.

        Raises:
            ConfigError: the first worker refuses its settings, as every other one would.
        """
        with SocketFolder() as folder:
            while True:
                self.state = WorkerState.IDLE
                await self._wanted.wait()
                self.state = WorkerState.PAUSE
                await asyncio.sleep(self._crashes.pause_s())
                await self._live(folder)

    async def _live(self, folder: SocketFolder) -> None:
        self.state = WorkerState.STARTING
        self.starts += 1
        self._order = asyncio.get_running_loop().create_future()
        try:
            socket = folder.find() / f"worker-{self.starts}.sock"
            worker = await WorkerProcess.start(self._command, self._settings_json, socket)
        except OSError as exc:
            self._ended(End(f"cannot start: {exc.strerror}", fault=True))
            return
        self.worker = worker
        try:
            end = await self._watch(worker, self._order)
        finally:  # cancelled: the gateway ends
            if not worker.gone.done():
                await worker.stop(_LAST_STOP_LIMIT_S)
            self.worker = None
        self._ended(end)

    async def _watch(self, worker: WorkerProcess, order: "asyncio.Future[Order]") -> End:
        ready = asyncio.ensure_future(worker.ready())
        ends: set[asyncio.Future[Any]] = {worker.gone, order}
        try:
            await asyncio.wait(
                {ready, *ends}, timeout=START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not (ready.done() or worker.gone.done() or order.done()):
                self.end(Order(f"not ready within {START_LIMIT_S:g} s", fault=True))
        finally:
            ready.cancel()
        if not (worker.gone.done() or order.done()):
            self.state = WorkerState.READY
            self._was_ready = True
            logger.info("worker ready pid=%d after_s=%.1f", worker.pid, _age_s(worker))
            self._on_ready()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return await self._stop(worker, order)

    async def _stop(self, worker: WorkerProcess, order: "asyncio.Future[Order]") -> End:
        self.state = WorkerState.STOPPING
        if not worker.gone.done():
            await asyncio.wait({worker.gone}, timeout=order.result().grace_s)
        if worker.gone.done():
            status = await worker.kill()
            if status == EXIT_BAD_SETTINGS and not self._was_ready:
                raise ConfigError("the worker refuses its settings; its own message says why")
            cause = describe(status)
            return End(cause, fault=True, from_outside=status in _FROM_OUTSIDE)
        asked = order.result()
        if asked.fault:
            await worker.kill()
        else:
            await worker.stop(STOP_LIMIT_S)
        return End(asked.reason, fault=asked.fault)

    def _ended(self, end: End) -> None:
        self._order = None
        self.state = WorkerState.PAUSE
        if end.fault:
            self._crashes.note_crash(f"worker ended: {end.cause}", time.monotonic())
            logger.error("worker ended cause=%r pause_s=%.1f", end.cause, self._crashes.pause_s())
        else:
            logger.info("worker stopped reason=%r", end.cause)
        self._on_end(end)


def _age_s(worker: WorkerProcess) -> float:
    return time.monotonic() - worker.started_s
