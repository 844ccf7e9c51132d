import math
from typing import Any

import cv2
import numpy as np
import pytest
from doubles.graph import FakeGraph, spec
from doubles.pictures import noise
from doubles.timing import work_of_at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from immich_ml_metal.errors import InferenceError, InvalidOutput, LoadFailed
from immich_ml_metal.tasks.faces import (
    ARCFACE_TEMPLATE,
    HEAD_ROWS,
    MAX_FACES,
    FaceCrop,
    FaceDetector,
    FaceQuery,
    FaceRecogniser,
    align,
    decode_heads,
    fit_canvas,
    letterbox,
    similarity_transform,
    warp_affine,
)
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.types import Bytes, Faces, Floats, Tensor

ROWS = {8: 12800, 16: 3200, 32: 800}  # cells of a 640 px canvas, two anchors each


# -- letterbox (contract §5.1) ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 640), (640, 640)),
        ((2160, 1440), (640, 426)),  # 426.67 is cut, not rounded
        ((1440, 2160), (426, 640)),
        ((600, 800), (480, 640)),
        ((20, 20), (640, 640)),  # small pictures are enlarged
        ((200, 3), (640, 9)),
        ((1, 200), (3, 640)),
        ((10_000, 3), (640, 1)),  # never zero
        ((3, 10_000), (1, 640)),
    ],
)
def test_the_longer_side_fills_the_canvas(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_canvas(size) == expected


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (700, 900), (1, 300), (3000, 2)])
def test_the_picture_lies_in_the_top_left_corner_on_black(size: tuple[int, int]) -> None:
    width, height = fit_canvas(size)
    canvas = letterbox(np.full((size[1], size[0], 3), 200, np.uint8))
    assert canvas.shape == (640, 640, 3)
    assert (canvas[:height, :width] == 200).all()
    assert canvas.sum() == 200 * 3 * width * height


def test_letterboxing_scales_bilinearly() -> None:
    pixels = noise(427, 640)
    expected = cv2.resize(pixels, (640, 427), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(letterbox(pixels)[:427], expected)
    ramp = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 20, axis=0)
    row = letterbox(np.repeat(ramp, 3, axis=2))[300, :, 0].astype(int)
    positions = ((np.arange(640) + 0.5) * 20 / 640 - 0.5).clip(0, 19)
    np.testing.assert_allclose(row, positions * 10, atol=1)


# -- heads → faces ---------------------------------------------------------------------------------


def heads(*found: tuple[int, int, float, list[float], list[float]]) -> list[Tensor]:
    """SCRFD's outputs with faces at (stride, row): their score, four distances, ten offsets."""
    scores = {stride: np.zeros((rows, 1), np.float32) for stride, rows in ROWS.items()}
    boxes = {stride: np.zeros((rows, 4), np.float32) for stride, rows in ROWS.items()}
    points = {stride: np.zeros((rows, 10), np.float32) for stride, rows in ROWS.items()}
    for stride, row, score, distances, offsets in found:
        scores[stride][row] = score
        boxes[stride][row] = distances
        points[stride][row] = offsets
    return [*scores.values(), *boxes.values(), *points.values()]


TEN = [float(n) for n in range(10)]


def test_a_face_is_where_its_anchor_and_distances_say() -> None:
    row = (5 * 40 + 7) * 2 + 1  # second anchor of cell x 7, y 5 of stride 16
    faces = decode_heads(heads((16, row, 0.9, [1, 2, 3, 4], TEN)), min_score=0.5, scale=1.0)
    assert faces.boxes.tolist() == [[7 * 16 - 16, 5 * 16 - 32, 7 * 16 + 48, 5 * 16 + 64]]
    assert faces.scores.tolist() == [np.float32(0.9)]
    expected = [[7 * 16 + TEN[i] * 16, 5 * 16 + TEN[i + 1] * 16] for i in range(0, 10, 2)]
    assert faces.landmarks.tolist() == [expected]
    assert [array.dtype for array in (faces.boxes, faces.scores, faces.landmarks)] == [
        np.float32
    ] * 3


