"""Immich's JSON ⇄ our types: the only place with camelCase.

The semantics are those of Immich 3.3 (contract §1): strict structure, unknown options ignored,
vectors as strings that hold a JSON array, OCR as four parallel lists.
"""

import reprlib
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError

from immich_ml_metal.catalog import model_key
from immich_ml_metal.errors import InvalidEntries, InvalidOutput
from immich_ml_metal.types import (
    FACE_MIN_SCORE,
    LINE_MIN_SCORE,
    TEXT_MAX_RESOLUTION,
    TEXT_MIN_SCORE,
    Answer,
    ClipTextual,
    ClipVisual,
    FaceDetection,
    FaceRecognition,
    Faces,
    Floats,
    ModelKey,
    Part,
    RecognisedFaces,
    Task,
    TaskRequest,
    TextDetection,
    TextLines,
    TextRecognition,
    TextRegions,
)

# -- entries → TaskRequest -------------------------------------------------------------------------

_Score = Annotated[float, Field(ge=0, le=1)]
_MAX_PROBLEMS = 5  # named in one error message
_REPR = reprlib.Repr()  # Python's own fails on what is nested deeply
_REPR.maxlevel, _REPR.maxstring = 2, 80


class _Options(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _LanguageOptions(_Options):
    language: str | None = None


class _FaceOptions(_Options):
    minScore: _Score = FACE_MIN_SCORE  # noqa: N815 - Immich's spelling


class _BoxOptions(_Options):
    minScore: _Score = TEXT_MIN_SCORE  # noqa: N815
    maxResolution: Annotated[int, Field(ge=1)] = TEXT_MAX_RESOLUTION  # noqa: N815


class _LineOptions(_Options):
    minScore: _Score = LINE_MIN_SCORE  # noqa: N815


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class _Entry(_Strict):
    modelName: StrictStr  # noqa: N815

    def key(self, task: Task, part: Part) -> ModelKey:
        return model_key(self.modelName, task, part)


class _VisualEntry(_Entry):
    options: _Options = _Options()

    def request(self) -> ClipVisual:
        return ClipVisual(self.key(Task.CLIP, Part.VISUAL))


class _TextualEntry(_Entry):
    options: _LanguageOptions = _LanguageOptions()

    def request(self) -> ClipTextual:
        return ClipTextual(self.key(Task.CLIP, Part.TEXTUAL), self.options.language)


class _FaceEntry(_Entry):
    options: _FaceOptions = _FaceOptions()

    def request(self, default_min_score: float) -> FaceDetection:
        is_asked = "minScore" in self.options.model_fields_set
        min_score = self.options.minScore if is_asked else default_min_score
        return FaceDetection(self.key(Task.FACES, Part.DETECTION), min_score)


class _FaceVectorEntry(_Entry):
    options: _Options = _Options()

    def request(self) -> FaceRecognition:
        return FaceRecognition(self.key(Task.FACES, Part.RECOGNITION))


class _BoxEntry(_Entry):
    options: _BoxOptions = _BoxOptions()

    def request(self) -> TextDetection:
        options = self.options
        key = self.key(Task.OCR, Part.DETECTION)
        return TextDetection(key, options.minScore, options.maxResolution)


class _LineEntry(_Entry):
    options: _LineOptions = _LineOptions()

    def request(self) -> TextRecognition:
        return TextRecognition(self.key(Task.OCR, Part.RECOGNITION), self.options.minScore)


class _Clip(_Strict):
    visual: _VisualEntry | None = None
    textual: _TextualEntry | None = None


class _Faces(_Strict):
    detection: _FaceEntry | None = None
    recognition: _FaceVectorEntry | None = None


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
    except RecursionError as exc:
        raise InvalidEntries("entries is nested too deeply") from exc
    except ValidationError as exc:
        raise InvalidEntries(f"invalid entries: {_explain(exc)}") from exc
    request = _to_request(entries, face_min_score)
    if request == TaskRequest():
        raise InvalidEntries("No model task requested.")
    return request


def _explain(exc: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in error['loc']) or 'top level'}: "
        f"{_reason(error['type'], error['msg'])} (got {_shorten(error['input'])})"
        for error in exc.errors()[:_MAX_PROBLEMS]
    )


def _reason(kind: str, message: str) -> str:
    if kind == "model_type":  # pydantic would name our own class
        return "must be an object"
    return message[:1].lower() + message[1:]


def _shorten(value: object, limit: int = 60) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _to_request(entries: _Entries, face_min_score: float) -> TaskRequest:
    clip, faces, ocr = entries.clip, entries.faces, entries.ocr
    return TaskRequest(
        clip_visual=clip.visual.request() if clip.visual else None,
        clip_textual=clip.textual.request() if clip.textual else None,
        face_detection=faces.detection.request(face_min_score) if faces.detection else None,
        face_recognition=faces.recognition.request() if faces.recognition else None,
        text_detection=ocr.detection.request() if ocr.detection else None,
        text_recognition=ocr.recognition.request() if ocr.recognition else None,
    )


# -- Answer → response body ------------------------------------------------------------------------


def count_items(answer: Answer) -> int:
    """Faces and lines of an answer: what its length grows with."""
    faces = answer.faces.faces if isinstance(answer.faces, RecognisedFaces) else answer.faces
    return sum(0 if part is None else len(part) for part in (faces, answer.text))


def render(answer: Answer) -> bytes:
    """The response body: compact JSON, float32 in its shortest exact form.

    Raises:
        InvalidOutput: a number is not finite; JSON could only say `null`.
    """
    body: dict[str, Any] = {}
    if answer.clip is not None:
        body[Task.CLIP.value] = _vector(answer.clip)
    if answer.faces is not None:
        body[Task.FACES.value] = _render_faces(answer.faces)
    if answer.text is not None:
        body[Task.OCR.value] = _render_text(answer.text)
    if answer.size is not None:
        width, height = answer.size
        body |= {"imageHeight": height, "imageWidth": width}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _vector(values: Floats) -> str:
    """A vector as Immich stores it: a string that is a JSON array, put into SQL as it is."""
    return orjson.dumps(_floats(values), option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _floats(values: Floats) -> Floats:
    """`values` as orjson takes them, or an error: it would write NaN and infinity as `null`."""
    contiguous = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(contiguous).all():
        raise InvalidOutput("a number of the answer is not finite")
    return contiguous


def _render_faces(faces: Faces | RecognisedFaces) -> Any:
    if isinstance(faces, Faces):
        return {
            "boxes": _floats(faces.boxes),
            "scores": _floats(faces.scores),
            "landmarks": _floats(faces.landmarks),
        }
    found = faces.faces
    return [
        {
            "boundingBox": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
            "embedding": _vector(embedding),
            "score": score,
        }
        for box, score, embedding in zip(
            _floats(found.boxes), _floats(found.scores), faces.embeddings, strict=True
        )
    ]


def _render_text(text: TextRegions | TextLines) -> Any:
    if isinstance(text, TextRegions):
        return {"boxes": _floats(text.quads), "scores": _floats(text.scores)}
    lengths = {len(text.quads), len(text.texts), len(text.box_scores), len(text.text_scores)}
    assert len(lengths) == 1, "Immich reads the four lists side by side"
    return {
        "box": _floats(text.quads).reshape(-1),
        "text": text.texts,
        "boxScore": _floats(text.box_scores),
        "textScore": _floats(text.text_scores),
    }
