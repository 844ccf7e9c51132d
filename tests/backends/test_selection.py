"""Which engine answers what, on machines that are simulated and on this one."""

import dataclasses
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from doubles.vision import Double
from doubles.vision_scene import FaceTruth, LineTruth, Scene
from immich_ml_metal.backends.self_tests import SystemProbe, check_product
from PIL import Image

from immich_ml_metal.backends.selection import (
    EnginePlan,
    Platform,
    choose_engines,
    create_engines,
)
from immich_ml_metal.backends.vision.bridge import VisionBridge
from immich_ml_metal.backends.vision.setup import (
    WORD,
    check_reading,
    create_vision,
    draw_word,
)
from immich_ml_metal.errors import ConfigError, InferenceError
from immich_ml_metal.settings import Settings
from immich_ml_metal.tasks.faces import FaceQuery
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.text_boxes import TextQuery
from immich_ml_metal.types import ModelKey, Part, Task

M_SERIES = Platform("Darwin", "arm64")
INTEL_MAC = Platform("Darwin", "x86_64")
LINUX = Platform("Linux", "x86_64")


class Machine:
    """A machine where the engines in `problems` fail with that reason."""

    def __init__(self, platform: Platform, **problems: str) -> None:
        self.platform = platform
        self.problems = problems
        self.asked: list[str] = []

    def check(self, engine: str) -> str | None:
        self.asked.append(engine)
        return self.problems.get(engine)


def engines(machine: Machine, **settings: Any) -> list[str]:
    """Engine by part: search picture, search text, face boxes, face vectors, text boxes, text."""
    plan = choose_engines(Settings(**settings), machine)
    return [choice.engine for choice in plan.choices]


def test_apple_silicon_uses_each_engine_for_what_it_does_best() -> None:
    assert engines(Machine(M_SERIES)) == ["mlx", "mlx", "vision", "coreml", "vision", "vision"]


def test_profile_exact_runs_the_official_models_on_the_gpu() -> None:
    assert engines(Machine(M_SERIES), profile="exact") == ["mlx"] * 6


@pytest.mark.parametrize("platform", [INTEL_MAC, LINUX])
@pytest.mark.parametrize("profile", ["native", "exact"])
def test_elsewhere_everything_is_on_the_portable_engine(platform: Platform, profile: str) -> None:
    machine = Machine(platform)
    assert engines(machine, profile=profile) == ["cpu"] * 6
    assert machine.asked == ["cpu"]  # what will not be used is not even imported


def test_without_core_ml_by_setting_faces_are_told_apart_on_the_gpu_without_a_warning() -> None:
    plan = choose_engines(Settings(use_coreml=False), Machine(M_SERIES))
    assert plan.engine_of(Task.FACES, Part.RECOGNITION) == "mlx"
    assert plan.warnings == ()


def test_auto_falls_to_the_next_engine_with_a_warning_that_stays() -> None:
    plan = choose_engines(Settings(), Machine(M_SERIES, vision="no user session"))
    assert plan.engine_of(Task.FACES, Part.DETECTION) == "mlx"
    assert plan.engine_of(Task.OCR, Part.RECOGNITION) == "mlx"
    warning = "vision is not used for facial-recognition: no user session"
    assert warning in plan.as_dict()["warnings"]
    assert f"warning: {warning}" in plan.as_table()


def test_auto_falls_as_far_as_it_must() -> None:
    machine = Machine(M_SERIES, vision="broken", mlx="no GPU", coreml="absent")
    assert engines(machine) == ["cpu"] * 6


def test_an_explicit_engine_wins_over_the_profile() -> None:
    chosen = engines(Machine(M_SERIES), profile="exact", ocr_engine="vision", clip_engine="cpu")
    assert chosen == ["cpu", "cpu", "mlx", "mlx", "vision", "vision"]


def test_mlx_may_be_asked_for_on_linux() -> None:
    assert engines(Machine(LINUX), clip_engine="mlx")[:3] == ["mlx", "mlx", "cpu"]


