"""What goes along with the requests: the Mac stays awake, and Immich's queues are looked after.

Both are optional; the gateway tells of each request's beginning and end and knows nothing more.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from immich_ml_metal.gateway.asked import TASKS, Asked
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.probe import Prober
from immich_ml_metal.gateway.supervisor import WorkerState
from immich_ml_metal.gateway.troubles import Troubles
from immich_ml_metal.immich.own import OwnSide
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.settings import Settings
from immich_ml_metal.state import StateFolder, default_folder
from immich_ml_metal.system.power import KeepAwake, make_keep_awake

if TYPE_CHECKING:  # it brings httpx, which the gateway does without otherwise
    from immich_ml_metal.immich.guard import Guard

logger = logging.getLogger(__name__)

_TICK_S = 5.0
# An idle worker has been there, and comes when it is needed.
_THERE = frozenset({WorkerState.READY, WorkerState.IDLE})
NO_KEY = (
    "no immich_url and immich_api_key: Immich's queues go on while we are stopped, and their jobs "
    "are lost; with both set they are paused and lost jobs are asked for again"
)
SWITCHED_OFF = "immich_guard is off"


class Companions:
    """Event loop only. `why_unguarded` says why there is no guard."""

    def __init__(
        self,
        awake: KeepAwake | None,
        guard: "Guard | None",
        *,
        why_unguarded: str = "",
        tick_s: float = _TICK_S,
    ) -> None:
        self._awake = awake
        self._guard = guard
        self._why_unguarded = why_unguarded
        self._tick_s = tick_s
        self._guarding: asyncio.Task[None] | None = None

    def describe(self) -> dict[str, Any]:
        """What `/health` says of the guard. Any: plain values."""
        if self._guard is None:
            return {"state": "off", "why_off": self._why_unguarded}
        return self._guard.describe()

    def begin(self) -> None:
        """A request has come."""
        if self._awake is not None:
            try:
                self._awake.begin()
            except OSError as exc:  # no process to be had: rather a Mac asleep than a request lost
                logger.warning("cannot keep the machine awake reason=%s", exc.strerror)

    def end(self, asked: Asked, *, is_lost: bool) -> None:
        """A request is done; `is_lost` when Immich was told of a failure of ours."""
        if self._awake is not None:
            self._awake.end()
        if self._guard is not None and is_lost and not asked.is_search:
            for task in asked.tasks:
                self._guard.count_lost(task)

    async def run(self) -> None:
        """Do what time brings, until cancelled; then let the machine sleep."""
        if self._guard is None:
            logger.info("Immich's queues are not looked after reason=%s", self._why_unguarded)
        else:
            self._guarding = asyncio.create_task(self._guard.run())
        try:
            while True:
                await asyncio.sleep(self._tick_s)
                if self._awake is not None:
                    self._awake.tick()
        finally:
            if self._awake is not None:
                self._awake.close()

    async def before_end(self, *, is_planned: bool) -> bool:
        """Pause or release Immich's queues; whether they are paused. Takes 3 s at most."""
        if self._guard is None:
            return False
        await self._end_guarding()
        return await self._guard.stop(is_planned=is_planned)

    async def active_jobs(self) -> int:
        """Jobs that Immich is in the middle of, as far as it says."""
        return await self._guard.active_jobs() if self._guard is not None else 0

    async def close(self) -> None:
        """Everything is answered: the end was planned."""
        await self._end_guarding()
        if self._guard is not None:
            await self._guard.close()

    async def _end_guarding(self) -> None:
        if self._guarding is not None:
            self._guarding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._guarding
            self._guarding = None


def see_own_side(
    dispatcher: Dispatcher, troubles: Troubles, prober: Prober, port: Callable[[], int]
) -> OwnSide:
    """What the guard sees of the gateway; `port` is known only once it listens."""
    supervisor, crashes = dispatcher.supervisor, dispatcher.crashes

    def lasting() -> dict[str, tuple[str, str]]:
        if not crashes.is_looping(time.monotonic()):
            return troubles.lasting()
        why = f"the worker only crashes: {crashes.failures[-1].cause}"
        return dict.fromkeys(TASKS, ("", why))

    return OwnSide(
        port=port,
        is_ready=lambda: supervisor.starts > 0 and supervisor.state in _THERE,
        troubles=lasting,
        probe=prober.probe,
        expect=troubles.expect,
    )


def make_companions(settings: Settings, metrics: Metrics, own: OwnSide) -> Companions:
    """Those of this machine and these settings."""
    awake = make_keep_awake()
    url, key = settings.immich_url, settings.immich_api_key
    if url is None or key is None:
        return Companions(awake, None, why_unguarded=NO_KEY)
    if not settings.immich_guard:
        return Companions(awake, None, why_unguarded=SWITCHED_OFF)
    from immich_ml_metal.immich.api import ImmichApi, ImmichError
    from immich_ml_metal.immich.guard import Guard
    from immich_ml_metal.immich.keeper import Keeper

    folder = StateFolder(settings.state_dir or default_folder())
    try:
        keeper = Keeper(ImmichApi(url, key), folder)
    except ImmichError as exc:
        return Companions(awake, None, why_unguarded=str(exc))
    return Companions(awake, Guard(keeper, own, metrics, is_trial=sys.stdin.isatty()))
