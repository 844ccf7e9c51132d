"""Every Objective-C call of the project, and nothing else.

Turns pixels into what Vision saw, in Vision's own frame (0..1, origin bottom-left). Knows nothing
about models, thresholds or Immich. Each name and call shape used here is compared with Apple's
declarations by `tests/test_vision_names.py`, which reads the annotations to follow the types.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from immich_ml_metal.errors import InferenceError
from immich_ml_metal.types import Bytes

# Objects that PyObjC hands over. It publishes no types, so the names only document (and are checked
# by the test named above); to a type checker each is Any.
CGImage = Any
CGPoint = Any
CGRect = Any
NSError = Any
VNFaceLandmarkRegion2D = Any
VNFaceLandmarks2D = Any
VNFaceObservation = Any
VNImageRequestHandler = Any
VNRecognizeTextRequest = Any
VNRecognizedText = Any
VNRecognizedTextObservation = Any
VNRequest = Any

Points = NDArray[np.float64]
BITS = 8  # per colour of a pixel
COLOURS = 3


@dataclass(frozen=True, slots=True)
class Frameworks:
    """The four PyObjC modules in use. Any: PyObjC makes their contents at run time."""

    vision: Any
    quartz: Any
    foundation: Any
    objc: Any


def load_frameworks() -> Frameworks:
    """Import PyObjC's modules.

    Raises:
        ImportError: this is not macOS, or PyObjC is not installed.
    """
    names = ("Vision", "Quartz", "Foundation", "objc")
    vision, quartz, foundation, objc = (importlib.import_module(name) for name in names)
    return Frameworks(vision=vision, quartz=quartz, foundation=foundation, objc=objc)


@dataclass(frozen=True, slots=True)
class SeenLandmarks:
    """Landmark regions of one face.

    Attributes:
        box: (4,) x, y, width, height of the face box that the points refer to; 0..1 of the
            picture, origin bottom-left.
        regions: region name → (N, 2) xy in 0..1 of that box, origin its bottom-left corner.
    """

    box: Points
    regions: Mapping[str, Points]


@dataclass(frozen=True, slots=True)
class SeenFace:
    """One face: `box` is (4,) x, y, width, height in 0..1 of the picture, origin bottom-left."""

    box: Points
    confidence: float
    landmarks: SeenLandmarks | None


@dataclass(frozen=True, slots=True)
class SeenLine:
    """One line: `corners` is (4, 2) xy in 0..1, origin bottom-left, in TL TR BR BL order."""

    corners: Points
    box_confidence: float
    text: str
    confidence: float


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How to read: languages most wanted first, and the smallest line as a share of the height."""

    languages: tuple[str, ...]
    detects_language: bool
    corrects: bool
    min_height: float


