"""After an outage in which answers were failed: ask Immich for its missing jobs, once.

Immich drops a failed job for good, so answers that we failed are photos without a result. Pure: the
gateway reports what it answers and the time, and does what `due` says.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from immich_ml_metal.types import Task

# Statuses that are our fault. A 4xx would be refused again, so asking again is no use.
LOST_FROM_STATUS = 500
# Good answers for this long mean that the outage is over, not that one request slipped through.
SETTLED_S = 60.0
# A missing run that fails again must not start the next one at once, for ever.
PAUSE_S = 3600.0


# Immich sends `entries` first, and short (contract §1.4).
_HEAD_BYTES = 4096


def tasks_of(body: bytes) -> tuple[Task, ...]:
    """The tasks a `/predict` body asks for, found without parsing it; all when none is found.

    The gateway keeps bodies unread; a task counted too often costs an idle missing run.
    """
    head = body[:_HEAD_BYTES]
    return tuple(task for task in Task if f'"{task}"'.encode() in head) or tuple(Task)


@dataclass(slots=True)
class RequeuePolicy:
    """Counts lost answers and decides when each task's missing run is due.

    One run per outage: it is due when answers have been good for `settled_s` after the last lost
    one, and not again within `pause_s` of the last run of that task.
    """

    settled_s: float = SETTLED_S
    pause_s: float = PAUSE_S
    lost: dict[Task, int] = field(default_factory=dict)
    _last_lost_s: float = field(default=float("-inf"), init=False)
    _first_good_s: float | None = field(default=None, init=False)
    _last_run_s: dict[Task, float] = field(default_factory=dict, init=False)
    _not_before_s: float = field(default=float("-inf"), init=False)

    def answered(self, tasks: Collection[Task], status: int, now_s: float) -> None:
        """Note one answer of `/predict`; `tasks` are those of its entries."""
        if status >= LOST_FROM_STATUS:
            for task in tasks:
                self.lost[task] = self.lost.get(task, 0) + 1
            self._last_lost_s = now_s
            self._first_good_s = None
        elif self.lost and self._first_good_s is None:
            self._first_good_s = now_s

    def due(self, now_s: float) -> tuple[Task, ...]:
        """The tasks whose missing run should start now."""
        good_s = self._first_good_s
        if good_s is None or now_s < self._not_before_s:
            return ()
        if now_s - max(good_s, self._last_lost_s) < self.settled_s:
            return ()
        never = float("-inf")
        return tuple(
            task for task in self.lost if now_s - self._last_run_s.get(task, never) >= self.pause_s
        )

    def refused(self, now_s: float) -> None:
        """Immich did not take the run: try again after another `settled_s`."""
        self._not_before_s = now_s + self.settled_s

    def started(self, task: Task, now_s: float) -> None:
        """The missing run of `task` was accepted by Immich: its outage is dealt with."""
        self.lost.pop(task, None)
        self._last_run_s[task] = now_s
        if not self.lost:
            self._first_good_s = None
