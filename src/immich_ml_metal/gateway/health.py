"""What `/health` says: both processes, the queue and what went wrong. Nothing of any request."""

import platform
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict
from os import getpid
from typing import TYPE_CHECKING, Any

from immich_ml_metal import __version__
from immich_ml_metal.gateway.supervisor import State
from immich_ml_metal.system.footprint import memory_bytes

if TYPE_CHECKING:
    from immich_ml_metal.gateway.app import Gateway


def report(gateway: "Gateway") -> dict[str, Any]:
    """The state of the service as JSON. Any: a tree of plain values."""
    now_s = time.monotonic()
    supervisor, crashes = gateway.dispatcher.supervisor, gateway.crashes
    own_bytes = memory_bytes(getpid())
    return {
        "status": _status(gateway, now_s),
        "versions": {"service": __version__, "python": platform.python_version()},
        "gateway": {
            "pid": getpid(),
            "age_s": round(now_s - gateway.started_s, 1),
            "memory_bytes": own_bytes,
            "memory_peak_bytes": max(own_bytes or 0, _own_peak_bytes()),
        },
        "worker": _worker(gateway, now_s),
        "queue": _queue(gateway),
        "requests": asdict(gateway.dispatcher.counts),
        "worker_starts": supervisor.starts,
        "failures": {
            "by_cause": Counter(failure.cause for failure in crashes.failures),
            "recent": [asdict(failure) for failure in crashes.failures],
        },
        "quarantined": len(gateway.holding.quarantine),
    }


def _status(gateway: "Gateway", now_s: float) -> str:
    if gateway.is_draining:
        return "draining"
    if gateway.crashes.is_looping(now_s):
        return "crash-loop"
    state = gateway.dispatcher.supervisor.state
    return "ok" if state in {State.READY, State.IDLE} else str(state)


def _worker(gateway: "Gateway", now_s: float) -> dict[str, Any]:
    supervisor, watch = gateway.dispatcher.supervisor, gateway.watch
    watch.measure()
    known: dict[str, Any] = {
        "state": supervisor.state,
        "memory_bytes": watch.memory_now_bytes,
        "memory_peak_bytes": watch.memory_peak_bytes,
        "pause_s": gateway.crashes.pause_s() if supervisor.state is State.PAUSE else None,
    }
    if (worker := supervisor.worker) is not None:
        known |= {"pid": worker.pid, "age_s": round(now_s - worker.started_s, 1)}
    if watch.health is not None:
        known |= {"health": watch.health, "health_age_s": round(now_s - watch.health_s, 1)}
    return known


def _queue(gateway: "Gateway") -> dict[str, int]:
    queue, room = gateway.dispatcher.queue, gateway.holding.reception.room
    return {
        "running": queue.running,
        "waiting": queue.waiting,
        "uploads_not_read_yet": room.waiting,
        "held_memory_bytes": room.held("memory"),
        "held_spool_bytes": room.held("spool"),
    }


def _own_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