class VisionBridge:
    """Runs Vision requests. Thread-safe: a call shares nothing with another call."""

    def __init__(self, frameworks: Frameworks) -> None:
        self._vision = frameworks.vision
        self._quartz = frameworks.quartz
        self._foundation = frameworks.foundation
        self._objc = frameworks.objc

    def find_faces(self, pixels: Bytes) -> list[SeenFace]:
        """Find the faces of an (H, W, 3) uint8 RGB picture; landmarks None where Vision has none.

        Raises:
            InferenceError: Vision failed, with its own words.
        """
        with self._call():
            handler = self._handler(pixels)
            request = self._vision.VNDetectFaceRectanglesRequest.alloc().init()
            faces: list[VNFaceObservation] = self._perform(handler, request)
            if not faces:  # without input faces the landmark request would look for its own
                return []
            landmarks = self._find_landmarks(handler, faces)
            return [_seen_face(face, landmarks) for face in faces]

    def read_text(self, pixels: Bytes, options: TextOptions) -> list[SeenLine]:
        """Read the lines of an (H, W, 3) uint8 RGB picture.

        Raises:
            InferenceError: Vision failed, with its own words.
        """
        with self._call():
            request = self._text_request()
            request.setRecognitionLanguages_(list(options.languages))
            request.setAutomaticallyDetectsLanguage_(options.detects_language)
            request.setUsesLanguageCorrection_(options.corrects)
            request.setMinimumTextHeight_(options.min_height)
            lines: list[VNRecognizedTextObservation] = self._perform(self._handler(pixels), request)
            return [_seen_line(line) for line in lines]

    def text_languages(self) -> tuple[str, ...]:
        """What this macOS can read accurately, as Vision's language tags.

        Raises:
            InferenceError: Vision failed, with its own words.
        """
        with self._call():
            request = self._text_request()
            tags, error = request.supportedRecognitionLanguagesAndReturnError_(None)
            if tags is None:
                raise InferenceError(f"apple vision named no languages: {_words(error)}")
            return tuple(str(tag) for tag in tags)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One autorelease pool per call: the device threads have no run loop to drain theirs."""
        with self._objc.autorelease_pool():
            try:
                yield
            except self._objc.error as exc:
                raise InferenceError(f"apple vision raised {exc}") from exc

    def _text_request(self) -> VNRecognizeTextRequest:
        request = self._vision.VNRecognizeTextRequest.alloc().init()
        request.setRecognitionLevel_(self._vision.VNRequestTextRecognitionLevelAccurate)
        return request

    def _find_landmarks(
        self, handler: VNImageRequestHandler, faces: Sequence[VNFaceObservation]
    ) -> dict[str, SeenLandmarks]:
        """Landmarks by the identity of the observation, which is the given face's own."""
        request = self._vision.VNDetectFaceLandmarksRequest.alloc().init()
        request.setInputFaceObservations_(faces)
        found: list[VNFaceObservation] = self._perform(handler, request)
        seen = {_identity(face): _seen_landmarks(face) for face in found}
        return {identity: landmarks for identity, landmarks in seen.items() if landmarks}

    def _handler(self, pixels: Bytes) -> VNImageRequestHandler:
        handler = self._vision.VNImageRequestHandler.alloc().initWithCGImage_options_(
            self._image(pixels), {}
        )
        if handler is None:
            raise InferenceError("apple vision took no picture")
        return handler

    def _image(self, pixels: Bytes) -> CGImage:
        """Wrap (H, W, 3) uint8 RGB as it is: device colours, so that nothing converts them."""
        height, width, colours = pixels.shape
        if colours != COLOURS:
            raise InferenceError(f"apple vision needs {COLOURS} colours, not {colours}")
        raw = pixels.tobytes()
        content = self._foundation.NSData.dataWithBytes_length_(raw, len(raw))
        image = self._quartz.CGImageCreate(
            width,
            height,
            BITS,
            BITS * COLOURS,
            width * COLOURS,
            self._quartz.CGColorSpaceCreateDeviceRGB(),
            self._quartz.kCGImageAlphaNone,
            self._quartz.CGDataProviderCreateWithCFData(content),
            None,  # no decode table
            False,  # no interpolation
            self._quartz.kCGRenderingIntentDefault,
        )
        if image is None:
            raise InferenceError(f"core graphics refused a picture of {width}x{height} px")
        return image

    def _perform(self, handler: VNImageRequestHandler, request: VNRequest) -> list[Any]:
        done, error = handler.performRequests_error_([request], None)
        if not done:
            raise InferenceError(f"apple vision failed: {_words(error)}")
        results = request.results()
        if results is None:  # Apple: nil means failed; nothing found is an empty array
            raise InferenceError("apple vision answered nothing at all")
        return list(results)


def _words(error: NSError) -> str:
    if error is None:
        return "no reason given"
    return f"{error.localizedDescription()} ({error.domain()} {error.code()})"


def _identity(face: VNFaceObservation) -> str:
    return str(face.uuid().UUIDString())


def _box(rect: CGRect) -> Points:
    return np.array([rect.origin.x, rect.origin.y, rect.size.width, rect.size.height], np.float64)


def _seen_face(face: VNFaceObservation, landmarks: Mapping[str, SeenLandmarks]) -> SeenFace:
    return SeenFace(
        box=_box(face.boundingBox()),
        confidence=float(face.confidence()),
        landmarks=landmarks.get(_identity(face)),
    )


def _seen_landmarks(face: VNFaceObservation) -> SeenLandmarks | None:
    landmarks = face.landmarks()
    if landmarks is None:
        return None
    regions = {
        "left_eye": _points(landmarks.leftEye()),
        "right_eye": _points(landmarks.rightEye()),
        "left_pupil": _points(landmarks.leftPupil()),
        "right_pupil": _points(landmarks.rightPupil()),
        "nose": _points(landmarks.nose()),
        "nose_crest": _points(landmarks.noseCrest()),
        "outer_lips": _points(landmarks.outerLips()),
    }
    return SeenLandmarks(box=_box(face.boundingBox()), regions=regions)


def _points(region: VNFaceLandmarkRegion2D) -> Points:
    """Copy a region's points; (0, 2) where Vision has no such region."""
    if region is None:
        return np.zeros((0, 2))
    # a bare C pointer that does not know its length, alive only as long as its region
    points: list[CGPoint] = region.normalizedPoints().as_tuple(region.pointCount())
    return np.array([(point.x, point.y) for point in points], np.float64).reshape(-1, 2)


def _seen_line(line: VNRecognizedTextObservation) -> SeenLine:
    corners: list[CGPoint] = [
        line.topLeft(),
        line.topRight(),
        line.bottomRight(),
        line.bottomLeft(),
    ]
    candidates: list[VNRecognizedText] = line.topCandidates_(1)
    return SeenLine(
        corners=np.array([(corner.x, corner.y) for corner in corners], np.float64),
        box_confidence=float(line.confidence()),
        # a line that Vision can place but not read has no candidate: no words, no confidence
        text="".join(candidate.string() for candidate in candidates),
        confidence=sum(float(candidate.confidence()) for candidate in candidates),
    )
