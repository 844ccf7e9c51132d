"""The four calls that Immich's server makes, sent as it sends them, to any service that takes them.

The one place that spells Immich's request and reads its answer from the other side of the wire.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import ServiceError
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import (
    FACE_MIN_SCORE,
    TEXT_MAX_RESOLUTION,
    TEXT_MIN_SCORE,
    Floats,
    ModelKey,
    Part,
    Task,
)

ANSWER_TIMEOUT_S = 300.0  # what Immich's own client grants
PING_TIMEOUT_S = 5.0
CLIP_IMAGE, CLIP_TEXT, FACES, TEXT = CALL_NAMES = ("clip image", "clip text", "faces", "text")
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
)
_SHOWN = 300  # characters of an error that are told
# Immich's own options (contract §1.4), by the half they are sent to
_OPTIONS: Mapping[tuple[Task, Part], Mapping[str, Any]] = MappingProxyType(
    {
        (Task.CLIP, Part.TEXTUAL): {"language": "en"},
        (Task.FACES, Part.DETECTION): {"minScore": FACE_MIN_SCORE},
        (Task.OCR, Part.DETECTION): {
            "minScore": TEXT_MIN_SCORE,
            "maxResolution": TEXT_MAX_RESOLUTION,
        },
        (Task.OCR, Part.RECOGNITION): {"minScore": 0.8},
    }
)


class Unreachable(ServiceError):
    """No service answers at this address."""


class BadAnswer(ServiceError):
    """A service answered with an error, or not at all.

    Attributes:
        what: the error without the address.
    """

    def __init__(self, url: str, what: str) -> None:
        super().__init__(f"{url} {what}")
        self.what = what


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The models to ask for, spelled as Immich's settings spell them."""

    clip: str
    faces: str
    ocr: str


