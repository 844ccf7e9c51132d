"""Which engines may answer what, on machines that are simulated; and the Vision settings."""

import subprocess
import sys
from typing import Any

import pytest
from doubles.vision import Double
from doubles.vision_scene import FaceTruth, LineTruth, Scene
from PIL import Image

from immich_ml_metal.backends.selection import REFERENCE, Platform, rule_for
from immich_ml_metal.backends.vision.bridge import VisionBridge
from immich_ml_metal.backends.vision.setup import create_vision
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.faces import FaceQuery
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.text_boxes import TextRegionQuery
from immich_ml_metal.types import SLOTS, ModelKey, Part, Task

M_SERIES = Platform("Darwin", "arm64")
INTEL_MAC = Platform("Darwin", "x86_64")
LINUX = Platform("Linux", "x86_64")


def first_choices(platform: Platform, **settings: Any) -> list[str]:
    """By part: search picture, search text, face boxes, face vectors, text boxes, text."""
    rules = [rule_for(slot, Settings(**settings), platform) for slot in SLOTS]
    return [rule.candidates[0].engine for rule in rules]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("balanced", ["mlx", "mlx", "mlx", "mlx", "vision", "mlx"]),
        ("native", ["mlx", "mlx", "vision", "coreml", "vision", "mlx"]),
        ("exact", ["mlx"] * 6),
    ],
)
def test_a_profile_names_the_first_choice_of_each_part(profile: str, expected: list[str]) -> None:
    assert first_choices(M_SERIES, profile=profile) == expected


def test_balanced_is_the_default() -> None:
    assert Settings().profile == "balanced"


@pytest.mark.parametrize("platform", [INTEL_MAC, LINUX])
@pytest.mark.parametrize("profile", ["balanced", "native", "exact"])
def test_elsewhere_the_portable_engine_is_the_only_one(platform: Platform, profile: Any) -> None:
    rules = [rule_for(slot, Settings(profile=profile), platform) for slot in SLOTS]
    assert {rule.candidates for rule in rules} == {(REFERENCE,)}
    assert not any(rule.needs_verdicts for rule in rules)


def test_the_cpu_stands_behind_every_automatic_choice() -> None:
    for slot in SLOTS:
        assert rule_for(slot, Settings(), M_SERIES).candidates[-1] == REFERENCE


def test_without_core_ml_by_setting_it_is_no_candidate() -> None:
    settings = Settings(profile="native", use_coreml=False)
    rule = rule_for((Task.FACES, Part.RECOGNITION), settings, M_SERIES)
    assert {one.engine for one in rule.candidates} == {"mlx", "cpu"}


def test_an_explicit_engine_wins_over_the_profile_and_has_nobody_behind_it() -> None:
    rule = rule_for((Task.CLIP, Part.VISUAL), Settings(clip_engine="cpu"), M_SERIES)
    assert rule.candidates == (REFERENCE,)
    assert rule.is_explicit


def test_mlx_may_be_asked_for_on_linux_in_the_one_format_that_a_cpu_is_fast_with() -> None:
    rule = rule_for((Task.CLIP, Part.VISUAL), Settings(clip_engine="mlx"), LINUX)
    assert [str(one) for one in rule.candidates] == ["mlx float32"]


# -- Apple Vision's settings -----------------------------------------------------------------------


def vision_engine(double: Double | None = None, /, **settings: Any) -> Any:
    def no_files(key: ModelKey) -> Any:
        raise AssertionError(f"{key} was fetched")

    return create_vision(
        Settings(**settings),
        files_of=no_files,
        on_fallback=lambda reason: None,
        bridge=VisionBridge((double or Double(Scene())).frameworks),
    )


VISION: Any = vision_engine()


def ask_vision(double: Double, task: Task, item: Any, **settings: Any) -> Any:
    name = {Task.FACES: "buffalo_l", Task.OCR: "EN__PP-OCRv5_mobile"}[task]
    model = vision_engine(double, **settings).load(ModelKey(task, Part.DETECTION, name), None)
    return model.postprocess(model.infer([model.preprocess(item)])[0], item)


BLANK = Picture(Image.new("RGB", (400, 300)))


def test_visions_grade_of_a_face_becomes_an_official_score() -> None:
    scene = Scene(faces=[FaceTruth((200, 150), 100, confidence=0.5)])
    found = ask_vision(Double(scene), Task.FACES, FaceQuery(BLANK, 0.0))
    assert found.scores == pytest.approx([0.5 / 0.6 * 0.7])


def test_visions_grade_of_a_line_becomes_an_official_score() -> None:
    corners = [(64, 64), (300, 64), (300, 128), (64, 128)]
    scene, item = Scene(lines=[LineTruth(corners, "x", 0.5)]), TextRegionQuery(BLANK, 0.5, 736)
    found = ask_vision(Double(scene), Task.OCR, item)
    assert [reading.score for reading in found.readings] == pytest.approx([0.85])


@pytest.mark.parametrize("corrects", [True, False])
def test_the_language_correction_setting_reaches_vision(corrects: bool) -> None:
    double = Double(Scene())
    ask_vision(double, Task.OCR, TextRegionQuery(BLANK, 0.5, 736), ocr_language_correction=corrects)
    assert double.arguments_of("setUsesLanguageCorrection_") == (corrects,)


def test_the_selection_imports_no_engine_it_does_not_use() -> None:
    script = (
        "import sys, immich_ml_metal.backends.selection\n"
        "heavy = {'onnxruntime', 'mlx', 'torch', 'Vision', 'cv2'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
