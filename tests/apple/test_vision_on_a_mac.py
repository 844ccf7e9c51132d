"""Apple Vision for real: what the double can only assume."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from immich_ml_metal.backends.ort.session import OrtGraph, session_options
from immich_ml_metal.backends.vision.bridge import VisionBridge, load_frameworks
from immich_ml_metal.backends.vision.setup import create_vision
from immich_ml_metal.backends.vision.text import LANGUAGES, text_options, wanted_languages
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.qualification.samples import draw_lines
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.faces import FaceDetector, FaceQuery
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.text_boxes import TextRegionQuery
from immich_ml_metal.types import (
    Bytes,
    Faces,
    Floats,
    ModelFiles,
    ModelKey,
    Part,
    Task,
    TextRegions,
)

pytestmark = pytest.mark.apple

WORD = "Harbour"
TURNS = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180}  # clockwise as seen


def bridge() -> VisionBridge:
    return VisionBridge(load_frameworks())


def draw_word() -> Bytes:
    return draw_lines((WORD,))[0].pixels


def no_files(key: ModelKey) -> ModelFiles:
    raise ModelUnavailable(f"{key} is not wanted here: Vision should place every landmark")


def find_faces(picture: Picture) -> Faces:
    engine = create_vision(Settings(), files_of=no_files, on_fallback=lambda reason: None)
    model = engine.load(ModelKey(Task.FACES, Part.DETECTION, "buffalo_l"), None)
    item = FaceQuery(picture, 0.5)
    faces: Faces = model.postprocess(model.infer([model.preprocess(item)])[0], item)
    return faces


def read_text(picture: Picture) -> TextRegions:
    engine = create_vision(Settings(), files_of=no_files, on_fallback=lambda reason: None)
    model = engine.load(ModelKey(Task.OCR, Part.DETECTION, "EN__PP-OCRv5_mobile"), None)
    item = TextRegionQuery(picture, 0.5, 736)
    regions: TextRegions = model.postprocess(model.infer([model.preprocess(item)])[0], item)
    return regions


def assert_same_points(faces: Faces, expected: Floats, *, share: float) -> None:
    """The nearest face has these (5, 2) points, up to `share` of the distance of the eyes."""
    eyes_px = np.hypot(*(expected[1] - expected[0]))
    off_px = [np.abs(landmarks - expected).max() for landmarks in faces.landmarks]
    assert min(off_px) < share * eyes_px


def test_vision_reads_the_same_from_several_threads_and_again_and_again() -> None:
    """Some releases of macOS fail every later request of a process, or in parallel only."""
    seen, options = bridge(), text_options(("en-US",), 0.0, corrects=False)

    def read(_: int) -> str:
        return " ".join(line.text for line in seen.read_text(draw_word(), options))

    with ThreadPoolExecutor(4) as threads:
        together = set(threads.map(read, range(16)))
    one_by_one = {read(turn) for turn in range(10)}
    assert together == one_by_one
    assert WORD.casefold() in together.pop().casefold()


def test_corners_are_where_the_word_is_drawn() -> None:
    word = draw_word()
    ink_y, ink_x = np.nonzero(word[:, :, 0] < 128)
    canvas = np.full((900, 1400, 3), 255, np.uint8)
    left, top = 120, 80  # off-centre: a wrong origin or axis lands elsewhere
    canvas[top : top + word.shape[0], left : left + word.shape[1]] = word
    found = read_text(Picture(Image.fromarray(canvas)))
    assert found.readings
    assert WORD in found.readings[0].text
    expected = [left + ink_x.min(), top + ink_y.min(), left + ink_x.max(), top + ink_y.max()]
    quad = found.quads[0]
    assert [*quad.min(axis=0), *quad.max(axis=0)] == pytest.approx(expected, abs=20)


def test_the_languages_are_spelled_as_this_macos_spells_them() -> None:
    supported = bridge().text_languages()
    readable = {prefix for prefix in LANGUAGES if wanted_languages(f"{prefix}__x", supported)}
    assert {"CH", "EN", "ESLAV", "KOREAN", "LATIN", "TH"} <= readable, supported


def test_vision_s_confidences_are_on_the_grades_that_the_calibration_knows() -> None:
    lines = bridge().read_text(draw_word(), text_options(("en-US",), 0.0, corrects=False))
    assert {round(line.confidence, 3) for line in lines} <= {0.3, 0.5, 1.0}


def test_the_five_points_agree_with_scrfd(portrait: Picture, detector_file: Path) -> None:
    graph = OrtGraph(detector_file, options=session_options(2))
    scrfd = FaceDetector(graph, name="scrfd")
    item = FaceQuery(portrait, 0.5)
    expected = scrfd.postprocess(scrfd.infer([scrfd.preprocess(item)])[0], item)
    assert_same_points(find_faces(portrait), expected.landmarks[0], share=0.2)


@pytest.mark.parametrize("turned", TURNS)
def test_the_points_turn_with_the_picture(portrait: Picture, turned: int) -> None:
    upright = find_faces(portrait)
    found = find_faces(Picture(portrait.image.transpose(TURNS[turned])))
    if len(found) == 0:
        pytest.skip(f"this macOS finds no face turned by {turned} degrees")
    width, height = portrait.size
    x, y = upright.landmarks[0].T
    expected = np.stack({90: (height - y, x), 180: (width - x, height - y)}[turned], axis=1)
    assert_same_points(found, expected, share=0.15)


def test_a_hundred_calls_leave_no_memory_behind() -> None:
    vision, pixels = bridge(), draw_word()
    for _ in range(20):
        vision.find_faces(pixels)
    before = psutil.Process().memory_info().rss
    for _ in range(100):
        vision.find_faces(pixels)
    grown_mib = (psutil.Process().memory_info().rss - before) / 2**20
    assert grown_mib < 20, "the 100 pictures are 26 MiB of pixels, were they kept"