def configured_names(settings: Settings) -> ModelNames:
    """The models that our own settings name."""
    return ModelNames(settings.clip_model, settings.face_model, settings.ocr_model)


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of request: what it is called, and the model halves it names.

    Immich never asks for two tasks at once.
    """

    name: str
    task: Task
    model: str
    parts: tuple[Part, ...]

    @property
    def takes_image(self) -> bool:
        """Whether the payload is a picture; else it is a text."""
        return self.parts[0] is not Part.TEXTUAL

    @property
    def keys(self) -> list[ModelKey]:
        """The halves in the catalogue's spelling.

        Raises:
            UnknownModel: the catalogue does not know the model.
        """
        return [model_key(self.model, self.task, part) for part in self.parts]

    def entries(self) -> dict[str, Any]:
        """The `entries` field, as Immich builds it."""
        return {self.task: {part: self._entry(part) for part in self.parts}}

    def form(self, payload: bytes | str) -> dict[str, Any]:
        """Arguments of `httpx.post` for this call about a picture (bytes) or a text."""
        fields = {"entries": json.dumps(self.entries())}
        if isinstance(payload, str):
            return {"data": fields, "files": {"text": (None, payload)}}  # multipart, as Immich's
        return {"data": fields, "files": {"image": ("blob", payload, "application/octet-stream")}}

    def missing(self, store: ModelStore) -> list[ModelKey]:
        """The halves that are not on disk."""
        return [key for key in self.keys if store.locate(key) is None]

    def _entry(self, part: Part) -> dict[str, Any]:
        options = _OPTIONS.get((self.task, part))
        return {"modelName": self.model} | ({"options": dict(options)} if options else {})


def immich_calls(names: ModelNames) -> dict[str, Call]:
    """Search by picture and by text, faces, and text, by the names in `CALL_NAMES`."""
    both = (Part.DETECTION, Part.RECOGNITION)
    calls = (
        Call(CLIP_IMAGE, Task.CLIP, names.clip, (Part.VISUAL,)),
        Call(CLIP_TEXT, Task.CLIP, names.clip, (Part.TEXTUAL,)),
        Call(FACES, Task.FACES, names.faces, both),
        Call(TEXT, Task.OCR, names.ocr, both),
    )
    return {call.name: call for call in calls}


def encode(call: Call, payload: bytes | str) -> httpx.Request:
    """The call as a ready request to `/predict` of an unnamed host: its bytes are made once."""
    request = httpx.Request("POST", "http://service/predict", **call.form(payload))
    request.read()
    return request


@contextmanager
def checked(url: str) -> Iterator[None]:
    """Turn what httpx raises about `url` in the body into a `BadAnswer`."""
    try:
        yield
    except httpx.HTTPStatusError as exc:
        reply = exc.response
        raise BadAnswer(url, f"answered {reply.status_code}: {reply.text[:_SHOWN]}") from exc
    except httpx.HTTPError as exc:
        raise BadAnswer(url, f"does not answer: {str(exc) or type(exc).__name__}") from exc


@dataclass(frozen=True, slots=True, eq=False)
class FaceAnswer:
    """One picture's faces: `boxes` (N, 4) xyxy in pixels as sent, `embeddings` (N, D)."""

    boxes: Floats
    embeddings: Floats
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TextAnswer:
    """One picture's lines: `corners` (N, 4, 2) as shares of width and height, and line scores."""

    lines: tuple[str, ...]
    corners: Floats
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer and the seconds it took, upload included."""

    answer: Any
    seconds: float


class ImmichClient:
    """Asks one service, ours or the official one, as Immich would; for many threads at once."""

    def __init__(self, url: str, names: ModelNames, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self._calls = immich_calls(names)
        # Machine-learning services stand in the own network: no proxy of the environment.
        self._client = httpx.Client(timeout=timeout_s, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ping(self) -> None:
        """Make sure that something is there.

        Raises:
            Unreachable: nothing answers.
        """
        try:
            reply = self._client.get(f"{self.url}/ping", timeout=PING_TIMEOUT_S)
        except httpx.HTTPError as exc:
            raise Unreachable(f"no service at {self.url}: {type(exc).__name__}") from exc
        if reply.status_code != httpx.codes.OK:
            raise Unreachable(f"{self.url}/ping answered {reply.status_code}")

    def ask(self, name: str, payload: bytes | str) -> Timed:
        """Make the call of this name about a picture or a text.

        Returns:
            A vector (D,) float32 for search, `FaceAnswer` for faces, `TextAnswer` for text.

        Raises:
            BadAnswer: the service refuses, or does not answer.
            KeyError, ValueError, TypeError: it answers something else than Immich expects.
        """
        call = self._calls[name]
        started_s = time.perf_counter()
        with checked(self.url):
            reply = self._client.post(f"{self.url}/predict", **call.form(payload))
            reply.raise_for_status()
        elapsed_s = time.perf_counter() - started_s
        return Timed(_READERS[call.task](reply.json()[call.task]), elapsed_s)


def _read_vector(text: str) -> Floats:
    return np.asarray(json.loads(text), np.float32)


def _read_faces(faces: list[dict[str, Any]]) -> FaceAnswer:
    boxes = [[face["boundingBox"][side] for side in ("x1", "y1", "x2", "y2")] for face in faces]
    return FaceAnswer(
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        embeddings=np.asarray([_read_vector(face["embedding"]) for face in faces], np.float32),
        scores=tuple(float(face["score"]) for face in faces),
    )


def _read_lines(found: Mapping[str, Any]) -> TextAnswer:
    return TextAnswer(
        lines=tuple(str(line) for line in found["text"]),
        corners=np.asarray(found["box"], np.float32).reshape(-1, 4, 2),
        scores=tuple(float(score) for score in found["textScore"]),
    )


_READERS: Mapping[Task, Callable[[Any], Any]] = MappingProxyType(
    {Task.CLIP: _read_vector, Task.FACES: _read_faces, Task.OCR: _read_lines}
)


def find_photos(paths: Iterable[Path]) -> list[Path]:
    """The given files, and the pictures in the given folders, in order and each once."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = _inside(path) if path.is_dir() else [path]
        for file in inside:
            if file == path or (file.is_file() and file.suffix.lower() in PICTURE_SUFFIXES):
                found[file] = None
    return list(found)


def passed_over(paths: Iterable[Path]) -> list[Path]:
    """What `find_photos` does not take of the given folders: files, and folders it cannot read."""
    paths = list(paths)
    taken = set(find_photos(paths))
    inside = (file for path in paths if path.is_dir() for file in _inside(path))
    return [file for file in inside if file not in taken and (file.is_file() or file.is_dir())]


def _inside(folder: Path) -> list[Path]:
    """The files in a folder and those below, and folders that cannot be read; gone ones are not."""
    closed: list[Path] = []

    def keep(exc: OSError) -> None:
        if not isinstance(exc, FileNotFoundError):
            closed.append(Path(exc.filename))

    walk = os.walk(folder, onerror=keep)
    return sorted([*(Path(place, name) for place, _, names in walk for name in names), *closed])
