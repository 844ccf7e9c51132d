"""A Vision framework made from Apple's declarations, for machines without one.

Strict where PyObjC is: an unknown selector, a wrong number of arguments, a filled out-parameter
or a missing autorelease pool is an error. It sees a `Scene` and reports it as Vision does: 0..1
from the bottom-left corner, landmarks relative to the face box as a C array without a length,
confidence 1.0 from the landmark request, nil results after a failure.
"""

import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from doubles.vision_scene import FaceTruth, LineTruth, Scene
from objc_names import Facts, Member, read_facts

from immich_ml_metal.backends.vision.bridge import Frameworks

FACTS = Path(__file__).parents[2] / "scripts/apple_facts.json"


class ObjCError(Exception):
    """`objc.error`: an Objective-C exception."""


@dataclass
class Call:
    """One Objective-C call, as it happened."""

    owner: str
    name: str
    arguments: tuple[Any, ...]
    thread: str


@dataclass
class Double:
    """The four modules, seeing `scene`. `fail_at` breaks that call (by number), in its own way, and
    all that follow with `for_good`."""

    scene: Scene
    fail_at: int | None = None
    fail_by: str = "raise"  # or "nil": no object, NO with an NSError, an empty C array
    for_good: bool = False
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.facts: Facts = read_facts(FACTS)
        self.pools = threading.local()
        self._lock = threading.Lock()

    @property
    def frameworks(self) -> Frameworks:
        """What the bridge is given."""
        module = _Module(self)
        return Frameworks(vision=module, quartz=module, foundation=module, objc=_ObjC(self))

    def record(self, owner: str, name: str, arguments: tuple[Any, ...]) -> bool:
        """Log a call and say whether it is the one to fail."""
        if not getattr(self.pools, "depth", 0):
            raise AssertionError(f"{owner}.{name} outside of any autorelease pool")
        with self._lock:
            number = len(self.calls)
            self.calls.append(Call(owner, name, arguments, threading.current_thread().name))
        fails = self.fail_at is not None and (
            number >= self.fail_at if self.for_good else number == self.fail_at
        )
        if fails and self.fail_by == "raise":
            raise ObjCError(f"{owner}.{name} was made to fail")
        return fails

    def arguments_of(self, name: str) -> tuple[Any, ...]:
        """Arguments of the last call of that name."""
        return next(call.arguments for call in reversed(self.calls) if call.name == name)


class _ObjC:
    error = ObjCError

    def __init__(self, double: Double) -> None:
        self._pools = double.pools

    def autorelease_pool(self) -> "_Pool":
        return _Pool(self._pools)


class _Pool:
    def __init__(self, pools: threading.local) -> None:
        self._pools = pools

    def __enter__(self) -> None:
        self._pools.depth = getattr(self._pools, "depth", 0) + 1

    def __exit__(self, *exc: object) -> None:
        self._pools.depth -= 1


class _Module:
    """Vision, Quartz and Foundation: classes, functions and constants that Apple declares."""

    def __init__(self, double: Double) -> None:
        self._double = double

    def __getattr__(self, name: str) -> Any:
        facts = self._double.facts
        if name in facts.members:
            return _Class(self._double, name)
        if name in facts.constants:
            return facts.constants[name]
        if name not in facts.functions:
            raise AttributeError(f"module has no attribute {name!r}")
        return _bound(self._double, "", name, facts.functions[name], FUNCTIONS[name])


class _Class:
    def __init__(self, double: Double, kind: str) -> None:
        self._double, self._kind = double, kind

    def __getattr__(self, name: str) -> Any:
        if name == "alloc":
            return lambda: MAKERS.get(self._kind, Thing)(self._double, self._kind)
        found = self._double.facts.find(self._kind, name)
        if found is None or not found[1].is_static:
            raise AttributeError(f"class {self._kind} has no attribute {name!r}")
        return _bound(self._double, self._kind, name, found[1], CLASS_METHODS[name])


