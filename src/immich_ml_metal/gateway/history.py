"""What the last hour brought, for the page: counts in steps of ten seconds, by kind of request.

Nothing of a request is kept but its kind, how it ended and how long it took.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from statistics import median
from typing import Any

from immich_ml_metal.gateway.asked import read_asked
from immich_ml_metal.types import QUEUES, Task

STEP_S = 10.0
STEPS = 360  # an hour
_RATE_STEPS = 3
_LATEST = 20  # searches whose median the page shows


class Kind(StrEnum):
    """What people tell apart; one request may be of several kinds."""

    SEARCH = "search"
    CLIP = "clip"
    FACES = "faces"
    OCR = "ocr"


_KINDS: dict[str, Kind] = {Task.CLIP: Kind.CLIP, Task.FACES: Kind.FACES, Task.OCR: Kind.OCR}


def kinds_of(head: bytes) -> tuple[Kind, ...]:
    """What a `/predict` body asks for, by how it begins."""
    asked = read_asked(head)
    kinds = _KINDS | {Task.CLIP: Kind.SEARCH} if asked.is_search else _KINDS
    return tuple(kinds[task] for task in asked.tasks)


@dataclass(slots=True)
class Total:
    """Requests since the start."""

    answered: int = 0
    failed: int = 0


class History:
    """Event loop only. Bounded: an hour of steps, whatever arrives."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.totals = {kind: Total() for kind in Kind}
        self._clock = clock
        self._step = int(clock() // STEP_S)
        self._answered = {kind: _empty() for kind in Kind}
        self._failed = {kind: _empty() for kind in Kind}
        self._search_s: deque[float] = deque(maxlen=_LATEST)

    def note(self, head: bytes, status: int | None, seconds: float) -> None:
        """One `/predict` is over.

        Args:
            head: how its body began.
            status: what was answered; None when the caller had hung up, which is not counted.
            seconds: from its first byte to its answer.
        """
        if status is None:
            return
        self._advance()
        is_good = status == 200
        for kind in kinds_of(head):
            (self._answered if is_good else self._failed)[kind][-1] += 1
            total = self.totals[kind]
            total.answered += is_good
            total.failed += not is_good
            if kind is Kind.SEARCH and is_good:
                self._search_s.append(seconds)

    def describe(self) -> dict[str, Any]:
        """For the page: steps oldest first, the last one unfinished. Any: plain values."""
        self._advance()
        return {
            "history": {
                "step_s": STEP_S,
                "kinds": {
                    kind: {
                        "answered": list(self._answered[kind]),
                        "failed": list(self._failed[kind]),
                    }
                    for kind in Kind
                },
            },
            "totals": {kind: asdict(total) for kind, total in self.totals.items()},
            "search_ms": round(1000 * median(self._search_s), 1) if self._search_s else None,
        }

    def copy_totals(self) -> dict[Kind, Total]:
        """What was answered and failed so far, to compare with later."""
        return {kind: replace(total) for kind, total in self.totals.items()}

    def rates(self) -> dict[str, float]:
        """Good answers per second of the last half minute, by Immich's queue."""
        self._advance()
        whole = slice(-1 - _RATE_STEPS, -1)
        return {
            queue: round(sum(list(self._answered[_KINDS[task]])[whole]) / (_RATE_STEPS * STEP_S), 2)
            for task, queue in QUEUES.items()
        }

    def _advance(self) -> None:
        step = int(self._clock() // STEP_S)
        for _ in range(min(step - self._step, STEPS)):
            for counts in (*self._answered.values(), *self._failed.values()):
                counts.append(0)
        self._step = max(step, self._step)


def _empty() -> deque[int]:
    return deque([0] * STEPS, maxlen=STEPS)
