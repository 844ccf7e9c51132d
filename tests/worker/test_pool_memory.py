"""The pool under a memory budget, and with models that fail to load."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from doubles.engines import FixedEngines
from doubles.hub import onnx_bytes

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.device import Device
from immich_ml_metal.errors import DownloadFailed, LoadFailed, ModelUnavailable
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task
from immich_ml_metal.worker.memory import Backoff, MemoryRules
from immich_ml_metal.worker.pool import Pool

VISUAL = ModelKey(Task.CLIP, Part.VISUAL, "ViT-B-32__openai")
TEXTUAL = ModelKey(Task.CLIP, Part.TEXTUAL, "ViT-B-32__openai")
DETECTOR = ModelKey(Task.FACES, Part.DETECTION, "buffalo_l")
RECOGNISER = ModelKey(Task.FACES, Part.RECOGNITION, "buffalo_l")


class Echo:
    """A model of a given size that answers what it was asked."""

    max_batch = 4

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.closed = 0

    def preprocess(self, item: Any) -> Any:
        return item

    def infer(self, batch: Sequence[Any]) -> Sequence[Any]:
        assert not self.closed
        return list(batch)

    def postprocess(self, raw: Any, item: Any) -> Any:
        return raw

    def close(self) -> None:
        self.closed += 1


class SizedEngine:
    """Loads models of 10 bytes, or fails as often as it is told to."""

    name = "sized"
    needs_files = True

    def __init__(self, failures: Sequence[Exception] = ()) -> None:
        self.device = Device("sized")
        self.failures = list(failures)
        self.sizes: dict[ModelKey, int] = {}
        self.loads: list[ModelKey] = []
        self.models: list[Echo] = []

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        self.loads.append(key)
        if self.failures:
            raise self.failures.pop(0)
        self.models.append(Echo(self.sizes.get(key, 10)))
        return self.models[-1]


@dataclass
class Files:
    """A store whose models are all here."""

    folder: Path
    is_damaged: bool = False
    failures: list[Exception] = field(default_factory=list)
    repaired: list[ModelKey] = field(default_factory=list)

    def ensure(self, key: ModelKey) -> ModelFiles:
        if self.failures:
            raise self.failures.pop(0)
        return ModelFiles(self.folder / f"{key.part}.onnx", self.folder, self.folder)

    def repair(self, key: ModelKey) -> bool:
        self.repaired.append(key)
        damaged, self.is_damaged = self.is_damaged, False
        return damaged

    def downloads(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        pass


class World:
    """A pool, its fakes, and a clock that stands still until it is moved."""

    def __init__(self, folder: Path, limit_bytes: int, failures: Sequence[Exception] = ()) -> None:
        self.now = 100.0
        self.engine = SizedEngine(failures)
        self.store = Files(folder)
        self.metrics = Metrics()
        self.threads = CpuThreads(2)
        self.backoff = Backoff(first_s=0.02, max_s=0.05)
        table = {
            (key.task, key.part): self.engine for key in (VISUAL, TEXTUAL, DETECTOR, RECOGNISER)
        }
        self.pool = Pool(
            FixedEngines(table),
            self.store,
            self.threads,
            self.metrics,
            clock=lambda: self.now,
            memory=MemoryRules(limit_bytes),
            backoff=self.backoff,
        )

    async def use(self, *keys: ModelKey) -> None:
        for key in keys:
            self.now += 1
            assert await self.pool.run(key, "x") == "x"

    @property
    def here(self) -> set[ModelKey]:
        return {loaded.key for loaded in self.pool.loaded}

    async def close(self) -> None:
        await self.pool.close()
        self.threads.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path, limit_bytes=25)
    yield world
    await world.close()


async def test_the_least_recently_used_makes_room(world: World) -> None:
    await world.use(VISUAL, DETECTOR, VISUAL, RECOGNISER)
    assert world.here == {VISUAL, RECOGNISER}
    assert [model.closed for model in world.engine.models] == [0, 1, 0]
    evicted = world.metrics.registry.get_sample_value(
        "immich_ml_model_evictions_total", {"reason": "memory"}
    )
    assert evicted == 1


async def test_an_evicted_model_comes_back_when_it_is_asked_for(world: World) -> None:
    await world.use(VISUAL, DETECTOR, RECOGNISER, VISUAL)
    assert world.engine.loads == [VISUAL, DETECTOR, RECOGNISER, VISUAL]
    assert world.here == {RECOGNISER, VISUAL}


async def test_what_is_to_stay_stays_when_idle_but_not_at_the_end(world: World) -> None:
    await world.use(TEXTUAL, RECOGNISER)
    world.now += 1e6
    assert await world.pool.unload_idle(300.0, keep=[TEXTUAL]) == [RECOGNISER]
    assert world.here == {TEXTUAL}
    await world.pool.close()
    assert all(model.closed == 1 for model in world.engine.models)


async def test_a_model_in_use_is_not_evicted(world: World) -> None:
    async with world.pool.lease(VISUAL), world.pool.lease(DETECTOR):
        await world.use(RECOGNISER)  # over the limit, but nobody is thrown out or refused
        assert world.here == {VISUAL, DETECTOR, RECOGNISER}
    await world.use(TEXTUAL)
    assert len(world.here) == 2


async def test_the_measured_size_counts_not_only_that_of_the_file(world: World) -> None:
    world.engine.sizes[RECOGNISER] = 25
    await world.use(VISUAL, DETECTOR, RECOGNISER)
    assert world.here == {RECOGNISER}


async def test_room_is_made_before_a_large_file_is_loaded(world: World, tmp_path: Path) -> None:
    (tmp_path / "recognition.onnx").write_bytes(onnx_bytes(1000))
    await world.use(VISUAL, DETECTOR)
    world.engine.failures.append(LoadFailed("out of memory"))
    with pytest.raises(LoadFailed):
        await world.use(RECOGNISER)
    assert world.here == set()


async def test_models_loaded_at_once_share_the_limit(tmp_path: Path) -> None:
    world = World(tmp_path, limit_bytes=25)
    await world.use(VISUAL, DETECTOR)
    await asyncio.gather(world.pool.get(RECOGNISER), world.pool.get(TEXTUAL))
    assert world.here == {RECOGNISER, TEXTUAL}
    await world.close()


@pytest.mark.parametrize("error", [LoadFailed("torn"), DownloadFailed("no network")])
async def test_a_failure_is_tried_again_after_a_pause_and_never_permanent(
    tmp_path: Path, error: Exception
) -> None:
    world = World(tmp_path, limit_bytes=0)
    if isinstance(error, LoadFailed):
        world.engine.failures.extend([error] * 3)
    else:
        world.store.failures.extend([error] * 3)
    for _ in range(3):
        with pytest.raises(type(error)):
            await world.pool.get(VISUAL)
        assert world.backoff.wait_s((VISUAL, world.engine.name), world.now) > 0
        world.now += 0.03  # part of the pause; the rest is waited for
    assert (await world.pool.get(VISUAL)).key == VISUAL
    assert world.backoff.wait_s((VISUAL, world.engine.name), world.now) == 0
    await world.close()


async def test_a_model_that_is_not_to_be_had_fails_at_once_each_time(tmp_path: Path) -> None:
    world = World(tmp_path, limit_bytes=0)
    world.backoff.failed(DETECTOR, world.now)  # another model's pause is not waited for
    world.store.failures = [ModelUnavailable("offline")] * 2
    async with asyncio.timeout(1):
        for _ in range(2):
            with pytest.raises(ModelUnavailable):
                await world.pool.get(VISUAL)
    await world.close()


async def test_a_damaged_file_is_repaired_and_the_caller_never_knows(tmp_path: Path) -> None:
    world = World(tmp_path, limit_bytes=0, failures=[LoadFailed("torn")])
    world.store.is_damaged = True
    await world.use(VISUAL)
    assert world.store.repaired == [VISUAL]
    assert world.engine.loads == [VISUAL, VISUAL]
    await world.close()


async def test_a_file_that_is_not_damaged_is_not_loaded_twice(tmp_path: Path) -> None:
    world = World(tmp_path, limit_bytes=0, failures=[LoadFailed("strange operator")])
    with pytest.raises(LoadFailed, match="strange operator"):
        await world.pool.get(VISUAL)
    assert world.engine.loads == [VISUAL]
    await world.close()
