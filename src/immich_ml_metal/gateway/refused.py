"""What was answered 4xx, and why: Immich never asks again for these photos either.

One log line per status and minute, with a count: a broken import must not flood the log.
"""

import logging
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger(__name__)

_QUIET_S = 60.0


@dataclass(slots=True)
class _Refusals:
    """Of one status: `told` of `count` are in the log already."""

    count: int = 0
    last_reason: str = ""
    last_when: str = ""
    told: int = 0
    told_s: float = float("-inf")


class Refused:
    """Counts and tells. Event loop only."""

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
        logger.warning(
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
