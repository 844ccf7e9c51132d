"""What the guard of Immich's queues is given: this service as it needs it, and its times."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OwnSide:
    """What the guard asks of the gateway.

    Attributes:
        port: where it listens.
        is_ready: whether a worker is there that can answer.
        troubles: task → (model, reason), for what cannot be served until something is mended.
        probe: asks for one answer of a task by a model; why there is none, empty when there is.
        expect: told what Immich asks for (task → model) while its queues are ours to pause.
    """

    port: Callable[[], int]
    is_ready: Callable[[], bool]
    troubles: Callable[[], Mapping[str, tuple[str, str]]]
    probe: Callable[[str, str], Awaitable[str]]
    expect: Callable[[Mapping[str, str]], None]


@dataclass(frozen=True, slots=True)
class Times:
    """How often the guard looks and how long it waits, in seconds; tests take shorter ones.

    Attributes:
        tick_s: between two looks while something is going on.
        look_s: between two looks while nothing is.
        settings_s: how old Immich's settings may be.
        call_s: how long one question to Immich may take.
        stop_s: how long a stop waits for its queues to be paused.
        stale_s: how old what is known may be, at a stop at which Immich does not answer.
        settled_s: no failure for this long means that an outage is over.
        drained_s: an asked-for run needs this long to fill its queue.
        first_rest_s: rest of a task after a run in which answers failed; doubles.
        probe_s, longest_probe_s: between two tries whether a task is mended; grows by half.
    """

    tick_s: float = 2.0
    look_s: float = 30.0
    settings_s: float = 30.0
    call_s: float = 10.0
    stop_s: float = 3.0
    stale_s: float = 60.0
    settled_s: float = 60.0
    drained_s: float = 15.0
    first_rest_s: float = 60.0
    probe_s: float = 10.0
    longest_probe_s: float = 60.0


TIMES = Times()
