"""Loaded models: fetched and loaded once, shared by every request, unloaded when idle.

A model that is in use is never unloaded. Knows nothing about pictures or HTTP.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from immich_ml_metal.backends.base import AnyModel, Engine, EngineTable
from immich_ml_metal.backends.batcher import Batcher
from immich_ml_metal.backends.device import Device
from immich_ml_metal.errors import DownloadFailed, LoadFailed, naming_what_ran_out
from immich_ml_metal.metrics import Metrics
from immich_ml_metal.models.progress import DownloadProgress
from immich_ml_metal.onnx_files.references import weight_bytes
from immich_ml_metal.threads import CpuThreads
from immich_ml_metal.types import ModelFiles, ModelKey
from immich_ml_metal.urgency import urgency_of
from immich_ml_metal.worker.loaded import BatchWatch, Loaded, Place
from immich_ml_metal.worker.memory import Backoff, MemoryRules

log = logging.getLogger(__name__)

_FETCHES_AT_ONCE = 4  # downloads side by side, so that one slow model does not block another


class Store(Protocol):
    """Where model files come from."""

    def repair(self, key: ModelKey) -> bool:
        """Fetch again what of a model is damaged; whether there was anything. Blocks."""
        ...

    def ensure(self, key: ModelKey) -> ModelFiles:
        """The files of a model, fetched first when they are not here. Blocks."""
        ...

    def downloads(self) -> Sequence[DownloadProgress]:
        """The running downloads, for `/health`."""
        ...

    def close(self) -> None:
        """End running downloads soon."""
        ...


class Pool:
    """The models of one process. Event loop only."""

    def __init__(
        self,
        engines: EngineTable,
        store: Store,
        threads: CpuThreads,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        memory: MemoryRules | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        """`threads` fetch files and run the models' CPU verbs."""
        self._engines = engines
        self._store = store
        self._threads = threads
        self._metrics = metrics
        self._memory = memory or MemoryRules()
        self._backoff = backoff or Backoff()
        self._incoming_bytes: dict[Place, int] = {}  # of models that are being loaded
        self._files_threads = CpuThreads(_FETCHES_AT_ONCE)
        self._clock = clock
        self._models: dict[Place, asyncio.Task[Loaded]] = {}
        self._devices: set[Device] = set()  # of the engines that were ever used
        self._closing: set[asyncio.Future[list[None]]] = set()
        self.progress = 0  # grows with every step any model makes

    @property
    def loaded(self) -> list[Loaded]:
        """Models that are ready."""
        return [
            task.result()
            for task in self._models.values()
            if task.done() and not task.cancelled() and task.exception() is None
        ]

    @property
    def loading(self) -> list[ModelKey]:
        """Models that are being fetched or loaded."""
        return [key for (key, _), task in self._models.items() if not task.done()]

    def serves(self, key: ModelKey) -> bool:
        """Whether an engine is set for this half."""
        return self._engines.serves(key)

    def engine_of(self, key: ModelKey) -> Engine | None:
        """The engine set for this half; None where Apple Vision reads text while detecting it."""
        return self._engines.choose(key) if self._engines.serves(key) else None

    def describe(self) -> list[dict[str, Any]]:
        """Every loaded model for `/health`: name, engine, size, use."""
        now = self._clock()
        return [
            {
                "model": loaded.key.name,
                "task": loaded.key.task,
                "part": loaded.key.part,
                "engine": loaded.engine.name,
                "size_bytes": loaded.model.size_bytes,
                "loaded_in_s": round(loaded.loaded_in_s, 3),
                "users": loaded.users,
                "idle_s": round(now - loaded.last_used, 1),
            }
            for loaded in self.loaded
        ]

    def describe_downloads(self) -> list[dict[str, Any]]:
        """Every running download for `/health`."""
        return [progress.describe() for progress in self._store.downloads()]

    async def get(self, key: ModelKey, engine: Engine | None = None) -> Loaded:
        """The model, fetched and loaded first if need be; callers at the same time share one load.

        Args:
            key: which half.
            engine: who loads it; the one that is set for it when None.

        Raises:
            ModelError: it cannot be fetched or loaded. The next call tries again.
        """
        engine = engine or self._engines.choose(key)
        self._devices.add(engine.device)
        place = key, engine.name
        task = self._models.get(place)
        if task is None:
            task = asyncio.create_task(self._load(key, engine))
            self._models[place] = task
            task.add_done_callback(lambda done: self._forget_failure(place, done))
        return await asyncio.shield(task)  # a caller that hangs up does not stop the load

    @asynccontextmanager
    async def lease(self, key: ModelKey, engine: Engine | None = None) -> AsyncIterator[Loaded]:
        """Hold the model in memory for the length of the block."""
        loaded = await self.get(key, engine)
        while loaded.is_closed:  # unloaded between its load and our turn
            loaded = await self.get(key, engine)
        loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1
            loaded.last_used = self._clock()

    async def run(self, key: ModelKey, item: Any, engine: Engine | None = None) -> Any:
        """Take one item through the model's three verbs.

        Any: what goes in and out is the model's own (`tasks`).
        """
        async with self.lease(key, engine) as loaded:
            model, label = loaded.model, f"{key.task}/{key.part}"
            urgency = urgency_of(key.task, key.part)
            with self._metrics.stage(label, "preprocess"):
                blob = await self._threads.run(lambda: model.preprocess(item), urgency)
            raw = await loaded.engine.device.submit(loaded.batcher, blob)
            self.progress += 1
            with self._metrics.stage(label, "postprocess"):
                return await self._threads.run(lambda: model.postprocess(raw, item), urgency)

    async def _load(self, key: ModelKey, engine: Engine) -> Loaded:
        place, outcome = (key, engine.name), "failed"
        try:
            await asyncio.sleep(self._backoff.wait_s(place, self._clock()))
            with naming_what_ran_out():
                files = await self._fetch(place) if engine.needs_files else None
            start = self._clock()
            model = await self._open(engine, key, files)
            outcome = "ok"
        except (DownloadFailed, LoadFailed):
            self._backoff.failed(place, self._clock())
            raise
        finally:
            self._incoming_bytes.pop(place, None)
            self._metrics.model_loads.labels(str(key), engine.name, outcome).inc()
        self._backoff.succeeded(place)
        self.progress += 1
        elapsed_s = self._clock() - start
        self._metrics.model_load_seconds.labels(engine.name).observe(elapsed_s)
        self._metrics.model_bytes.labels(str(key), engine.name).set(model.size_bytes)
        log.info("loaded model=%s engine=%s seconds=%.2f", key, engine.name, elapsed_s)
        batcher = Batcher(
            model.infer,
            name=str(key),
            max_batch=model.max_batch,
            urgency=urgency_of(key.task, key.part),
            watch=BatchWatch(self._metrics, key, engine.name),
        )
        return Loaded(key, engine, model, batcher, elapsed_s, self._clock())

    async def _fetch(self, place: Place) -> ModelFiles:
        key, _ = place
        files = await self._files_threads.run(lambda: self._store.ensure(key))
        self.progress += 1
        size_bytes = await self._files_threads.run(lambda: weight_bytes(files.graph))
        await self._make_room(place, size_bytes)
        return files

    async def _open(self, engine: Engine, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Load; when the engine rejects damaged files, fetch those again and load once more."""
        urgency = urgency_of(key.task, key.part)  # of the threads that the engine starts as well
        try:
            model = await engine.device.call(lambda: _load_with(engine, key, files), urgency)
        except LoadFailed:
            if files is None or not await self._files_threads.run(lambda: self._store.repair(key)):
                raise
            log.warning("damaged files were fetched again model=%s", key)
            model = await engine.device.call(lambda: _load_with(engine, key, files), urgency)
        await self._make_room((key, engine.name), model.size_bytes)
        return model

    async def _make_room(self, place: Place, size_bytes: int) -> None:
        """Unload the least recently used so that `size_bytes` for `place` fit into the limit."""
        self._incoming_bytes[place] = size_bytes
        incoming = sum(self._incoming_bytes.values())
        await self._unload(self._memory.choose_evictions(self.loaded, incoming), "memory")

    def _forget_failure(self, place: Place, task: asyncio.Task[Loaded]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._models.pop(place, None)

    async def unload_idle(
        self, idle_s: float, *, keep: Collection[ModelKey] = ()
    ) -> list[ModelKey]:
        """Unload every model but `keep` that nobody has used for `idle_s` seconds; say which."""
        now = self._clock()
        idle = [
            loaded
            for loaded in self.loaded
            if loaded.users == 0 and now - loaded.last_used >= idle_s and loaded.key not in keep
        ]
        await self._unload(idle, "idle")
        return [loaded.key for loaded in idle]

    async def _unload(self, chosen: Sequence[Loaded], reason: str) -> None:
        for loaded in chosen:  # first all out of reach, then the slow part
            loaded.is_closed = True
            del self._models[loaded.place]
            self._metrics.model_bytes.remove(str(loaded.key), loaded.engine.name)
        closing = asyncio.gather(*(self._close_model(loaded, reason) for loaded in chosen))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)  # nobody else can reach these models to close them

    async def _close_model(self, loaded: Loaded, reason: str) -> None:
        try:
            await loaded.engine.device.call(loaded.model.close)
        except Exception:  # the others must be unloaded all the same
            log.exception("unloading failed model=%s engine=%s", loaded.key, loaded.engine.name)
            return
        self._metrics.model_evictions.labels(reason).inc()
        log.info("unloaded model=%s engine=%s why=%s", loaded.key, loaded.engine.name, reason)

    async def close(self) -> None:
        """Break off downloads, unload everything and end the engines' threads.

        A load that runs cannot be broken off: it is waited for, so that its model is freed on the
        thread that made it.
        """
        self._store.close()
        await asyncio.gather(*self._models.values(), return_exceptions=True)
        await self.unload_idle(float("-inf"))
        await asyncio.gather(*self._closing, return_exceptions=True)
        for device in self._devices | {engine.device for engine in self._engines.engines()}:
            await self._threads.run(device.close)
        await self._threads.run(self._files_threads.close)


def _load_with(engine: Engine, key: ModelKey, files: ModelFiles | None) -> AnyModel:
    """Load on the engine's thread; whatever a broken file makes a library do is its failure.

    Raises:
        LoadFailed: with the model's name.
        OutOfMemory, Busy: the machine is short of memory or files; the model may be right.
    """
    try:
        with naming_what_ran_out():
            return engine.load(key, files)
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as exc:
        where = f" in {files.folder}" if files is not None else ""
        reason = "nested too deeply" if isinstance(exc, RecursionError) else exc
        raise LoadFailed(f"{key}{where}: {type(exc).__name__}: {reason}") from exc
