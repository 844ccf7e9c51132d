"""What goes along with the requests: the Mac stays awake, and lost jobs are asked for again.

Both are optional; the gateway tells of each request's beginning and end and knows nothing more.
"""

import asyncio
import logging
from typing import Protocol

from immich_ml_metal.metrics import Metrics
from immich_ml_metal.settings import Settings
from immich_ml_metal.system.power import KeepAwake, make_keep_awake

logger = logging.getLogger(__name__)

_TICK_S = 5.0


class AsksAgain(Protocol):
    """The part of a requeuer that the gateway needs (`immich.requeuer.Requeuer`)."""

    def answered(self, body: bytes, status: int) -> None:
        """Note the answer to a request that began with `body`."""
        ...

    async def tick(self) -> None:
        """Start what is due."""
        ...


class Companions:
    """Event loop only."""

    def __init__(
        self, awake: KeepAwake | None, requeuer: AsksAgain | None, *, tick_s: float = _TICK_S
    ) -> None:
        self._awake = awake
        self._requeuer = requeuer
        self._tick_s = tick_s

    def begin(self) -> None:
        """A request has come."""
        if self._awake is not None:
            try:
                self._awake.begin()
            except OSError as exc:  # no process to be had: rather a Mac asleep than a request lost
                logger.warning("cannot keep the machine awake reason=%s", exc.strerror)

    def end(self, head: bytes, status: int | None) -> None:
        """A request is done.

        Args:
            head: how its body began; it names the tasks.
            status: what was answered; None when the caller had hung up.
        """
        if self._awake is not None:
            self._awake.end()
        if self._requeuer is not None and status is not None:
            self._requeuer.answered(head, status)

    async def run(self) -> None:
        """Do what time brings, until cancelled; then let the machine sleep."""
        try:
            while True:
                await asyncio.sleep(self._tick_s)
                if self._awake is not None:
                    self._awake.tick()
                if self._requeuer is not None:
                    await self._requeuer.tick()
        finally:
            if self._awake is not None:
                self._awake.close()


def make_companions(settings: Settings, metrics: Metrics) -> Companions:
    """Those of this machine and these settings.

    Raises:
        ConfigError: lost jobs are to be asked for, but Immich's address or key is missing.
    """
    requeuer: AsksAgain | None = None
    if settings.immich_requeue:
        # brings httpx and NumPy, which the gateway does without otherwise
        from immich_ml_metal.immich.requeuer import make_requeuer

        requeuer = make_requeuer(settings, metrics.requeues.inc)
    return Companions(make_keep_awake(), requeuer)