@pytest.mark.parametrize(
    ("setting", "engine", "name"),
    [
        ("clip_engine", "open_clip", "ML_CLIP_ENGINE"),
        ("face_detection_engine", "vision", "ML_FACE_DETECTION_ENGINE"),
        ("face_recognition_engine", "coreml", "ML_FACE_RECOGNITION_ENGINE"),
        ("ocr_engine", "mlx", "ML_OCR_ENGINE"),
    ],
)
def test_an_explicit_engine_that_is_unavailable_stops_the_start_with_the_reason(
    setting: str, engine: str, name: str
) -> None:
    machine = Machine(LINUX, **{engine: "not on this machine"})
    with pytest.raises(ConfigError, match=f"{name} = {engine} cannot be .*: not on this machine"):
        engines(machine, **{setting: engine})


def test_a_machine_where_nothing_works_does_not_start() -> None:
    with pytest.raises(ConfigError, match="no engine can serve clip visual: broken wheel"):
        engines(Machine(LINUX, cpu="broken wheel"))


def test_each_engine_is_tested_once() -> None:
    machine = Machine(M_SERIES)
    engines(machine)
    assert sorted(machine.asked) == ["coreml", "mlx", "vision"]


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (
            Machine(M_SERIES),
            """\
engines on Apple Silicon
task                part         engine  why
clip                visual       mlx     profile native
clip                textual      mlx     profile native
facial-recognition  detection    vision  profile native
facial-recognition  recognition  coreml  profile native
ocr                 detection    vision  profile native
ocr                 recognition  vision  profile native""",
        ),
        (
            Machine(M_SERIES, coreml="its self-test failed: no provider"),
            """\
engines on Apple Silicon
task                part         engine  why
clip                visual       mlx     profile native
clip                textual      mlx     profile native
facial-recognition  detection    vision  profile native
facial-recognition  recognition  mlx     profile native, coreml unavailable
ocr                 detection    vision  profile native
ocr                 recognition  vision  profile native
warning: coreml is not used for facial-recognition: its self-test failed: no provider""",
        ),
        (
            Machine(INTEL_MAC),
            """\
engines on Mac (x86_64)
task                part         engine  why
clip                visual       cpu     portable default
clip                textual      cpu     portable default
facial-recognition  detection    cpu     portable default
facial-recognition  recognition  cpu     portable default
ocr                 detection    cpu     portable default
ocr                 recognition  cpu     portable default""",
        ),
        (
            Machine(LINUX),
            """\
engines on Linux (x86_64)
task                part         engine  why
clip                visual       cpu     portable default
clip                textual      cpu     portable default
facial-recognition  detection    cpu     portable default
facial-recognition  recognition  cpu     portable default
ocr                 detection    cpu     portable default
ocr                 recognition  cpu     portable default""",
        ),
    ],
    ids=["M-series", "M-series without Core ML", "Intel Mac", "Linux"],
)
def test_the_start_up_table_says_what_runs_where_and_why(machine: Machine, expected: str) -> None:
    assert choose_engines(Settings(), machine).as_table() == expected


def test_the_plan_cannot_be_changed() -> None:
    plan = choose_engines(Settings(), Machine(LINUX))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.choices[0].engine = "mlx"  # type: ignore[misc]


# -- engines from a plan ---------------------------------------------------------------------------


def portable_plan() -> EnginePlan:
    return choose_engines(Settings(), Machine(LINUX))


def test_a_plan_becomes_one_engine_per_name_and_a_table_of_parts() -> None:
    plan = portable_plan()
    made = create_engines(plan, Settings())
    table = plan.bind(made)
    assert list(made) == ["cpu"]
    assert len(table) == 6
    assert set(table.values()) == {made["cpu"]}


def test_text_recognition_has_no_engine_where_vision_reads_while_detecting() -> None:
    plan = choose_engines(Settings(ocr_engine="vision"), Machine(LINUX))
    table = plan.bind({"cpu": create_engines(portable_plan(), Settings())["cpu"], "vision": VISION})
    assert (Task.OCR, Part.RECOGNITION) not in table
    assert table[Task.OCR, Part.DETECTION] is VISION


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


def test_the_face_scores_setting_is_used() -> None:
    scene = Scene(faces=[FaceTruth((200, 150), 100, confidence=0.5)])
    item = FaceQuery(BLANK, 0.0)
    plain = ask_vision(Double(scene), Task.FACES, item)
    lenient = ask_vision(Double(scene), Task.FACES, item, vision_face_scores="0:0, 0.5:0.9, 1:1")
    assert plain.scores == pytest.approx([0.5 / 0.6 * 0.7])
    assert lenient.scores == pytest.approx([0.9])


