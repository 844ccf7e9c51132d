"""The seams between the service and the hardware: a loaded model, and the engine it runs on."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

from immich_ml_metal.backends.device import Device
from immich_ml_metal.errors import LoadFailed
from immich_ml_metal.types import ModelFiles, ModelKey, Part, Task

ItemT = TypeVar("ItemT", contravariant=True)
BlobT = TypeVar("BlobT")
RawT = TypeVar("RawT")
ResultT = TypeVar("ResultT", covariant=True)


class Model(Protocol[ItemT, BlobT, RawT, ResultT]):
    """One loaded network, in three verbs that run on different threads.

    Options travel inside the item; a model has no setters. Arrays received are read-only.
    """

    @property
    def max_batch(self) -> int:
        """The most blobs one `infer` takes."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory held while loaded."""
        ...

    def preprocess(self, item: ItemT) -> BlobT:
        """Turn one item into what `infer` takes. CPU pool."""
        ...

    def infer(self, batch: Sequence[BlobT]) -> Sequence[RawT]:
        """Run the network; one result per blob, in order. Device thread only."""
        ...

    def postprocess(self, raw: RawT, item: ItemT) -> ResultT:
        """Turn one raw result into an answer. CPU pool."""
        ...

    def close(self) -> None:
        """Free the memory. Device thread only."""
        ...


AnyModel = Model[Any, Any, Any, Any]  # the pool holds models of every kind side by side


class Engine(Protocol):
    """A way to run models: ONNX Runtime, MLX, Core ML, Apple Vision, open_clip."""

    @property
    def name(self) -> str:
        """As in settings, logs and `/health`: `cpu`, `mlx`, `coreml`, `vision`, `open_clip`."""
        ...

    @property
    def device(self) -> Device:
        """The threads that own this engine's models."""
        ...

    @property
    def needs_files(self) -> bool:
        """Whether models come from the store; False for Apple Vision."""
        ...

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Load one model. Device thread only.

        Raises:
            LoadFailed: the engine rejects the files.
        """
        ...


class ManyFormats(Engine, Protocol):
    """An engine that opens a model in a number format of the caller's choice: MLX, Core ML."""

    @property
    def number_formats(self) -> Collection[str]:
        """Those it knows: `float16`, `float32`, ..."""
        ...

    def load(
        self, key: ModelKey, files: ModelFiles | None, number_format: str | None = None
    ) -> AnyModel:
        """Load one model; None is the format of the settings.

        Raises:
            LoadFailed: as `Engine.load`, or the engine has no such format.
        """
        ...


class InFormat:
    """An engine whose models are all opened in one number format; the device stays the same."""

    def __init__(self, engine: ManyFormats, number_format: str) -> None:
        self._engine = engine
        self.number_format = number_format
        self.name = engine.name
        self.device = engine.device
        self.needs_files = engine.needs_files

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Load one model in this format. Device thread only."""
        return self._engine.load(key, files, self.number_format)


def in_format(engine: Engine, number_format: str) -> Engine:
    """`engine`, opening models in `number_format`; an engine with one format only is given back.

    Raises:
        LoadFailed: the engine has formats to choose from, and this is none of them.
    """
    formats = getattr(engine, "number_formats", None)
    if formats is None:
        return engine
    if number_format not in formats:
        raise LoadFailed(f"the {engine.name} engine has no number format {number_format}")
    return InFormat(cast("ManyFormats", engine), number_format)


class EngineTable(Protocol):
    """Who answers what. A choice never changes while a process lives."""

    def serves(self, key: ModelKey) -> bool:
        """Whether an engine is set for this half; Apple Vision reads text while detecting it."""
        ...

    def choose(self, key: ModelKey) -> Engine:
        """The engine of a model."""
        ...

    def names(self) -> Mapping[tuple[Task, Part], str]:
        """The engine of each part of each task, for the models of the settings."""
        ...

    def engines(self) -> Collection[Engine]:
        """Every engine that was made so far."""
        ...
