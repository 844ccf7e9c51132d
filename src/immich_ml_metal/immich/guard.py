"""The guardian of the queues that feed us: pauses them before they burn, and mends what was lost.

A job that finds us stopped or failing is lost for good, thousands of them in seconds; jobs of a
paused queue wait. So queues are paused before a planned stop and while a task cannot be served,
and Immich is asked for what is missing after an end that nobody planned.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from immich_ml_metal.immich.api import (
    ImmichError,
    KeyRefused,
    QueueCounts,
    ServerSettings,
)
from immich_ml_metal.immich.keeper import Keeper, aside
from immich_ml_metal.immich.missing import MissingRuns
from immich_ml_metal.immich.own import TIMES, OwnSide, Times
from immich_ml_metal.immich.records import STOPPED, now_utc
from immich_ml_metal.immich.whose import Dependence, find_dependence, no_lookup
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.state import StateUnusable
from immich_ml_metal.system.network import names_of_this_machine
from immich_ml_metal.types import QUEUES

log = logging.getLogger(__name__)

HOW_TO_RELEASE = "immich-ml-metal immich release"
_TERMINAL = "run from a terminal: only the installed service pauses queues"
_NOT_LOOKED = "Immich has not been asked yet"


class Guard:
    """Event loop only."""

    def __init__(
        self,
        keeper: Keeper,
        own: OwnSide,
        metrics: Metrics,
        *,
        is_trial: bool = False,
        times: Times = TIMES,
    ) -> None:
        self.keeper = keeper
        self.why_off = _NOT_LOOKED  # why nothing is paused; empty while it may be
        self._depends = Dependence()
        self._own = own
        self._metrics = metrics
        self._is_trial = is_trial
        self._times = times
        self._missing = MissingRuns(keeper, own.probe, metrics, times)
        self._server: ServerSettings | None = None
        self._queues: dict[str, QueueCounts] = {}
        self._asked_settings_s = self._looked_s = float("-inf")
        self._respected: set[str] = set()
        self._said = ""
        self._has_tried_key = False
        self._refusal = ""  # of the key
        self._key_refused = ""  # at the last question, for who asks us
        self._unwritten = ""  # why there are no records

    def describe(self) -> dict[str, Any]:
        """Its part of `/health`. Any: plain values."""
        records = self.keeper.records
        why_off = (self.why_off == _NOT_LOOKED and self._key_refused) or self.why_off
        return {
            "state": "off" if self.why_off else "on",
            "why_off": why_off,
            "queues": {
                QUEUES[task]: asdict(one) for task, one in self._queues.items() if task in QUEUES
            },
            "paused": {QUEUES[task]: asdict(one) for task, one in records.paused.items()},
            "missing_runs": self._missing.describe(),
            "unplanned_end": records.unplanned_end,
            "last_trouble_with_immich": self._said,
        }

    def count_lost(self, task: str) -> None:
        """A job of this task was answered with a failure of ours."""
        self.keeper.records.repair(task).count_lost(time.time())

    async def run(self) -> None:
        """Look after the queues, until cancelled."""
        while True:
            await self._attempt()
            await asyncio.sleep(self._times.tick_s)

    async def _attempt(self) -> None:
        """One look; a fault in this courtesy must not end the gateway it runs in."""
        try:
            if not self.keeper.is_open:
                await self._begin()
            if self._is_time():
                await self._look()
                self._said = self._unwritten = ""
        except StateUnusable as exc:
            self._unwritten = f"{exc}: no queue is paused"
            self._set_off(self._unwritten)
        except ImmichError as exc:
            self._key_refused = str(exc) if isinstance(exc, KeyRefused) else ""
            self._say_once(str(exc))
        except Exception as exc:  # noqa: BLE001 - said below, with its traceback
            self._say_once(repr(exc), exc)

    async def _begin(self) -> None:
        """Own the records and set the run marker; one that is set tells of an unplanned end."""
        await self.keeper.open()
        records = self.keeper.records
        if records.running_since is not None:
            log.warning("the last run ended unplanned started=%s", records.running_since)
            records.unplanned_end = now_utc()
            self._metrics.unplanned_end.set(time.time())
            self._missing.want_all("an unplanned end")
        records.running_since = now_utc()
        await self.keeper.save()

    def _is_time(self) -> bool:
        records = self.keeper.records
        repairs = self._depends.is_named and self._missing.has_work()
        busy = records.paused or self._own.troubles() or repairs
        pause_s = 0.0 if busy else self._times.look_s
        return time.monotonic() - self._looked_s >= pause_s

    async def _look(self) -> None:
        await self._ask_settings()
        self._queues = await self.keeper.look(self._times.call_s)
        self._looked_s = time.monotonic()
        if self._server is None:
            return
        try:
            await self._try_key()
            self._note_resumed()
            refused = await self._resume_mended(self._server)
            refused += await self._pause_troubled(self._server)
            if self._depends.is_named:
                await self._missing.ask(self._server, self._queues)
        finally:
            self._show_paused()
            await self.keeper.save()
        for error in refused:
            raise error

    async def _try_key(self) -> None:
        """Learn before it matters whether the key may command: resume a queue that runs anyway.

        Raises:
            ImmichError: it may not; the guard stays off until it may.
        """
        running = [t for t in QUEUES if t in self._queues and not self._queues[t].is_paused]
        if self._has_tried_key or not running or self.why_off not in ("", self._refusal):
            return
        for error in (await self.keeper.try_resume(running[:1], self._times.call_s)).values():
            if isinstance(error, KeyRefused):
                self._refusal = str(error)
                self._set_off(self._refusal)
            raise error
        self._has_tried_key, self._refusal = True, ""
        self._set_off("")

    async def _ask_settings(self) -> None:
        now_s = time.monotonic()
        if now_s - self._asked_settings_s < self._times.settings_s:
            return
        self._server = await self.keeper.settings(self._times.call_s)
        self._asked_settings_s = now_s
        await self._judge(self._server, self._times.call_s)

    async def _judge(self, server: ServerSettings, within_s: float) -> None:
        """Whether its queues are ours to pause."""
        url, port, last = self.keeper.immich.url, self._own.port(), self._depends
        find = partial(find_dependence, server, url, port, last=last)
        try:
            async with asyncio.timeout(within_s):
                self._depends = await aside(lambda: find(names_of_this_machine()))
        except TimeoutError:  # a name server that does not answer: as one that fails
            self._depends = find((), lookup=no_lookup)
        trial = _TERMINAL if self._is_trial else ""
        why_off = self._depends.why_not_alone or trial or self._refusal or self._unwritten
        self._set_off(why_off)

    def _set_off(self, why: str) -> None:
        if why != self.why_off:
            self.why_off = why
            if why:
                log.warning("Immich's queues are not paused when we cannot serve reason=%s", why)
            else:
                log.info("looking after Immich's queues immich=%s", self.keeper.immich.url)
        models = self._server.models if self._server is not None and not why else {}
        self._own.expect(models)

    def _note_resumed(self) -> None:
        """A queue of ours that runs is not ours any more, whoever resumed it."""
        for task, pause in self.keeper.forget_running(self._queues).items():
            log.warning("somebody resumed queue=%s that we had paused", QUEUES[task])
            if pause.reason == STOPPED:  # it may have run while nobody listened
                self._missing.want(task, "its queue went on while we were stopped")
            else:
                self._respected.add(task)

    async def _resume_mended(self, server: ServerSettings) -> list[ImmichError]:
        mended = [
            task
            for task, pause in self.keeper.records.paused.items()
            if task in self._queues and self._may_go_on(task, pause.reason, server)
        ]
        return await self._resume(mended, self._times.call_s) if mended else []

    async def _resume(self, tasks: list[str], call_s: float) -> list[ImmichError]:
        failed = await self.keeper.resume(tasks, call_s)
        for task in set(tasks) - failed.keys():
            log.warning("resumed queue=%s", QUEUES[task])
        return list(failed.values())

    def _may_go_on(self, task: str, reason: str, server: ServerSettings) -> bool:
        if self._depends.why_not_alone or task not in server.models:
            return True  # somebody else works on it now, or nobody is to
        if reason == STOPPED:
            return self._own.is_ready()
        return self._missing.is_answered(task, server.models[task])

    async def _pause_troubled(self, server: ServerSettings) -> list[ImmichError]:
        troubles = {
            task: reason
            for task, (model, reason) in self._own.troubles().items()
            if model in ("", server.models.get(task))
        }
        self._respected &= troubles.keys()
        refused: list[ImmichError] = []
        if self.why_off:
            return refused
        left_alone = self._respected | self.keeper.records.paused.keys()
        for task, reason in troubles.items():
            queue = self._queues.get(task)
            if queue is None or queue.is_paused or task in left_alone:
                continue
            if failed := await self.keeper.pause([task], reason, self._times.call_s):
                refused += failed.values()
                continue
            log.error(
                "paused queue=%s until it can be served again; by hand: %s reason=%s",
                QUEUES[task],
                HOW_TO_RELEASE,
                reason,
            )
        return refused

    def _show_paused(self) -> None:
        for task, queue in QUEUES.items():
            self._metrics.paused_queues.labels(queue).set(task in self.keeper.records.paused)

    def _say_once(self, text: str, failure: Exception | None = None) -> None:
        if text != self._said:
            self._said = text
            log.warning("cannot look after Immich's queues reason=%s", text, exc_info=failure)

    # -- the end -----------------------------------------------------------------------------------

    async def stop(self, *, is_planned: bool) -> bool:
        """Before the end: pause for a planned one, else release; whether queues are paused now.

        Returns within `Times.stop_s`, whatever Immich does.
        """
        if not self.keeper.is_open:
            return False
        self._unwritten = ""  # try: if they cannot be written still, the run marker tells it
        try:
            async with asyncio.timeout(self._times.stop_s):
                await self.keeper.arrived()
                if is_planned and not self._is_trial:
                    return await self._pause_all()
                paused = list(self.keeper.records.paused)
                for error in await self._resume(paused, self._times.stop_s / 2):
                    log.error("could not resume a queue reason=%s", error)
        except Exception as exc:  # no fault here may keep the service from ending
            why = str(exc) or f"no answer within {self._times.stop_s:g} s"
            is_known = isinstance(exc, TimeoutError | ImmichError | StateUnusable)
            log.exception(
                "could not pause or release Immich's queues reason=%s",
                why,
                exc_info=None if is_known else exc,
            )
            if is_planned and self.why_off in ("", _NOT_LOOKED):
                self._missing.want_all("a stop at which the queues could not be paused")
        return False

    async def _look_for_stop(self, call_s: float) -> ServerSettings:
        """Immich as it is now or, if it does not answer, as it was a moment ago.

        Raises:
            ImmichError: it does not answer, and did not for a while.
        """
        try:
            server, self._queues = await asyncio.gather(
                self.keeper.settings(call_s), self.keeper.look(call_s)
            )
        except ImmichError:
            is_stale = time.monotonic() - self._looked_s > self._times.stale_s
            if self._server is None or is_stale:
                raise
            return self._server
        return server

    async def _pause_all(self) -> bool:
        call_s = self._times.stop_s / 3
        await self._judge(await self._look_for_stop(call_s), call_s)
        if self.why_off:
            return False
        queues = self._queues
        tasks = [task for task in QUEUES if task in queues and not queues[task].is_paused]
        failed = await self.keeper.pause(tasks, STOPPED, call_s)
        for task, error in failed.items():
            log.error("could not pause queue=%s reason=%s", QUEUES[task], error)
            self._missing.want(task, "a stop at which its queue could not be paused")
        names = ", ".join(
            QUEUES[task] for task in sorted(self.keeper.records.paused.keys() - failed.keys())
        )
        if names:
            log.warning(
                "Immich's queues stay paused until the next start; by hand: %s queues=%s",
                HOW_TO_RELEASE,
                names,
            )
        return bool(names)

    async def active_jobs(self) -> int:
        """Jobs that Immich is in the middle of, 0 when it cannot be asked."""
        with contextlib.suppress(ImmichError):
            queues = await self.keeper.look(self._times.stop_s / 3)
            return sum(queues[task].active for task in QUEUES if task in queues)
        return 0

    async def close(self) -> None:
        """The planned end: take the run marker away."""
        if not self.keeper.is_open:
            return
        self.keeper.records.running_since = None
        with contextlib.suppress(StateUnusable):
            await self.keeper.save()
        self.keeper.close()
