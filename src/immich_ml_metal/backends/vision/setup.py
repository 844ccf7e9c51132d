"""Makes the Vision engine from settings."""

from collections.abc import Callable

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.ort.engine import OrtEngine
from immich_ml_metal.backends.vision.bridge import VisionBridge, load_frameworks
from immich_ml_metal.backends.vision.calibration import FACE_KNOTS, LINE_KNOTS, Calibration
from immich_ml_metal.backends.vision.engine import Bridge, VisionEngine
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelFiles, ModelKey


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
