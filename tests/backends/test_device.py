import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from doubles.engines import PATIENCE_S, Gate, soon
from doubles.timing import until

from immich_ml_metal.backends.batcher import Batcher
from immich_ml_metal.backends.device import Device
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.threads import CpuThreads, contained, core_count
from immich_ml_metal.urgency import OVERTAKINGS, Urgency


class Model:
    """An inference that waits at its gate and remembers its batches and threads."""

    def __init__(
        self,
        name: str = "m",
        *,
        max_batch: int = 2,
        is_open: bool = True,
        urgency: Urgency = Urgency.PICTURES,
    ) -> None:
        self.name = name
        self.on_batch: Callable[[str], None] = lambda name: None
        self.gate = Gate(is_open=is_open)
        self.batches: list[list[Any]] = []
        self.threads: set[str] = set()
        self.batcher: Batcher[Any, Any] = Batcher(
            self.infer, name=name, max_batch=max_batch, urgency=urgency
        )

    def infer(self, batch: Sequence[Any]) -> Sequence[Any]:
        self.batches.append(list(batch))
        self.on_batch(self.name)
        self.threads.add(threading.current_thread().name)
        self.gate.pass_through()
        if "bad" in batch:
            raise ValueError("bad")
        return [item * 2 for item in batch]


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device("dev")
    yield device
    device.close()


@pytest.fixture
def wide() -> Iterator[Device]:
    device = Device("wide", width=2)
    yield device
    device.close()


async def test_an_idle_device_starts_at_once_with_a_batch_of_one(device: Device) -> None:
    model = Model()
    assert await soon(device.submit(model.batcher, 21)) == 42
    assert model.batches == [[21]]


async def test_what_queues_while_the_device_is_busy_is_the_next_batch(device: Device) -> None:
    model = Model(max_batch=4, is_open=False)
    work = [asyncio.create_task(device.submit(model.batcher, item)) for item in range(4)]
    await until(lambda: model.gate.waiting == 1)
    assert device.queued == 3 or model.batches == [[0, 1, 2, 3]]
    more = [asyncio.create_task(device.submit(model.batcher, item)) for item in (4, 5)]
    await until(lambda: device.queued >= 2)
    model.gate.open()
    assert await soon(asyncio.gather(*work, *more)) == [0, 2, 4, 6, 8, 10]
    assert sum(map(len, model.batches)) == 6
    assert len(model.batches) < 6


async def test_all_work_of_a_device_runs_on_its_own_thread(device: Device) -> None:
    model = Model()
    for item in range(3):
        await soon(device.submit(model.batcher, item))
    loader = await soon(device.call(lambda: threading.current_thread().name))
    assert model.threads == {loader}
    assert loader.startswith("dev")


async def test_a_caller_may_queue_again_the_moment_it_is_answered(device: Device) -> None:
    model = Model()
    async with asyncio.timeout(PATIENCE_S):  # not `soon`: its task would give the worker time
        for item in range(20):
            assert await device.submit(model.batcher, item) == 2 * item
            assert await device.call(lambda: 5) == 5


async def test_models_take_turns(device: Device) -> None:
    order: list[str] = []
    gate = Gate()

    def make(name: str) -> Batcher[Any, Any]:
        def infer(batch: Sequence[Any]) -> Sequence[Any]:
            order.append(name)
            gate.pass_through()
            return batch

        return Batcher(infer, name=name, max_batch=1)

    first, second = make("a"), make("b")
    work = [asyncio.create_task(device.submit(first, row)) for row in range(3)]
    await until(lambda: order == ["a"])
    work += [asyncio.create_task(device.submit(second, row)) for row in range(2)]
    await until(lambda: device.queued == 4)
    gate.open()
    await soon(asyncio.gather(*work))
    assert order == ["a", "a", "b", "a", "b"] or order == ["a", "b", "a", "b", "a"]


