"""Asks Immich for its missing results: each task for itself, when its queue has nothing to do."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from immich_ml_metal.immich.api import (
    DUPLICATES,
    ImmichError,
    QueueBusy,
    QueueCounts,
    ServerSettings,
)
from immich_ml_metal.immich.keeper import Keeper, aside
from immich_ml_metal.immich.own import Times
from immich_ml_metal.immich.repairs import Repair, is_within
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.types import QUEUES

log = logging.getLogger(__name__)

_SEARCH = "clip"  # what duplicates are found by


class MissingRuns:
    """Event loop only. Changes the keeper's records; the guard saves them."""

    def __init__(
        self,
        keeper: Keeper,
        probe: Callable[[str, str], Awaitable[str]],
        metrics: Metrics,
        times: Times,
    ) -> None:
        self._keeper = keeper
        self._probe = probe
        self._metrics = metrics
        self._times = times
        self._probing: dict[str, asyncio.Task[str]] = {}
        self._probe_after: dict[str, tuple[float, float]] = {}  # task → pause, not before
        self._waits: dict[str, str] = {}

    def describe(self) -> dict[str, dict[str, Any]]:
        """What is wanted and what was asked for, for `/health`. Any: plain values."""
        return {
            QUEUES[task]: {
                "wanted_for": repair.reason
                or (f"{repair.lost} failed answers" * bool(repair.lost)),
                "waits_for": self._waits.get(task, ""),
                "last_asked_s_ago": round(time.time() - repair.asked_s) if repair.asked_s else None,
                "is_running": repair.is_running,
            }
            for task, repair in self._keeper.records.repairs.items()
            if repair.is_wanted or repair.asked_s
        }

    def want(self, task: str, reason: str) -> None:
        """A run of this task is wanted, however many failed answers were counted."""
        self._keeper.records.repair(task).reason = reason

    def want_all(self, reason: str) -> None:
        """Runs of all tasks are wanted."""
        for task in QUEUES:
            self.want(task, reason)

    def has_work(self) -> bool:
        """Whether there is anything to look at now."""
        records, now_s = self._keeper.records, time.time()
        return records.duplicates or any(
            repair.is_running or repair.is_due(now_s, self._times.settled_s)
            for repair in records.repairs.values()
        )

    def is_answered(self, task: str, model: str) -> bool:
        """Whether the task was found to be answered; asks in the background, now and then."""
        now_s = time.monotonic()
        probing = self._probing.get(task)
        pause_s, after_s = self._probe_after.get(task, (self._times.probe_s, 0.0))
        if probing is None:
            if now_s >= after_s:
                self._probing[task] = asyncio.ensure_future(self._probe(task, model))
            return False
        if not probing.done():
            return False
        del self._probing[task]
        if probing.exception() is None and not probing.result():
            self._probe_after.pop(task, None)
            return True
        longer_s = min(1.5 * pause_s, self._times.longest_probe_s)
        self._probe_after[task] = (longer_s, now_s + pause_s)
        return False

    async def ask(self, server: ServerSettings, queues: dict[str, QueueCounts]) -> None:
        """Note which runs are over, and start those that are due."""
        for task, repair in list(self._keeper.records.repairs.items()):
            if task not in queues or task not in server.models:
                repair.reason, repair.lost, repair.is_running = "", 0, False
                continue
            self._note_drained(task, repair, queues[task])
            if repair.is_due(time.time(), self._times.settled_s):
                await self._start(task, repair, server.models[task], queues[task])
        if self._keeper.records.duplicates and DUPLICATES in queues:
            await self._start_duplicates(queues[DUPLICATES])

    def _note_drained(self, task: str, repair: Repair, queue: QueueCounts) -> None:
        now_s = time.time()
        if not repair.is_running or not queue.is_idle:
            return
        if is_within(repair.asked_s, self._times.drained_s, now_s):
            return
        repair.drained(now_s, self._times.first_rest_s)
        log.info(
            "the missing run is over queue=%s answers_failed=%d", QUEUES[task], repair.failed_in_run
        )
        if task == _SEARCH:
            self._keeper.records.duplicates = True

    async def _start(self, task: str, repair: Repair, model: str, queue: QueueCounts) -> None:
        if queue.is_paused:
            self._wait(task, "it is paused")
        elif not queue.is_idle:
            self._wait(task, "it works")
        elif not self.is_answered(task, model):
            self._wait(task, "the task is not answered yet")
        else:
            why = repair.reason or f"{repair.lost} failed answers"
            try:
                await aside(partial(self._keeper.immich.start_missing, task))
            except QueueBusy:
                self._wait(task, "it works")
                return
            except ImmichError as exc:  # this one's: the others are asked for all the same
                self._wait(task, str(exc))
                return
            repair.asked(time.time())
            self._waits.pop(task, None)
            self._metrics.requeues.inc()
            log.warning("asked Immich for its missing results queue=%s after=%s", QUEUES[task], why)

    def _wait(self, task: str, why: str) -> None:
        if self._waits.get(task) != why:
            self._waits[task] = why
            log.info("missing results are asked for later queue=%s reason=%s", QUEUES[task], why)

    async def _start_duplicates(self, queue: QueueCounts) -> None:
        if queue.is_paused or not queue.is_idle:
            return
        try:
            await aside(partial(self._keeper.immich.start_missing, DUPLICATES))
        except QueueBusy:
            return
        except ImmichError as exc:  # asked once: without it only the duplicates are found later
            log.warning("could not start queue=%s reason=%s", DUPLICATES, exc)
        else:
            log.info("asked Immich to look for duplicates among what was missing")
        self._keeper.records.duplicates = False
