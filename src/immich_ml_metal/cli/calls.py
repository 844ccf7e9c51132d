"""The four calls that Immich's server makes, for the commands that play its part."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from immich_ml_metal.config import Settings
from immich_ml_metal.types import Part, Task

# Immich's own defaults (contract §1.9)
FACE_MIN_SCORE = 0.7
TEXT_BOX_MIN_SCORE = 0.5
TEXT_LINE_MIN_SCORE = 0.8
MAX_RESOLUTION_PX = 736


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of request: what it is called, and its `entries`."""

    name: str
    entries: dict[str, Any]
    takes_image: bool

    def form(self, *, image: bytes | None = None, text: str | None = None) -> dict[str, Any]:
        """Arguments of `httpx.post` for this call."""
        fields: dict[str, Any] = {"data": {"entries": json.dumps(self.entries)}}
        if self.takes_image:
            fields["files"] = {"image": ("blob", image, "application/octet-stream")}
        else:
            fields["data"]["text"] = text
        return fields


def standard_calls(settings: Settings) -> dict[str, Call]:
    """Search by picture and by text, faces, and text, with the configured models."""
    clip, face, ocr = settings.clip_model, settings.face_model, settings.ocr_model
    return {
        "clip image": Call(
            "clip image", {Task.CLIP: {Part.VISUAL: {"modelName": clip}}}, takes_image=True
        ),
        "clip text": Call(
            "clip text",
            {Task.CLIP: {Part.TEXTUAL: {"modelName": clip, "options": {"language": "en"}}}},
            takes_image=False,
        ),
        "faces": Call(
            "faces",
            {
                Task.FACES: {
                    Part.DETECTION: {"modelName": face, "options": {"minScore": FACE_MIN_SCORE}},
                    Part.RECOGNITION: {"modelName": face},
                }
            },
            takes_image=True,
        ),
        "text": Call(
            "text",
            {
                Task.OCR: {
                    Part.DETECTION: {
                        "modelName": ocr,
                        "options": {
                            "minScore": TEXT_BOX_MIN_SCORE,
                            "maxResolution": MAX_RESOLUTION_PX,
                        },
                    },
                    Part.RECOGNITION: {
                        "modelName": ocr,
                        "options": {"minScore": TEXT_LINE_MIN_SCORE},
                    },
                }
            },
            takes_image=True,
        ),
    }


def encode(call: Call, *, image: bytes | None = None, text: str | None = None) -> httpx.Request:
    """The call as a ready request to `/predict` of an unnamed host: its bytes are made once."""
    request = httpx.Request(
        "POST", "http://service/predict", **call.form(image=image, text=text)
    )
    request.read()
    return request


def read_pictures(paths: list[Path]) -> list[bytes]:
    """The bytes of every named picture; a folder stands for the files in it."""
    files = [
        file
        for path in paths
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        if file.is_file()
    ]
    return [file.read_bytes() for file in files]
