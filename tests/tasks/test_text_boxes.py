import itertools
import math

import cv2
import numpy as np
import pytest
from doubles.graph import FakeGraph, spec
from doubles.pictures import noise_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from immich_ml_metal.errors import InferenceError, InvalidOutput
from immich_ml_metal.tasks.images import Picture, resize
from immich_ml_metal.tasks.text_boxes import (
    CANVAS_RATIOS,
    MAX_DETECTION_PIXELS,
    TextDetector,
    TextRegionQuery,
    canvas_size,
    detection_size,
    find_regions,
    grow,
    order_corners,
    reading_order,
)
from immich_ml_metal.types import Floats, Tensor, TextRegions

sides = st.integers(32, 20_000)


# -- sizes (contract §6.1) -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "max_resolution", "expected"),
    [
        ((2160, 1440), 736, (1088, 736)),  # 1104 is 34.5 x 32
        ((1440, 2160), 736, (736, 1088)),
        ((1920, 1440), 736, (992, 736)),  # 981.3 is nearest to 31 x 32
        ((1440, 1440), 1440, (1440, 1440)),
        ((2880, 1440), 1440, (2880, 1440)),  # the largest official canvas
        ((500, 300), 736, (512, 288)),  # never enlarged, but rounded to 32
        ((48, 80), 736, (64, 64)),  # halves to even: 1.5 → 2, 2.5 → 2
        ((32, 32), 736, (32, 32)),
        ((33, 47), 736, (32, 32)),
        ((1000, 1000), 1, (32, 32)),  # never below 32
    ],
)
def test_the_detector_sees_multiples_of_32(
    size: tuple[int, int], max_resolution: int, expected: tuple[int, int]
) -> None:
    assert detection_size(size, max_resolution) == expected


@given(sides, sides, st.integers(1, 5000))
def test_the_size_stays_near_the_picture_and_within_the_limits(
    width: int, height: int, max_resolution: int
) -> None:
    found = detection_size((width, height), max_resolution)
    assert all(side % 32 == 0 and side >= 32 for side in found)
    ratio = min(1.0, max_resolution / min(width, height))
    limited = min(ratio, math.sqrt(MAX_DETECTION_PIXELS / (width * height)))
    for side, source in zip(found, (width, height), strict=True):
        assert abs(side - source * limited) <= 16 or side == 32
        assert side <= max(32, source * ratio + 16)  # never enlarged but by rounding
    assert detection_size((height, width), max_resolution) == found[::-1]


def test_a_panorama_is_bounded() -> None:
    width, height = detection_size((20_000, 700), 736)
    assert width * height <= MAX_DETECTION_PIXELS * 1.1
    assert width / height == pytest.approx(20_000 / 700, rel=0.1)


@given(st.integers(1, 90), st.integers(1, 180))
def test_a_canvas_holds_the_picture_and_is_listed(short: int, long: int) -> None:
    size = (32 * max(short, long), 32 * min(short, long))
    canvas = canvas_size(size)
    assert canvas[0] >= size[0]
    assert canvas[1] == size[1]  # the short side is kept
    assert canvas_size((size[1], size[0])) == (canvas[1], canvas[0])
    listed = {32 * math.ceil(round(size[1] * ratio) / 32) for ratio in CANVAS_RATIOS}
    smaller = [side for side in listed if size[0] <= side < canvas[0]]
    assert not smaller
    assert canvas[0] in listed or (canvas == size and size[0] > max(listed))


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((736, 736), (736, 736)),
        ((992, 736), (992, 736)),
        ((1104, 736), (1120, 736)),
        ((736, 1312), (736, 1312)),
        ((1344, 736), (1472, 736)),
        ((3200, 736), (3200, 736)),  # longer than 2:1 has no list
    ],
)
def test_official_canvases(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert canvas_size(size) == canvas


# -- corners ---------------------------------------------------------------------------------------


def clockwise_area(quad: Floats) -> float:
    """Positive for corners that run clockwise on the screen, where y points down."""
    x, y = quad.astype(np.float64).T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


@given(
    centre=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    size=st.tuples(st.integers(6, 400), st.integers(6, 400)),
    angle_deg=st.floats(-180, 180),
)
def test_corners_come_out_clockwise_for_any_order_of_input(
    centre: tuple[int, int], size: tuple[int, int], angle_deg: float
) -> None:
    corners = np.round(cv2.boxPoints((centre, size, angle_deg))).astype(np.float32)
    ordered = order_corners(corners)
    for permutation in itertools.permutations(range(4)):
        np.testing.assert_array_equal(order_corners(corners[list(permutation)]), ordered)
    assert clockwise_area(ordered) > 0
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, corners.tolist()))


