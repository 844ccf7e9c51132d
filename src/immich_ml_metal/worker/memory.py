"""Which models stay in memory, and how long a model that failed to load is left alone.

Plain decisions on plain data; the pool carries them out.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from immich_ml_metal.types import ModelKey


class Resident(Protocol):
    """A model in memory."""

    @property
    def key(self) -> ModelKey:
        """Which one."""
        ...

    @property
    def size_bytes(self) -> int:
        """What it holds, as its engine measured it."""
        ...

    @property
    def users(self) -> int:
        """Requests that use it now."""
        ...

    @property
    def last_used(self) -> float:
        """When one last did."""
        ...


ResidentT = TypeVar("ResidentT", bound=Resident)


@dataclass(frozen=True, slots=True)
class MemoryRules:
    """What may stay.

    Attributes:
        limit_bytes: for all models together; 0 for no limit.
    """

    limit_bytes: int = 0

    def choose_evictions(
        self, residents: Iterable[ResidentT], incoming_bytes: int
    ) -> list[ResidentT]:
        """Whom to unload so that `incoming_bytes` more fit: the least recently used first.

        A model in use is never chosen, so what is chosen may free too little.
        """
        everyone = list(residents)
        excess = incoming_bytes + sum(one.size_bytes for one in everyone) - self.limit_bytes
        chosen: list[ResidentT] = []
        for one in sorted(everyone, key=lambda one: one.last_used):
            if not self.limit_bytes or excess <= 0:
                break
            if one.users == 0:
                chosen.append(one)
                excess -= one.size_bytes
        return chosen


class Backoff:
    """How long to wait before a model that failed is tried again; never for ever.

    A request waits instead of failing at once: Immich does not repeat a failed job, and a queue of
    jobs that fail at once is burnt in seconds.
    """

    def __init__(self, *, first_s: float = 1.0, max_s: float = 30.0) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._failures: dict[Hashable, tuple[int, float]] = {}

    def failed(self, key: Hashable, now: float) -> None:
        """Remember a failure at `now`."""
        count = self._failures.get(key, (0, 0.0))[0] + 1
        pause = min(self._max_s, self._first_s * 2.0 ** (count - 1))
        self._failures[key] = (count, now + pause)

    def succeeded(self, key: Hashable) -> None:
        """Forget its failures."""
        self._failures.pop(key, None)

    def wait_s(self, key: Hashable, now: float) -> float:
        """Seconds until the next try; 0 when nothing failed."""
        return max(0.0, self._failures.get(key, (0, now))[1] - now)
