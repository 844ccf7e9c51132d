"""An engine that fails now and then, keeps failing or hangs: the answer comes all the same."""

import asyncio
import errno
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from doubles.engines import VISUAL, FakeEngine, FakeModel, FakeStore, FixedEngines, soon
from doubles.timing import until

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.errors import (
    Busy,
    DownloadFailed,
    InferenceError,
    InvalidOutput,
    LoadFailed,
    ModelUnavailable,
    OutOfMemory,
)
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task
from immich_ml_metal.worker.pool import Pool
from immich_ml_metal.worker.second_try import ASIDE_S, FAILURES_IN_A_ROW, Requalify, SecondTry

READER = ModelKey(Task.OCR, Part.RECOGNITION, "PP-OCRv6_tiny")


class FlakyModel(FakeModel):
    """Answers 'by NAME ITEM'; `fails(call)` says what call number so and so does wrong."""

    name = "flaky"
    calls: "itertools.count[int]"
    fails: Callable[[int], Exception | None]

    def infer(self, batch: Sequence[Any]) -> Sequence[Any]:
        error = self.fails(next(self.calls))
        if isinstance(error, InvalidOutput):
            return [error] * len(batch)
        if error is not None:
            raise error
        return [f"by {self.name}: {item}" for item in batch]

    def postprocess(self, raw: Any, item: Any) -> Any:
        if isinstance(raw, Exception):
            raise raw
        return raw


class FlakyEngine(FakeEngine):
    def __init__(
        self,
        name: str,
        fails: Callable[[int], Exception | None] = lambda call: None,
        **options: Any,
    ) -> None:
        super().__init__(name=name, **options)
        self.fails = fails
        self.calls = itertools.count(1)

    def heal(self) -> None:
        self.fails = lambda call: None

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        super().load(key, files)
        model = FlakyModel()
        model.name, model.calls, model.fails = self.name, self.calls, lambda n: self.fails(n)
        return model


class World:
    """An `mlx` engine as told, with a good `cpu` engine as its spare."""

    def __init__(self) -> None:
        self.now = 100.0
        self.metrics = Metrics()
        self.threads = CpuThreads(4)
        self.store = FakeStore()
        self.spare: FlakyEngine | None = FlakyEngine("cpu")
        self.spares_made = 0
        self.requalify: Requalify | None = None
        self.pool: Pool | None = None

    def models(self, engine: FakeEngine, *, limit_s: float = 5.0) -> SecondTry:
        table = {(Task.CLIP, Part.VISUAL): engine}
        self.pool = Pool(
            FixedEngines(table), self.store, self.threads, self.metrics, clock=lambda: self.now
        )
        return SecondTry(
            self.pool,
            self.make_spare if self.spare else None,
            self.metrics,
            limit_s=limit_s,
            requalify=self.requalify,
            clock=lambda: self.now,
        )

    def make_spare(self) -> FakeEngine:
        assert self.spare is not None
        self.spares_made += 1
        return self.spare

    def failures(self, cause: str, engine: str = "mlx") -> float:
        labels = {"engine": engine, "cause": cause}
        name = "immich_ml_engine_failures_total"
        return self.metrics.registry.get_sample_value(name, labels) or 0

    @property
    def by_spare(self) -> float:
        labels = {"reason": "engine_failed"}
        name = "immich_ml_fallbacks_total"
        return self.metrics.registry.get_sample_value(name, labels) or 0


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    if world.pool is not None:
        await soon(world.pool.close())
    world.threads.close()


def always(error: Exception) -> Callable[[int], Exception]:
    return lambda call: error


GPU = RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity")
NAN = InvalidOutput("m gave 3 values that are not finite")


# -- one bad call ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "cause"), [(GPU, "error"), (NAN, "invalid_output")])
async def test_what_fails_once_is_answered_by_the_same_engine(
    world: World, error: Exception, cause: str
) -> None:
    engine = FlakyEngine("mlx", lambda call: error if call == 1 else None)
    models = world.models(engine)
    assert await soon(models.run(VISUAL, "a")) == "by mlx: a"
    assert (world.failures(cause), world.by_spare, world.store.asked) == (1, 0, [VISUAL])


@pytest.mark.parametrize(("error", "cause"), [(GPU, "error"), (NAN, "invalid_output")])
async def test_what_fails_twice_is_answered_by_the_cpu(
    world: World, error: Exception, cause: str
) -> None:
    models = world.models(FlakyEngine("mlx", always(error)))
    assert await soon(models.run(VISUAL, "a")) == "by cpu: a"
    assert (world.failures(cause), world.by_spare) == (2, 1)
    told = models.describe()
    assert (told[0]["model"], told[0]["engine"]) == (str(VISUAL), "mlx")
    assert str(error) in told[0]["causes"][0]


