"""A model in memory, with what measures its batches."""

from dataclasses import dataclass
from typing import Any

from immich_ml_metal.backends.base import AnyModel, Engine
from immich_ml_metal.backends.batcher import Batcher
from immich_ml_metal.metrics import Metrics, note_stage
from immich_ml_metal.types import ModelKey

Place = tuple[ModelKey, str]  # a model and its engine: a spare engine's copy lies beside the usual


@dataclass(slots=True)
class Loaded:
    """A model in memory, its queue, and who uses it."""

    key: ModelKey
    engine: Engine
    model: AnyModel
    batcher: Batcher[Any, Any]  # Any: models of every kind side by side
    loaded_in_s: float
    last_used: float
    users: int = 0
    is_closed: bool = False

    @property
    def place(self) -> Place:
        """Under which it is kept."""
        return self.key, self.engine.name

    @property
    def size_bytes(self) -> int:
        """Memory it holds, as its engine measured it."""
        return self.model.size_bytes


class BatchWatch:
    """Tells the metrics how long items waited, how long their batch ran, and that it failed."""

    def __init__(self, metrics: Metrics, key: ModelKey, engine: str) -> None:
        label = f"{key.task}/{key.part}"
        self._wait = metrics.stage_seconds.labels(label, "queue")
        self._run = metrics.stage_seconds.labels(label, "infer")
        self._items = metrics.batch_items.labels(str(key))
        self._failures = metrics.engine_failures.labels(engine, "error")

    def waited(self, seconds: float) -> None:
        """One item waited so long for its batch."""
        self._wait.observe(seconds)
        note_stage("queue", seconds)

    def answered(self, seconds: float) -> None:
        """One item's batch ran so long."""
        note_stage("infer", seconds)

    def ran(self, items: int, seconds: float) -> None:
        """One batch ran."""
        self._items.observe(items)
        self._run.observe(seconds)

    def failed(self) -> None:
        """One batch failed."""
        self._failures.inc()