@pytest.mark.parametrize(
    "expected",
    [
        [[0, 0], [10, 0], [10, 5], [0, 5]],
        [[2, 0], [12, 4], [10, 9], [0, 5]],  # falling
        [[0, 4], [10, 0], [12, 5], [2, 9]],  # rising
        [[5, 0], [10, 5], [5, 10], [0, 5]],  # on its tip: ties in x and in y
    ],
)
def test_top_left_comes_first(expected: list[list[int]]) -> None:
    quad = np.array(expected, np.float32)
    for permutation in itertools.permutations(range(4)):
        assert order_corners(quad[list(permutation)]).tolist() == expected


# -- reading order (contract §6.3) -----------------------------------------------------------------


def at(*corners: tuple[float, float]) -> Floats:
    """Boxes of 20x8 with these top-left corners."""
    shape = np.array([[0, 0], [20, 0], [20, 8], [0, 8]], np.float32)
    return np.array(corners, np.float32).reshape(-1, 1, 2) + shape


def naive_order(quads: Floats) -> list[int]:
    by_y = sorted(range(len(quads)), key=lambda row: float(quads[row, 0, 1]))
    lines: list[list[int]] = []
    for row in by_y:
        if lines and quads[row, 0, 1] - quads[lines[-1][-1], 0, 1] < 10:
            lines[-1].append(row)
        else:
            lines.append([row])
    return [row for line in lines for row in sorted(line, key=lambda r: float(quads[r, 0, 0]))]


places = st.tuples(st.integers(0, 60), st.integers(0, 60))


@given(st.lists(places, max_size=12))
def test_reading_order_is_that_of_the_naive_rule(corners: list[tuple[int, int]]) -> None:
    quads = at(*corners)
    assert reading_order(quads).tolist() == naive_order(quads)


@given(st.lists(places, max_size=8, unique=True), st.randoms())
def test_reading_order_does_not_depend_on_the_order_of_detection(
    corners: list[tuple[int, int]], random: object
) -> None:
    shuffled = list(corners)
    getattr(random, "shuffle")(shuffled)  # noqa: B009 - hypothesis's own Random
    first, second = at(*corners), at(*shuffled)
    np.testing.assert_array_equal(first[reading_order(first)], second[reading_order(second)])


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ([], []),
        ([(50, 0), (0, 9)], [1, 0]),  # 9 px lower is the same line
        ([(50, 0), (0, 10)], [0, 1]),  # 10 px lower is the next
        ([(90, 0), (50, 9), (0, 18)], [2, 1, 0]),  # a line may drift
        ([(7, 3), (7, 3), (7, 1)], [2, 0, 1]),  # ties stay as they came
    ],
)
def test_a_line_is_read_from_the_left(
    corners: list[tuple[float, float]], expected: list[int]
) -> None:
    assert reading_order(at(*corners)).tolist() == expected


# -- probability map → boxes (contract §6.2) -------------------------------------------------------


def text_map(
    *bars: tuple[int, int, int, int], shape: tuple[int, int] = (160, 320), value: float = 0.9
) -> Floats:
    """A map with bars of text: left, top, width, height."""
    probability = np.zeros(shape, np.float32)
    for left, top, width, height in bars:
        probability[top : top + height, left : left + width] = value
    return probability


