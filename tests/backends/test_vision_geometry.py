"""Frames and points: properties that hold for every box, angle and picture size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from immich_ml_metal.backends.vision.bridge import SeenFace, SeenLandmarks
from immich_ml_metal.backends.vision.geometry import (
    box_pixels,
    five_points,
    quad_pixels,
    region_pixels,
    to_pixels,
)

NAMES = ("left_eye", "right_eye", "left_pupil", "right_pupil", "nose", "nose_crest", "outer_lips")
shares = st.floats(0.05, 0.95)
# no subnormals: ONNX Runtime, in the same process, tells the processor to take them for zero
reals = st.floats(-1, 2, allow_subnormal=False)


def landmarks(**regions: list[tuple[float, float]]) -> SeenLandmarks:
    points = {name: np.array(regions.get(name, []), float).reshape(-1, 2) for name in NAMES}
    return SeenLandmarks(box=np.array([0.2, 0.4, 0.2, 0.4]), regions=points)


def face(**regions: list[tuple[float, float]]) -> SeenFace:
    seen = landmarks(**regions)
    return SeenFace(box=seen.box, confidence=0.9, landmarks=seen)


WHOLE: dict[str, list[tuple[float, float]]] = {
    "left_pupil": [(0.3, 0.7)],
    "right_pupil": [(0.7, 0.7)],
    "nose_crest": [(0.5, 0.6), (0.5, 0.4)],
    "outer_lips": [(0.35, 0.2), (0.5, 0.15), (0.65, 0.2)],
}


def test_the_origin_moves_from_the_bottom_left_to_the_top_left() -> None:
    corners = np.array([[0.0, 0.0], [1.0, 1.0], [0.25, 0.75]])
    assert to_pixels(corners, (400, 200)).tolist() == [[0, 200], [400, 0], [100, 50]]


def test_a_box_becomes_whole_pixels_rounded_half_to_even_and_not_clipped() -> None:
    box = np.array([-0.005, 0.5, 0.13, 0.525])  # 100 px: left -0.5, right 12.5; top -2.5
    assert box_pixels(box, (100, 100)).tolist() == [-0.0, -2.0, 12.0, 50.0]


@given(x=shares, y=shares, width=shares, height=shares)
def test_landmarks_count_from_the_face_box_not_from_the_picture(
    x: float, y: float, width: float, height: float
) -> None:
    seen = SeenLandmarks(np.array([x, y, width, height]), {"nose": np.array([[0.0, 0.0], [1, 1]])})
    bottom_left, top_right = region_pixels(seen, "nose", (1000, 500))
    assert bottom_left == pytest.approx([x * 1000, (1 - y) * 500])
    assert top_right == pytest.approx([(x + width) * 1000, (1 - y - height) * 500])


def test_the_five_points_come_in_arcfaces_order() -> None:
    points = five_points(face(**WHOLE), (1000, 1000))
    assert points is not None
    expected = [[260, 320], [340, 320], [300, 440], [270, 520], [330, 520]]
    assert points == pytest.approx(np.array(expected, np.float32))


def test_without_pupils_the_middle_of_the_eye_stands_in() -> None:
    eyes = {"left_eye": [(0.2, 0.7), (0.4, 0.7)], "right_eye": [(0.6, 0.65), (0.8, 0.75)]}
    lacking = {name: points for name, points in WHOLE.items() if "pupil" not in name}
    points = five_points(face(**lacking, **eyes), (1000, 1000))
    assert points is not None
    assert points[:2] == pytest.approx(np.array([[260, 320], [340, 320]], np.float32))


@pytest.mark.parametrize("absent", ["left_pupil", "nose_crest", "outer_lips"])
def test_a_face_without_a_needed_region_has_no_points(absent: str) -> None:
    lacking = {name: points for name, points in WHOLE.items() if name != absent}
    assert five_points(face(**lacking), (1000, 1000)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"right_pupil": [(0.301, 0.7)]},  # both eyes in one place
        {"outer_lips": [(0.5, 0.2)]},  # no width to the mouth
        {"left_pupil": [(float("nan"), 0.7)]},
        {"nose_crest": [(0.5, float("nan"))]},
    ],
)
def test_degenerate_landmarks_give_no_points(change: dict[str, list[tuple[float, float]]]) -> None:
    assert five_points(face(**{**WHOLE, **change}), (1000, 1000)) is None


def test_a_face_without_landmarks_has_no_points() -> None:
    assert five_points(SeenFace(np.array([0, 0, 1.0, 1]), 0.9, None), (10, 10)) is None


@given(st.permutations([(0.1, 0.2), (0.6, 0.25), (0.58, 0.4), (0.08, 0.35)]))
def test_corners_are_ordered_by_where_they_are_not_by_what_vision_calls_them(
    corners: list[tuple[float, float]],
) -> None:
    quad = quad_pixels(np.array(corners), (100, 100))
    expected = [[8, 65], [58, 60], [60, 75], [10, 80]]  # TL TR BR BL, y down
    assert quad == pytest.approx(np.array(expected, np.float32))


@given(st.lists(st.tuples(reals, reals), min_size=4, max_size=4))
def test_quads_stay_inside_the_picture(corners: list[tuple[float, float]]) -> None:
    quad = quad_pixels(np.array(corners), (640, 480))
    assert (quad >= 0).all()
    assert (quad <= (640, 480)).all()
