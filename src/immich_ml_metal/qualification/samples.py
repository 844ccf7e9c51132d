"""What engines are asked while they are measured: pictures, texts, faces and lines that we draw.

Not noise alone: noise meets none of the large activations in which half precision fails. And no
photograph: none may be shipped, and none of the user's is touched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from immich_ml_metal.drawing import draw_face, draw_preview
from immich_ml_metal.tasks import clip, faces, text_boxes, text_lines
from immich_ml_metal.tasks.images import ImageLimits, Picture, decode
from immich_ml_metal.types import TEXT_MAX_RESOLUTION, TEXT_MIN_SCORE, Part, Slot, Task

WORDS = ("Harbour", "Invoice 2026", "Kaffee und Kuchen", "No. 4711-08/15", "Platform 9", "sunrise")
TEXTS = (
    "a photo of a dog",
    "two children on a beach at sunset, one of them with a red bucket",
    "receipt",
    "Zwei Fahrräder vor einem alten Haus",
    "un chat noir qui dort sur le canapé",
    "桜の下の写真",
    "my passport lying on the kitchen table next to a cup of coffee and the keys of the car",
    "2019",
)
_FACE_MIN_SCORE = 0.3  # drawn faces are not what a detector was trained on
_LINE_PX = 56
_LIMITS = ImageLimits(10**8, 10**5)


@dataclass(frozen=True, slots=True)
class Samples:
    """What a model is asked, one after the other. Any: the items are the model's own."""

    items: tuple[Any, ...]
    note: str = ""  # what these samples cannot show


def draw_samples(slot: Slot, count: int) -> Samples:
    """`count` items for one part of a task; the same ones in every process."""
    return _MAKERS[slot](count)


def _pictures(count: int) -> list[Picture]:
    """Landscapes with a face and lines of text; the last two are a page of text and plain noise."""
    drawn = [decode(draw_preview(seed), _LIMITS) for seed in range(max(1, count - 2))]
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    others = [draw_lines(WORDS)[0], Picture(Image.fromarray(noise))]
    return [*drawn, *others][:count]


def _visual(count: int) -> Samples:
    return Samples(tuple(_pictures(count)))


def _textual(count: int) -> Samples:
    return Samples(tuple(clip.SearchQuery(text, "en") for text in TEXTS[:count]))


def _face_finding(count: int) -> Samples:
    found = tuple(faces.FaceQuery(picture, _FACE_MIN_SCORE) for picture in _pictures(count))
    return Samples(found, "on drawn faces only: no photograph of people is at hand")


def _face_telling(count: int) -> Samples:
    crops = []
    for row in range(count):
        image = Image.new("RGB", (480, 480), (90 + 20 * (row % 8), 130, 160 - 15 * (row % 8)))
        centre, unit = (240.0 + 4 * row, 240.0), 16.0 + 2 * (row % 8)
        draw_face(image, centre, 10 * unit)
        # where `draw_face` puts the eyes, the nose and the corners of the mouth, in its units
        points = np.array([(-1.5, -0.55), (1.5, -0.55), (0, 1.4), (-1.3, 2.75), (1.3, 2.75)])
        landmarks = (points * unit + np.array(centre)).astype(np.float32)
        crops.append(faces.FaceCrop(Picture(image), landmarks))
    return Samples(tuple(crops), "on drawn faces only: no photograph of people is at hand")


def _text_finding(count: int) -> Samples:
    pages = [draw_lines(WORDS[row:] + WORDS[:row])[0] for row in range(count)]
    return Samples(
        tuple(
            text_boxes.TextRegionQuery(page, TEXT_MIN_SCORE, TEXT_MAX_RESOLUTION) for page in pages
        )
    )


def _text_reading(count: int) -> Samples:
    page, quads = draw_lines(WORDS)
    return Samples(
        tuple(text_lines.LineCrop(page, quads[row % len(quads)]) for row in range(count))
    )


def draw_lines(lines: tuple[str, ...]) -> tuple[Picture, list[np.ndarray]]:
    """Lines of black text on white, and where each is: (4, 2) xy, pixels, from the top-left."""
    font = ImageFont.load_default(_LINE_PX)
    image = Image.new("RGB", (960, 2 * _LINE_PX * (len(lines) + 1)), "white")
    draw = ImageDraw.Draw(image)
    quads = []
    for row, line in enumerate(lines):
        at = (_LINE_PX, 2 * _LINE_PX * row + _LINE_PX)
        draw.text(at, line, font=font, fill="black")
        left, top, right, bottom = draw.textbbox(at, line, font=font)
        corners = [(left - 4, top - 4), (right + 4, top - 4)]
        corners += [(right + 4, bottom + 4), (left - 4, bottom + 4)]
        quads.append(np.array(corners, np.float32))
    return Picture(image), quads


_MAKERS: Mapping[Slot, Callable[[int], Samples]] = {
    (Task.CLIP, Part.VISUAL): _visual,
    (Task.CLIP, Part.TEXTUAL): _textual,
    (Task.FACES, Part.DETECTION): _face_finding,
    (Task.FACES, Part.RECOGNITION): _face_telling,
    (Task.OCR, Part.DETECTION): _text_finding,
    (Task.OCR, Part.RECOGNITION): _text_reading,
}
