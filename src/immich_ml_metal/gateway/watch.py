"""Looks at the worker once a second: is it stuck, idle, or too big?"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from immich_ml_metal.gateway import client as worker_client
from immich_ml_metal.gateway.client import WorkerLost
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.supervisor import Order, WorkerState
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.footprint import memory_bytes

logger = logging.getLogger(__name__)

_TICK_S = 1.0
# Long, because questions to a blocked worker pile up in its backlog, which has 128 places on macOS.
_ASK_TIMEOUT_S = 15.0
# Compiling a large model for the Neural Engine takes minutes, in one call that shows no progress.
LOAD_LIMIT_S = 900.0
# A model set that is larger than the limit must not keep the worker restarting.
_RECYCLE_MIN_AGE_S = 60.0
# After a machine slept, its clocks disagree about how long nothing happened.
_ASLEEP_S = 60.0


class ProgressWatch:
    """Decides when a busy worker is stuck: nothing moved for as long as it may."""

    def __init__(self, limit_s: float, load_limit_s: float = LOAD_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._load_limit_s = max(load_limit_s, limit_s)
        self._mark: object = None
        self._moved_s = 0.0
        self._seen_s = 0.0

    def observe(self, *, busy: bool, loading: bool, mark: object, now_s: float) -> bool:
        """Whether the worker is stuck. `mark` differs from the last one when anything moved."""
        slept = now_s - self._seen_s > _ASLEEP_S
        self._seen_s = now_s
        if not busy or slept or mark != self._mark:
            self._mark = mark
            self._moved_s = now_s
        return now_s - self._moved_s >= (self._load_limit_s if loading else self._limit_s)


class Watch:
    """What is known of the running worker, and what is done about it."""

    def __init__(self, settings: Settings, dispatcher: Dispatcher) -> None:
        self.health: dict[str, Any] | None = None
        self.last_health: dict[str, Any] | None = None  # also of a worker that is gone
        self.health_s = 0.0
        self.memory_now_bytes: int | None = None
        self.memory_peak_bytes = 0
        self._settings = settings
        self._dispatcher = dispatcher
        self._told: object = None  # what the worker had done when it was last asked for news
        self._progress = ProgressWatch(settings.request_timeout_s)
        self._keeps_preloaded = has_preload(settings)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            await self.look()

    async def look(self) -> None:
        """Look once."""
        self.measure()
        if self._dispatcher.supervisor.state is not WorkerState.READY:
            self.health = None
            return
        self._check_memory(time.monotonic())
        self._check_idle(time.monotonic())
        if self._dispatcher.queue.running:
            await self.ask(min(_ASK_TIMEOUT_S, self._settings.request_timeout_s))
        self._check_progress(time.monotonic())

    def measure(self) -> None:
        """Sample the worker's memory."""
        worker = self._dispatcher.supervisor.worker
        self.memory_now_bytes = memory_bytes(worker.pid) if worker is not None else None
        self.memory_peak_bytes = max(self.memory_peak_bytes, self.memory_now_bytes or 0)

    async def ask(self, timeout_s: float) -> None:
        """Ask the worker for its `/health`; keep the last answer if it gives none in time."""
        worker = self._dispatcher.supervisor.worker
        body = await self._get("/health", timeout_s)
        if body is None or self._dispatcher.supervisor.worker is not worker:
            return
        with contextlib.suppress(ValueError):
            if isinstance(health := json.loads(body), dict):
                self.health, self.health_s = health, time.monotonic()
                self.last_health = health

    async def ask_news(self) -> dict[str, Any] | None:
        """The worker's `/health`, if it has started or answered anything since the last time."""
        mark = (self._dispatcher.supervisor.starts, self._dispatcher.served_by_worker)
        if self._dispatcher.supervisor.state is not WorkerState.READY or mark == self._told:
            return None
        self._told = mark
        await self.ask(_ASK_TIMEOUT_S)
        return self.health

    async def ask_metrics(self, timeout_s: float) -> str | None:
        """The worker's own numbers, None when it gives none in time."""
        body = await self._get("/metrics", timeout_s)
        return body.decode() if body is not None else None

    async def _get(self, path: str, timeout_s: float) -> bytes | None:
        supervisor = self._dispatcher.supervisor
        if supervisor.worker is None or supervisor.state is not WorkerState.READY:
            return None
        try:
            answer = await worker_client.get(supervisor.worker.socket, path, timeout_s=timeout_s)
        except WorkerLost:  # a busy worker is no news here: the progress check decides
            return None
        return answer.body if answer.status == 200 else None

    def _check_progress(self, now_s: float) -> None:
        supervisor, health = self._dispatcher.supervisor, self.health or {}
        stuck = self._progress.observe(
            busy=self._dispatcher.queue.running > 0,
            loading=bool(health.get("loading")),
            mark=(supervisor.starts, self._dispatcher.served_by_worker, progress_mark(health)),
            now_s=now_s,
        )
        if stuck:
            limit = f"no progress for {self._settings.request_timeout_s:g} s"
            supervisor.end(Order(limit, fault=True))

    def _check_memory(self, now_s: float) -> None:
        limit, worker = self._settings.memory_limit_bytes, self._dispatcher.supervisor.worker
        if not limit or worker is None or (self.memory_now_bytes or 0) <= limit:
            return
        if now_s - worker.started_s >= _RECYCLE_MIN_AGE_S:
            logger.warning("worker over its limit bytes=%d limit=%d", self.memory_now_bytes, limit)
            self._dispatcher.recycle(Order("memory"))

    def _check_idle(self, now_s: float) -> None:
        ttl_s = self._settings.model_ttl_s
        if ttl_s <= 0 or now_s - self._dispatcher.last_active_s < ttl_s:
            return
        if self._keeps_preloaded and not self._dispatcher.served_by_worker:
            return  # it holds nothing but what is to stay
        self._dispatcher.stop_if_idle(Order("idle", again=self._keeps_preloaded))


def progress_mark(health: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a worker's `/health` changes when anything moves. Any: its own JSON."""
    downloads = health.get("downloads", [])
    return (health.get("progress"), *(download.get("done_bytes") for download in downloads))


def has_preload(settings: Settings) -> bool:
    """Whether any model is to be loaded at start."""
    return any(
        getattr(settings, name) for name in Settings.model_fields if name.startswith("preload_")
    )
