"""The Vision engine, driven through a strict double of the framework (`vision_double`)."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from doubles.vision import Double
from doubles.vision_scene import FaceTruth, LineTruth, Scene
from PIL import Image

from immich_ml_metal.backends.base import AnyModel
from immich_ml_metal.backends.vision.bridge import VisionBridge
from immich_ml_metal.backends.vision.calibration import FACE_KNOTS, LINE_KNOTS, Calibration
from immich_ml_metal.backends.vision.engine import NO_LANDMARKS, NO_LANGUAGE, VisionEngine
from immich_ml_metal.backends.vision.standby import OfficialText, no_official
from immich_ml_metal.errors import InferenceError, LoadFailed, ModelUnavailable
from immich_ml_metal.tasks.faces import FaceQuery
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.text_boxes import TextRegionQuery
from immich_ml_metal.types import Faces, ModelKey, Part, Reading, Task, TextRegions

SIZE = (800, 600)
FACES_KEY = ModelKey(Task.FACES, Part.DETECTION, "buffalo_l")
TEXT_KEY = ModelKey(Task.OCR, Part.DETECTION, "EN__PP-OCRv5_mobile")


def picture(size: tuple[int, int] = SIZE) -> Picture:
    """A picture whose pixels all differ by place, so that a swapped axis or channel shows."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x % 251, y % 253, (x + 2 * y) % 255], axis=2).astype(np.uint8)
    return Picture(Image.fromarray(pixels))


class Official:
    """Stands for SCRFD: always finds the same one face."""

    max_batch = 1
    size_bytes = 17

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_closed = False

    def preprocess(self, item: FaceQuery) -> FaceQuery:
        return item

    def infer(self, batch: Sequence[FaceQuery]) -> list[str]:
        self.asked.append(threading.current_thread().name)
        return ["raw"] * len(batch)

    def postprocess(self, raw: str, item: FaceQuery) -> Faces:
        assert raw == "raw"
        one = np.ones((1, 5, 2), np.float32)
        return Faces(one[:, :2].reshape(1, 4), np.array([0.77], np.float32), one)

    def close(self) -> None:
        self.is_closed = True


def engine(double: Double, load: Any = no_official, told: list[str] | None = None) -> VisionEngine:
    return VisionEngine(
        VisionBridge(double.frameworks),
        face_score=Calibration(FACE_KNOTS),
        line_score=Calibration(LINE_KNOTS),
        corrects=True,
        load_official=load,
        on_fallback=(told if told is not None else []).append,
    )


def run(model: AnyModel, item: Any) -> Any:
    """Take an item through the three verbs."""
    [raw] = model.infer([model.preprocess(item)])
    return model.postprocess(raw, item)


def find(double: Double, *, min_score: float = 0.7, load: Any = no_official) -> Faces:
    faces = run(engine(double, load).load(FACES_KEY, None), FaceQuery(picture(), min_score))
    assert isinstance(faces, Faces)
    return faces


def read(double: Double, item: TextRegionQuery, key: ModelKey = TEXT_KEY) -> TextRegions:
    regions = run(engine(double).load(key, None), item)
    assert isinstance(regions, TextRegions)
    return regions


# -- faces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [0, 30, -30, 90, 180, 270])
@pytest.mark.parametrize("swaps", [False, True], ids=["viewer's left", "face's left"])
@pytest.mark.parametrize(
    "missing", [(), ("leftPupil", "rightPupil")], ids=["pupils", "eye outlines"]
)
def test_five_points_land_within_two_pixels_however_the_face_is_turned(
    turned: float, swaps: bool, missing: tuple[str, ...]
) -> None:
    face = FaceTruth((560, 180), 150, turned_deg=turned, missing=missing)  # off-centre
    found = find(Double(Scene(faces=[face], swaps_sides=swaps)))
    assert np.abs(found.landmarks[0] - face.five_points).max() < 2


@pytest.mark.parametrize("centre", [(20, 300), (790, 300), (400, 15), (400, 590), (0, 0)])
def test_a_face_cut_by_the_edge_keeps_its_points_and_its_box(centre: tuple[int, int]) -> None:
    face = FaceTruth(centre, 200, turned_deg=12)
    found = find(Double(Scene(faces=[face])))
    assert np.abs(found.landmarks[0] - face.five_points).max() < 2
    assert found.boxes[0].tolist() == np.rint(face.box).tolist()  # not clipped, as Immich