async def test_every_tenth_call_failing_under_eight_clients_loses_nothing(world: World) -> None:
    injected = []

    def fails(call: int) -> Exception | None:
        if call % 10:
            return None
        injected.append(call)
        return GPU if call % 20 else NAN

    models = world.models(FlakyEngine("mlx", fails))

    async def client(number: int) -> list[Any]:
        return [await models.run(VISUAL, f"{number}/{turn}") for turn in range(200)]

    answers = await asyncio.gather(*(client(number) for number in range(8)))
    assert [[a.partition(": ")[2] for a in row] for row in answers] == [
        [f"{number}/{turn}" for turn in range(200)] for number in range(8)
    ]
    assert len(injected) > 20
    raised = [call for call in injected if call % 20]
    assert world.failures("error") == len(raised)
    # one call is one batch, and each of its items was told that its answer is not finite
    assert world.failures("invalid_output") >= len(injected) - len(raised)


async def test_an_engine_without_a_spare_is_asked_again_and_then_gives_its_reason(
    world: World,
) -> None:
    world.spare = None
    models = world.models(FlakyEngine("cpu", lambda call: GPU if call < 4 else None))
    assert await soon(models.run(VISUAL, "a")) == "by cpu: a"
    models = world.models(FlakyEngine("cpu", always(GPU)))
    with pytest.raises(InferenceError, match="Impacting Interactivity"):
        await soon(models.run(VISUAL, "a"))


async def test_when_the_cpu_fails_as_well_both_causes_are_told(world: World) -> None:
    world.spare = FlakyEngine("cpu", always(NAN))
    models = world.models(FlakyEngine("mlx", always(GPU)))
    with pytest.raises(InvalidOutput, match=r"not finite \(before it: .*Impacting"):
        await soon(models.run(VISUAL, "a"))


async def test_the_spare_engine_is_made_once_and_only_when_it_is_needed(world: World) -> None:
    models = world.models(FlakyEngine("cpu"))
    await soon(models.run(VISUAL, "a"))
    assert world.spares_made == 0  # the cpu is its own spare
    models = world.models(FlakyEngine("mlx", always(GPU)))
    await soon(asyncio.gather(*(models.run(VISUAL, item) for item in "abc")))
    assert world.spares_made == 1


async def test_an_open_clip_model_has_no_spare_because_it_is_in_no_file_of_immichs(
    world: World,
) -> None:
    models = world.models(FlakyEngine("open_clip", always(GPU)))
    with pytest.raises(InferenceError):
        await soon(models.run(VISUAL, "a"))
    assert world.by_spare == 0


async def test_a_missing_file_is_no_failure_of_the_engine(world: World) -> None:
    models = world.models(FlakyEngine("mlx", always(ModelUnavailable("not here"))))
    with pytest.raises(ModelUnavailable, match=r"^not here$"):
        await soon(models.run(VISUAL, "a"))
    assert (world.failures("error"), models.describe()) == (0, [])


async def test_a_half_without_an_engine_is_read_by_the_spare(world: World) -> None:
    """Apple Vision reads while it finds; where it found nothing out, the lines still come."""
    models = world.models(FlakyEngine("vision"))
    assert not models.serves(READER)
    assert await soon(models.run(READER, "line")) == "by cpu: line"


@pytest.mark.parametrize(
    ("error", "kind"), [(MemoryError("full"), OutOfMemory), (Busy("Too many open files"), Busy)]
)
async def test_what_the_machine_lacks_is_no_failure_of_the_engine(
    world: World, error: Exception, kind: type[Exception]
) -> None:
    models = world.models(FlakyEngine("mlx", always(error)))
    with pytest.raises(kind):
        await soon(models.run(VISUAL, "a"))
    assert (world.failures("error"), models.describe(), world.by_spare) == (0, [], 0)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(MemoryError("full"), OutOfMemory), (OSError(errno.EMFILE, "Too many open files"), Busy)],
)
async def test_a_load_for_which_the_machine_lacks_something_sets_no_engine_aside(
    world: World, error: Exception, kind: type[Exception]
) -> None:
    models = world.models(FlakyEngine("mlx", failures=[error]))
    with pytest.raises(kind):
        await soon(models.get(VISUAL))
    assert (world.failures("load"), models.describe()) == (0, [])
    assert await soon(models.run(VISUAL, "a")) == "by mlx: a"


# -- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [LoadFailed("no such operator"), RuntimeError("metal::malloc")])
async def test_a_model_that_the_engine_does_not_take_is_answered_by_the_cpu(
    world: World, error: Exception
) -> None:
    models = world.models(FlakyEngine("mlx", failures=[error]))
    await soon(models.get(VISUAL))
    assert await soon(models.run(VISUAL, "a")) == "by cpu: a"
    assert world.failures("load") == 1
    assert models.describe()[0]["set_aside_for_s"] == ASIDE_S


async def test_files_that_no_engine_takes_are_an_error_with_both_reasons(world: World) -> None:
    world.spare = FlakyEngine("cpu", failures=[LoadFailed("torn")])
    models = world.models(FlakyEngine("mlx", failures=[LoadFailed("no such operator")]))
    with pytest.raises(LoadFailed, match=r"torn \(before it: no such operator\)"):
        await soon(models.get(VISUAL))


