"""What the guard of Immich's queues sees of the gateway."""

import time
from collections.abc import Callable

from immich_ml_metal.gateway.asked import TASKS
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.probe import Prober
from immich_ml_metal.gateway.supervisor import WorkerState
from immich_ml_metal.gateway.troubles import Troubles
from immich_ml_metal.immich.own import OwnSide

# An idle worker has been there, and comes when it is needed.
_THERE = frozenset({WorkerState.READY, WorkerState.IDLE})


def see_own_side(
    dispatcher: Dispatcher, troubles: Troubles, prober: Prober, port: Callable[[], int]
) -> OwnSide:
    """Put it together; `port` is known only once the gateway listens."""
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