def test_growing_adds_area_times_ratio_over_half_the_perimeter() -> None:
    centre, size, angle = grow(((5, 6), (100, 20), 30))
    growth = 100 * 20 * 1.6 / 120
    assert (centre, angle) == ((5, 6), 30)
    assert size == pytest.approx((100 + growth, 20 + growth))


def test_a_bar_becomes_its_grown_box_in_the_pictures_pixels() -> None:
    probability = text_map((50, 60, 100, 20))
    found = find_regions(probability, size=(640, 320), min_score=0.5)  # twice the map
    # dilation by 2x2 adds a cell on the right and below; contours run through the cells' middles
    growth = 100 * 20 * 1.6 / (100 + 20) / 2
    left, top, right, bottom = 50 - growth, 60 - growth, 150 + growth, 80 + growth
    expected = np.round(np.array([[left, top], [right, top], [right, bottom], [left, bottom]]) * 2)
    np.testing.assert_allclose(found.quads, expected[None], atol=1)
    assert found.scores[0] == pytest.approx(0.9 * 100 * 20 / (101 * 21), abs=1e-4)
    assert found.quads.dtype == np.float32
    assert found.scores.dtype == np.float32


def test_boxes_and_scores_come_in_reading_order() -> None:
    probability = text_map((200, 20, 80, 12), (20, 100, 80, 12)) + text_map(
        (20, 22, 80, 12), value=0.6
    )
    found = find_regions(probability, size=(320, 160), min_score=0.3)
    assert [quad[0, 0] < 100 for quad in found.quads] == [True, False, True]
    assert found.quads[2, 0, 1] > 80
    assert found.scores[0] < 0.6 < found.scores[1]


@pytest.mark.parametrize(("min_score", "count"), [(0.8, 1), (0.95, 0)])
def test_weak_boxes_are_dropped(min_score: float, count: int) -> None:
    found = find_regions(text_map((50, 60, 100, 20)), size=(320, 160), min_score=min_score)
    assert len(found) == count


def test_the_least_score_is_included() -> None:
    probability = text_map((50, 60, 100, 20))
    score = float(find_regions(probability, size=(320, 160), min_score=0).scores[0])
    at_least = math.nextafter(score, 0) - 1e-6
    assert len(find_regions(probability, size=(320, 160), min_score=at_least)) == 1
    assert len(find_regions(probability, size=(320, 160), min_score=score + 1e-6)) == 0


@pytest.mark.parametrize(
    ("bar", "count"),
    [
        ((50, 60, 100, 2), 0),  # 2 px high, 3 needed
        ((50, 60, 100, 3), 1),
        ((50, 60, 3, 3), 1),
        ((50, 60, 1, 1), 0),
    ],
)
def test_specks_are_dropped(bar: tuple[int, int, int, int], count: int) -> None:
    assert len(find_regions(text_map(bar), size=(320, 160), min_score=0.1)) == count


def test_cells_at_the_threshold_are_no_text() -> None:
    assert (
        len(find_regions(text_map((50, 60, 99, 20), value=0.3), size=(320, 160), min_score=0)) == 0
    )


def test_boxes_too_small_in_the_picture_are_dropped() -> None:
    probability = text_map((50, 60, 100, 8))
    assert len(find_regions(probability, size=(320, 160), min_score=0.1)) == 1
    assert len(find_regions(probability, size=(40, 20), min_score=0.1)) == 0  # 2 px high