def test_every_stride_counts_in_its_own_cells() -> None:
    found = [(8, 2 * 81, 0.7), (16, 2 * 40 * 30, 0.8), (32, 2 * 399, 0.9)]
    faces = decode_heads(
        heads(*((stride, row, score, [1.0] * 4, TEN) for stride, row, score in found)),
        min_score=0.5,
        scale=1.0,
    )
    # cell (19, 19) of stride 32, cell (0, 30) of 16, cell (1, 1) of 8; best first
    assert faces.boxes.tolist() == [
        [576, 576, 640, 640],
        [-16, 464, 16, 496],
        [0, 0, 16, 16],
    ]


def test_boxes_go_back_to_the_picture_rounded_half_to_even_and_unclipped() -> None:
    faces = decode_heads(
        heads((8, 0, 0.9, [1.0, 3.0, 1.125, 0.625], TEN)), min_score=0.5, scale=2.0
    )
    # -8/2, -24/2, 9/2 = 4.5 → 4, 5/2 = 2.5 → 2
    assert faces.boxes.tolist() == [[-4, -12, 4, 2]]
    assert faces.landmarks[0, 4].tolist() == [8 * 8 / 2, 9 * 8 / 2]  # not rounded


@pytest.mark.parametrize(("min_score", "count"), [(0.7, 2), (0.70001, 1), (0.9, 1), (0.91, 0)])
def test_the_least_score_is_included(min_score: float, count: int) -> None:
    found = heads((8, 0, 0.7, [1, 1, 1, 1], TEN), (32, 700, 0.9, [1, 1, 1, 1], TEN))
    assert len(decode_heads(found, min_score=min_score, scale=1.0)) == count


def test_no_face_gives_empty_arrays_of_the_right_shape() -> None:
    faces = decode_heads(heads(), min_score=0.5, scale=1.0)
    assert (faces.boxes.shape, faces.scores.shape) == ((0, 4), (0,))
    assert faces.landmarks.shape == (0, 5, 2)


def test_heads_may_come_in_any_order_and_with_a_batch_axis() -> None:
    found = heads((16, 3, 0.9, [1, 2, 3, 4], TEN), (8, 900, 0.8, [4, 3, 2, 1], TEN))
    plain = decode_heads(found, min_score=0.5, scale=1.5)
    mixed = decode_heads([head[None] for head in reversed(found)], min_score=0.5, scale=1.5)
    assert len(plain) == 2
    np.testing.assert_array_equal(mixed.boxes, plain.boxes)
    np.testing.assert_array_equal(mixed.landmarks, plain.landmarks)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found[:8],
        lambda found: [found[0][:-2], *found[1:]],
        lambda found: [*found[:8], found[8][:, :8]],
        lambda found: [*found[:3], found[3][:100], *found[4:]],
    ],
    ids=["one missing", "rows missing", "four landmarks", "boxes of another canvas"],
)
def test_other_heads_are_an_error(change: Any) -> None:
    with pytest.raises(InferenceError, match="are not SCRFD's"):
        decode_heads(change(heads()), min_score=0.5, scale=1.0)


# -- overlaps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [MAX_FACES - 1, MAX_FACES, MAX_FACES + 100])
def test_of_one_picture_the_best_faces_are_kept(count: int) -> None:
    anchors = [2 * (4 * row * 80 + 4 * column) for row in range(20) for column in range(20)]
    scores = [0.2 + 0.001 * number for number in range(count)]
    found = [
        (8, anchor, score, [1.0] * 4, [0.0] * 10)
        for anchor, score in zip(anchors, scores, strict=False)
    ]
    faces = decode_heads(heads(*found), min_score=0.1, scale=1.0)
    np.testing.assert_allclose(faces.scores, scores[::-1][:MAX_FACES], rtol=1e-5)


