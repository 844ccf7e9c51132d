"""This service, as the guard of Immich's queues needs it."""

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