def test_several_faces_keep_their_own_landmarks_and_come_best_first() -> None:
    faces = [
        FaceTruth((150, 150), 120, confidence=0.7),
        FaceTruth((600, 200), 90, turned_deg=180, confidence=0.95),
        FaceTruth((300, 450), 60, turned_deg=-30, confidence=0.8),
    ]
    found = find(Double(Scene(faces=faces)))
    best_first = [faces[1], faces[2], faces[0]]
    assert found.scores == pytest.approx([0.9625, 0.85, 0.775])
    for landmarks, face in zip(found.landmarks, best_first, strict=True):
        assert np.abs(landmarks - face.five_points).max() < 2


def test_without_a_nose_ridge_the_outline_gives_the_tip() -> None:
    face = FaceTruth((400, 300), 200, turned_deg=90, missing=("noseCrest",))
    found = find(Double(Scene(faces=[face])))
    assert np.abs(found.landmarks[0] - face.five_points).max() < 0.03 * face.height


def test_the_minimum_score_is_on_immichs_scale() -> None:
    faces = [FaceTruth((200, 300), 99, confidence=c) for c in (0.55, 0.61, 0.93)]
    assert len(find(Double(Scene(faces=faces)), min_score=0.7)) == 2
    assert len(find(Double(Scene(faces=faces)), min_score=0.9)) == 1
    assert len(find(Double(Scene(faces=faces)), min_score=0.3)) == 3


def test_a_face_just_at_the_minimum_score_is_kept() -> None:
    faces = [FaceTruth((200, 300), 99, confidence=0.61)]
    score = Calibration(FACE_KNOTS)(0.61)
    assert len(find(Double(Scene(faces=faces)), min_score=score)) == 1
    assert len(find(Double(Scene(faces=faces)), min_score=np.nextafter(score, 1))) == 0


def test_no_face_is_an_empty_answer_without_a_second_request() -> None:
    double = Double(Scene())
    found = find(double)
    assert (found.boxes.shape, found.landmarks.shape) == ((0, 4), (0, 5, 2))
    assert "setInputFaceObservations_" not in [call.name for call in double.calls]


def test_vision_sees_the_decoded_pixels_and_nothing_else() -> None:
    double = Double(Scene(faces=[FaceTruth((400, 300), 100)]))
    find(double)
    (image, _) = double.arguments_of("initWithCGImage_options_")
    assert (image.pixels == picture().pixels).all()


@pytest.mark.parametrize(
    "flaw",
    [
        {"has_landmarks": False},
        {"is_forgotten": True},
        {"missing": ("outerLips",)},
        {"missing": ("noseCrest", "nose")},
        {"missing": ("leftEye", "leftPupil")},
    ],
)
def test_a_picture_with_a_face_without_landmarks_is_answered_by_the_official_detector(
    flaw: dict[str, Any],
) -> None:
    faces = [FaceTruth((200, 300), 99), FaceTruth((600, 300), 99, **flaw)]
    official, told = Official(), list[str]()
    model = engine(Double(Scene(faces=faces)), lambda key: official, told).load(FACES_KEY, None)
    found = run(model, FaceQuery(picture(), 0.7))
    assert found.scores.tolist() == pytest.approx([0.77])
    assert told == [NO_LANDMARKS]
    assert model.size_bytes == 17
    model.close()
    assert official.is_closed


def test_without_the_official_detector_a_face_without_landmarks_is_an_error() -> None:
    double = Double(Scene(faces=[FaceTruth((200, 300), 99, has_landmarks=False)]))
    with pytest.raises(ModelUnavailable, match="buffalo_l/detection is not here"):
        find(double)


def test_a_face_below_the_threshold_needs_no_landmarks() -> None:
    faces = [FaceTruth((200, 300), 99), FaceTruth((9, 9), 9, confidence=0.2, has_landmarks=False)]
    assert len(find(Double(Scene(faces=faces)))) == 1


# -- text ------------------------------------------------------------------------------------------

TILTED = [(100, 120), (300, 80), (306, 110), (106, 150)]


