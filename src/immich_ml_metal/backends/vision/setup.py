"""Makes the Vision engine from settings, and proves at start that Vision really reads."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.backends.vision.bridge import VisionBridge, load_frameworks
from immich_ml_metal.backends.vision.calibration import FACE_KNOTS, LINE_KNOTS, Calibration
from immich_ml_metal.backends.vision.engine import Bridge, VisionEngine
from immich_ml_metal.backends.vision.text import text_options, wanted_languages
from immich_ml_metal.errors import InferenceError
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import Bytes, ModelFiles, ModelKey

WORD = "Harbour"  # drawn and read back at start
_FONT_PX = 64


def create_vision(
    settings: Settings,
    *,
    files_of: Callable[[ModelKey], ModelFiles],
    on_fallback: Callable[[str], None],
    bridge: Bridge | None = None,
) -> VisionEngine:
    """Make the engine; what Vision cannot answer goes to the official model on the CPU."""
    official = OrtEngine(settings)

    def load_official(key: ModelKey) -> AnyModel:
        return official.load(key, files_of(key))

    return VisionEngine(
        bridge or VisionBridge(load_frameworks()),
        face_score=Calibration(FACE_KNOTS),
        line_score=Calibration(LINE_KNOTS),
        corrects=settings.ocr_language_correction,
        load_official=load_official,
        on_fallback=on_fallback,
    )


def draw_word(word: str = WORD) -> Bytes:
    """Draw a word in black on white: (H, W, 3) uint8 RGB."""
    font = ImageFont.load_default(_FONT_PX)
    image = Image.new("RGB", (len(word) * _FONT_PX, 3 * _FONT_PX), "white")
    ImageDraw.Draw(image).text((_FONT_PX, _FONT_PX), word, font=font, fill="black")
    return np.asarray(image)


def check_reading(bridge: Bridge) -> None:
    """Let Vision read the drawn word and look for faces in it.

    Raises:
        InferenceError: it failed, or read something else.
    """
    pixels = draw_word()
    languages = wanted_languages("EN__", bridge.text_languages())
    lines = bridge.read_text(pixels, text_options(languages, 0.0, corrects=False))
    read = " ".join(line.text for line in lines)
    if WORD.casefold() not in read.casefold():
        raise InferenceError(f"apple vision read {read!r} where {WORD!r} is drawn")
    bridge.find_faces(pixels)
