"""How often the worker died, how long to wait before the next try, and what is told about it."""

from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_FAILURES_KEPT = 50
# With the pauses between them five deaths take 3.5 s at least: longer than something is busy for a
# moment, and little of the 280 s for which a request is held.
MAX_CRASHES = 5
WINDOW_S = 300.0  # as long as Immich waits for an answer


@dataclass(frozen=True, slots=True)
class Failure:
    """One thing that went wrong: when (UTC) and why, without anything from a request."""

    when: str
    cause: str


class CrashRecord:
    """The deaths of workers that had answered nothing since the death before.

    A worker that answers between two deaths is of use, however often it dies: its requests are
    replayed. One that only dies is tried again after longer and longer pauses.
    """

    def __init__(self, *, max_crashes: int = MAX_CRASHES, window_s: float = WINDOW_S) -> None:
        self._max_crashes = max_crashes
        self._window_s = window_s
        self._fruitless: deque[float] = deque()
        self.failures: deque[Failure] = deque(maxlen=_FAILURES_KEPT)

    def note_crash(self, cause: str, now_s: float) -> None:
        """Count one death."""
        self._fruitless.append(now_s)
        self.note_failure(cause)

    def note_answer(self) -> None:
        """The worker has answered a request."""
        self._fruitless.clear()

    def note_failure(self, cause: str) -> None:
        """Remember a cause for `/health`."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.failures.append(Failure(when, cause))

    def is_looping(self, now_s: float) -> bool:
        """Whether the worker only dies: a request sent now is likely to fail."""
        while self._fruitless and self._fruitless[0] <= now_s - self._window_s:
            self._fruitless.popleft()
        return len(self._fruitless) >= self._max_crashes

    def pause_s(self) -> float:
        """How long to wait before the next start: the first one is at once."""
        doublings = len(self._fruitless) - 2
        if doublings < 0:
            return 0.0
        return min(_FIRST_PAUSE_S * float(2 ** min(doublings, 10)), _LONGEST_PAUSE_S)