async def test_where_classes_have_lanes_a_search_waits_for_no_picture() -> None:
    device = Device("cpu", width=1, has_lanes=True)
    pictures = Model(max_batch=1, is_open=False)
    search = Model(urgency=Urgency.SEARCH)
    work = [asyncio.create_task(device.submit(pictures.batcher, item)) for item in range(3)]
    await until(lambda: pictures.gate.waiting == 1)
    assert await soon(device.submit(search.batcher, 4)) == 8
    assert device.queued == 2
    pictures.gate.open()
    await soon(asyncio.gather(*work))
    assert search.threads.isdisjoint(pictures.threads)
    await asyncio.to_thread(device.close)


async def test_on_an_accelerator_a_search_is_next_and_pictures_get_their_turns(
    device: Device,
) -> None:
    pictures = Model("pictures", max_batch=1, is_open=False)
    searches = Model("searches", max_batch=1, urgency=Urgency.SEARCH)
    order: list[str] = []
    searches.on_batch = pictures.on_batch = order.append
    work = [asyncio.create_task(device.submit(pictures.batcher, item)) for item in range(3)]
    await until(lambda: pictures.gate.waiting == 1)
    flood = range(3 * OVERTAKINGS)
    work += [asyncio.create_task(device.submit(searches.batcher, item)) for item in flood]
    await until(lambda: device.queued == 2 + len(flood))
    pictures.gate.open()
    await soon(asyncio.gather(*work))
    assert order[:2] == ["pictures", "searches"]
    assert order.index("pictures", 1) <= 1 + OVERTAKINGS, "the flood never ends, they wait"


async def test_as_many_batches_run_side_by_side_as_the_device_is_wide(wide: Device) -> None:
    model = Model(max_batch=1, is_open=False)
    work = [asyncio.create_task(wide.submit(model.batcher, item)) for item in range(5)]
    await until(lambda: model.gate.waiting == 2)
    assert wide.queued == 3
    assert repr(wide) == "<Device wide: 2/2 busy, 3 queued>"
    model.gate.open()
    assert await soon(asyncio.gather(*work)) == [0, 2, 4, 6, 8]
    assert len(model.threads) == 2


@pytest.mark.parametrize("name", ["device", "wide"])
async def test_one_bad_item_fails_alone(name: str, request: pytest.FixtureRequest) -> None:
    device: Device = request.getfixturevalue(name)
    model = Model(max_batch=4, is_open=False)
    blocker = Model("blocker", is_open=False)
    blocks = [asyncio.create_task(device.submit(blocker.batcher, 0)) for _ in range(2)]
    await until(lambda: blocker.gate.waiting >= 1)
    items = [1, "bad", 3]
    work = [asyncio.create_task(device.submit(model.batcher, item)) for item in items]
    await asyncio.sleep(0)
    model.gate.open()
    blocker.gate.open()
    results = await soon(asyncio.gather(*work, return_exceptions=True))
    await soon(asyncio.gather(*blocks))
    assert (results[0], results[2]) == (2, 6)
    assert isinstance(results[1], InferenceError)


async def test_a_caller_cancelled_in_the_queue_is_never_computed(device: Device) -> None:
    model = Model(max_batch=1, is_open=False)
    first = asyncio.create_task(device.submit(model.batcher, 1))
    await until(lambda: model.gate.waiting == 1)
    second = asyncio.create_task(device.submit(model.batcher, 2))
    third = asyncio.create_task(device.submit(model.batcher, 3))
    await until(lambda: device.queued == 2)
    second.cancel()
    model.gate.open()
    assert await soon(asyncio.gather(first, third)) == [2, 6]
    assert model.batches == [[1], [3]]


async def test_a_caller_cancelled_while_it_is_computed_leaves_the_device_free(
    device: Device,
) -> None:
    model = Model(is_open=False)
    first = asyncio.create_task(device.submit(model.batcher, 1))
    await until(lambda: model.gate.waiting == 1)
    first.cancel()
    second = asyncio.create_task(device.submit(model.batcher, 2))
    await asyncio.sleep(0)
    model.gate.open()
    assert await soon(second) == 4