def _bound(
    double: Double, owner: str, name: str, member: Member, body: Callable[..., Any]
) -> Callable[..., Any]:
    """A call as PyObjC makes it: arguments counted, out-parameters returned beside the result."""

    def call(*arguments: Any) -> Any:
        if len(arguments) != member.arity:
            raise TypeError(f"{owner}.{name} needs {member.arity} arguments, got {len(arguments)}")
        if member.out is not None and arguments[member.out] is not None:
            raise ValueError(f"{owner}.{name}: argument {member.out} must be None")
        fails = double.record(owner, name, arguments)
        given = [value for index, value in enumerate(arguments) if index != member.out]
        error = _error(double, "made to fail") if fails else None
        if fails and member.is_bool:
            result: Any = False
        elif fails:
            result = VarList((), None) if member.is_pointer else None
        else:
            result = body(*given)
            if member.out is not None and isinstance(result, Failure):
                result, error = result.result, _error(double, result.reason)
        return result if member.out is None else (result, error)

    return call


@dataclass
class Failure:
    """What a body returns to fill its out-parameter with an NSError."""

    result: Any
    reason: str


class Thing:
    """An Objective-C object: only declared selectors, and only those it was given a body for."""

    def __init__(self, double: Double, kind: str, **bodies: Callable[..., Any]) -> None:
        self._double = double
        self._kind = kind
        self._bodies = bodies

    def __getattr__(self, name: str) -> Any:
        found = self._double.facts.find(self._kind, name)
        if found is None or found[1].is_static:
            raise AttributeError(f"{self._kind!r} object has no attribute {name!r}")
        body = self._bodies.get(name) or getattr(type(self), f"do_{name}", None)
        if body is None:
            raise NotImplementedError(f"the double does not know {self._kind}.{name}")
        bound = body if name in self._bodies else body.__get__(self)
        return _bound(self._double, self._kind, name, found[1], bound)

    def do_init(self) -> "Thing":
        return self


class Struct:
    """A C struct: only declared fields."""

    def __init__(self, double: Double, kind: str, **fields: Any) -> None:
        self._facts, self._kind, self._fields = double.facts, kind, fields

    def __getattr__(self, name: str) -> Any:
        found = self._facts.find(self._kind, name)
        if found is None or found[1].arity is not None:
            raise AttributeError(f"{self._kind} has no field {name!r}")
        return self._fields[name]


class VarList:
    """PyObjC's array of unknown length: no len(), no iteration, garbage past the end."""

    __iter__ = None

    def __init__(self, values: Sequence[Any], owner: Any) -> None:
        self._values = tuple(values)
        self._owner = weakref.ref(owner) if owner is not None else None

    def as_tuple(self, count: int) -> tuple[Any, ...]:
        """Copy `count` values; the memory belongs to the region and dies with it."""
        if self._owner is not None and self._owner() is None:
            raise AssertionError("the points were read after their region was freed")
        if count > len(self._values):
            raise AssertionError(f"read {count} values of {len(self._values)}: a wild pointer")
        return self._values[:count]


def _point(double: Double, x: float, y: float) -> Struct:
    return Struct(double, "CGPoint", x=float(x), y=float(y))


def _rect(double: Double, x: float, y: float, width: float, height: float) -> Struct:
    size = Struct(double, "CGSize", width=width, height=height)
    return Struct(double, "CGRect", origin=_point(double, x, y), size=size)


def _error(double: Double, words: str) -> Thing:
    return Thing(
        double,
        "NSError",
        localizedDescription=lambda: words,
        domain=lambda: "com.apple.Vision",
        code=lambda: 9,
    )


# -- Core Graphics ---------------------------------------------------------------------------------


@dataclass
class FakeImage:
    """A CGImage: the pixels as (H, W, 3), read back from how they were described."""

    pixels: np.ndarray[Any, Any]


