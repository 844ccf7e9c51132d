"""Apple Vision as an engine: face detection with ArcFace's five points, and text recognition.

Vision is part of macOS: no files, no weights of ours. What it says is translated in `vision_bridge`
(calls), `vision_geometry` (frames) and `vision_text` (languages, order); here it becomes models.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.device import Device
from immich_ml_metal.backends.vision.bridge import SeenFace, SeenLine, TextOptions
from immich_ml_metal.backends.vision.calibration import LINE_BOX_KNOTS, Calibration
from immich_ml_metal.backends.vision.geometry import Size, box_pixels, five_points
from immich_ml_metal.backends.vision.standby import (
    OfficialLoader,
    OfficialText,
    Standby,
    no_official,
)
from immich_ml_metal.backends.vision.text import (
    min_text_height,
    text_options,
    to_regions,
    wanted_languages,
)
from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.tasks.faces import FaceQuery
from immich_ml_metal.tasks.text_boxes import MIN_SIDE_PX, TextRegionQuery
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

NO_LANDMARKS, NO_LANGUAGE = "vision_no_landmarks", "vision_no_language"  # of `on_fallback`
WIDTH = (
    4  # calls in flight: Immich sends two pictures for faces and one for text, plus one to overlap
)


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

    def preprocess(self, item: FaceQuery) -> FaceQuery:
        """Pass the item on: Vision takes the decoded pixels as they are."""
        return item

    def infer(self, batch: Sequence[FaceQuery]) -> list[Faces]:
        """Find the faces of each picture."""
        return [self._detect(item) for item in batch]

    def postprocess(self, raw: Faces, item: FaceQuery) -> Faces:
        """Pass the faces on: they were finished where the official detector can be asked."""
        return raw

    def close(self) -> None:
        """Free the official detector if it was loaded."""
        self._standby.close()

    def _detect(self, item: FaceQuery) -> Faces:
        size = item.picture.size
        seen = self._bridge.find_faces(item.picture.pixels)
        graded = [(self._score(face.confidence), face) for face in seen]
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

    def preprocess(self, item: TextRegionQuery) -> TextRegionQuery | None:
        """Pass the item on as it is; None for a picture too small to hold text, as officially."""
        return item if min(item.picture.size) >= MIN_SIDE_PX else None

    def infer(self, batch: Sequence[TextRegionQuery | None]) -> list[list[SeenLine]]:
        """Read the lines of each picture."""
        return [[] if item is None else self._read(item) for item in batch]

    def postprocess(self, raw: Sequence[SeenLine], item: TextRegionQuery) -> TextRegions:
        """Turn Vision's lines into regions scoring at least `item.min_score`."""
        return to_regions(
            raw,
            item.picture.size,
            box_score=self._box_score,
            line_score=self._score,
            min_score=item.min_score,
        )

    def close(self) -> None:
        """Nothing is held."""

    def _read(self, item: TextRegionQuery) -> list[SeenLine]:
        height = min_text_height(item.picture.size, item.max_resolution)
        options = text_options(self._languages, height, corrects=self._corrects)
        return self._bridge.read_text(item.picture.pixels, options)


class VisionEngine:
    """Serves face detection and text from what macOS brings.

    `load_official` gives the official model where Vision has no answer: a face without landmarks, a
    script it cannot read. `on_fallback` is told each time, with the reason.
    """

    name = "vision"
    needs_files = False

    def __init__(
        self,
        bridge: Bridge,
        *,
        face_score: Calibration,
        line_score: Calibration,
        corrects: bool,
        load_official: OfficialLoader = no_official,
        on_fallback: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.device = Device(self.name, width=WIDTH)
        self._bridge = bridge
        self._face_score = face_score
        self._line_score = line_score
        self._corrects = corrects
        self._load_official = load_official
        self._on_fallback = on_fallback

    def load(self, key: ModelKey, files: ModelFiles | None) -> AnyModel:
        """Give the model of `key`; Vision's own needs nothing from disk.

        Raises:
            LoadFailed: Vision has no such task, or failed when asked for its languages.
            ModelUnavailable: Vision cannot read the script, and the official model is not here.
        """
        match key.task, key.part:
            case Task.FACES, Part.DETECTION:
                standby = Standby(key, self._load_official, lambda: self._on_fallback(NO_LANDMARKS))
                return VisionFaces(self._bridge, self._face_score, standby)
            case Task.OCR, Part.DETECTION:
                return self._load_text(key)
            case _:
                raise LoadFailed(f"apple vision does not do {key.task} {key.part}")

    def _load_text(self, key: ModelKey) -> AnyModel:
        try:
            supported = self._bridge.text_languages()
        except InferenceError as exc:
            raise LoadFailed(f"{key}: {exc}") from exc
        languages = wanted_languages(key.name, supported)
        if not languages:
            log.warning("vision cannot read the script of model=%s, the official model does", key)
            self._on_fallback(NO_LANGUAGE)
            reader = replace(key, part=Part.RECOGNITION)
            return OfficialText(self._load_official(key), self._load_official(reader))
        log.info("vision reads model=%s languages=%s", key, ",".join(languages))
        return VisionText(self._bridge, languages, self._line_score, corrects=self._corrects)
