"""How two answers are told apart."""

import numpy as np
import pytest

from immich_ml_metal.onnx_graph.gap import gap
from immich_ml_metal.qualification.compare import box_gap, reading_gap
from immich_ml_metal.types import Faces, Reading, TextRegions


def faces(*boxes: tuple[float, float, float, float], score: float = 0.9) -> Faces:
    count = len(boxes)
    return Faces(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.full(count, score, np.float32),
        np.zeros((count, 5, 2), np.float32),
    )


def test_values_that_only_one_has_finite_are_counted() -> None:
    good = np.array([1, 2, 3, -np.inf], np.float32)
    assert gap(good, good).not_finite == 0
    bad = gap(np.array([1, np.nan, np.inf, -np.inf], np.float32), good)
    assert bad.not_finite == 2
    assert bad.cosine == pytest.approx(1)


def test_a_vector_at_an_angle_has_its_cosine() -> None:
    one, other = np.array([1.0, 0.0]), np.array([np.cos(0.1), np.sin(0.1)])
    assert gap(one, other).cosine == pytest.approx(np.cos(0.1))


def test_boxes_are_matched_in_any_order_and_measured() -> None:
    found = box_gap(
        faces((100, 100, 200, 200), (0, 0, 50, 50)), faces((0, 0, 50, 52), (100, 100, 200, 200))
    )
    assert (found.unmatched, found.moved_px) == (0, 2)


def test_a_box_too_many_is_seen_on_either_side() -> None:
    one, two = faces((0, 0, 50, 50)), faces((0, 0, 50, 50), (300, 0, 350, 50))
    assert box_gap(one, two).unmatched == box_gap(two, one).unmatched == 1
    assert box_gap(faces(), faces()).moved_px == 0


def test_scores_and_corners_of_text_are_measured() -> None:
    quad = np.array([[[0, 0], [90, 0], [90, 20], [0, 20]]], np.float32)
    ours = TextRegions(quad + 1, np.array([0.8], np.float32))
    theirs = TextRegions(quad, np.array([0.75], np.float32))
    found = box_gap(ours, theirs)
    assert (found.unmatched, found.moved_px) == (0, 1)
    assert found.score_gap == pytest.approx(0.05)


def test_a_line_that_was_a_guess_anyway_may_read_otherwise() -> None:
    sure, unsure = Reading("7", 0.9), Reading("1", 0.3)
    assert reading_gap([Reading("8", 0.9)], [sure])[0] == 1
    assert reading_gap([Reading("l", 0.3)], [unsure])[0] == 0
