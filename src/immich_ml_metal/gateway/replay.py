"""Which request goes to the worker next, and which of them ended it.

After the death of a worker, the requests it worked on are sent again one at a time, in the order
they arrived, before anything else: one that kills workers dies alone and is known. Plain state, no
I/O.
"""

import asyncio
import bisect
from collections import OrderedDict
from dataclasses import dataclass, field

from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.client import WorkerAnswer
from immich_ml_metal.urgency import Turns, Urgency

MAX_DEATHS = 2
# A SIGKILL comes from outside, from a person or a kernel out of memory: two of them prove nothing.
MAX_KILLS = 3
REMEMBER_S = 600.0
_REMEMBER_MAX = 1000


@dataclass(eq=False, slots=True)
class Job:
    """One accepted request. `deaths` counts the workers that ended while they worked on it.

    `kind` is its task and model, where that is known.
    """

    number: int
    body: Body
    content_type: bytes
    request_id: str
    answer: "asyncio.Future[WorkerAnswer]"
    kind: tuple[str, str] | None = None
    urgency: Urgency = Urgency.PICTURES
    deaths: int = 0
    causes: list[str] = field(default_factory=list)


class JobQueue:
    """Every unanswered request: the most urgent first, then in order of arrival."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._waiting: list[Job] = []
        self._running: set[Job] = set()

    def __repr__(self) -> str:
        return f"<JobQueue: {self.waiting} waiting, {self.running} running>"

    @property
    def waiting(self) -> int:
        """Requests that are not with the worker."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that the worker works on."""
        return len(self._running)

    @property
    def suspects(self) -> int:
        """Waiting requests that were in flight when a worker died."""
        return sum(job.deaths > 0 for job in self._waiting)

    def everything(self) -> list[Job]:
        """Every request that is here."""
        return [*self._running, *self._waiting]

    def add(self, job: Job) -> None:
        """Queue a request by its number."""
        bisect.insort(self._waiting, job, key=lambda waiting: waiting.number)

    def take(self, limit: int, slow: frozenset[tuple[str, str]] = frozenset()) -> list[Job]:
        """Move to the worker what it may have next; a suspect goes alone.

        Args:
            limit: how many at once; as many searches are let through beside them.
            slow: tasks with models that fail for now: they take no more than a third of the places.
        """
        if any(job.deaths for job in self._running):
            return []
        if self._waiting and self._waiting[0].deaths:  # suspects arrived before all others
            return [] if self._running else [self._start(self._waiting[0])]
        searches = self._choose(limit, slow, are_searches=True)
        return [*searches, *self._choose(limit, slow, are_searches=False)]

    def _choose(
        self, limit: int, slow: frozenset[tuple[str, str]], *, are_searches: bool
    ) -> list[Job]:
        """Start those of one kind, searches or the rest, for which there is room."""

        def is_slow(job: Job) -> bool:
            return job.kind in slow

        def is_asked(job: Job) -> bool:
            return (job.urgency is Urgency.SEARCH) is are_searches

        room = limit - sum(map(is_asked, self._running))
        slow_room = max(1, limit // 3) - sum(map(is_slow, self._running))
        waiting = [job for job in self._waiting if is_asked(job)]
        chosen: list[Job] = []
        while len(chosen) < room:
            if slow and slow_room <= 0:
                waiting = [job for job in waiting if not is_slow(job)]
            if not waiting:
                break
            urgencies = [each.urgency for each in waiting]
            # A search overtakes nobody here: counted as a turn, it would put off who waits longest.
            job = waiting.pop(0 if are_searches else self._turns.choose(urgencies))
            slow_room -= is_slow(job)
            chosen.append(self._start(job))
        return chosen

    def _start(self, job: Job) -> Job:
        self._waiting.remove(job)
        self._running.add(job)
        return job

    def remove(self, job: Job) -> None:
        """Forget a request: it was answered, or nobody waits for it."""
        self._running.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)

    def return_running(self) -> None:
        """Queue the running requests again, through no fault of theirs."""
        for job in self._running:
            self.add(job)
        self._running.clear()

    def blame_running(self, cause: str, *, from_outside: bool) -> list[Job]:
        """Queue the running requests again as suspects; return those that had their last chance."""
        suspects = sorted(self._running, key=lambda running: running.number)
        return [job for job in suspects if self.blame(job, cause, from_outside=from_outside)]

    def blame(self, job: Job, cause: str, *, from_outside: bool = False) -> bool:
        """Queue one running request again as a suspect; whether it had its last chance instead."""
        job.deaths += 1
        job.causes.append(cause)
        self._running.discard(job)
        if job.deaths >= (MAX_KILLS if from_outside else MAX_DEATHS):
            return True
        self.add(job)
        return False


class Quarantine:
    """Remembers for a while which contents ended workers, and why."""

    def __init__(self, remember_s: float = REMEMBER_S) -> None:
        self._remember_s = remember_s
        self._reasons: OrderedDict[bytes, tuple[float, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, digest: bytes, reason: str, now_s: float) -> None:
        """Refuse this content until `remember_s` from now."""
        self._reasons[digest] = (now_s + self._remember_s, reason)
        self._reasons.move_to_end(digest)
        while len(self._reasons) > _REMEMBER_MAX:
            self._reasons.popitem(last=False)

    def forget_old(self, now_s: float) -> None:
        """Drop what has been refused long enough."""
        while self._reasons and next(iter(self._reasons.values()))[0] <= now_s:
            self._reasons.popitem(last=False)

    def find(self, digest: bytes) -> str | None:
        """The reason why this content is refused, if it is."""
        entry = self._reasons.get(digest)
        return entry[1] if entry else None