async def test_a_cancelled_call_that_waits_is_not_made(device: Device) -> None:
    model = Model(is_open=False)
    first = asyncio.create_task(device.submit(model.batcher, 1))
    await until(lambda: model.gate.waiting == 1)
    made: list[int] = []
    call = asyncio.create_task(device.call(lambda: made.append(1)))
    await until(lambda: device.queued == 1)
    call.cancel()
    model.gate.open()
    assert await soon(first) == 2
    assert await soon(device.call(lambda: 5)) == 5
    assert made == []


async def test_a_call_cancelled_while_it_runs_leaves_the_device_free(device: Device) -> None:
    gate = Gate()
    call = asyncio.create_task(device.call(gate.pass_through))
    await until(lambda: gate.waiting == 1)
    call.cancel()
    gate.open()
    assert await soon(device.call(lambda: 5)) == 5


@pytest.mark.parametrize("error", [LoadFailed("no"), KeyError("k"), InferenceError("x")])
async def test_a_call_raises_what_its_function_raises(device: Device, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await soon(device.call(fail))
    assert caught.value is error
    assert await soon(device.call(lambda: 1)) == 1


class Panic(BaseException):
    """What a Rust library raises."""


@pytest.mark.parametrize("error", [Panic("index out of range"), StopIteration(), SystemExit(1)])
async def test_what_cannot_travel_to_the_caller_arrives_as_an_error(
    device: Device, error: BaseException
) -> None:
    threads = CpuThreads(1)

    def fail() -> None:
        raise error

    for work in (device.call(fail), threads.run(fail)):
        with pytest.raises(InferenceError, match=type(error).__name__) as caught:
            await soon(work)
        assert caught.value.__cause__ is error
    assert await soon(device.call(lambda: 1)) == 1
    threads.close()


def test_what_succeeds_and_ordinary_errors_pass_through() -> None:
    assert contained(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        contained(lambda: 1 // 0)


async def test_closing_waits_for_what_runs_and_ends_with_the_exit_call() -> None:
    order: list[str] = []
    device = Device("d", on_exit=lambda: order.append("exit"))
    gate = Gate()

    def job() -> None:
        gate.pass_through()
        order.append("job")

    call = asyncio.create_task(device.call(job))
    await until(lambda: gate.waiting == 1)
    closing = asyncio.create_task(asyncio.to_thread(device.close))
    await asyncio.sleep(0.01)
    gate.open()
    await soon(closing)
    await soon(call)
    assert order == ["job", "exit"]


async def test_work_that_comes_after_the_end_fails_instead_of_waiting() -> None:
    device = Device("d")
    device.close()
    with pytest.raises(InferenceError, match="RuntimeError"):
        await soon(device.submit(Model().batcher, 1))


def test_an_exit_call_needs_a_device_of_one_thread() -> None:
    with pytest.raises(AssertionError):
        Device("d", width=2, on_exit=lambda: None)


async def test_cpu_threads_carry_the_callers_context() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    name.set("caller")
    threads = CpuThreads(0)
    assert await soon(threads.run(name.get)) == "caller"
    threads.close()


async def test_as_many_cpu_threads_work_as_were_asked_for() -> None:
    threads, gate = CpuThreads(3), Gate()
    work = [asyncio.create_task(threads.run(gate.pass_through)) for _ in range(5)]
    await until(lambda: gate.waiting == 3)
    await asyncio.sleep(0.01)
    assert gate.waiting == 3
    gate.open()
    await soon(asyncio.gather(*work))
    threads.close()


def test_there_is_a_core_to_run_on() -> None:
    assert core_count() >= 1
    if sys.platform == "linux":
        import os

        assert core_count() == len(os.sched_getaffinity(0))
