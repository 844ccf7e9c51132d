"""Ask a running service Immich's own questions over HTTP, and time the answers.

Works against any service that speaks the contract, ours or the official one.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from immich_ml_metal.errors import ServiceError
from immich_ml_metal.parity.compare import FaceAnswer
from immich_ml_metal.types import Floats

ANSWER_TIMEOUT_S = 300.0  # what Immich's own client grants
PING_TIMEOUT_S = 5.0


class Unreachable(ServiceError):
    """No service answers at this address."""


class Refused(ServiceError):
    """The service answered, but not with a result."""


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The models to ask for, and the options an Immich server sends by default."""

    clip: str
    faces: str
    ocr: str
    face_min_score: float = 0.7
    text_min_detection: float = 0.5
    text_min_recognition: float = 0.8
    text_max_resolution: int = 736


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer and the seconds it took, upload included."""

    answer: Any
    seconds: float


class Service:
    """One side of the comparison."""

    def __init__(self, url: str, models: ModelNames, *, client: httpx.Client | None = None) -> None:
        self.url = url.rstrip("/")
        self._models = models
        self._client = client or httpx.Client(timeout=ANSWER_TIMEOUT_S)

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

    def embed_image(self, image: bytes) -> Timed:
        """The picture's search vector, (D,)."""
        reply = self._predict({"clip": {"visual": {"modelName": self._models.clip}}}, image=image)
        return Timed(_vector(reply.answer["clip"]), reply.seconds)

    def embed_text(self, text: str) -> Timed:
        """The text's search vector, (D,)."""
        entry = {"modelName": self._models.clip, "options": {}}
        reply = self._predict({"clip": {"textual": entry}}, text=text)
        return Timed(_vector(reply.answer["clip"]), reply.seconds)

    def find_faces(self, image: bytes) -> Timed:
        """The picture's faces, as `FaceAnswer`."""
        name, options = self._models.faces, {"minScore": self._models.face_min_score}
        detection = {"modelName": name, "options": options}
        entries = {
            "facial-recognition": {"detection": detection, "recognition": {"modelName": name}}
        }
        reply = self._predict(entries, image=image)
        faces = reply.answer["facial-recognition"]
        boxes = [[face["boundingBox"][side] for side in ("x1", "y1", "x2", "y2")] for face in faces]
        answer = FaceAnswer(
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            embeddings=np.asarray([_vector(face["embedding"]) for face in faces], np.float32),
        )
        return Timed(answer, reply.seconds)

    def read_text(self, image: bytes) -> Timed:
        """The picture's text lines, as a list of strings."""
        names = self._models
        detection = {
            "minScore": names.text_min_detection,
            "maxResolution": names.text_max_resolution,
        }
        recognition = {"minScore": names.text_min_recognition}
        entries = {
            "ocr": {
                "detection": {"modelName": names.ocr, "options": detection},
                "recognition": {"modelName": names.ocr, "options": recognition},
            }
        }
        reply = self._predict(entries, image=image)
        return Timed([str(line) for line in reply.answer["ocr"]["text"]], reply.seconds)

    def _predict(
        self, entries: dict[str, Any], *, image: bytes | None = None, text: str | None = None
    ) -> Timed:
        fields = {"entries": json.dumps(entries)} | ({"text": text} if text is not None else {})
        files = (
            {"image": ("blob", image, "application/octet-stream")} if image is not None else None
        )
        started_s = time.perf_counter()
        try:
            reply = self._client.post(f"{self.url}/predict", data=fields, files=files)
        except httpx.HTTPError as exc:
            raise Refused(f"no answer: {type(exc).__name__}") from exc
        elapsed_s = time.perf_counter() - started_s
        if reply.status_code != httpx.codes.OK:
            raise Refused(f"answered {reply.status_code}: {reply.text[:120]}")
        return Timed(reply.json(), elapsed_s)


def _vector(text: str) -> Floats:
    return np.asarray(json.loads(text), np.float32)