@pytest.mark.parametrize(("width", "count"), [(24, 0), (32, 1)])
@pytest.mark.parametrize("is_upright", [False, True])
def test_edges_of_three_pixels_are_too_short_and_of_four_are_not(
    width: int, count: int, is_upright: bool
) -> None:
    # 100x20 grows by 26.7: rows 46.7 to 93.3 of 160; of 12 px they are 3.5..7, of 16 px 4.7..9.3
    probability, size = text_map((50, 60, 100, 20)), (width, width // 2)
    if is_upright:
        probability, size = probability.T, (width // 2, width)
    found = find_regions(probability, size=size, min_score=0.1)
    assert len(found) == count


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("is_upright", [False, True])
def test_a_score_counts_the_cells_at_the_maps_edge(is_last: bool, is_upright: bool) -> None:
    probability = text_map((316 if is_last else 0, 60, 4, 20))
    probability[60:80, 319 if is_last else 0] = 0.4
    if is_upright:
        probability = probability.T
    size = (probability.shape[1], probability.shape[0])
    (score,) = find_regions(probability, size=size, min_score=0.1).scores
    # dilation by 2x2 adds an empty cell below, and one on the right where there is room
    cells = (4 if is_last else 5) * 21
    assert score == pytest.approx((0.4 + 3 * 0.9) * 20 / cells, abs=1e-5)


def test_boxes_are_clipped_to_the_picture() -> None:
    found = find_regions(text_map((0, 0, 320, 40)), size=(320, 160), min_score=0.1)
    quad = found.quads[0]
    assert quad[0].tolist() == [0, 0]
    assert quad[1].tolist() == [319, 0]
    assert quad.min() >= 0
    assert (quad.max(axis=0) <= [319, 159]).all()


def test_an_empty_map_gives_empty_arrays_of_the_right_shape() -> None:
    found = find_regions(np.zeros((160, 320), np.float32), size=(320, 160), min_score=0.5)
    assert (found.quads.shape, found.scores.shape) == ((0, 4, 2), (0,))


@settings(max_examples=40, deadline=None)
@given(
    centre=st.tuples(st.integers(90, 230), st.integers(75, 85)),
    size=st.tuples(st.integers(30, 90), st.integers(10, 25)),
    angle_deg=st.integers(-89, 89),
)
def test_a_tilted_bar_is_found_where_it_is(
    centre: tuple[int, int], size: tuple[int, int], angle_deg: int
) -> None:
    probability = np.zeros((160, 320), np.float32)
    bar = cv2.boxPoints((centre, size, angle_deg)).astype(np.int32)
    cv2.fillPoly(probability, [bar], (0.9,))
    found = find_regions(probability, size=(320, 160), min_score=0.1)
    assert len(found) == 1
    mask = np.zeros((160, 320), np.uint8)
    cv2.fillPoly(mask, [found.quads[0].astype(np.int32)], (1,))
    assert mask[probability > 0].mean() > 0.97  # all of the bar is in the box
    assert clockwise_area(found.quads[0]) > 0


# -- the detector ----------------------------------------------------------------------------------


def query(image: Image.Image, max_resolution: int = 736) -> TextRegionQuery:
    return TextRegionQuery(Picture(image), 0.5, max_resolution)


def bar_in_the_middle(feeds: dict[str, Tensor]) -> list[Tensor]:
    """A detector that always sees one bar, at a quarter of the canvas, as (1, 1, H, W)."""
    (batch,) = feeds.values()
    height, width = batch.shape[1:3] if batch.shape[-1] == 3 else batch.shape[2:]
    probability = np.zeros((1, 1, height, width), np.float32)
    probability[0, 0, height // 4 : height // 4 + 20, width // 4 : width // 2] = 0.9
    return [probability]


def test_a_float_graph_gets_bgr_in_minus_one_to_one() -> None:
    item = query(noise_picture(100, 70))
    blob = TextDetector(FakeGraph(bar_in_the_middle), name="m").preprocess(item)
    assert blob is not None
    resized = np.asarray(resize(item.picture.image, (96, 64), Image.Resampling.LANCZOS))
    expected = (resized[:, :, ::-1].astype(np.float64) / 127.5 - 1).transpose(2, 0, 1)
    np.testing.assert_allclose(blob.tensor, expected, atol=1e-6)
    assert blob.tensor.dtype == np.float32
    assert blob.content == (96, 64)


def test_a_fused_graph_gets_rgb_bytes() -> None:
    graph = FakeGraph(bar_in_the_middle, inputs=[spec("x", np.uint8)])
    item = query(noise_picture(100, 70))
    blob = TextDetector(graph, name="m").preprocess(item)
    assert blob is not None
    expected = np.asarray(resize(item.picture.image, (96, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(blob.tensor, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_fixed_shapes_get_a_black_canvas_and_the_map_is_cut_back(dtype: type) -> None:
    graph = FakeGraph(bar_in_the_middle, inputs=[spec("x", dtype)], fixed_shapes=True)
    detector = TextDetector(graph, name="m")
    blob = detector.preprocess(query(Image.new("RGB", (1088, 736), "white")))
    assert blob is not None
    canvas = blob.tensor if dtype is np.uint8 else blob.tensor.transpose(1, 2, 0)
    assert canvas.shape == (736, 1120, 3)
    assert (canvas[:, 1088:] == (0 if dtype is np.uint8 else -1)).all()
    assert (canvas[:, :1088] == (255 if dtype is np.uint8 else 1)).all()
    (probability,) = detector.infer([blob])
    assert probability.shape == (736, 1088)


def test_boxes_come_in_the_pictures_pixels() -> None:
    detector = TextDetector(FakeGraph(bar_in_the_middle), name="m")
    item = query(Image.new("RGB", (1280, 640)), max_resolution=320)
    found: TextRegions = detector.postprocess(detector.infer([detector.preprocess(item)])[0], item)
    assert len(found) == 1
    centre = found.quads[0].mean(axis=0)  # of 160..320 x 80..100 on 640x320, twice as large
    np.testing.assert_allclose(centre, [480, 180], atol=3)


@pytest.mark.parametrize("size", [(31, 500), (500, 31), (20, 20)])
def test_a_picture_too_small_holds_no_text_and_is_not_looked_at(size: tuple[int, int]) -> None:
    graph = FakeGraph(bar_in_the_middle)
    detector = TextDetector(graph, name="m")
    item = query(Image.new("RGB", size))
    found = detector.postprocess(detector.infer([detector.preprocess(item)])[0], item)
    assert (len(found), found.quads.shape, graph.fed) == (0, (0, 4, 2), [])


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (
            np.zeros((1, 1, 16, 24), np.float32),
            InferenceError,
            r"maps \(3, 64, 96\) to \(1, 1, 16, 24\)",
        ),
        (
            np.full((1, 1, 64, 96), np.nan, np.float32),
            InvalidOutput,
            "6144 values that are not finite",
        ),
    ],
)
def test_a_map_that_cannot_be_read_is_an_error(
    output: Tensor, error: type[Exception], message: str
) -> None:
    detector = TextDetector(FakeGraph(lambda _: [output]), name="m")
    with pytest.raises(error, match=message):
        detector.infer([detector.preprocess(query(noise_picture(100, 70)))])


def test_close_frees_the_graph() -> None:
    graph = FakeGraph(bar_in_the_middle)
    detector = TextDetector(graph, name="m")
    detector.close()
    assert graph.is_closed
    assert (detector.max_batch, detector.size_bytes) == (1, 1234)


@pytest.mark.parametrize(("side", "found"), [(31, 961), (32, 1000), (40, 1000)])
def test_of_one_picture_the_first_thousand_outlines_are_looked_at(side: int, found: int) -> None:
    probability = np.zeros((16 * side, 16 * side), np.float32)
    for top in range(0, 16 * side, 16):
        for left in range(0, 16 * side, 16):
            probability[top + 2 : top + 10, left + 2 : left + 10] = 1
    regions = find_regions(probability, size=(16 * side, 16 * side), min_score=0)
    assert len(regions) == found
