"""Pictures the project draws itself, so that demo, bench and self-tests need no photograph."""

import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PREVIEW_SIZE = (2160, 1440)  # of Immich's preview of a 3:2 photo: the shorter side is 1440
_LINES = (
    "Immich on a Mac",
    "Search, faces and text",
    "Kein Job geht verloren",
    "1 000 000 photos",
)
_Point = tuple[float, float]


def draw_preview(seed: int) -> bytes:
    """A JPEG like Immich's previews: 2160x1440, quality 80, a landscape, a face, lines of text."""
    rng = random.Random(seed)
    image = _landscape(PREVIEW_SIZE, rng)
    draw_face(image, (rng.uniform(1000, 1650), 560.0), rng.uniform(380, 520))
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(_LINES):
        font = ImageFont.load_default(rng.randint(44, 72))
        draw.text((120 + 40 * row, 1010 + 95 * row), line, font=font, fill=(16, 20, 28))
    return to_jpeg(image)


def to_jpeg(image: Image.Image) -> bytes:
    """Encode as Immich encodes previews: quality 80, no chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, subsampling=0)
    return buffer.getvalue()


def _landscape(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Sky, hills and a pale field, with grain so that it compresses like a photograph."""
    width, height = size
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    for y in range(height):
        share = y / height
        draw.line((0, y, width, y), fill=(int(120 + 100 * share), int(170 + 60 * share), 235))
    for level in range(3):
        phase, reach = rng.uniform(0, 6.3), rng.uniform(300, 700)
        top = [
            (x, height * (0.4 + 0.1 * level) + 70 * math.sin(x / reach + phase))
            for x in range(0, width + 40, 40)
        ]
        shade = 90 + 45 * level
        draw.polygon([(0, height), *top, (width, height)], fill=(shade, shade + 60, shade))
    draw.rectangle((0, height * 0.68, width, height), fill=(236, 232, 214))
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, 3, (height, width, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def draw_face(image: Image.Image, centre: _Point, height: float) -> None:
    """Draw a plain human face, `height` pixels from chin to hair line, onto `image`."""
    x, y = centre
    unit = height / 10
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)

    def oval(cx: float, cy: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        left, top = x + (cx - rx) * unit, y + (cy - ry) * unit
        draw.ellipse((left, top, left + 2 * rx * unit, top + 2 * ry * unit), fill=fill)

    skin, shade, dark = (226, 178, 148), (196, 142, 116), (52, 36, 30)
    oval(0, 7.5, 5.5, 3.2, (70, 90, 140))  # shoulders
    oval(0, 4.6, 1.7, 2.2, shade)  # neck
    oval(0, -1.2, 4.3, 4.9, dark)  # hair
    oval(0, 0.4, 3.6, 4.8, skin)
    oval(0, -3.9, 3.2, 1.2, dark)  # fringe
    for side in (-1, 1):
        oval(1.5 * side, -1.35, 0.95, 0.22, dark)  # brow
        oval(1.5 * side, -0.55, 0.85, 0.46, (246, 246, 244))
        oval(1.5 * side, -0.55, 0.42, 0.44, (84, 60, 44))
        oval(1.5 * side, -0.55, 0.2, 0.22, (10, 10, 10))
        oval(0.42 * side, 1.5, 0.3, 0.2, shade)  # nostril
        oval(2.2 * side, 1.6, 0.7, 0.5, (222, 160, 136))  # cheek
    oval(0, 0.6, 0.35, 1.1, (214, 162, 134))  # nose
    oval(0, 2.75, 1.35, 0.42, (170, 82, 80))  # mouth
    oval(0, 2.7, 1.15, 0.13, (110, 48, 50))
    smooth = layer.filter(ImageFilter.GaussianBlur(height / 160))
    image.paste(smooth, (0, 0), smooth)