def test_a_least_score_of_nothing_takes_bounded_time_and_keeps_the_best() -> None:
    rng = np.random.default_rng(0)
    raw: list[Tensor] = [
        rng.random((rows, width), np.float32) for width in (1, 4, 10) for rows in HEAD_ROWS
    ]
    with work_of_at_most(2):
        faces = decode_heads(raw, min_score=0, scale=1.0)
    assert len(faces) == MAX_FACES
    assert faces.scores[0] == max(head.max() for head in raw[:3])


def naive_nms(boxes: Tensor, scores: Tensor, limit: float) -> list[int]:
    """Greedy: the best box stays, and what overlaps it by more than `limit` goes."""
    kept: list[int] = []
    for row in np.argsort(-scores, kind="stable"):
        if all(iou(boxes[row], boxes[other]) <= limit for other in kept):
            kept.append(int(row))
    return kept


def iou(a: Tensor, b: Tensor) -> float:
    width = min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0]))
    height = min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1]))
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [float(box[2] - box[0]) * float(box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


@settings(max_examples=60, deadline=None)
@given(
    found=st.dictionaries(
        st.integers(0, 799),
        st.tuples(st.integers(51, 99), *[st.integers(1, 16) for _ in range(4)]),
        max_size=30,
    )
)
def test_overlaps_are_removed_as_by_the_naive_rule(
    found: dict[int, tuple[int, int, int, int, int]],
) -> None:
    raw = heads(
        *(
            (32, row, score / 100, [side / 4 for side in sides], TEN)
            for row, (score, *sides) in found.items()
        )
    )
    faces = decode_heads(raw, min_score=0.5, scale=1.0)
    scores, distances = raw[2][:, 0], raw[5]
    (rows,) = np.nonzero(scores)
    centres = np.stack([rows // 2 % 20, rows // 2 // 20], axis=1) * 32
    boxes = np.hstack([centres - distances[rows, :2] * 32, centres + distances[rows, 2:] * 32])
    kept = naive_nms(boxes, scores[rows], 0.4)
    np.testing.assert_array_equal(faces.boxes, np.round(boxes[kept]))
    assert (np.diff(faces.scores) <= 0).all()


# -- the detector ----------------------------------------------------------------------------------

NINE = [spec(f"head{n}") for n in range(9)]


def test_a_detector_normalises_and_answers_in_the_pictures_pixels() -> None:
    graph = FakeGraph(lambda _: heads((32, 2 * 21, 0.9, [1, 1, 1, 1], TEN)), outputs=NINE)
    detector = FaceDetector(graph, name="m")
    query = FaceQuery(Picture(Image.fromarray(noise(500, 1000))), 0.5)
    blob = detector.preprocess(query)
    canvas = letterbox(query.picture.pixels).astype(np.float64)
    np.testing.assert_allclose(blob, ((canvas - 127.5) / 128).transpose(2, 0, 1), atol=1e-6)
    assert blob.dtype == np.float32
    faces: Faces = detector.postprocess(detector.infer([blob])[0], query)
    # cell (1, 1) of stride 32 at 32 ± 32, on a canvas of 0.64 canvas pixels per pixel
    assert faces.boxes.tolist() == [[0, 0, 100, 100]]
    assert graph.fed[0]["input"].shape == (1, 3, 640, 640)


def test_a_fused_detector_gets_the_bytes_of_the_canvas() -> None:
    graph = FakeGraph(lambda _: heads(), inputs=[spec("image", np.uint8)], outputs=NINE)
    query = FaceQuery(Picture(Image.fromarray(noise(50, 100))), 0.5)
    blob = FaceDetector(graph, name="m").preprocess(query)
    np.testing.assert_array_equal(blob, letterbox(query.picture.pixels))


def test_the_scale_of_both_axes_is_that_of_the_height() -> None:
    graph = FakeGraph(lambda _: heads((32, 2 * 21, 0.9, [0, 0, 15, 15], TEN)), outputs=NINE)
    detector = FaceDetector(graph, name="m")
    query = FaceQuery(Picture(Image.new("RGB", (1000, 667))), 0.5)  # 426.88 → 426
    (faces,) = [detector.postprocess(raw, query) for raw in detector.infer([np.zeros(1)])]
    expected = [round(side * 667 / 426) for side in (32, 32, 512, 512)]
    assert faces.boxes.tolist() == [expected]


def test_a_head_with_a_hole_is_an_error_not_an_empty_answer() -> None:
    broken = heads()
    broken[0][5] = np.nan
    detector = FaceDetector(FakeGraph(lambda _: broken, outputs=NINE), name="m")
    with pytest.raises(InvalidOutput, match="m gave 1 values that are not finite"):
        detector.infer([np.zeros(1)])


def test_a_graph_without_nine_outputs_is_no_detector() -> None:
    with pytest.raises(LoadFailed, match="1 outputs, an SCRFD detector has 9"):
        FaceDetector(FakeGraph(lambda _: []), name="m")


# -- alignment (contract §5.2) ---------------------------------------------------------------------


@given(
    angle=st.floats(-math.pi, math.pi),
    scale=st.floats(0.05, 20),
    shift=st.tuples(st.floats(-5000, 5000), st.floats(-5000, 5000)),
)
def test_a_known_similarity_is_recovered(
    angle: float, scale: float, shift: tuple[float, float]
) -> None:
    turn = scale * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    points = (ARCFACE_TEMPLATE @ turn.T + shift).astype(np.float32)
    matrix = similarity_transform(points).astype(np.float64)
    np.testing.assert_allclose(matrix[:, :2], np.linalg.inv(turn), rtol=2e-2, atol=2e-3 / scale)
    back = points @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(back, ARCFACE_TEMPLATE, atol=max(0.01, 0.05 / scale))


def umeyama(source: Tensor, target: Tensor) -> Tensor:
    """The textbook: singular value decomposition of the covariance, reflection excluded."""
    centred, aimed = source - source.mean(axis=0), target - target.mean(axis=0)
    left, values, right = np.linalg.svd(aimed.T @ centred / len(source))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    turn = left @ np.diag(signs) @ right
    scale = (values * signs).sum() / centred.var(axis=0).sum()
    return np.hstack(
        [scale * turn, (target.mean(axis=0) - scale * turn @ source.mean(axis=0))[:, None]]
    )


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=5, max_size=5, unique=True
    )
)
def test_the_transform_is_umeyamas(points: list[tuple[int, int]]) -> None:
    source = np.array(points, dtype=np.float64)
    expected = umeyama(source, ARCFACE_TEMPLATE.astype(np.float64))
    found = similarity_transform(source.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("point", [(0, 0), (1234.567, 987.3), (60_000.1, 12.3)])
def test_landmarks_on_one_point_are_an_error(point: tuple[float, float]) -> None:
    with pytest.raises(InferenceError, match="lie on one another"):
        similarity_transform(np.tile(np.array(point, np.float32), (5, 1)))


def naive_warp(pixels: Bytes, matrix: Floats, side: int) -> Bytes:
    """OpenCV 4's `warpAffine`, written out: 1/1024 px, then 1/32 px, then 15-bit weights."""
    full = np.vstack([matrix.astype(np.float64), [0, 0, 1]])
    inverse = np.linalg.inv(full)
    height, width = pixels.shape[:2]
    out = np.zeros((side, side, 3), np.uint8)
    for y in range(side):
        for x in range(side):
            place = []
            for axis in (0, 1):
                across = round(inverse[axis, 0] * x * 1024)
                down = round((inverse[axis, 1] * y + inverse[axis, 2]) * 1024)
                place.append((across + down + 16) >> 5)
            column, row = place[0] >> 5, place[1] >> 5
            u, v = place[0] & 31, place[1] & 31
            total = np.zeros(3, np.int64)
            for dy, weight_y in ((0, 32 - v), (1, v)):
                for dx, weight_x in ((0, 32 - u), (1, u)):
                    if 0 <= row + dy < height and 0 <= column + dx < width:
                        pixel = pixels[row + dy, column + dx].astype(np.int64)
                        total += pixel * (weight_x * weight_y * 32)
            out[y, x] = (total + (1 << 14)) >> 15
    return out


@settings(max_examples=25, deadline=None)
@given(
    angle=st.floats(-math.pi, math.pi),
    scale=st.floats(0.1, 6),
    centre=st.tuples(st.floats(-60, 160), st.floats(-60, 140)),
    seed=st.integers(0, 99),
)
def test_warping_is_opencv_4s_bit_for_bit(
    angle: float, scale: float, centre: tuple[float, float], seed: int
) -> None:
    pixels, side = noise(80, 100, seed=seed), 16
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    middle = side / 2
    matrix = np.array(
        [
            [cosine, -sine, middle - cosine * centre[0] + sine * centre[1]],
            [sine, cosine, middle - sine * centre[0] - cosine * centre[1]],
        ],
        dtype=np.float32,
    )
    np.testing.assert_array_equal(
        warp_affine(pixels, matrix, side), naive_warp(pixels, matrix, side)
    )


def test_an_upright_face_of_template_size_is_cut_out_unchanged() -> None:
    pixels = noise(300, 400)
    crop = align(pixels, ARCFACE_TEMPLATE + np.array([100, 50], np.float32))
    np.testing.assert_array_equal(crop, pixels[50:162, 100:212])


def test_what_lies_outside_the_picture_is_black() -> None:
    white = np.full((100, 100, 3), 255, np.uint8)
    crop = align(white, ARCFACE_TEMPLATE + np.array([40, 0], np.float32))
    assert (crop[:99, :59] == 255).all()
    assert (crop[:, 61:] == 0).all()
    far = align(white, ARCFACE_TEMPLATE - np.array([5000, 5000], np.float32))
    assert not far.any()


# -- the recogniser --------------------------------------------------------------------------------


def face() -> FaceCrop:
    return FaceCrop(Picture(Image.fromarray(noise(200, 200))), ARCFACE_TEMPLATE + np.float32(30))


def test_a_face_is_normalised_for_a_float_graph() -> None:
    model = FaceRecogniser(FakeGraph(lambda _: []), name="m", dim=2)
    blob = model.preprocess(face())
    crop = align(face().picture.pixels, face().landmarks).astype(np.float64)
    np.testing.assert_allclose(blob, ((crop - 127.5) / 127.5).transpose(2, 0, 1), atol=1e-6)
    assert blob.dtype == np.float32


def test_faces_run_as_one_batch_and_stay_as_long_as_they_are() -> None:
    graph = FakeGraph(
        lambda feeds: [feeds["face"].mean(axis=(1, 2))], inputs=[spec("face", np.uint8)]
    )
    model = FaceRecogniser(graph, name="m", dim=3)
    blob = model.preprocess(face())
    assert blob.dtype == np.uint8
    first, second = model.infer([blob, np.full_like(blob, 9)])
    assert model.postprocess(second, face()).tolist() == [9, 9, 9]  # not normalised
    np.testing.assert_allclose(model.postprocess(first, face()), blob.mean(axis=(0, 1)), rtol=1e-5)
    assert graph.fed[0]["face"].shape == (2, 112, 112, 3)
    assert (model.max_batch, model.size_bytes) == (4, 1234)


def test_a_face_vector_of_another_length_is_an_error() -> None:
    model = FaceRecogniser(FakeGraph(lambda _: []), name="m", dim=512)
    with pytest.raises(InvalidOutput, match="gave 3 values, the model's dimension is 512"):
        model.postprocess(np.zeros(3), face())


def test_both_models_close_their_graphs() -> None:
    graphs = [FakeGraph(lambda _: [], outputs=NINE), FakeGraph(lambda _: [])]
    FaceDetector(graphs[0], name="m").close()
    FaceRecogniser(graphs[1], name="m", dim=512).close()
    assert all(graph.is_closed for graph in graphs)
