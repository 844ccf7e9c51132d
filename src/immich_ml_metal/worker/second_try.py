"""No engine's failure costs a job: the item is tried again there, then on the spare engine.

The spare is ONNX Runtime on the CPU in float32: same files, no accelerator. An engine that keeps
failing with a model is set aside for a while, so that not every item has to fail first.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from immich_ml_metal.backends.base import Engine
from immich_ml_metal.errors import (
    Busy,
    DownloadFailed,
    InferenceError,
    InvalidOutput,
    LoadFailed,
    ModelUnavailable,
    OutOfMemory,
    ServiceError,
    UnknownModel,
)
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.types import ModelKey
from immich_ml_metal.worker.pool import Pool

log = logging.getLogger(__name__)

CAUSES = ("error", "invalid_output", "timeout", "load")
ANSWERED_BY_SPARE = "engine_failed"  # the reason in the fallback metric
TRIES = 2  # of an engine with a spare
TRIES_ALONE = 4  # of the spare engine itself, and of one without: nobody else can answer
FAILURES_IN_A_ROW = 3  # items that had no answer
CAUSES_KEPT = 6
ASIDE_S, ASIDE_MAX_S = 60.0, 3600.0

# Asked before the engine of a model that was set aside is used again: whether it qualifies.
Requalify = Callable[[ModelKey], Awaitable[bool]]


class _Stuck(Exception):
    """An engine took longer for an item than it may."""


@dataclass(slots=True)
class Standing:
    """How an engine does with one model. Times are of the clock, in seconds."""

    engine: str
    in_a_row: int = 0
    times_aside: int = 0
    aside_until: float = 0.0
    causes: list[str] = field(default_factory=list)  # the latest ones
    checking: "asyncio.Task[None] | None" = None


class SecondTry:
    """Runs items with the models of a pool. Event loop only."""

    def __init__(
        self,
        pool: Pool,
        spare: Callable[[], Engine] | None,
        metrics: Metrics,
        *,
        limit_s: float,
        requalify: Requalify | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Work with these.

        Args:
            pool: holds the models, and knows which engine is set for each.
            spare: gives the engine of last resort, made when it is first needed; None for none.
            metrics: is told of every failure and of every answer from the spare engine.
            limit_s: how long an engine with a spare may take for one item.
            requalify: see `Requalify`; without it, one more failure sets the engine aside again.
            clock: monotonic seconds.
        """
        self._pool = pool
        self._make_spare = spare
        self._metrics = metrics
        self._limit_s = limit_s
        self.requalify = requalify
        self._clock = clock
        self._spare: Engine | None = None
        self._standings: dict[ModelKey, Standing] = {}

    def serves(self, key: ModelKey) -> bool:
        """Whether an engine is set for this half."""
        return self._pool.serves(key)

    def describe(self) -> list[dict[str, Any]]:
        """For `/health`: each model for which an engine had no answer, why, and what follows."""
        now = self._clock()
        return [
            {
                "model": str(key),
                "engine": standing.engine,
                "set_aside_for_s": round(max(0.0, standing.aside_until - now), 1),
                "times_set_aside": standing.times_aside,
                "causes": standing.causes,
            }
            for key, standing in self._standings.items()
        ]

    async def get(self, key: ModelKey) -> None:
        """Have the model loaded by an engine that takes it.

        Raises:
            ModelError: it cannot be fetched, or no engine takes it.
        """
        engine, spare = self._engines(key)
        if engine is None or (spare is not None and self._is_aside(key, engine)):
            await self._pool.get(key, spare)
            return
        try:
            await self._pool.get(key, engine)
        except (DownloadFailed, ModelUnavailable, UnknownModel, OutOfMemory, Busy):
            raise  # another engine would lack the same file, or the same memory
        except Exception as exc:
            self._metrics.engine_failures.labels(engine.name, "load").inc()
            if spare is None:
                raise
            self._note(key, engine, [f"load: {exc}"], weight=FAILURES_IN_A_ROW)
            await _with_causes(self._pool.get(key, spare), [str(exc)])

    async def run(self, key: ModelKey, item: Any) -> Any:
        """Take one item through a model, on whichever engine can answer.

        Any: what goes in and out is the model's own (`tasks`).

        Raises:
            ServiceError: nothing could answer; names the causes.
        """
        engine, spare = self._engines(key)
        if engine is None or (spare is not None and self._is_aside(key, engine)):
            return await self._run_spare(key, item, spare, [])
        causes: list[str] = []
        try:
            return await self._try_again(key, item, engine, causes, limited=spare is not None)
        except (InferenceError, InvalidOutput, _Stuck) as exc:
            if spare is None:
                raise
            is_stuck = isinstance(exc, _Stuck)
        self._note(key, engine, causes, weight=FAILURES_IN_A_ROW if is_stuck else 1)
        return await self._run_spare(key, item, spare, causes)

    async def _try_again(
        self, key: ModelKey, item: Any, engine: Engine, causes: list[str], *, limited: bool
    ) -> Any:
        """On this engine, more than once; what is stuck does not get better by asking again."""
        for left in reversed(range(TRIES if limited else TRIES_ALONE)):
            try:
                answer = await self._try(key, item, engine, limited=limited)
            except (InferenceError, InvalidOutput) as exc:
                causes.append(str(exc))
                if not left:
                    raise
            except _Stuck as exc:
                causes.append(str(exc))
                raise
            else:
                self._forgive(key)
                return answer
        raise AssertionError("the last try either answers or raises")

    async def _try(self, key: ModelKey, item: Any, engine: Engine, *, limited: bool) -> Any:
        """Once on this engine; what its inference raises was counted where batches are made."""
        limit = asyncio.timeout(self._limit_s if limited else None)
        try:
            async with limit:
                return await self._pool.run(key, item, engine)
        except InvalidOutput:
            self._metrics.engine_failures.labels(engine.name, "invalid_output").inc()
            raise
        except TimeoutError as exc:
            if not limit.expired():  # a library's own
                raise
            self._metrics.engine_failures.labels(engine.name, "timeout").inc()
            raise _Stuck(f"{engine.name}: no answer within {self._limit_s:g} s") from exc

    async def _run_spare(
        self, key: ModelKey, item: Any, spare: Engine | None, causes: list[str]
    ) -> Any:
        answer = await _with_causes(self._pool.run(key, item, spare), causes)
        self._metrics.fallbacks.labels(ANSWERED_BY_SPARE).inc()
        return answer

    def _engines(self, key: ModelKey) -> tuple[Engine | None, Engine | None]:
        """Who is set for this model, and who could answer in its place."""
        engine = self._pool.engine_of(key)
        if self._make_spare is None or (engine is not None and engine.name == "open_clip"):
            return engine, None  # its models are in no file of Immich's
        if engine is not None and engine.name == "cpu":
            return engine, None
        if self._spare is None:
            self._spare = self._make_spare()
        return engine, self._spare

    def _note(self, key: ModelKey, engine: Engine, causes: list[str], *, weight: int) -> None:
        standing = self._standings.setdefault(key, Standing(engine.name))
        standing.causes = [*standing.causes, *causes][-CAUSES_KEPT:]
        log.warning("engine failed model=%s engine=%s why=%r", key, engine.name, causes[-1])
        now = self._clock()
        if now < standing.aside_until:  # was under way when it was set aside
            return
        standing.in_a_row += weight
        if standing.in_a_row < (1 if standing.times_aside else FAILURES_IN_A_ROW):
            return
        pause_s = min(ASIDE_MAX_S, ASIDE_S * 2.0**standing.times_aside)
        standing.times_aside += 1
        standing.in_a_row = 0
        standing.aside_until = now + pause_s
        log.error(
            "engine set aside model=%s engine=%s for_s=%.0f: the cpu answers in its place",
            key,
            engine.name,
            pause_s,
        )

    def _forgive(self, key: ModelKey) -> None:
        standing = self._standings.get(key)
        if standing is None:
            return
        if standing.times_aside:
            log.info("engine works again model=%s engine=%s", key, standing.engine)
        standing.in_a_row = standing.times_aside = 0

    def _is_aside(self, key: ModelKey, engine: Engine) -> bool:
        standing = self._standings.get(key)
        if standing is None or not standing.aside_until:
            return False
        if self._clock() < standing.aside_until or standing.checking is not None:
            return True
        if self.requalify is None:
            standing.aside_until = 0.0
            return False
        standing.checking = asyncio.create_task(self._check_again(key, engine, standing))
        return True

    async def _check_again(self, key: ModelKey, engine: Engine, standing: Standing) -> None:
        """Nothing waits for it: the spare engine goes on answering meanwhile."""
        assert self.requalify is not None, "checked"
        try:
            is_fit = await self.requalify(key)
        except Exception as exc:  # noqa: BLE001 - without an answer it would be asked for each item
            log.warning("not qualified again model=%s engine=%s why=%r", key, engine.name, exc)
            is_fit = False
        finally:
            standing.checking = None
        if is_fit:
            standing.aside_until = 0.0
        else:
            self._note(key, engine, ["it did not qualify again"], weight=FAILURES_IN_A_ROW)


async def _with_causes(work: Awaitable[Any], causes: list[str]) -> Any:
    """Await the spare engine's work; when it fails as well, say what failed before."""
    try:
        return await work
    except ServiceError as exc:
        if not causes:
            raise
        before = "; ".join(dict.fromkeys(causes))
        raise type(exc)(f"{exc} (before it: {before})") from exc
    except Exception as exc:
        raise LoadFailed(f"{exc!r} (before it: {'; '.join(causes)})") from exc
