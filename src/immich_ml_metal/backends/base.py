"""The seams between the service and the hardware: a loaded model, and the engine it runs on."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from immich_ml_metal.backends.device import Device
from immich_ml_metal.types import ModelFiles, ModelKey

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
