"""Apple Vision judged: it must read what is drawn, and the same every time."""

from pathlib import Path
from typing import Any

import pytest
from doubles.vision import Double
from doubles.vision_scene import LineTruth, Scene

from immich_ml_metal.backends.makers import Surroundings
from immich_ml_metal.backends.selection import VISION
from immich_ml_metal.backends.vision.bridge import VisionBridge
from immich_ml_metal.backends.vision.setup import create_vision
from immich_ml_metal.qualification.order import CHECK, Order
from immich_ml_metal.qualification.probe import probe
from immich_ml_metal.qualification.samples import WORDS
from immich_ml_metal.qualification.verdict import Outcome, Verdict
from immich_ml_metal.settings import Settings
from immich_ml_metal.types import ModelKey, Part, Task

pytestmark = pytest.mark.anyio

FINDER = ModelKey(Task.OCR, Part.DETECTION, "EN__PP-OCRv5_mobile")
CORNERS = [(4.0, 4.0), (60.0, 4.0), (60.0, 16.0), (4.0, 16.0)]


async def judged(models: Path, *texts: str) -> Verdict:
    """The verdict on a Vision that reads these texts, one each time it is asked."""
    double = Double(Scene(lines=[LineTruth(CORNERS, texts[0])]))
    left = list(texts[1:])

    class Fickle(VisionBridge):
        def read_text(self, *args: Any, **kwargs: Any) -> Any:
            found = super().read_text(*args, **kwargs)
            if left:
                double.scene = Scene(lines=[LineTruth(CORNERS, left.pop(0))])
            return found

    def make(given: Surroundings) -> Any:
        bridge = Fickle(double.frameworks)
        return create_vision(
            given.settings, files_of=given.files_of, on_fallback=print, bridge=bridge
        )

    settings = Settings(models_dir=models, offline=True).model_dump_json()
    order = Order(settings, FINDER, VISION, CHECK, 60)
    return await probe(order, {"vision": make}, lambda step: None)


async def test_the_same_words_every_time_are_right(tmp_path: Path) -> None:
    drawn = " ".join(WORDS)
    verdict = await judged(tmp_path, drawn, drawn.upper())
    assert verdict.outcome is Outcome.RIGHT


async def test_right_words_with_other_ones_beside_them_now_and_then_are_wrong(
    tmp_path: Path,
) -> None:
    drawn = " ".join(WORDS)
    verdict = await judged(tmp_path, drawn, f"{drawn} too", drawn)
    assert verdict.outcome is Outcome.WRONG
    assert f"{drawn} too" in verdict.reason


async def test_words_that_are_not_drawn_are_wrong(tmp_path: Path) -> None:
    verdict = await judged(tmp_path, "other")
    assert (verdict.outcome, "5 of 5 times" in verdict.reason) == (Outcome.WRONG, True)
