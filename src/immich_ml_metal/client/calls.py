"""The four calls that Immich's server makes, for the commands that play its part."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import ServiceError
from immich_ml_metal.models.store import ModelStore
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelKey, Part, Task

# Immich's own options (contract §1.4), by the half they are sent to
_OPTIONS: dict[tuple[Task, Part], dict[str, Any]] = {
    (Task.CLIP, Part.TEXTUAL): {"language": "en"},
    (Task.FACES, Part.DETECTION): {"minScore": 0.7},
    (Task.OCR, Part.DETECTION): {"minScore": 0.5, "maxResolution": 736},
    (Task.OCR, Part.RECOGNITION): {"minScore": 0.8},
}


class BadAnswer(ServiceError):
    """A service answered with an error, or not at all."""


@contextmanager
def checked(url: str) -> Iterator[None]:
    """Turn what httpx raises about `url` in the body into a `BadAnswer`."""
    try:
        yield
    except httpx.HTTPStatusError as exc:
        words = exc.response.text[:300]
        raise BadAnswer(f"{url} answered {exc.response.status_code}: {words}") from exc
    except httpx.HTTPError as exc:
        raise BadAnswer(f"{url} does not answer: {str(exc) or type(exc).__name__}") from exc


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of request: what it is called, and the models it names."""

    name: str
    keys: tuple[ModelKey, ...]

    @property
    def task(self) -> Task:
        """The one task of this call; Immich never sends two."""
        return self.keys[0].task

    @property
    def takes_image(self) -> bool:
        """Whether the payload is a picture; else it is a text."""
        return self.keys[0].part is not Part.TEXTUAL

    def entries(self) -> dict[str, Any]:
        """The `entries` field, as Immich builds it."""
        return {self.task: {key.part: _entry(key) for key in self.keys}}

    def form(self, *, image: bytes | None = None, text: str | None = None) -> dict[str, Any]:
        """Arguments of `httpx.post` for this call."""
        fields: dict[str, Any] = {"data": {"entries": json.dumps(self.entries())}}
        if self.takes_image:
            fields["files"] = {"image": ("blob", image, "application/octet-stream")}
        else:
            fields["data"]["text"] = text
        return fields

    def missing(self, store: ModelStore) -> list[ModelKey]:
        """The models of this call that are not on disk."""
        return [key for key in self.keys if store.locate(key) is None]


def _entry(key: ModelKey) -> dict[str, Any]:
    options = _OPTIONS.get((key.task, key.part))
    return {"modelName": key.name, **({"options": options} if options else {})}


def standard_calls(settings: Settings) -> dict[str, Call]:
    """Search by picture and by text, faces, and text, with the configured models."""

    def call(name: str, model: str, task: Task, *parts: Part) -> Call:
        return Call(name, tuple(model_key(model, task, part) for part in parts))

    both = (Part.DETECTION, Part.RECOGNITION)
    calls = (
        call("clip image", settings.clip_model, Task.CLIP, Part.VISUAL),
        call("clip text", settings.clip_model, Task.CLIP, Part.TEXTUAL),
        call("faces", settings.face_model, Task.FACES, *both),
        call("text", settings.ocr_model, Task.OCR, *both),
    )
    return {one.name: one for one in calls}


def encode(call: Call, *, image: bytes | None = None, text: str | None = None) -> httpx.Request:
    """The call as a ready request to `/predict` of an unnamed host: its bytes are made once."""
    request = httpx.Request("POST", "http://service/predict", **call.form(image=image, text=text))
    request.read()
    return request


def read_pictures(paths: list[Path]) -> list[bytes]:
    """The bytes of every named picture; a folder stands for the visible files in it.

    Raises:
        OSError: a path does not exist or cannot be read.
    """
    return [file.read_bytes() for path in paths for file in _files(path)]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
