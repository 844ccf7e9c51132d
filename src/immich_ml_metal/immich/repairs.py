"""When to ask Immich for its missing results of a task. Plain state; times are epoch seconds.

Immich drops a failed job for good, so an answer that we failed is a photo without a result until a
"missing" run asks for it again. One that always fails must not start runs for ever: the rest after
a run in which answers failed doubles, up to a day. More failures than that run had are a new
outage, which does not wait for it.
"""

from dataclasses import dataclass

LONGEST_REST_S = 86_400.0


def is_within(then_s: float, length_s: float, now_s: float) -> bool:
    """Whether less than `length_s` have gone by; a time to come tells that the clock was put."""
    return 0 <= now_s - then_s < length_s


@dataclass(slots=True)
class Repair:
    """One task's need of a missing run.

    Attributes:
        reason: why a run is wanted whatever was counted; empty when it is not.
        lost: failed answers since the last run was asked for.
        last_lost_s: when the last of them was.
        asked_s: when the last run was asked for; 0 for never.
        is_running: that run has not drained yet.
        failed_in_run: answers that failed in the last run that is over.
        rest_s: how long the task rests after it.
        rests_until_s: when that is over.
    """

    reason: str = ""
    lost: int = 0
    last_lost_s: float = 0.0
    asked_s: float = 0.0
    is_running: bool = False
    failed_in_run: int = 0
    rest_s: float = 0.0
    rests_until_s: float = 0.0

    def __post_init__(self) -> None:
        times = (self.last_lost_s, self.asked_s, self.rest_s, self.rests_until_s)
        numbers = (self.lost, self.failed_in_run, *times)
        if not all(isinstance(one, int | float) for one in numbers):
            raise TypeError(f"no number among {numbers}")

    @property
    def is_wanted(self) -> bool:
        """Whether a run is to be asked for, sooner or later."""
        return bool(self.reason or self.lost)

    def count_lost(self, now_s: float) -> None:
        """An answer was a failure of ours."""
        self.lost += 1
        self.last_lost_s = now_s

    def is_due(self, now_s: float, settled_s: float) -> bool:
        """Whether a run should start now, `settled_s` after the last failure."""
        if self.is_running or not self.is_wanted or is_within(self.last_lost_s, settled_s, now_s):
            return False
        rested = not is_within(self.rests_until_s - self.rest_s, self.rest_s, now_s)
        return bool(self.reason) or self.lost > self.failed_in_run or rested

    def asked(self, now_s: float) -> None:
        """Immich has taken the run."""
        self.reason, self.lost = "", 0
        self.asked_s, self.is_running = now_s, True

    def drained(self, now_s: float, first_rest_s: float) -> None:
        """The run is over: everything that lacked a result was asked for again."""
        self.is_running = False
        self.failed_in_run = self.lost
        self.rest_s = min(max(first_rest_s, 2 * self.rest_s), LONGEST_REST_S) if self.lost else 0.0
        self.rests_until_s = now_s + self.rest_s