def _cg_image(*arguments: Any) -> FakeImage | None:
    width, height, bits, bits_per_pixel, row_bytes, space, info, raw, decode, smooth, intent = (
        arguments
    )
    if (bits, bits_per_pixel, row_bytes) != (8, 24, width * 3) or len(raw) != height * row_bytes:
        return None
    if (space, info, decode, smooth, intent) != ("device RGB", 0, None, False, 0):
        return None
    return FakeImage(np.frombuffer(raw, np.uint8).reshape(height, width, 3))


def _copy(raw: Any, length: int) -> bytes:
    return bytes(raw)[:length]


def _provider(content: bytes) -> bytes:
    return content


def _device_rgb() -> str:
    return "device RGB"


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "CGImageCreate": _cg_image,
    "CGDataProviderCreateWithCFData": _provider,
    "CGColorSpaceCreateDeviceRGB": _device_rgb,
}
CLASS_METHODS: dict[str, Callable[..., Any]] = {"dataWithBytes_length_": _copy}


# -- Vision ----------------------------------------------------------------------------------------


class Handler(Thing):
    """VNImageRequestHandler."""

    image: FakeImage

    def do_initWithCGImage_options_(self, image: FakeImage, options: Any) -> "Handler":  # noqa: N802
        assert isinstance(image, FakeImage)
        assert options == {}
        self.image = image
        return self

    def do_performRequests_error_(self, requests: Sequence["Request"]) -> bool:  # noqa: N802
        height, width, _ = self.image.pixels.shape
        for request in requests:
            request.perform(width, height)
        return True


class Request(Thing):
    """A VNRequest: its setters, and its results once performed."""

    def __init__(self, double: Double, kind: str) -> None:
        super().__init__(double, kind)
        self.found: Sequence[Thing] | None = None
        self.set: dict[str, Any] = {}

    def do_results(self) -> Sequence[Thing] | None:
        return self.found

    def perform(self, width: int, height: int) -> None:
        """See the scene."""
        raise NotImplementedError


class FaceRectangles(Request):
    """VNDetectFaceRectanglesRequest."""

    def perform(self, width: int, height: int) -> None:
        """Report every face with its real confidence and no landmarks."""
        self.found = [
            _face(self._double, face, (width, height), str(uuid.uuid4()), face.confidence)
            for face in self._double.scene.faces
        ]


class FaceLandmarks(Request):
    """VNDetectFaceLandmarksRequest."""

    given: Sequence[Any] = ()

    def do_setInputFaceObservations_(self, faces: Sequence[Any]) -> None:  # noqa: N802
        self.given = list(faces)

    def perform(self, width: int, height: int) -> None:
        """Report the given faces in another order, a little larger, all with confidence 1.0."""
        assert self.given, "without input faces the request would look for its own"
        self.found = [
            _face(self._double, face.truth, (width, height), face.identity, 1.0, grown=1.1)
            for face in reversed(self.given)
            if not face.truth.is_forgotten
        ]


class TextRequest(Request):
    """VNRecognizeTextRequest."""

    def do_setRecognitionLevel_(self, level: int) -> None:  # noqa: N802
        self.set["level"] = level

    def do_setRecognitionLanguages_(self, languages: Sequence[str]) -> None:  # noqa: N802
        unknown = set(languages) - set(self._double.scene.languages)
        if unknown:
            raise ObjCError(f"unknown languages {unknown}")
        self.set["languages"] = tuple(languages)

    def do_setAutomaticallyDetectsLanguage_(self, on: bool) -> None:  # noqa: N802
        self.set["detects"] = on

    def do_setUsesLanguageCorrection_(self, on: bool) -> None:  # noqa: N802
        self.set["corrects"] = on

    def do_setMinimumTextHeight_(self, share: float) -> None:  # noqa: N802
        assert 0 <= share <= 1
        self.set["min_height"] = share

    def do_supportedRecognitionLanguagesAndReturnError_(self) -> Sequence[str]:  # noqa: N802
        return list(self._double.scene.languages)

    def perform(self, width: int, height: int) -> None:
        """Report the lines that are high enough."""
        assert self.set["level"] == 0, "Immich's scripts need the accurate level"
        lines = self._double.scene.lines
        self.found = [
            _line(self._double, line, (width, height))
            for line in lines
            if _line_height(line) >= self.set["min_height"] * height
        ]