def test_the_text_scores_setting_is_used() -> None:
    corners = [(64, 64), (300, 64), (300, 128), (64, 128)]
    scene, item = Scene(lines=[LineTruth(corners, "x", 0.5)]), TextQuery(BLANK, 0.5, 736)
    found = ask_vision(Double(scene), Task.OCR, item, vision_text_scores="0:0, 0.5:0.2, 1:1")
    assert [reading.score for reading in found.readings] == pytest.approx([0.2])


@pytest.mark.parametrize("corrects", [True, False])
def test_the_language_correction_setting_reaches_vision(corrects: bool) -> None:
    double = Double(Scene())
    ask_vision(double, Task.OCR, TextQuery(BLANK, 0.5, 736), ocr_language_correction=corrects)
    assert double.arguments_of("setUsesLanguageCorrection_") == (corrects,)


@pytest.mark.parametrize("name", ["ML_VISION_FACE_SCORES", "ML_VISION_TEXT_SCORES"])
@pytest.mark.parametrize("text", ["0:0,1", "0:0, 0.5:0.9, 1:0.8", "a:b, c:d", "0:0, 0.5:0.5"])
def test_a_malformed_calibration_stops_the_start_with_its_name(name: str, text: str) -> None:
    setting = name.removeprefix("ML_").lower()
    with pytest.raises(ConfigError, match=name):
        vision_engine(**{setting: text})


# -- self-tests ------------------------------------------------------------------------------------


def test_the_portable_engine_passes_its_self_test_here() -> None:
    assert SystemProbe().check("cpu") is None


def test_mlx_multiplies_correctly_here() -> None:
    pytest.importorskip("immich_ml_metal.backends.mlx", reason="the mlx engine is not here")
    assert SystemProbe().check("mlx") is None


def test_apples_engines_say_why_they_are_not_here() -> None:
    if SystemProbe().platform.system == "Darwin":
        pytest.skip("this is a Mac: tests/apple runs the real self-tests")
    assert SystemProbe().check("vision") == "Vision cannot be imported"
    assert "no Core ML provider" in (SystemProbe().check("coreml") or "")


def test_an_engine_that_dies_in_its_self_test_is_unavailable_with_its_words() -> None:
    def die() -> None:
        assert threading.current_thread() is not threading.main_thread()
        raise RuntimeError("Metal is on fire")

    probe = SystemProbe({"mlx": die})
    assert probe.check("mlx") == "its self-test failed: Metal is on fire"


def test_a_gpu_that_multiplies_wrongly_is_found() -> None:
    check_product(np.matmul)
    with pytest.raises(InferenceError, match="a product of matrices is off by"):
        check_product(lambda a, b: a @ b * 1.01)
    with pytest.raises(InferenceError, match="off by nan"):
        check_product(lambda a, b: a @ b * np.nan)


def bridge_that_reads(*words: str) -> VisionBridge:
    corners = [(64, 64), (300, 64), (300, 128), (64, 128)]
    lines = [LineTruth(corners, word) for word in words]
    return VisionBridge(Double(Scene(lines=lines)).frameworks)


def test_vision_must_read_the_word_that_is_drawn() -> None:
    check_reading(bridge_that_reads("the HARBOUR"))
    with pytest.raises(InferenceError, match="read 'Arbor' where 'Harbour' is drawn"):
        check_reading(bridge_that_reads("Arbor"))
    with pytest.raises(InferenceError, match="read '' where"):
        check_reading(bridge_that_reads())


def test_the_drawn_word_is_large_black_text_inside_the_picture() -> None:
    pixels = draw_word()
    ink_y, ink_x = np.nonzero(pixels[:, :, 0] < 128)
    height, width, _ = pixels.shape
    assert pixels.dtype == np.uint8
    assert np.ptp(ink_y) > 40
    assert 0 < ink_x.min() < ink_x.max() < width - 1
    assert 0 < ink_y.min() < ink_y.max() < height - 1
    assert np.ptp(ink_x) > 20 * len(WORD)


def test_the_selection_imports_no_engine_it_does_not_use() -> None:
    script = (
        "import sys, immich_ml_metal.backends.selection\n"
        "heavy = {'onnxruntime', 'mlx', 'torch', 'Vision', 'cv2'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
