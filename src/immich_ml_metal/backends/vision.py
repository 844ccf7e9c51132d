"""Apple Vision as an engine: face detection with ArcFace's five points, and text recognition.

Vision is part of macOS: no files, no weights of ours. What it says is translated in `vision_bridge`
(calls), `vision_geometry` (frames) and `vision_text` (languages, order); here it becomes models.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.calibration import LINE_BOX_KNOTS, Calibration
from immich_ml_metal.backends.vision_bridge import SeenFace, SeenLine, TextOptions
from immich_ml_metal.backends.vision_geometry import Size, box_pixels, five_points
from immich_ml_metal.backends.vision_text import (
    min_text_height,
    text_options,
    to_regions,
    wanted_languages,
)
from immich_ml_metal.device import Device
from immich_ml_metal.errors import InferenceError, LoadFailed, ModelUnavailable
from immich_ml_metal.types import (
    Bytes,
    Faces,
    Floats,
    ModelFiles,
    ModelKey,
    Part,
    Task,
    TextRegions,
)

log = logging.getLogger(__name__)

WIDTH = 4  # calls in flight: Immich sends two pictures for faces and one for text, plus one to overlap


class Picture(Protocol):
    """What is needed of a decoded picture: `pixels` is (H, W, 3) uint8 RGB."""

    @property
    def pixels(self) -> Bytes: ...


class FacesItem(Protocol):
    """One picture to find faces in, those scoring at least `min_score` on Immich's scale."""

    @property
    def picture(self) -> Picture: ...
    @property
    def min_score(self) -> float: ...


class TextItem(FacesItem, Protocol):
    """One picture to read; `max_resolution` is Immich's limit for the short side, in pixels."""

    @property
    def max_resolution(self) -> int: ...


class Bridge(Protocol):
    """What the models need of `vision_bridge.VisionBridge`."""

    def find_faces(self, pixels: Bytes) -> list[SeenFace]:
        """Find faces, in Vision's frame."""
        ...

    def read_text(self, pixels: Bytes, options: TextOptions) -> list[SeenLine]:
        """Read lines, in Vision's frame."""
        ...

    def text_languages(self) -> tuple[str, ...]:
        """Name what can be read."""
        ...


DetectorLoader = Callable[[ModelKey], AnyModel]


def no_detector(key: ModelKey) -> AnyModel:
    """Stand for an official detector where none was wired.

    Raises:
        ModelUnavailable: always.
    """
    raise ModelUnavailable(
        f"apple vision found a face without usable landmarks, and {key} is not here to answer instead"
    )


class Standby:
    """The official face detector, loaded when the first picture needs it. Any Vision thread."""

    def __init__(self, key: ModelKey, load: DetectorLoader, on_use: Callable[[], None]) -> None:
        self._key = key
        self._load = load
        self._on_use = on_use
        self._lock = threading.Lock()  # Vision has several threads; the model is loaded by one
        self._model: AnyModel | None = None

    def __call__(self, item: FacesItem) -> Faces:
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


class VisionFaces:
    """Face detection.

    A picture with a face whose landmarks Vision does not give is answered by the official detector
    as a whole: aligning by the box would put that face's vector into another space, and leaving it
    out would lose a person.
    """

    max_batch = 1

    def __init__(self, bridge: Bridge, score: Calibration, standby: Standby) -> None:
        self._bridge = bridge
        self._score = score
        self._standby = standby

    @property
    def size_bytes(self) -> int:
        """Memory of the official detector if it was needed; Vision's own belongs to macOS."""
        return self._standby.size_bytes

    def preprocess(self, item: FacesItem) -> FacesItem:
        """Pass the item on: Vision takes the decoded pixels as they are."""
        return item

    def infer(self, batch: Sequence[FacesItem]) -> list[Faces]:
        """Find the faces of each picture."""
        return [self._detect(item) for item in batch]

    def postprocess(self, raw: Faces, item: FacesItem) -> Faces:
        """Pass the faces on: they were finished where the official detector could still be asked."""
        return raw

    def close(self) -> None:
        """Free the official detector if it was loaded."""
        self._standby.close()

    def _detect(self, item: FacesItem) -> Faces:
        pixels = item.picture.pixels
        size = (pixels.shape[1], pixels.shape[0])
        graded = [(self._score(face.confidence), face) for face in self._bridge.find_faces(pixels)]
        kept = [(score, face) for score, face in graded if score >= item.min_score]
        kept.sort(key=lambda pair: -pair[0])
        points = [five_points(face, size) for _, face in kept]
        placed = [five for five in points if five is not None]
        if len(placed) < len(kept):
            return self._standby(item)
        return _faces(kept, placed, size)


