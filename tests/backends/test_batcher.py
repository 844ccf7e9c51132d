import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.backends.batcher import Batcher
from immich_ml_metal.errors import InferenceError, LoadFailed

T = TypeVar("T")


async def run_here(func: Callable[[], T]) -> T:
    return func()


def echo(batch: Sequence[Any]) -> Sequence[Any]:
    for item in batch:
        if isinstance(item, Exception):
            raise item
    return list(batch)


def make(infer: Callable[..., Any] = echo, *, max_batch: int = 3) -> Batcher[Any, Any]:
    return Batcher(infer, name="m", max_batch=max_batch)


async def drain(batcher: Batcher[Any, Any]) -> list[int]:
    """Answer everything that waits; the sizes of the batches."""
    sizes = []
    while len(batcher):
        if batch := batcher.next_batch():
            sizes.append(len(batch))
            await batcher.answer(batch, run_here)
    return sizes


name: ContextVar[str] = ContextVar("name", default="nobody")


class Seen:
    def __init__(self) -> None:
        self.waits: list[float] = []
        self.runs: list[int] = []
        self.answers: list[tuple[str, float]] = []
        self.failures = 0

    def failed(self) -> None:
        self.failures += 1

    def waited(self, seconds: float, /) -> None:
        self.waits.append(seconds)

    def answered(self, seconds: float, /) -> None:
        self.answers.append((name.get(), seconds))

    def ran(self, items: int, seconds: float, /) -> None:
        self.runs.append(items)


async def test_what_waits_becomes_batches_of_at_most_the_models_size_in_order() -> None:
    batcher = make()
    futures = [batcher.add(item) for item in range(7)]
    assert await drain(batcher) == [3, 3, 1]
    assert [await future for future in futures] == list(range(7))


async def test_a_cancelled_caller_is_not_computed() -> None:
    batcher = make()
    futures = [batcher.add(item) for item in range(3)]
    futures[1].cancel()
    assert [entry.item for entry in batcher.next_batch()] == [0, 2]


async def test_cancelled_callers_do_not_take_places_in_a_batch() -> None:
    batcher = make(max_batch=2)
    futures = [batcher.add(item) for item in range(4)]
    futures[0].cancel()
    futures[1].cancel()
    assert [entry.item for entry in batcher.next_batch()] == [2, 3]


async def test_a_caller_cancelled_while_its_batch_runs_does_not_disturb_the_others() -> None:
    batcher = make()
    futures = [batcher.add(item) for item in range(3)]

    async def run(func: Callable[[], T]) -> T:
        futures[1].cancel()
        return func()

    await batcher.answer(batcher.next_batch(), run)
    assert (await futures[0], await futures[2]) == (0, 2)
    assert futures[1].cancelled()


async def test_a_caller_cancelled_while_its_failing_item_runs_does_not_end_the_worker() -> None:
    batcher = make(max_batch=1)
    future = batcher.add(ValueError("bad"))

    async def run(func: Callable[[], T]) -> T:
        future.cancel()
        return func()

    await batcher.answer(batcher.next_batch(), run)
    assert future.cancelled()


async def test_one_bad_item_fails_alone() -> None:
    batcher = make(max_batch=4)
    futures = [batcher.add(item) for item in (1, 2, ValueError("bad"), 4)]
    assert await drain(batcher) == [4, 1, 1, 1, 1]
    assert [await futures[row] for row in (0, 1, 3)] == [1, 2, 4]
    with pytest.raises(InferenceError, match="m: ValueError: bad"):
        await futures[2]


async def test_items_of_a_failed_batch_go_first_and_newcomers_do_not_join_them() -> None:
    batcher = make(max_batch=2)
    failed = [batcher.add(item) for item in (1, ValueError("bad"))]
    await batcher.answer(batcher.next_batch(), run_here)
    later = [batcher.add(item) for item in (3, 4)]
    assert [entry.item for entry in batcher.next_batch()] == [1]
    batcher.next_batch()
    assert [entry.item for entry in batcher.next_batch()] == [3, 4]
    for future in (*failed, *later):
        future.cancel()


async def test_an_item_on_its_own_does_not_join_a_batch_of_newcomers() -> None:
    batcher = make(max_batch=2)
    cancelled, bad = batcher.add(1), batcher.add(ValueError("bad"))
    await batcher.answer(batcher.next_batch(), run_here)
    cancelled.cancel()
    new = batcher.add(3)
    assert [len(batcher.next_batch()) for _ in range(2)] == [1, 1]
    bad.cancel()
    new.cancel()


async def test_a_deliberate_error_reaches_the_caller_as_it_is() -> None:
    batcher = make()
    error = LoadFailed("no memory")
    future = batcher.add(error)
    await drain(batcher)
    with pytest.raises(LoadFailed) as caught:
        await future
    assert caught.value is error


async def test_a_foreign_error_is_kept_as_the_cause() -> None:
    batcher = make()
    future = batcher.add(ZeroDivisionError("by zero"))
    await drain(batcher)
    with pytest.raises(InferenceError) as caught:
        await future
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("results", [[], [1, 2]])
async def test_a_model_that_gives_another_number_of_results_is_an_error(results: list[int]) -> None:
    batcher = make(lambda _: results)
    future = batcher.add(0)
    await drain(batcher)
    with pytest.raises(InferenceError, match=f"m gave {len(results)} results for 1 items"):
        await future


async def test_the_watch_is_told_waits_and_sizes_of_what_succeeded() -> None:
    seen = Seen()
    batcher: Batcher[Any, Any] = Batcher(echo, name="m", max_batch=2, watch=seen)
    futures = [batcher.add(item) for item in (1, 2, 3, ValueError("bad"))]
    await drain(batcher)
    await asyncio.gather(*futures, return_exceptions=True)
    assert seen.runs == [2, 1]
    assert seen.failures == 2  # of the pair, then of the bad one alone
    assert len(seen.waits) == 3
    assert all(seconds >= 0 for seconds in seen.waits)


async def test_each_caller_is_told_in_its_own_context_how_long_its_batch_ran() -> None:
    seen = Seen()
    batcher: Batcher[Any, Any] = Batcher(echo, name="m", max_batch=2, watch=seen)
    for caller in ("first", "second"):
        name.set(caller)
        batcher.add(1)
    name.set("the device")
    await drain(batcher)
    assert [caller for caller, _ in seen.answers] == ["first", "second"]
    assert seen.answers[0][1] == seen.answers[1][1] >= 0


async def test_its_name_and_queue_are_told() -> None:
    batcher = make()
    batcher.add(1).cancel()
    assert repr(batcher) == "<Batcher m: 1 queued>"


@given(
    items=st.lists(st.tuples(st.integers(), st.booleans(), st.booleans()), max_size=20),
    max_batch=st.integers(1, 5),
)
def test_every_caller_gets_its_own_answer_once(
    items: list[tuple[int, bool, bool]], max_batch: int
) -> None:
    async def scenario() -> None:
        batcher = make(max_batch=max_batch)
        futures = []
        for value, is_bad, is_cancelled in items:
            future = batcher.add(ValueError(str(value)) if is_bad else value)
            futures.append(future)
            if is_cancelled:
                future.cancel()
        await drain(batcher)
        for future, (value, is_bad, is_cancelled) in zip(futures, items, strict=True):
            assert future.cancelled() == is_cancelled
            if is_bad and not is_cancelled:
                assert f"ValueError: {value}" in str(future.exception())
            elif not is_cancelled:
                assert future.result() == value

    asyncio.run(scenario())