def _line_height(line: LineTruth) -> float:
    top_left, bottom_left = np.array(line.corners[0]), np.array(line.corners[3])
    return float(np.hypot(*(bottom_left - top_left)))


class Face(Thing):
    """VNFaceObservation."""

    truth: FaceTruth
    identity: str


def _face(
    double: Double,
    truth: FaceTruth,
    size: tuple[int, int],
    identity: str,
    confidence: float,
    *,
    grown: float | None = None,
) -> Face:
    """An observation; with `grown` (its box that much larger) it carries landmarks."""
    box = _normalised_box(truth, size, grown or 1.0)
    name = Thing(double, "NSUUID", UUIDString=lambda: identity)
    landmarks = _landmarks(double, truth, size, box) if grown and truth.has_landmarks else None
    face = Face(
        double,
        "VNFaceObservation",
        boundingBox=lambda: _rect(double, *box),
        confidence=lambda: confidence,
        uuid=lambda: name,
        landmarks=lambda: landmarks,
    )
    face.truth, face.identity = truth, identity
    return face


def _normalised_box(
    truth: FaceTruth, size: tuple[int, int], grown: float
) -> tuple[float, float, float, float]:
    """x, y, width, height in 0..1 from the bottom-left corner."""
    x1, y1, x2, y2 = truth.box
    width, height = (x2 - x1) * grown, (y2 - y1) * grown
    left, bottom = (x1 + x2 - width) / 2, size[1] - (y1 + y2 + height) / 2
    return left / size[0], bottom / size[1], width / size[0], height / size[1]


def _landmarks(
    double: Double,
    truth: FaceTruth,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
) -> Thing:
    regions = {
        name: None if name in truth.missing else _region(double, points, size, box)
        for name, points in truth.regions().items()
    }
    if double.scene.swaps_sides:
        for kind in ("Eye", "Pupil"):
            left, right = f"left{kind}", f"right{kind}"
            regions[left], regions[right] = regions[right], regions[left]
    bodies = {name: (lambda region=region: region) for name, region in regions.items()}
    return Thing(double, "VNFaceLandmarks2D", **bodies)


def _region(
    double: Double,
    points: np.ndarray[Any, Any],
    size: tuple[int, int],
    box: tuple[float, float, float, float],
) -> Thing:
    """Pixels → 0..1 of the picture, y up → 0..1 of the face box."""
    x, y, width, height = box
    placed = [
        _point(double, (px / size[0] - x) / width, (1 - py / size[1] - y) / height)
        for px, py in points
    ]
    region = Thing(double, "VNFaceLandmarkRegion2D", pointCount=lambda: len(placed))
    owner = weakref.ref(region)
    region._bodies["normalizedPoints"] = lambda: VarList(placed, owner())
    return region


def _line(double: Double, line: LineTruth, size: tuple[int, int]) -> Thing:
    names = ("topLeft", "topRight", "bottomRight", "bottomLeft")
    corners = {
        name: (lambda x=x, y=y: _point(double, x / size[0], 1 - y / size[1]))
        for name, (x, y) in zip(names, line.corners, strict=True)
    }
    candidate = Thing(
        double,
        "VNRecognizedText",
        string=lambda: line.text,
        confidence=lambda: line.confidence,
    )
    return Thing(
        double,
        "VNRecognizedTextObservation",
        **corners,
        confidence=lambda: line.confidence,
        topCandidates_=lambda count: [candidate][:count],
    )


MAKERS: dict[str, Callable[[Double, str], Thing]] = {
    "VNImageRequestHandler": Handler,
    "VNDetectFaceRectanglesRequest": FaceRectangles,
    "VNDetectFaceLandmarksRequest": FaceLandmarks,
    "VNRecognizeTextRequest": TextRequest,
}
