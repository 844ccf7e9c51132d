"""The official models that answer where Apple Vision cannot: no landmarks, or an unknown script.

They run on Vision's own threads, so whatever loads them must give models that any thread may run:
ONNX Runtime on the CPU does.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.tasks.faces import FaceQuery
from immich_ml_metal.tasks.text_boxes import TextRegionQuery
from immich_ml_metal.tasks.text_lines import LineCrop
from immich_ml_metal.types import Faces, ModelKey, Reading, Tensor, TextRegions

OfficialLoader = Callable[[ModelKey], AnyModel]


def no_official(key: ModelKey) -> AnyModel:
    """Stand for the official models where none were wired.

    Raises:
        ModelUnavailable: always.
    """
    raise ModelUnavailable(f"apple vision cannot answer this one, and {key} is not here to do it")


class Standby:
    """The official face detector, loaded when the first picture needs it. Any Vision thread."""

    def __init__(self, key: ModelKey, load: OfficialLoader, on_use: Callable[[], None]) -> None:
        self._key = key
        self._load = load
        self._on_use = on_use
        self._lock = threading.Lock()  # Vision has several threads; the model is loaded by one
        self._model: AnyModel | None = None

    def __call__(self, item: FaceQuery) -> Faces:
        """Answer a picture with the official detector.

        Raises:
            ModelUnavailable: its files are not here.
        """
        with self._lock:
            if self._model is None:
                self._model = self._load(self._key)
        model = self._model
        self._on_use()
        blob = model.preprocess(item)
        faces: Faces = model.postprocess(model.infer([blob])[0], item)
        return faces

    @property
    def size_bytes(self) -> int:
        """Memory of the detector, 0 until it is needed."""
        return self._model.size_bytes if self._model is not None else 0

    def close(self) -> None:
        """Free the detector."""
        if self._model is not None:
            self._model.close()
            self._model = None


class OfficialText:
    """Both halves of an official text model, as one that reads while it detects."""

    max_batch = 1

    def __init__(self, detector: AnyModel, reader: AnyModel) -> None:
        self._detector = detector
        self._reader = reader

    @property
    def size_bytes(self) -> int:
        """Memory of both halves."""
        return self._detector.size_bytes + self._reader.size_bytes

    def preprocess(self, item: TextRegionQuery) -> tuple[TextRegionQuery, Tensor]:
        """Prepare the picture for the detector, and keep it for the reader."""
        return item, self._detector.preprocess(item)

    def infer(self, batch: Sequence[tuple[TextRegionQuery, Tensor]]) -> list[TextRegions]:
        """Detect and read each picture."""
        return [self._read(item, blob) for item, blob in batch]

    def postprocess(self, raw: TextRegions, item: TextRegionQuery) -> TextRegions:
        """Pass the regions on: they are finished."""
        return raw

    def close(self) -> None:
        """Free both halves."""
        self._detector.close()
        self._reader.close()

    def _read(self, item: TextRegionQuery, blob: Tensor) -> TextRegions:
        raw = self._detector.infer([blob])[0]
        regions: TextRegions = self._detector.postprocess(raw, item)
        readings = tuple(self._read_line(LineCrop(item.picture, quad)) for quad in regions.quads)
        return replace(regions, readings=readings)

    def _read_line(self, crop: LineCrop) -> Reading:
        blob = self._reader.preprocess(crop)
        reading: Reading = self._reader.postprocess(self._reader.infer([blob])[0], crop)
        return reading
