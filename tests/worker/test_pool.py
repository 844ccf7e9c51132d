import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from doubles.engines import (
    FILES,
    TEXTUAL,
    VISUAL,
    FakeEngine,
    FakeModel,
    FakeStore,
    FixedEngines,
    Gate,
    soon,
)
from doubles.timing import Clock, until

from immich_ml_metal.errors import DownloadFailed, InferenceError, LoadFailed, OutOfMemory
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.types import ModelKey, Part, Task
from immich_ml_metal.worker.pool import Pool


class World:
    """A pool with its fakes, closed by the fixture."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.store = FakeStore()
        self.pools: list[tuple[Pool, CpuThreads]] = []

    def pool(self, engine: FakeEngine, other: FakeEngine | None = None) -> Pool:
        threads = CpuThreads(4)
        table = {
            (Task.CLIP, Part.VISUAL): engine,
            (Task.CLIP, Part.TEXTUAL): other or engine,
        }
        pool = Pool(FixedEngines(table), self.store, threads, self.metrics, clock=self.clock)
        self.pools.append((pool, threads))
        return pool

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"immich_ml_{name}", labels)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for pool, threads in world.pools:
        await soon(pool.close())
        threads.close()


def start(work: Any) -> "asyncio.Task[Any]":
    return asyncio.ensure_future(work)


# -- loading ---------------------------------------------------------------------------------------


async def test_callers_at_the_same_time_share_one_load(world: World) -> None:
    engine = FakeEngine()
    pool = world.pool(engine)
    loaded = await soon(asyncio.gather(*(pool.get(VISUAL) for _ in range(5))))
    assert len(engine.models) == 1
    assert all(one is loaded[0] for one in loaded)
    assert (world.store.asked, engine.files) == ([VISUAL], [FILES])


async def test_an_engine_without_files_never_asks_the_store(world: World) -> None:
    engine = FakeEngine(needs_files=False)
    await soon(world.pool(engine).get(VISUAL))
    assert (world.store.asked, engine.files) == ([], [None])


async def test_a_cancelled_caller_does_not_stop_the_load_for_the_others(world: World) -> None:
    engine = FakeEngine()
    engine.gate.close()
    pool = world.pool(engine)
    first, second = start(pool.get(VISUAL)), start(pool.get(VISUAL))
    await until(lambda: engine.gate.waiting == 1)
    assert pool.loading == [VISUAL]
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    engine.gate.open()
    assert (await soon(second)).key == VISUAL
    assert len(engine.models) == 1


async def test_a_load_whose_only_caller_left_is_ready_for_the_next(world: World) -> None:
    engine = FakeEngine()
    world.store.gate.close()
    pool = world.pool(engine)
    first = start(pool.get(VISUAL))
    await until(lambda: world.store.gate.waiting == 1)
    first.cancel()
    world.store.gate.open()
    await until(lambda: bool(pool.loaded))
    await soon(pool.get(VISUAL))
    assert len(world.store.asked) == 1


@pytest.mark.parametrize("error", [LoadFailed("bad file"), OutOfMemory("full")])
async def test_a_failed_load_is_tried_again_by_the_next_caller(
    world: World, error: Exception
) -> None:
    engine = FakeEngine(failures=[error])
    pool = world.pool(engine)
    together = await soon(asyncio.gather(*[pool.get(VISUAL)] * 1, return_exceptions=True))
    assert together == [error]
    assert (await soon(pool.get(VISUAL))).key == VISUAL
    labels = {"model": str(VISUAL), "engine": "fake"}
    assert world.value("model_loads_total", **labels, outcome="failed") == 1
    assert world.value("model_loads_total", **labels, outcome="ok") == 1


async def test_a_failed_download_is_tried_again_by_the_next_caller(world: World) -> None:
    world.store = FakeStore(failures=[DownloadFailed("no network")])
    pool = world.pool(FakeEngine())
    with pytest.raises(DownloadFailed):
        await soon(pool.get(VISUAL))
    assert pool.loading == []
    assert (await soon(pool.get(VISUAL))).key == VISUAL


async def test_a_slow_download_does_not_hold_up_another_model(world: World) -> None:
    pool = world.pool(FakeEngine())
    world.store.gate.close()
    slow = start(pool.get(VISUAL))
    await until(lambda: world.store.gate.waiting == 1)
    fast = start(pool.get(TEXTUAL))
    await until(lambda: world.store.gate.waiting == 2)
    world.store.gate.open()
    await soon(asyncio.gather(slow, fast))


async def test_a_loaded_model_is_described_without_being_touched(world: World) -> None:
    pool = world.pool(FakeEngine())
    await soon(pool.get(VISUAL))
    world.clock.now_s += 5
    assert pool.describe() == [
        {
            "model": "ViT-B-32__openai",
            "task": "clip",
            "part": "visual",
            "engine": "fake",
            "size_bytes": 7,
            "loaded_in_s": 0.0,
            "users": 0,
            "idle_s": 5.0,
        }
    ]
    assert world.value("model_bytes", model=str(VISUAL), engine="fake") == 7
    assert pool.progress == 2


async def test_only_halves_with_an_engine_are_served(world: World) -> None:
    pool = world.pool(FakeEngine())
    assert pool.serves(VISUAL)
    assert not pool.serves(ModelKey(Task.OCR, Part.RECOGNITION, "PP-OCRv6_tiny"))


# -- running ---------------------------------------------------------------------------------------


async def test_an_item_goes_through_the_three_verbs(world: World) -> None:
    engine = FakeEngine()
    pool = world.pool(engine)
    assert await soon(pool.run(VISUAL, "cat")) == "cat"
    assert engine.models[0].batches == [["cat"]]
    for stage in ("preprocess", "infer", "queue", "postprocess"):
        assert world.value("stage_seconds_count", task="clip/visual", stage=stage) == 1
    assert world.value("batch_items_sum", model=str(VISUAL)) == 1
    assert pool.progress == 3


@pytest.mark.parametrize("verb", ["preprocess", "infer", "postprocess"])
async def test_a_verb_that_fails_fails_the_item_and_frees_the_model(
    world: World, verb: str
) -> None:
    engine = FakeEngine()
    pool = world.pool(engine)
    loaded = await soon(pool.get(VISUAL))
    engine.models[0].fail[verb] = ValueError("forced")
    with pytest.raises((ValueError, InferenceError), match="forced"):
        await soon(pool.run(VISUAL, 1))
    assert loaded.users == 0
    engine.models[0].fail.clear()
    assert await soon(pool.run(VISUAL, 2)) == 2


async def test_items_of_several_callers_share_a_batch(world: World) -> None:
    engine = FakeEngine(gate=Gate())
    pool = world.pool(engine)
    work = [start(pool.run(VISUAL, row)) for row in range(4)]
    await until(lambda: bool(engine.models) and engine.models[0].gate.waiting == 1)
    await until(lambda: sum(map(len, engine.models[0].batches)) + engine.device.queued == 4)
    engine.models[0].gate.open()
    assert await soon(asyncio.gather(*work)) == [0, 1, 2, 3]
    assert len(engine.models[0].batches) <= 2


@pytest.mark.parametrize("place", ["download", "load", "queue", "infer"])
async def test_a_caller_that_leaves_frees_the_model_wherever_it_waits(
    world: World, place: str
) -> None:
    model_gate = Gate(is_open=place in ("download", "load"))
    engine = FakeEngine(gate=model_gate, max_batch=1)
    pool = world.pool(engine)
    if place == "download":
        world.store.gate.close()
    if place == "load":
        engine.gate.close()
    ahead = [start(pool.run(VISUAL, 1))] if place == "queue" else []
    if ahead:
        await until(lambda: model_gate.waiting == 1)
    caller = start(pool.run(VISUAL, 2))
    gate = {"download": world.store.gate, "load": engine.gate}.get(place, model_gate)
    await until(lambda: engine.device.queued == 1 if place == "queue" else gate.waiting == 1)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    assert caller.cancelled()
    gate.open()
    await soon(asyncio.gather(*ahead))
    assert await soon(pool.run(VISUAL, 3)) == 3
    assert pool.loaded[0].users == 0
    if place == "queue":
        assert engine.models[0].batches == [[1], [3]]


@pytest.mark.parametrize("verb", ["preprocess", "postprocess"])
async def test_a_caller_that_leaves_during_cpu_work_frees_the_model(
    world: World, verb: str
) -> None:
    gate = Gate()

    class Slow(FakeModel):
        def preprocess(self, item: Any) -> Any:
            if verb == "preprocess":
                gate.pass_through()
            return item

        def postprocess(self, raw: Any, item: Any) -> Any:
            if verb == "postprocess":
                gate.pass_through()
            return raw

    engine = FakeEngine()
    pool = world.pool(engine)
    loaded = await soon(pool.get(VISUAL))
    loaded.model = Slow()
    caller = start(pool.run(VISUAL, 1))
    await until(lambda: gate.waiting == 1)
    assert loaded.users == 1
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    assert loaded.users == 0
    gate.open()


# -- unloading -------------------------------------------------------------------------------------


async def test_an_idle_model_is_unloaded_on_its_devices_thread(world: World) -> None:
    engine = FakeEngine()
    pool = world.pool(engine)
    await soon(pool.run(VISUAL, 1))
    world.clock.now_s += 10
    assert await soon(pool.unload_idle(10)) == [VISUAL]
    (model,) = engine.models
    assert model.closed == 1
    assert len(model.threads) == 1
    assert pool.loaded == []
    assert world.value("model_bytes", model=str(VISUAL), engine="fake") is None
    assert world.value("model_evictions_total", reason="idle") == 1


async def test_a_model_used_lately_stays(world: World) -> None:
    pool = world.pool(FakeEngine())
    await soon(pool.run(VISUAL, 1))
    world.clock.now_s += 9
    await soon(pool.run(VISUAL, 1))
    world.clock.now_s += 9
    assert await soon(pool.unload_idle(10)) == []


async def test_a_kept_model_stays_however_idle_it_is(world: World) -> None:
    pool = world.pool(FakeEngine())
    await soon(asyncio.gather(pool.get(VISUAL), pool.get(TEXTUAL)))
    world.clock.now_s += 1000
    assert await soon(pool.unload_idle(10, keep=(TEXTUAL,))) == [VISUAL]


@pytest.mark.parametrize("width", [1, 2])
async def test_several_models_are_unloaded_in_one_go(world: World, width: int) -> None:
    engine = FakeEngine(width=width)
    pool = world.pool(engine)
    await soon(asyncio.gather(pool.get(VISUAL), pool.get(TEXTUAL)))
    assert set(await soon(pool.unload_idle(0))) == {VISUAL, TEXTUAL}
    assert [model.closed for model in engine.models] == [1, 1]


async def test_a_model_in_use_is_never_unloaded(world: World) -> None:
    engine = FakeEngine(gate=Gate())
    pool = world.pool(engine)
    work = start(pool.run(VISUAL, 1))
    await until(lambda: bool(engine.models) and engine.models[0].gate.waiting == 1)
    world.clock.now_s += 1000
    assert await soon(pool.unload_idle(0)) == []
    engine.models[0].gate.open()
    assert await soon(work) == 1
    assert engine.models[0].closed == 0


async def test_a_model_unloaded_between_its_load_and_its_callers_turn_is_loaded_again(
    world: World,
) -> None:
    engine = FakeEngine()
    engine.gate.close()
    pool = world.pool(engine)
    work = start(pool.run(VISUAL, 1))
    await until(lambda: engine.gate.waiting == 1)
    loading = pool._models[VISUAL, "fake"]
    engine.gate.open()
    while not loading.done():
        await asyncio.sleep(0)
    assert await pool.unload_idle(0) == [VISUAL]  # in this very turn: the caller's is a later one
    assert await soon(work) == 1
    assert [(model.closed, model.batches) for model in engine.models] == [(1, []), (0, [[1]])]


async def test_unloading_and_running_at_the_same_time_never_hits_a_model_in_use(
    world: World,
) -> None:
    engine = FakeEngine(width=2)
    pool = world.pool(engine)

    async def work(row: int) -> list[Any]:
        answers = []
        for turn in range(10):
            answers.append(await pool.run((VISUAL, TEXTUAL)[row % 2], (row, turn)))
            await asyncio.sleep(0.004)  # nobody uses the model for a moment
        return answers

    working = start(asyncio.gather(*(work(row) for row in range(4))))
    while not working.done():
        await pool.unload_idle(0)
        await asyncio.sleep(0.001)
    assert await soon(working) == [[(row, turn) for turn in range(10)] for row in range(4)]
    assert len(engine.models) > 2  # models were unloaded in between


async def test_a_model_that_cannot_be_closed_does_not_keep_the_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    pool = world.pool(engine)
    await soon(pool.get(VISUAL))
    await soon(pool.get(TEXTUAL))
    engine.models[0].fail["close"] = RuntimeError("stuck")
    with caplog.at_level(logging.ERROR):
        await soon(pool.unload_idle(0))
    assert [model.closed for model in engine.models] == [1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        f"unloading failed model={VISUAL} engine=fake"
    ]
    assert pool.loaded == []


async def test_a_cancelled_unload_still_frees_what_it_put_out_of_reach(world: World) -> None:
    engine = FakeEngine()
    pool = world.pool(engine)
    await soon(pool.get(VISUAL))
    busy = Gate()
    blocker = start(engine.device.call(busy.pass_through))
    await until(lambda: busy.waiting == 1)
    unload = start(pool.unload_idle(0))
    await asyncio.sleep(0.01)
    unload.cancel()
    await asyncio.gather(unload, return_exceptions=True)
    busy.open()
    await soon(blocker)
    await until(lambda: engine.models[0].closed == 1)


async def test_a_model_loaded_again_while_it_is_unloaded_keeps_its_figures(world: World) -> None:
    engine = FakeEngine(width=2)
    pool = world.pool(engine)
    await soon(pool.get(VISUAL))
    unload = start(pool.unload_idle(0))
    await asyncio.sleep(0)
    await soon(pool.get(VISUAL))
    await soon(unload)
    assert world.value("model_bytes", model=str(VISUAL), engine="fake") == 7


# -- the end ---------------------------------------------------------------------------------------


async def test_closing_unloads_everything_and_ends_every_device_once(world: World) -> None:
    engine, other = FakeEngine(name="a"), FakeEngine(name="b")
    pool = world.pool(engine, other)
    await soon(asyncio.gather(pool.get(VISUAL), pool.get(TEXTUAL)))
    await soon(pool.close())
    assert [model.closed for model in (*engine.models, *other.models)] == [1, 1]
    assert (engine.exits, other.exits) == (1, 1)
    world.pools.clear()


async def test_closing_breaks_off_a_download(world: World) -> None:
    world.store.gate.close()
    pool = world.pool(FakeEngine())
    waiting = start(pool.get(VISUAL))
    await until(lambda: world.store.gate.waiting == 1)
    await soon(pool.close())
    with pytest.raises(DownloadFailed):
        await soon(waiting)
    world.pools.clear()


async def test_closing_waits_for_a_load_and_frees_its_model_on_its_thread(world: World) -> None:
    engine = FakeEngine()
    engine.gate.close()
    pool = world.pool(engine)
    waiting = start(pool.get(VISUAL))
    await until(lambda: engine.gate.waiting == 1)
    closing = start(pool.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    engine.gate.open()
    await soon(closing)
    assert engine.models[0].closed == 1
    await soon(waiting)
    world.pools.clear()


async def test_a_device_that_two_engines_share_is_ended_once(world: World) -> None:
    engine, other = FakeEngine(), FakeEngine()
    other.device.close()
    other.device = engine.device
    pool = world.pool(engine, other)
    await soon(pool.close())
    assert engine.exits == 1
    world.pools.clear()