def test_a_line_keeps_its_four_corners_in_pixels() -> None:
    double = Double(Scene(lines=[LineTruth(TILTED, "Metal")]))
    found = read(double, TextRegionQuery(picture(), 0.5, 736))
    assert found.quads[0] == pytest.approx(np.array(TILTED, np.float32), abs=1e-3)
    assert [reading.text for reading in found.readings or ()] == ["Metal"]


def test_text_upside_down_still_has_its_corners_from_the_top_left() -> None:
    corners = [TILTED[2], TILTED[3], TILTED[0], TILTED[1]]  # as Vision names them: the text's own
    found = read(
        Double(Scene(lines=[LineTruth(corners, "x")])), TextRegionQuery(picture(), 0.5, 736)
    )
    assert found.quads[0] == pytest.approx(np.array(TILTED, np.float32), abs=1e-3)


def test_immichs_default_thresholds_drop_only_vision_s_guesses() -> None:
    lines = [LineTruth(TILTED, text, grade) for text, grade in (("a", 0.3), ("b", 0.5), ("c", 1.0))]
    found = read(Double(Scene(lines=lines)), TextRegionQuery(picture(), 0.5, 736))
    kept = {reading.text for reading in found.readings or () if reading.score > 0.8}
    assert kept == {"b", "c"}


def test_the_request_is_accurate_with_the_models_languages_and_the_correction_setting() -> None:
    double = Double(Scene())
    read(double, TextRegionQuery(picture(), 0.5, 736))
    assert double.arguments_of("setRecognitionLanguages_") == (["en-US"],)
    assert double.arguments_of("setAutomaticallyDetectsLanguage_") == (False,)
    assert double.arguments_of("setUsesLanguageCorrection_") == (True,)
    assert double.arguments_of("setRecognitionLevel_") == (0,)


def test_max_resolution_decides_how_small_a_line_may_be() -> None:
    small = [(50, 50), (90, 50), (90, 56), (50, 56)]  # 6 px high; 5 px of a 512 px short side count
    double = Double(Scene(lines=[LineTruth(small, "fine print")]))
    assert len(read(double, TextRegionQuery(picture(), 0.5, 256))) == 0
    assert len(read(double, TextRegionQuery(picture(), 0.5, 736))) == 1


def test_a_picture_too_small_for_text_is_not_shown_to_vision() -> None:
    double = Double(Scene(lines=[LineTruth(TILTED, "x")]))
    assert len(read(double, TextRegionQuery(picture((31, 200)), 0.5, 736))) == 0
    assert "performRequests_error_" not in [call.name for call in double.calls]


class Boxes(Official):
    """Stands for an official text detector: two boxes."""

    def postprocess(self, raw: str, item: Any) -> Any:
        quads = np.array([TILTED, TILTED], np.float32)
        return TextRegions(quads, np.array([0.9, 0.8], np.float32))


class Reader(Official):
    """Stands for an official recogniser: numbers the lines."""

    def postprocess(self, raw: str, item: Any) -> Any:
        return Reading(f"line {len(self.asked)}", 0.9)


def test_a_script_that_vision_cannot_read_is_left_to_the_official_models() -> None:
    told: list[str] = []
    official: dict[Part, Official] = {Part.DETECTION: Boxes(), Part.RECOGNITION: Reader()}
    greek = ModelKey(Task.OCR, Part.DETECTION, "EL__PP-OCRv5_mobile")
    model = engine(Double(Scene()), lambda key: official[key.part], told).load(greek, None)
    assert isinstance(model, OfficialText)
    found: TextRegions = run(model, TextRegionQuery(picture(), 0.5, 736))
    assert [reading.text for reading in found.readings or ()] == ["line 1", "line 2"]
    assert told == [NO_LANGUAGE]
    assert model.size_bytes == 34
    model.close()
    assert all(half.is_closed for half in official.values())


def test_without_the_official_models_an_unreadable_script_is_an_error() -> None:
    greek = ModelKey(Task.OCR, Part.DETECTION, "EL__PP-OCRv5_mobile")
    with pytest.raises(ModelUnavailable, match="EL__PP-OCRv5_mobile/detection is not here"):
        engine(Double(Scene())).load(greek, None)