async def test_a_download_that_fails_is_told_as_it_is(world: World) -> None:
    world.store = FakeStore(failures=[DownloadFailed("no network")])
    models = world.models(FlakyEngine("mlx"))
    with pytest.raises(DownloadFailed, match=r"^no network$"):
        await soon(models.get(VISUAL))
    assert (world.failures("load"), world.spares_made) == (0, 1)


# -- an engine that keeps failing ------------------------------------------------------------------


async def fail_until_aside(world: World, models: SecondTry) -> None:
    for _ in range(FAILURES_IN_A_ROW):
        await soon(models.run(VISUAL, "a"))
    assert models.describe()[0]["set_aside_for_s"] > 0


async def test_an_engine_that_keeps_failing_is_not_asked_for_a_while(world: World) -> None:
    engine = FlakyEngine("mlx", always(GPU))
    models = world.models(engine)
    await fail_until_aside(world, models)
    asked = next(engine.calls)
    assert await soon(models.run(VISUAL, "b")) == "by cpu: b"
    assert next(engine.calls) == asked + 1  # not asked


async def test_it_is_used_again_afterwards_and_one_failure_sets_it_aside_for_longer(
    world: World,
) -> None:
    engine = FlakyEngine("mlx", always(GPU))
    models = world.models(engine)
    await fail_until_aside(world, models)
    world.now += ASIDE_S
    assert await soon(models.run(VISUAL, "b")) == "by cpu: b"
    assert models.describe()[0]["set_aside_for_s"] == 2 * ASIDE_S
    world.now += 2 * ASIDE_S
    engine.heal()
    assert await soon(models.run(VISUAL, "c")) == "by mlx: c"
    assert models.describe()[0]["times_set_aside"] == 0


async def test_items_between_good_ones_do_not_set_it_aside(world: World) -> None:
    # of each three calls the first two fail: one item in two has no answer from the engine
    engine = FlakyEngine("mlx", lambda call: GPU if call % 3 else None)
    models = world.models(engine)
    answers = [await soon(models.run(VISUAL, turn)) for turn in range(10)]
    assert answers == [f"by {'mlx' if turn % 2 else 'cpu'}: {turn}" for turn in range(10)]
    assert models.describe()[0]["times_set_aside"] == 0


async def test_requests_under_way_when_it_is_set_aside_do_not_prolong_it(world: World) -> None:
    models = world.models(FlakyEngine("mlx", always(GPU)))
    await soon(asyncio.gather(*(models.run(VISUAL, item) for item in range(20))))
    told = models.describe()[0]
    assert (told["times_set_aside"], told["set_aside_for_s"]) == (1, ASIDE_S)


@pytest.mark.parametrize("is_fit", [True, False])
async def test_it_is_qualified_again_while_the_cpu_goes_on_answering(
    world: World, is_fit: bool
) -> None:
    asked: list[ModelKey] = []
    verdict = asyncio.Event()

    async def requalify(key: ModelKey) -> bool:
        asked.append(key)
        await verdict.wait()
        return is_fit

    world.requalify = requalify
    engine = FlakyEngine("mlx", lambda call: GPU if call <= 2 * FAILURES_IN_A_ROW else None)
    models = world.models(engine)
    await fail_until_aside(world, models)
    world.now += ASIDE_S
    assert await soon(models.run(VISUAL, "b")) == "by cpu: b"
    assert await soon(models.run(VISUAL, "c")) == "by cpu: c"
    verdict.set()
    await until(lambda: (models.describe()[0]["set_aside_for_s"] > 0) is not is_fit)
    await asyncio.sleep(0)
    assert asked == [VISUAL]
    assert await soon(models.run(VISUAL, "d")) == ("by mlx: d" if is_fit else "by cpu: d")


async def test_a_probe_that_breaks_keeps_it_aside_and_is_not_asked_for_each_item(
    world: World,
) -> None:
    asked: list[ModelKey] = []

    async def requalify(key: ModelKey) -> bool:
        asked.append(key)
        raise OSError("no disk")

    world.requalify = requalify
    models = world.models(FlakyEngine("mlx", always(GPU)))
    await fail_until_aside(world, models)
    world.now += ASIDE_S
    await soon(models.run(VISUAL, "b"))
    await until(lambda: models.describe()[0]["times_set_aside"] == 2)
    assert [await soon(models.run(VISUAL, item)) for item in "cd"] == ["by cpu: c", "by cpu: d"]
    assert asked == [VISUAL]


async def test_an_engine_that_hangs_is_not_waited_for_and_set_aside_at_once(world: World) -> None:
    stuck = threading.Event()

    def hangs(call: int) -> Exception | None:
        stuck.wait(5)
        return None

    models = world.models(FlakyEngine("vision", hangs), limit_s=0.05)
    try:
        assert await soon(models.run(VISUAL, "a")) == "by cpu: a"
        assert world.failures("timeout", "vision") == 1
        assert models.describe()[0]["set_aside_for_s"] == ASIDE_S
        assert await soon(models.run(VISUAL, "b")) == "by cpu: b"
    finally:
        stuck.set()
