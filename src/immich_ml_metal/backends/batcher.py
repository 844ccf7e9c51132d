"""Micro-batching: whatever queued up while the device was busy becomes the next batch.

There is no timer. An idle device starts at once with a batch of one; a busy device finds a larger
batch waiting when it is done. Knows nothing about models or threads: `device.Device` pulls batches.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from immich_ml_metal.errors import (
    Busy,
    InferenceError,
    InvalidOutput,
    ModelError,
    OutOfMemory,
    ServiceError,
    what_ran_out,
)
from immich_ml_metal.urgency import Urgency

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[ItemT, ResultT]):
    """One waiting item, with the context of its caller.

    `alone` marks an item whose batch failed: it is tried again by itself.
    """

    item: ItemT
    future: asyncio.Future[ResultT]
    queued_at: float
    context: Context
    alone: bool = False


class BatchWatch(Protocol):
    """Is told how long an item waited, how long a batch ran, in seconds, and that one failed."""

    def waited(self, seconds: float, /) -> None:
        """One item waited so long for its batch. Called in its caller's context."""
        ...

    def answered(self, seconds: float, /) -> None:
        """The batch of one item ran so long. Called in its caller's context."""
        ...

    def ran(self, items: int, seconds: float, /) -> None:
        """One batch ran."""
        ...

    def failed(self) -> None:
        """One batch failed, of one item or more; each of several is tried again alone."""
        ...


class RunOnDevice(Protocol):
    """Runs a blocking function on a device thread."""

    def __call__(self, func: Callable[[], T], /) -> Awaitable[T]:
        """Await `func()`, run there."""
        ...


class Batcher(Generic[ItemT, ResultT]):
    """The queue of one model: forms batches, and gives every caller exactly one answer.

    Event loop only.
    """

    def __init__(
        self,
        infer: Callable[[Sequence[ItemT]], Sequence[ResultT]],
        *,
        name: str,
        max_batch: int,
        urgency: Urgency = Urgency.PICTURES,
        watch: BatchWatch | None = None,
    ) -> None:
        self.name = name
        self.urgency = urgency
        self._infer = infer
        self._max_batch = max_batch
        self._watch = watch
        self._queue: deque[Waiting[ItemT, ResultT]] = deque()

    def __repr__(self) -> str:
        return f"<Batcher {self.name}: {len(self._queue)} queued>"

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, item: ItemT) -> asyncio.Future[ResultT]:
        """Queue one item; the future gets its result or its InferenceError."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        entry: Waiting[ItemT, ResultT] = Waiting(item, future, time.perf_counter(), copy_context())
        self._queue.append(entry)
        return future

    def take_turn(self, run: RunOnDevice) -> Awaitable[None]:
        """Take the next batch out of the queue now; what is returned answers it."""
        return self.answer(self.next_batch(), run)

    def next_batch(self) -> list[Waiting[ItemT, ResultT]]:
        """Pop up to `max_batch` entries whose callers still wait; empty when there are none."""
        batch: list[Waiting[ItemT, ResultT]] = []
        while self._queue and len(batch) < self._max_batch:
            if batch and batch[0].alone:  # those that failed are always in front
                break
            entry = self._queue.popleft()
            if not entry.future.done():  # cancelled callers are not computed
                batch.append(entry)
        return batch

    async def answer(self, batch: list[Waiting[ItemT, ResultT]], run: RunOnDevice) -> None:
        """Infer `batch` through `run` and settle its futures; a failed batch is split up."""
        if not batch:
            return
        items = [entry.item for entry in batch]
        started = time.perf_counter()
        try:
            results = await run(lambda: self._infer(items))
            self._check_count(len(results), len(batch))
        except Exception as exc:  # noqa: BLE001 - every waiter must be answered
            self._fail(batch, exc)
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.future.done():
                entry.future.set_result(result)
        self._report(batch, started)

    def _check_count(self, results: int, items: int) -> None:
        if results != items:
            raise InferenceError(f"{self.name} gave {results} results for {items} items")

    def _report(self, batch: list[Waiting[ItemT, ResultT]], started: float) -> None:
        if self._watch is None:
            return
        ran_s = time.perf_counter() - started
        for entry in batch:
            entry.context.run(self._watch.waited, started - entry.queued_at)
            entry.context.run(self._watch.answered, ran_s)
        self._watch.ran(len(batch), ran_s)

    def _fail(self, batch: list[Waiting[ItemT, ResultT]], exc: Exception) -> None:
        # A file that is not here is no failure of the engine's; a wrong output is counted by item.
        # Nor is what the machine had no more of.
        exc = what_ran_out(exc) or exc
        blameless = (ModelError, InvalidOutput, OutOfMemory, Busy)
        if self._watch is not None and not isinstance(exc, blameless):
            self._watch.failed()
        if len(batch) > 1:  # one bad item must not fail its neighbours
            self._queue.extendleft(replace(entry, alone=True) for entry in reversed(batch))
            return
        error: Exception = exc
        if not isinstance(exc, ServiceError):
            error = InferenceError(f"{self.name}: {type(exc).__name__}: {exc}")
            error.__cause__ = exc
        if not batch[0].future.done():
            batch[0].future.set_exception(error)
