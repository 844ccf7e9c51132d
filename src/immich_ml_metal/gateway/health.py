"""What `/health` says: both processes, the queue and what went wrong. Nothing of any request."""

import platform
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from os import getpid
from typing import Any

from immich_ml_metal import __version__
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.holding import Holding
from immich_ml_metal.gateway.qualifier import Qualifier
from immich_ml_metal.gateway.remedies import remedy_of
from immich_ml_metal.gateway.supervisor import WorkerState
from immich_ml_metal.gateway.watch import Watch
from immich_ml_metal.system.footprint import memory_bytes


@dataclass(frozen=True, slots=True)
class Parts:
    """What the report reads; `started_s` is of the monotonic clock."""

    dispatcher: Dispatcher
    crashes: CrashRecord
    holding: Holding
    watch: Watch
    qualifier: Qualifier
    started_s: float
    is_draining: bool


def report(parts: Parts) -> dict[str, Any]:
    """The state of the service as JSON. Any: a tree of plain values."""
    now_s = time.monotonic()
    supervisor, crashes = parts.dispatcher.supervisor, parts.crashes
    own_bytes = memory_bytes(getpid())
    return {
        "status": _status(parts, now_s),
        "versions": {"service": __version__, "python": platform.python_version()},
        "gateway": {
            "pid": getpid(),
            "age_s": round(now_s - parts.started_s, 1),
            "memory_bytes": own_bytes,
            "memory_peak_bytes": max(own_bytes or 0, _own_peak_bytes()),
        },
        "worker": _worker(parts, now_s),
        "queue": _queue(parts),
        "requests": asdict(parts.dispatcher.counts),
        "worker_starts": supervisor.starts,
        "worker_ends": dict(parts.dispatcher.ends),
        "failures": {
            "by_cause": Counter(failure.cause for failure in crashes.failures),
            "recent": [
                {**asdict(failure), "advice": remedy_of(failure.cause)}
                for failure in crashes.failures
            ],
        },
        "qualification": parts.qualifier.describe(),
        "quarantined": len(parts.holding.quarantine),
    }


def _status(parts: Parts, now_s: float) -> str:
    if parts.is_draining:
        return "draining"
    if parts.crashes.is_looping(now_s):
        return "crash-loop"
    state = parts.dispatcher.supervisor.state
    return "ok" if state in {WorkerState.READY, WorkerState.IDLE} else str(state)


def _worker(parts: Parts, now_s: float) -> dict[str, Any]:
    supervisor, watch = parts.dispatcher.supervisor, parts.watch
    watch.measure()
    known: dict[str, Any] = {
        "state": supervisor.state,
        "memory_bytes": watch.memory_now_bytes,
        "memory_peak_bytes": watch.memory_peak_bytes,
        "pause_s": parts.crashes.pause_s() if supervisor.state is WorkerState.PAUSE else None,
    }
    if (worker := supervisor.worker) is not None:
        known |= {"pid": worker.pid, "age_s": round(now_s - worker.started_s, 1)}
    if watch.health is not None:
        known |= {"health": watch.health, "health_age_s": round(now_s - watch.health_s, 1)}
    return known


def _queue(parts: Parts) -> dict[str, int]:
    queue, room = parts.dispatcher.queue, parts.holding.reception.room
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
