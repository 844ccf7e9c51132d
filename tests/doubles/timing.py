"""Waiting for what others do, and time that passes when told to."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 30.0


class Clock:
    """Time in seconds that stands still until a test moves `now_s`."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


async def until(
    condition: Callable[[], Any], what: str = "condition", patience_s: float = PATIENCE_S
) -> None:
    """Let the loop turn until `condition` holds; a test that waits in vain fails."""
    end_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} did not come about in {patience_s:g} s"
        await asyncio.sleep(0.002)


@contextmanager
def work_of_at_most(limit_s: float) -> Iterator[None]:
    """Seconds that this thread may compute in the block, whatever else the machine has to do."""
    started_s = time.thread_time()
    yield
    assert time.thread_time() - started_s < limit_s
