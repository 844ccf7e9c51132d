"""The threads that own an accelerator, and what they do next.

MLX streams are thread-local since 0.31.2: an array made lazily on one thread cannot be evaluated on
another. So a model is loaded, run and freed on its device's threads, and only NumPy arrays cross.
An accelerator has one thread; the CPU has one per core, because several inferences side by side
outrun one inference spread over all cores, and that many for each class of work (`urgency`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from immich_ml_metal.backends.batcher import Batcher, RunOnDevice
from immich_ml_metal.threads import contained, executor
from immich_ml_metal.urgency import Turns, Urgency

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
T = TypeVar("T")


class Device:
    """Runs batches and other jobs on its own threads, `width` at a time, models taking turns.

    The queues belong to the event loop; only the blocking functions run on the threads.
    """

    def __init__(
        self,
        name: str,
        *,
        width: int = 1,
        has_lanes: bool = False,
        on_exit: Callable[[], None] | None = None,
    ) -> None:
        """Make the threads when they are first needed.

        Args:
            name: names the threads, and the device in metrics.
            width: threads, of each lane where there are lanes.
            has_lanes: each class of work has threads of its own, at its own priority; else all
                share the threads, and the more urgent is taken first.
            on_exit: runs last on the thread of a device that has only one.
        """
        assert on_exit is None or width == 1, "which of several threads should run it?"
        self.name = name
        self.width = width
        self._on_exit = on_exit
        if has_lanes:
            self._lanes = {one: Lane(executor(one, width, name), width) for one in Urgency}
        else:
            lane = Lane(executor(Urgency.SEARCH, width, name), width)
            self._lanes = dict.fromkeys(Urgency, lane)

    def __repr__(self) -> str:
        busy = sum(lane.busy for lane in set(self._lanes.values()))
        return f"<Device {self.name}: {busy}/{self.width} busy, {self.queued} queued>"

    @property
    def queued(self) -> int:
        """Items waiting for a thread."""
        return sum(lane.queued for lane in set(self._lanes.values()))

    async def submit(self, batcher: Batcher[ItemT, ResultT], item: ItemT) -> ResultT:
        """Queue one item for the next batch of its model and wait for the result.

        Raises:
            InferenceError: the model failed on this item.
        """
        future = batcher.add(item)
        self._lanes[batcher.urgency].enqueue(batcher)
        return await future

    async def call(self, func: Callable[[], T], urgency: Urgency = Urgency.PICTURES) -> T:
        """Run `func` on a device thread in its turn: loading and freeing models.

        Raises what `func` raises.
        """
        call = _Call(func, urgency)
        self._lanes[urgency].enqueue(call)
        result: T = await call.future
        return result

    def close(self) -> None:
        """Let what runs finish, give the thread its `on_exit`, and end the threads. Blocks."""
        for lane in set(self._lanes.values()):
            lane.close(self._on_exit)


class Lane:
    """Threads of one priority, and what waits for them. Event loop only."""

    def __init__(self, threads: ThreadPoolExecutor, width: int) -> None:
        self._threads = threads
        self._width = width
        # Any: batchers of models of every kind take turns here
        self._ready: list[Batcher[Any, Any] | _Call] = []
        self._running: set[asyncio.Task[None]] = set()
        self._turns = Turns()

    @property
    def busy(self) -> int:
        """Threads at work."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Items waiting for a thread."""
        return sum(len(queue) for queue in self._ready)

    def enqueue(self, queue: "Batcher[Any, Any] | _Call") -> None:
        """Give what waits in `queue` its turns."""
        if queue not in self._ready:
            self._ready.append(queue)
        if len(self._running) < self._width:
            self._running.add(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        try:
            while self._ready:
                await self._turn()
        finally:
            # Here and not in a done callback: that one comes after the callers whose answers were
            # just given, and what they queue next would find a turn that is already over.
            turn = asyncio.current_task()
            assert turn is not None
            self._running.discard(turn)

    async def _turn(self) -> None:
        """Answer one batch of the model whose turn it is, or make one call."""
        queue = self._ready.pop(self._turns.choose([queue.urgency for queue in self._ready]))
        turn = queue.take_turn(self._run)
        if len(queue):  # the rest waits behind the other models
            self._ready.append(queue)
        await turn
        if len(queue) and queue not in self._ready:  # a failed batch came back
            self._ready.append(queue)

    async def _run(self, func: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: contained(func))

    def close(self, on_exit: Callable[[], None] | None) -> None:
        """Let what runs finish, call `on_exit` last, and end the threads. Blocks."""
        if on_exit is not None:
            self._threads.submit(on_exit)
        self._threads.shutdown(wait=True)


class _Call:
    """One blocking function in the queue; its result or exception reaches the caller unchanged."""

    def __init__(self, func: Callable[[], Any], urgency: Urgency) -> None:
        self.urgency = urgency
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._func = func
        self._left = 1

    def __len__(self) -> int:
        return self._left

    def take_turn(self, run: RunOnDevice) -> Awaitable[None]:
        """Leave the queue now; what is returned calls the function, unless the caller has gone."""
        self._left = 0
        return self._answer(run)

    async def _answer(self, run: RunOnDevice) -> None:
        if self.future.done():
            return
        try:
            result = await run(self._func)
        except Exception as exc:  # noqa: BLE001 - the caller's to handle
            if not self.future.done():
                self.future.set_exception(exc)
        else:
            if not self.future.done():
                self.future.set_result(result)
