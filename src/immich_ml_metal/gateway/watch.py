"""Looks at the engine once a second: is it stuck, idle, or too big?"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from immich_ml_metal.gateway import client as engine_client
from immich_ml_metal.gateway.client import EngineLost
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.supervisor import Order, State
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.footprint import memory_bytes

logger = logging.getLogger(__name__)

_TICK_S = 1.0
# Long, because questions to a blocked engine pile up in its backlog, which has 128 places on macOS.
_ASK_TIMEOUT_S = 15.0
# Compiling a large model for the Neural Engine takes minutes, in one call that shows no progress.
LOAD_LIMIT_S = 900.0
# A model set that is larger than the limit must not keep the engine restarting.
_RECYCLE_MIN_AGE_S = 60.0
# After a machine slept, its clocks disagree about how long nothing happened.
_ASLEEP_S = 60.0


class ProgressWatch:
    """Decides when a busy engine is stuck: nothing moved for as long as it may."""

    def __init__(self, limit_s: float, load_limit_s: float = LOAD_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._load_limit_s = max(load_limit_s, limit_s)
        self._mark: object = None
        self._moved_s = 0.0
        self._seen_s = 0.0

    def observe(self, *, busy: bool, loading: bool, mark: object, now_s: float) -> bool:
        """Whether the engine is stuck. `mark` differs from the last one when anything moved."""
        slept = now_s - self._seen_s > _ASLEEP_S
        self._seen_s = now_s
        if not busy or slept or mark != self._mark:
            self._mark = mark
            self._moved_s = now_s
        return now_s - self._moved_s >= (self._load_limit_s if loading else self._limit_s)


class Watch:
    """What is known of the running engine, and what is done about it."""

    def __init__(self, settings: Settings, dispatcher: Dispatcher) -> None:
        self.health: dict[str, Any] | None = None
        self.health_s = 0.0
        self.memory_now_bytes: int | None = None
        self.memory_peak_bytes = 0
        self._settings = settings
        self._dispatcher = dispatcher
        self._progress = ProgressWatch(settings.request_timeout_s)
        self._keeps_preloaded = settings.preload_stays and has_preload(settings)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            await self.look()

    async def look(self) -> None:
        """Look once."""
        self.measure()
        if self._dispatcher.supervisor.state is not State.READY:
            self.health = None
            return
        self._check_memory()
        self._check_idle(time.monotonic())
        if self._dispatcher.queue.running:
            await self.ask(min(_ASK_TIMEOUT_S, self._settings.request_timeout_s))
        self._check_progress(time.monotonic())

    def measure(self) -> None:
        """Sample the engine's memory."""
        engine = self._dispatcher.supervisor.engine
        self.memory_now_bytes = memory_bytes(engine.pid) if engine is not None else None
        self.memory_peak_bytes = max(self.memory_peak_bytes, self.memory_now_bytes or 0)

    async def ask(self, timeout_s: float) -> None:
        """Ask the engine for its `/health`; keep the last answer if it gives none in time."""
        engine = self._dispatcher.supervisor.engine
        body = await self._get("/health", timeout_s)
        if body is None or self._dispatcher.supervisor.engine is not engine:
            return
        with contextlib.suppress(ValueError):
            if isinstance(health := json.loads(body), dict):
                self.health, self.health_s = health, time.monotonic()

    async def ask_metrics(self, timeout_s: float) -> str | None:
        """The engine's own numbers, None when it gives none in time."""
        body = await self._get("/metrics", timeout_s)
        return body.decode() if body is not None else None

    async def _get(self, path: str, timeout_s: float) -> bytes | None:
        supervisor = self._dispatcher.supervisor
        if supervisor.engine is None or supervisor.state is not State.READY:
            return None
        try:
            answer = await engine_client.get(supervisor.engine.socket, path, timeout_s=timeout_s)
        except EngineLost:  # a busy engine is no news here: the progress check decides
            return None
        return answer.body if answer.status == 200 else None

    def _check_progress(self, now_s: float) -> None:
        supervisor, health = self._dispatcher.supervisor, self.health or {}
        stuck = self._progress.observe(
            busy=self._dispatcher.queue.running > 0,
            loading=bool(health.get("loading")),
            mark=(supervisor.starts, self._dispatcher.served_by_engine, progress_mark(health)),
            now_s=now_s,
        )
        if stuck:
            limit = f"no progress for {self._settings.request_timeout_s:g} s"
            supervisor.end(Order(limit, fault=True))

    def _check_memory(self) -> None:
        limit, engine = self._settings.memory_limit_bytes, self._dispatcher.supervisor.engine
        if not limit or engine is None or (self.memory_now_bytes or 0) <= limit:
            return
        if time.monotonic() - engine.started_s >= _RECYCLE_MIN_AGE_S:
            logger.warning("engine over its limit bytes=%d limit=%d", self.memory_now_bytes, limit)
            self._dispatcher.recycle(Order("memory"))

    def _check_idle(self, now_s: float) -> None:
        ttl_s = self._settings.model_ttl_s
        if ttl_s <= 0 or now_s - self._dispatcher.last_active_s < ttl_s:
            return
        if self._keeps_preloaded and not self._dispatcher.served_by_engine:
            return  # it holds nothing but what is to stay
        self._dispatcher.stop_if_idle(Order("idle", again=self._keeps_preloaded))


def progress_mark(health: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of an engine's `/health` changes when anything moves. Any: its own JSON."""
    downloads = health.get("downloads", [])
    return (health.get("progress"), *(download.get("done_bytes") for download in downloads))


def has_preload(settings: Settings) -> bool:
    """Whether any model is to be loaded at start."""
    return any(
        getattr(settings, name)
        for name in Settings.model_fields
        if name.startswith("preload_") and name != "preload_stays"
    )
