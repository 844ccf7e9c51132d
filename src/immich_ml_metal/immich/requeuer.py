"""Runs the requeue policy inside the gateway: counts answers, and asks Immich when a run is due."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Protocol

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.immich.requeue import RequeuePolicy, tasks_of
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Task

log = logging.getLogger(__name__)


class StartsMissing(Protocol):
    """What is needed of an Immich client."""

    def start_missing(self, task: Task) -> None:
        """Queue every asset without a result of `task`."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class Requeuer:
    """Event loop only; Immich is asked on another thread."""

    def __init__(
        self,
        connect: Callable[[], StartsMissing],
        on_started: Callable[[], None],
        *,
        policy: RequeuePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._on_started = on_started
        self._policy = policy or RequeuePolicy()
        self._clock = clock

    def answered(self, body: bytes, status: int) -> None:
        """Note the answer to one `/predict`."""
        self._policy.answered(tasks_of(body), status, self._clock())

    async def tick(self) -> None:
        """Start the missing runs that are due. Call this every few seconds."""
        due = self._policy.due(self._clock())
        if due:
            await self._start(due)

    async def _start(self, due: tuple[Task, ...]) -> None:
        try:
            with contextlib.closing(self._connect()) as api:
                for task in due:
                    await self._start_one(api, task)
        except ServiceError as exc:
            self._policy.refused(self._clock())
            log.warning("could not ask Immich for its missing jobs reason=%s", exc)
        except Exception:  # a fault in this courtesy must not end the gateway it runs in
            self._policy.refused(self._clock())
            log.exception("could not ask Immich for its missing jobs")

    async def _start_one(self, api: StartsMissing, task: Task) -> None:
        lost = self._policy.lost.get(task, 0)
        await asyncio.to_thread(api.start_missing, task)
        self._policy.started(task, self._clock())
        self._on_started()
        log.warning("asked Immich for its missing jobs task=%s answers_failed=%d", task, lost)


def make_requeuer(settings: Settings, on_started: Callable[[], None]) -> Requeuer | None:
    """The requeuer of these settings; None unless `immich_requeue` asks for it.

    Raises:
        ConfigError: `immich_requeue` is set but the address or the key is missing.
    """
    if not settings.immich_requeue:
        return None
    from immich_ml_metal.immich.api import connect  # brings httpx, which the gateway does without

    connect(settings.immich_url, settings.immich_api_key).close()
    return Requeuer(lambda: connect(settings.immich_url, settings.immich_api_key), on_started)