@pytest.mark.parametrize("part", [(Task.FACES, Part.RECOGNITION), (Task.CLIP, Part.VISUAL)])
def test_vision_refuses_what_it_does_not_do(part: tuple[Task, Part]) -> None:
    with pytest.raises(LoadFailed, match="apple vision does not do"):
        engine(Double(Scene())).load(ModelKey(*part, "buffalo_l"), None)


# -- failures and threads --------------------------------------------------------------------------

FACE_SCENE = Scene(faces=[FaceTruth((560, 180), 150, turned_deg=20)])
TEXT_SCENE = Scene(lines=[LineTruth(TILTED, "Metal")])


def calls_of(scene: Scene, key: ModelKey, item: Any) -> int:
    double = Double(scene)
    run(engine(double).load(key, None), item)
    return len(double.calls)


@pytest.mark.parametrize("fail_by", ["raise", "nil"])
@pytest.mark.parametrize(
    ("scene", "key", "item"),
    [
        (FACE_SCENE, FACES_KEY, FaceQuery(picture(), 0.7)),
        (TEXT_SCENE, TEXT_KEY, TextRegionQuery(picture(), 0.5, 736)),
    ],
    ids=["faces", "text"],
)
def test_a_failure_at_any_objective_c_call_is_never_an_empty_answer(
    scene: Scene, key: ModelKey, item: Any, fail_by: str
) -> None:
    number = calls_of(scene, key, item)
    assert number > 20
    silent = []
    for index in range(number):
        double = Double(scene, fail_at=index, fail_by=fail_by)
        try:
            model = engine(double, lambda key: Official()).load(key, None)
            answer = run(model, item)
        except Exception:  # noqa: BLE001 - any error reaches the caller as a failed request
            continue
        if len(answer) == 0:
            silent.append(double.calls[index].name)
    assert silent == []


def test_an_nserror_keeps_its_words() -> None:
    names = [call.name for call in _calls(FACE_SCENE)]
    double = Double(FACE_SCENE, fail_at=names.index("performRequests_error_"), fail_by="nil")
    with pytest.raises(InferenceError, match=r"made to fail \(com\.apple\.Vision 9\)"):
        find(double)


def test_an_objective_c_exception_keeps_its_words() -> None:
    names = [call.name for call in _calls(FACE_SCENE)]
    double = Double(FACE_SCENE, fail_at=names.index("results"))
    with pytest.raises(InferenceError, match=r"apple vision raised .*results was made to fail"):
        find(double)


def test_results_that_are_nil_are_a_failure_and_not_nothing_found() -> None:
    names = [call.name for call in _calls(FACE_SCENE)]
    double = Double(FACE_SCENE, fail_at=names.index("results"), fail_by="nil")
    with pytest.raises(InferenceError, match="apple vision answered nothing at all"):
        find(double)


def _calls(scene: Scene) -> list[Any]:
    double = Double(scene)
    find(double)
    return double.calls


def test_several_calls_run_at_once_and_do_not_mix() -> None:
    faces = [FaceTruth((100 + 60 * n, 300), 50 + n) for n in range(8)]
    model = engine(Double(Scene(faces=faces))).load(FACES_KEY, None)
    barrier = threading.Barrier(4)

    def find_faces(_: int) -> list[float]:
        barrier.wait(timeout=10)
        answer: Faces = run(model, FaceQuery(picture(), 0.7))
        return [float(x) for x in answer.landmarks[:, 2, 0]]

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(find_faces, range(4)))
    assert answers == [pytest.approx([face.five_points[2, 0] for face in faces], abs=2)] * 4


def test_the_engine_has_a_thread_for_each_call_immich_makes_by_default() -> None:
    made = engine(Double(Scene()))
    assert made.device.width >= 3
    made.device.close()


def test_the_official_detector_is_loaded_once_by_several_threads() -> None:
    loads: list[ModelKey] = []

    def load(key: ModelKey) -> Official:
        loads.append(key)
        return Official()

    scene = Scene(faces=[FaceTruth((400, 300), 99, has_landmarks=False)])
    model = engine(Double(scene), load).load(FACES_KEY, None)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: run(model, FaceQuery(picture(), 0.7)), range(8)))
    assert loads == [FACES_KEY]
