"""Immich's JSON ⇄ our types: the only place with camelCase.

The semantics are those of Immich 3.3 (contract §1): strict structure, unknown options ignored,
vectors as strings that hold a JSON array, OCR as four parallel lists.
"""

from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import InvalidEntries
from immich_ml_metal.types import (
    Answer,
    ClipTextual,
    ClipVisual,
    FaceDetection,
    FaceRecognition,
    Faces,
    Floats,
    Part,
    RecognisedFaces,
    Task,
    TaskRequest,
    TextDetection,
    TextLines,
    TextRecognition,
    TextRegions,
)

# -- entries → TaskRequest --------------------------------------------------------------------------

_Score = Annotated[float, Field(ge=0, le=1)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _LanguageOptions(_Options):
    language: str | None = None


class _FaceOptions(_Options):
    minScore: _Score | None = None  # noqa: N815 - Immich's spelling


class _BoxOptions(_Options):
    minScore: _Score = 0.5  # noqa: N815
    maxResolution: Annotated[int, Field(ge=1)] = 736  # noqa: N815


class _LineOptions(_Options):
    minScore: _Score = 0.9  # noqa: N815


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class _Entry(_Strict):
    modelName: StrictStr  # noqa: N815
    options: _Options = _Options()


class _TextualEntry(_Entry):
    options: _LanguageOptions = _LanguageOptions()


class _FaceEntry(_Entry):
    options: _FaceOptions = _FaceOptions()


class _BoxEntry(_Entry):
    options: _BoxOptions = _BoxOptions()


class _LineEntry(_Entry):
    options: _LineOptions = _LineOptions()


class _Clip(_Strict):
    visual: _Entry | None = None
    textual: _TextualEntry | None = None


class _Faces(_Strict):
    detection: _FaceEntry | None = None
    recognition: _Entry | None = None


class _Ocr(_Strict):
    detection: _BoxEntry | None = None
    recognition: _LineEntry | None = None


class _Entries(_Strict):
    clip: _Clip = _Clip()
    faces: _Faces = Field(default=_Faces(), alias="facial-recognition")
    ocr: _Ocr = _Ocr()


def parse_entries(text: str, *, face_min_score: float) -> TaskRequest:
    """Read the `entries` field.

    Args:
        text: JSON, `{task: {type: {"modelName": ..., "options": {...}}}}`.
        face_min_score: what a face detection without `minScore` gets, 0..1.

    Raises:
        InvalidEntries: not JSON, or not this shape; the message names the place.
        UnknownModel: no official model has this name and task.
    """
    try:
        entries = _Entries.model_validate(orjson.loads(text))
    except orjson.JSONDecodeError as exc:
        raise InvalidEntries(f"entries is not JSON: {exc}") from exc
    except ValidationError as exc:
        raise InvalidEntries(f"invalid entries: {_explain(exc)}") from exc
    request = _to_request(entries, face_min_score)
    if request == TaskRequest():
        raise InvalidEntries("No model task requested.")
    return request


def _explain(exc: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in error['loc']) or 'top level'}: "
        f"{error['msg'][:1].lower()}{error['msg'][1:]} (got {_shorten(error['input'])})"
        for error in exc.errors()
    )


def _shorten(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _to_request(entries: _Entries, face_min_score: float) -> TaskRequest:
    visual, textual = entries.clip.visual, entries.clip.textual
    face, crop = entries.faces.detection, entries.faces.recognition
    box, line = entries.ocr.detection, entries.ocr.recognition

    def score(options: _FaceOptions) -> float:
        return face_min_score if options.minScore is None else options.minScore

    return TaskRequest(
        clip_visual=visual and ClipVisual(model_key(visual.modelName, Task.CLIP, Part.VISUAL)),
        clip_textual=textual
        and ClipTextual(
            model_key(textual.modelName, Task.CLIP, Part.TEXTUAL), textual.options.language
        ),
        face_detection=face
        and FaceDetection(
            model_key(face.modelName, Task.FACES, Part.DETECTION), score(face.options)
        ),
        face_recognition=crop
        and FaceRecognition(model_key(crop.modelName, Task.FACES, Part.RECOGNITION)),
        text_detection=box
        and TextDetection(
            model_key(box.modelName, Task.OCR, Part.DETECTION),
            box.options.minScore,
            box.options.maxResolution,
        ),
        text_recognition=line
        and TextRecognition(
            model_key(line.modelName, Task.OCR, Part.RECOGNITION), line.options.minScore
        ),
    )


# -- Answer → response body -------------------------------------------------------------------------


def render(answer: Answer) -> bytes:
    """The response body: compact JSON, float32 in its shortest exact form."""
    body: dict[str, Any] = {}
    if answer.clip is not None:
        body[Task.CLIP.value] = _vector(answer.clip)
    if answer.faces is not None:
        body[Task.FACES.value] = _render_faces(answer.faces)
    if answer.text is not None:
        body[Task.OCR.value] = _render_text(answer.text)
    if answer.size is not None:
        body["imageWidth"], body["imageHeight"] = answer.size
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _vector(values: Floats) -> str:
    """A vector as Immich stores it: a string that is a JSON array, put into SQL as it is."""
    contiguous = np.ascontiguousarray(values, dtype=np.float32)
    return orjson.dumps(contiguous, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _render_faces(faces: Faces | RecognisedFaces) -> Any:
    if isinstance(faces, Faces):
        return {
            "boxes": faces.boxes.tolist(),
            "scores": np.ascontiguousarray(faces.scores),
            "landmarks": np.ascontiguousarray(faces.landmarks),
        }
    found = faces.faces
    return [
        {
            "boundingBox": dict(zip(("x1", "y1", "x2", "y2"), box.tolist(), strict=True)),
            "embedding": _vector(embedding),
            "score": score,
        }
        for box, score, embedding in zip(found.boxes, found.scores, faces.embeddings, strict=True)
    ]


def _render_text(text: TextRegions | TextLines) -> Any:
    if isinstance(text, TextRegions):
        return {"boxes": np.ascontiguousarray(text.quads), "scores": text.scores}
    return {
        "box": np.ascontiguousarray(text.quads).reshape(-1),
        "text": list(text.texts),
        "boxScore": text.box_scores,
        "textScore": text.text_scores,
    }
