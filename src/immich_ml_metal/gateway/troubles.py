"""Which tasks cannot be answered until something is mended, and who is made to wait for that.

Immich throws a job away at its first failure, so the same failure again and again would empty its
queue in seconds. After a few in a row, further requests are held for as long as they can be. Plain
state.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from immich_ml_metal.gateway.asked import Asked
from immich_ml_metal.gateway.client import WorkerAnswer
from immich_ml_metal.gateway.remedies import remedy_of

log = logging.getLogger(__name__)

# Failures that the same request would get again until a person has done something.
LASTING = frozenset({"ModelUnavailable", "UnknownModel", "LoadFailed"})
FEW = 3  # answered at once, for whoever tries something by hand
FORGOTTEN_S = 600.0  # without another failure: nobody asks for it any more
PASSING_S = 60.0  # what passes by itself (a download) is a trouble after this long
_GOOD, _FAILED = 200, 500
_QUIET_S = 60.0  # between two lines about refusals of one status


@dataclass(slots=True)
class Trouble:
    """One task that fails with one model.

    Attributes:
        reason: as in the last answer.
        is_lasting: the same request would fail the same way until a person has done something.
        is_passing: the worker asks to be asked again, as for a download.
        first_s: monotonic time of the first failure in a row.
        since: the same, UTC.
        in_row: failures since the last good answer.
        last_s: monotonic time of the last of them.
        is_confirmed: a try of our own failed as well.
        held, held_bytes: requests that wait for it to be mended.
    """

    task: str
    model: str
    first_s: float
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    reason: str = ""
    is_lasting: bool = False
    is_passing: bool = False
    in_row: int = 0
    last_s: float = 0.0
    is_confirmed: bool = False
    held: int = 0
    held_bytes: int = 0
    answer: WorkerAnswer | None = None
    mended: asyncio.Event = field(default_factory=asyncio.Event)
    tried_s: float = 0.0


class Troubles:
    """Event loop only.

    `share_bytes` is what the held requests of one task may take of the room for uploads.
    """

    def __init__(self, share_bytes: int) -> None:
        self._expected: Mapping[str, str] = {}
        self._share_bytes = share_bytes
        self._known: dict[tuple[str, str], Trouble] = {}
        self._is_ending = False

    def __iter__(self) -> Iterator[Trouble]:
        """Those that are not forgotten yet."""
        old_s = time.monotonic() - FORGOTTEN_S
        self._known = {k: one for k, one in self._known.items() if one.held or one.last_s > old_s}
        return iter(list(self._known.values()))

    def expect(self, models: Mapping[str, str]) -> None:
        """Take what a guarded Immich asks for, by task: its queues can be paused meanwhile."""
        self._expected = models

    def end(self) -> None:
        """Nothing will be mended in time: whoever waits gets its answer now."""
        self._is_ending = True
        for trouble in self:
            trouble.mended.set()

    def note_answer(self, asked: Asked, answer: WorkerAnswer) -> None:
        """Learn from one answer of the worker."""
        if is_failure(answer):
            is_lasting = answer.error in LASTING
            self.note_failure(asked, reason_of(answer), is_lasting=is_lasting, answer=answer)
        elif answer.status == _GOOD:
            self.note_good(asked)

    def note_good(self, asked: Asked) -> None:
        """The task is answered: whoever waits for it goes on."""
        if asked.job is not None and (trouble := self._known.pop(asked.job, None)) is not None:
            trouble.mended.set()

    def note_failure(
        self, asked: Asked, reason: str, *, is_lasting: bool, answer: WorkerAnswer | None = None
    ) -> None:
        """A request of the task was not answered as it should be."""
        if asked.job is None:
            return
        trouble = self._known.setdefault(asked.job, Trouble(*asked.job, time.monotonic()))
        trouble.in_row += 1
        trouble.last_s = time.monotonic()
        trouble.reason, trouble.is_lasting, trouble.answer = reason, is_lasting, answer
        trouble.is_passing = answer is not None and b"retry-after" in dict(answer.headers)

    def find_holding(self, asked: Asked, size_bytes: int) -> Trouble | None:
        """The trouble that a request is to wait for; None when it is answered at once."""
        trouble = self._known.get(asked.job) if asked.job is not None else None
        if trouble is None or not trouble.is_lasting or self._is_ending:
            return None
        is_guarded = self._expected.get(trouble.task) == trouble.model
        if trouble.in_row < FEW and not is_guarded:
            return None
        if trouble.held and trouble.held_bytes + size_bytes > self._share_bytes:
            return None
        return trouble

    @contextmanager
    def held(self, trouble: Trouble, size_bytes: int) -> Iterator[None]:
        """Count a request that waits, for the length of the block."""
        trouble.held += 1
        trouble.held_bytes += size_bytes
        try:
            yield
        finally:
            trouble.held -= 1
            trouble.held_bytes -= size_bytes

    def lasting(self) -> dict[str, tuple[str, str]]:
        """Task → (model, reason), for what a guarded Immich asks for and cannot have."""
        return {
            trouble.task: (trouble.model, trouble.reason)
            for trouble in self
            if self._expected.get(trouble.task) == trouble.model
            and (trouble.is_lasting or trouble.is_confirmed or _is_long(trouble))
        }

    def suspects(self) -> list[Trouble]:
        """Those that only a try of our own can tell from a few bad pictures."""
        return [
            trouble
            for trouble in self
            if not (trouble.is_lasting or trouble.is_passing or trouble.is_confirmed)
            and trouble.in_row >= FEW
            and self._expected.get(trouble.task) == trouble.model
        ]

    def describe(self) -> list[dict[str, Any]]:
        """For `/health`. Any: plain values."""
        shown = ("task", "model", "reason", "since", "in_row", "held")
        return [
            {**{name: getattr(one, name) for name in shown}, "advice": remedy_of(one.reason)}
            for one in self
        ]

    def slow_jobs(self) -> frozenset[tuple[str, str]]:
        """Tasks with their models whose requests may take only a share of the worker's places."""
        return frozenset(name for name, one in self._known.items() if one.in_row >= FEW)


