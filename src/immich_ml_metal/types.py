"""What travels between the stages: requests, results, and the shape of a tensor graph.

Knows nothing about HTTP, files or hardware. One frame everywhere: origin top-left, x right, y down,
pixels of the decoded picture; boxes `xyxy`; quads clockwise from the top-left corner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the gateway shares these words, and does without NumPy's 5 MB
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]
    Tensor = NDArray[Any]  # a graph's input or output: its dtype is the graph's own
else:
    Floats = Bytes = Tensor = Any


class Task(StrEnum):
    """What is asked of a picture or a text. Values are Immich's."""

    CLIP = "clip"
    FACES = "facial-recognition"
    OCR = "ocr"


# Immich's names of the queues that ask a machine-learning service, by task.
QUEUES: Mapping[str, str] = MappingProxyType(
    {Task.CLIP: "smartSearch", Task.FACES: "faceDetection", Task.OCR: "ocr"}
)


class Part(StrEnum):
    """Which half of a model. Values are Immich's, and the folder names in its cache."""

    VISUAL = "visual"
    TEXTUAL = "textual"
    DETECTION = "detection"
    RECOGNITION = "recognition"


Slot = tuple[Task, Part]

# Every half of every task, for whoever needs one of each: engines, settings, files, `/health`.
SLOTS: tuple[Slot, ...] = (
    (Task.CLIP, Part.VISUAL),
    (Task.CLIP, Part.TEXTUAL),
    (Task.FACES, Part.DETECTION),
    (Task.FACES, Part.RECOGNITION),
    (Task.OCR, Part.DETECTION),
    (Task.OCR, Part.RECOGNITION),
)


@dataclass(frozen=True, slots=True)
class ModelKey:
    """One loadable network: a cleaned model name, its task and its half."""

    task: Task
    part: Part
    name: str

    def __str__(self) -> str:
        return f"{self.name}/{self.part}"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where one half of a model lies on disk.

    Attributes:
        graph: the ONNX file.
        folder: holds the half's side files (`preprocess_cfg.json`, `tokenizer.json`,
            `charset.txt`).
        root: holds the files that both halves share (`config.json`).
        compat: the server whose resize rule made the index, where it is not the settings'.
    """

    graph: Path
    folder: Path
    root: Path
    compat: str | None = None


# -- requests: one frozen dataclass per entry, options included -----------------------------------

# Where a request names none: as Immich's own service has them.
FACE_MIN_SCORE = 0.7
TEXT_MIN_SCORE = 0.5
TEXT_MAX_RESOLUTION = 736  # pixels
LINE_MIN_SCORE = 0.9


@dataclass(frozen=True, slots=True)
class ClipVisual:
    """Embed the picture."""

    model: ModelKey


@dataclass(frozen=True, slots=True)
class ClipTextual:
    """Embed the text; `language` is the caller's tag, as sent (`de`, `en-US`, `en-null`)."""

    model: ModelKey
    language: str | None = None


@dataclass(frozen=True, slots=True)
class FaceDetection:
    """Find faces scoring at least `min_score` (0..1)."""

    model: ModelKey
    min_score: float = FACE_MIN_SCORE


@dataclass(frozen=True, slots=True)
class FaceRecognition:
    """Embed each face that detection found."""

    model: ModelKey


@dataclass(frozen=True, slots=True)
class TextDetection:
    """Find text boxes scoring at least `min_score` (0..1).

    Attributes:
        max_resolution: what the picture's short side is reduced to, pixels.
    """

    model: ModelKey
    min_score: float = TEXT_MIN_SCORE
    max_resolution: int = TEXT_MAX_RESOLUTION


@dataclass(frozen=True, slots=True)
class TextRecognition:
    """Read each text box, keeping lines scoring strictly above `min_score` (0..1)."""

    model: ModelKey
    min_score: float = LINE_MIN_SCORE


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Everything one `/predict` asks for. None means not asked."""

    clip_visual: ClipVisual | None = None
    clip_textual: ClipTextual | None = None
    face_detection: FaceDetection | None = None
    face_recognition: FaceRecognition | None = None
    text_detection: TextDetection | None = None
    text_recognition: TextRecognition | None = None


# -- results --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Faces:
    """Detected faces, by descending score.

    Attributes:
        boxes: (N, 4) xyxy, pixels, whole numbers, may lie outside the picture.
        scores: (N,) in 0..1.
        landmarks: (N, 5, 2) xy, pixels: left eye, right eye, nose, left and right mouth corner,
            left and right as seen in the picture.
    """

    boxes: Floats
    scores: Floats
    landmarks: Floats

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class RecognisedFaces:
    """Faces with their vectors: `embeddings` is (N, 512), not normalised."""

    faces: Faces
    embeddings: Floats


@dataclass(frozen=True, slots=True)
class Reading:
    """One line as read: its text and the reader's confidence in 0..1."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class TextRegions:
    """Detected text lines, in reading order.

    Attributes:
        quads: (N, 4, 2) xy, pixels, clockwise from the top-left corner.
        scores: (N,) in 0..1.
        readings: the text of each region where the detector reads too (Apple Vision), else None.
    """

    quads: Floats
    scores: Floats
    readings: tuple[Reading, ...] | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class TextLines:
    """Read lines: `quads` (N, 4, 2) xy in 0..1 of the picture's sides, and N scores and texts."""

    quads: Floats
    box_scores: Floats
    texts: tuple[str, ...]
    text_scores: Floats

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class Answer:
    """The results of one request. None means not asked, or consumed by a later stage.

    Attributes:
        size: (width, height) of the decoded picture in pixels, None for a text.
        clip: (D,) unit vector.
    """

    size: tuple[int, int] | None = None
    clip: Floats | None = None
    faces: Faces | RecognisedFaces | None = None
    text: TextRegions | TextLines | None = None


# -- tensor graphs ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output: `shape` holds None for a free dimension."""

    name: str
    dtype: "np.dtype[Any]"
    shape: tuple[int | None, ...]


# In a graph's metadata: it takes fewer tokens than the file says, up to and with the end token.
FREE_LENGTH = "immich-ml-metal.free_length"


class Graph(Protocol):
    """A tensor program: an ONNX file on some engine."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` is fed."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, in order."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's own key-value pairs: PP-OCR keeps its character list there."""
        ...

    @property
    def max_batch(self) -> int:
        """The most rows one `run` takes; rows are independent of each other."""
        ...

    @property
    def fixed_shapes(self) -> bool:
        """Whether each new input shape costs a compilation: callers pad to a short list of them."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory held by the weights."""
        ...

    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute every output for `feeds` (input name → array), on the engine's own thread."""
        ...

    def close(self) -> None:
        """Give back the memory. The graph is not used afterwards."""
        ...
