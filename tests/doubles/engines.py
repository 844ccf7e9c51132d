"""Stand-ins behind the Protocols of the service: an engine, a store, and a way to wait."""

import asyncio
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from immich_ml_metal.backends.base import AnyModel, Engine
from immich_ml_metal.backends.device import Device
from immich_ml_metal.errors import DownloadFailed
from immich_ml_metal.models.progress import DownloadProgress
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

VISUAL = ModelKey(Task.CLIP, Part.VISUAL, "ViT-B-32__openai")
TEXTUAL = ModelKey(Task.CLIP, Part.TEXTUAL, "ViT-B-32__openai")
FILES = ModelFiles(Path("model.onnx"), Path(), Path())
PATIENCE_S = 5.0  # how long a test waits for something that happens at once when all is well


async def soon(work: Any) -> Any:
    """Await `work`, which never comes when there is a deadlock."""
    return await asyncio.wait_for(work, PATIENCE_S)


class Gate:
    """Something a thread waits at until the test opens it."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.waiting = 0
        self._open = threading.Event()
        if is_open:
            self._open.set()

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def pass_through(self) -> None:
        self.waiting += 1
        try:
            assert self._open.wait(PATIENCE_S), "the gate stayed closed"
        finally:
            self.waiting -= 1


@dataclass
class FakeModel:
    """Answers the item itself; every verb can be made to fail, and inference to wait."""

    max_batch: int = 4
    size_bytes: int = 7
    gate: Gate = field(default_factory=lambda: Gate(is_open=True))
    fail: dict[str, BaseException] = field(default_factory=dict)
    batches: list[list[Any]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    closed: int = 0

    def _may_fail(self, verb: str) -> None:
        if verb in self.fail:
            raise self.fail[verb]

    def preprocess(self, item: Any) -> Any:
        self._may_fail("preprocess")
        return item

    def infer(self, batch: Sequence[Any]) -> Sequence[Any]:
        assert not self.closed, "used after its close"
        self.threads.add(threading.current_thread().name)
        self.batches.append(list(batch))
        self.gate.pass_through()
        self._may_fail("infer")
        if any(isinstance(item, Exception) for item in batch):
            raise next(item for item in batch if isinstance(item, Exception))
        assert not self.closed, "closed while in use"
        return list(batch)

    def postprocess(self, raw: Any, item: Any) -> Any:
        self._may_fail("postprocess")
        return raw

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed += 1
        self._may_fail("close")


class FakeEngine:
    """Loads `FakeModel`s, or fails as often as it is told to."""

    def __init__(
        self,
        *,
        width: int = 1,
        needs_files: bool = True,
        failures: Iterable[BaseException] = (),
        name: str = "fake",
        **model: Any,
    ) -> None:
        self.name = name
        self.needs_files = needs_files
        self.exits = 0
        self.device = Device(name, width=width, on_exit=self._exit if width == 1 else None)
        self.gate = Gate(is_open=True)
        self.models: list[FakeModel] = []
        self.files: list[ModelFiles | None] = []
        self.failures = list(failures)
        self._model = model

    def _exit(self) -> None:
        self.exits += 1

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        self.files.append(files)
        self.gate.pass_through()
        if self.failures:
            raise self.failures.pop(0)
        model = FakeModel(**self._model)
        self.models.append(model)
        return model


class FakeStore:
    """Has every model; or waits at its gate, as a download does, until it is closed."""

    def __init__(self, *, failures: Iterable[Exception] = ()) -> None:
        self.gate = Gate(is_open=True)
        self.asked: list[ModelKey] = []
        self.failures = list(failures)
        self.is_closed = False

    def downloads(self) -> Sequence[DownloadProgress]:
        return ()

    def ensure(self, key: ModelKey) -> ModelFiles:
        self.asked.append(key)
        self.gate.pass_through()
        if self.is_closed:
            raise DownloadFailed("the service stops")
        if self.failures:
            raise self.failures.pop(0)
        return FILES

    def repair(self, key: ModelKey) -> bool:
        return False  # what it has is intact

    def close(self) -> None:
        self.is_closed = True
        self.gate.open()


class FixedEngines:
    """One engine for each part of each task, whatever the model."""

    def __init__(self, table: Mapping[tuple[Task, Part], Engine]) -> None:
        self.table = table

    def serves(self, key: ModelKey) -> bool:
        return (key.task, key.part) in self.table

    def choose(self, key: ModelKey) -> Engine:
        return self.table[key.task, key.part]

    def names(self) -> dict[tuple[Task, Part], str]:
        return {slot: engine.name for slot, engine in self.table.items()}

    def engines(self) -> Collection[Engine]:
        return list(self.table.values())


def every_part(engine: Any) -> FixedEngines:
    """One engine for everything."""
    parts = {
        Task.CLIP: (Part.VISUAL, Part.TEXTUAL),
        Task.FACES: (Part.DETECTION, Part.RECOGNITION),
        Task.OCR: (Part.DETECTION, Part.RECOGNITION),
    }
    return FixedEngines({(task, part): engine for task in parts for part in parts[task]})