def _faces(kept: Sequence[tuple[float, SeenFace]], points: Sequence[Floats], size: Size) -> Faces:
    boxes = [box_pixels(face.box, size) for _, face in kept]
    return Faces(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array([score for score, _ in kept], np.float32),
        landmarks=np.array(points, np.float32).reshape(-1, 5, 2),
    )


class VisionText:
    """Text detection that reads as well: its regions carry their readings."""

    max_batch = 1
    size_bytes = 0  # Vision's own memory belongs to macOS

    def __init__(
        self, bridge: Bridge, languages: tuple[str, ...], score: Calibration, *, corrects: bool
    ) -> None:
        self._bridge = bridge
        self._languages = languages
        self._score = score
        self._box_score = Calibration(LINE_BOX_KNOTS)
        self._corrects = corrects

    def preprocess(self, item: TextItem) -> TextItem:
        """Pass the item on: Vision takes the decoded pixels as they are."""
        return item

    def infer(self, batch: Sequence[TextItem]) -> list[list[SeenLine]]:
        """Read the lines of each picture."""
        return [self._read(item) for item in batch]

    def postprocess(self, raw: Sequence[SeenLine], item: TextItem) -> TextRegions:
        """Turn Vision's lines into regions scoring at least `item.min_score`."""
        height, width, _ = item.picture.pixels.shape
        return to_regions(
            raw,
            (width, height),
            box_score=self._box_score,
            line_score=self._score,
            min_score=item.min_score,
        )

    def close(self) -> None:
        """Nothing is held."""

    def _read(self, item: TextItem) -> list[SeenLine]:
        pixels = item.picture.pixels
        height = min_text_height((pixels.shape[1], pixels.shape[0]), item.max_resolution)
        options = text_options(self._languages, height, corrects=self._corrects)
        return self._bridge.read_text(pixels, options)


class VisionEngine:
    """Serves face detection and text from what macOS brings."""

    name = "vision"
    needs_files = False

    def __init__(
        self,
        bridge: Bridge,
        *,
        face_score: Calibration,
        line_score: Calibration,
        corrects: bool,
        load_detector: DetectorLoader = no_detector,
        on_fallback: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = Device(self.name, width=WIDTH)
        self._bridge = bridge
        self._face_score = face_score
        self._line_score = line_score
        self._corrects = corrects
        self._load_detector = load_detector
        self._on_fallback = on_fallback

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Give the model of `key`; nothing is read from disk.

        Raises:
            LoadFailed: Vision has no such task, or cannot read the script that the model is for.
        """
        match key.task, key.part:
            case Task.FACES, Part.DETECTION:
                standby = Standby(key, self._load_detector, self._on_fallback)
                return VisionFaces(self._bridge, self._face_score, standby)
            case Task.OCR, Part.DETECTION:
                return self._load_text(key)
            case _:
                raise LoadFailed(f"apple vision does not do {key.task} {key.part}")

    def _load_text(self, key: ModelKey) -> VisionText:
        try:
            supported = self._bridge.text_languages()
        except InferenceError as exc:
            raise LoadFailed(f"{key}: {exc}") from exc
        languages = wanted_languages(key.name, supported)
        if not languages:
            raise LoadFailed(
                f"apple vision on this macOS cannot read what {key.name} is for; it reads "
                f"{', '.join(supported)}; set ML_OCR_ENGINE to cpu or mlx"
            )
        log.info("vision reads %s as languages=%s", key.name, ",".join(languages))
        return VisionText(self._bridge, languages, self._line_score, corrects=self._corrects)