def _is_long(trouble: Trouble) -> bool:
    return trouble.is_passing and time.monotonic() - trouble.first_s >= PASSING_S


def is_failure(answer: WorkerAnswer) -> bool:
    """Whether an answer is our fault: a good picture has no result now."""
    return answer.status >= _FAILED or answer.error in LASTING


def reason_of(answer: WorkerAnswer) -> str:
    """The status, and why in the worker's own words."""
    status = f"answered {answer.status}"
    try:
        found: Any = json.loads(answer.body)["detail"]
    except (ValueError, KeyError, TypeError):
        return status
    return f"{status}: {str(found)[:300]}"


@dataclass(slots=True)
class _Refusals:
    """Of one status: `told` of `count` are in the log already."""

    count: int = 0
    last_reason: str = ""
    last_when: str = ""
    told: int = 0
    told_s: float = float("-inf")


class Refused:
    """What was answered 4xx, and why: Immich never asks again for these photos either.

    One log line per status and minute, with a count: a broken import must not flood the log. Event
    loop only.
    """

    def __init__(self) -> None:
        self._by_status: dict[int, _Refusals] = {}

    def note(self, status: int, reason: str) -> None:
        """A request was answered with a 4xx `status`."""
        known = self._by_status.setdefault(status, _Refusals())
        known.count += 1
        known.last_reason = reason
        known.last_when = datetime.now(UTC).isoformat(timespec="seconds")
        now_s = time.monotonic()
        if now_s - known.told_s < _QUIET_S:
            return
        log.warning(
            "refused, and Immich does not ask again status=%d count=%d reason=%s",
            status,
            known.count - known.told,
            reason,
        )
        known.told, known.told_s = known.count, now_s

    def describe(self) -> dict[str, dict[str, Any]]:
        """By status, for `/health`. Any: plain values."""
        hidden = {"told", "told_s"}
        return {
            str(status): {k: v for k, v in asdict(one).items() if k not in hidden}
            for status, one in sorted(self._by_status.items())
        }
