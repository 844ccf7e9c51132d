import math
from typing import Any

import cv2
import numpy as np
import pytest
from doubles.graph import FakeGraph, spec
from doubles.pictures import noise_picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from immich_ml_metal.errors import InferenceError, InvalidOutput
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.text_lines import (
    FIXED_WIDTHS_PX,
    LineCrop,
    TextRecogniser,
    cut_line,
    decode_ctc,
    perspective_coefficients,
    tensor_width,
)
from immich_ml_metal.types import Floats, Reading, Tensor

CHARSET = ["a", "b", "c"]
CLASSES = ("", "a", "b", "c", " ")


def rectangle(left: float, top: float, width: float, height: float) -> Floats:
    right, bottom = left + width, top + height
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float32)


# -- cutting a line out (contract §6.4) ------------------------------------------------------------


def test_an_upright_box_is_cut_out_unchanged() -> None:
    image = noise_picture(200, 100)
    crop = cut_line(Picture(image), rectangle(30, 20, 100, 40))
    np.testing.assert_array_equal(crop, np.asarray(image.crop((30, 20, 130, 60))))


def test_the_longer_of_two_opposite_edges_counts_cut_to_whole_pixels() -> None:
    quad = np.array([[0, 0], [90.9, 0], [80, 30.2], [0, 25]], np.float32)
    assert cut_line(Picture(noise_picture(200, 100)), quad).shape == (32, 90, 3)


@pytest.mark.parametrize(("height", "is_turned"), [(59, False), (60, True), (90, True)])
def test_a_line_taller_than_wide_is_turned_counter_clockwise(height: int, is_turned: bool) -> None:
    image = noise_picture(200, 100)
    crop = cut_line(Picture(image), rectangle(30, 5, 40, height))
    upright = np.asarray(image.crop((30, 5, 70, 5 + height)))
    np.testing.assert_array_equal(crop, np.rot90(upright) if is_turned else upright)


def test_what_lies_outside_the_picture_is_black() -> None:
    crop = cut_line(Picture(Image.new("RGB", (50, 50), "white")), rectangle(30, 10, 60, 20))
    assert (crop[:, :18] == 255).all()
    assert (crop[:, 22:] == 0).all()


def test_pixels_between_pixels_are_bicubic() -> None:
    step = np.full((20, 40, 3), 100, np.uint8)
    step[:, 20:] = 200
    crop = cut_line(Picture(Image.fromarray(step)), rectangle(10.5, 2, 20, 10))
    assert crop[5, 7:12, 0].tolist() == [100, 87, 150, 212, 200]  # -1, 5, 5, -1 eighths


def test_a_tilted_line_is_straightened() -> None:
    flat = np.zeros((60, 200, 3), np.uint8)
    flat[20:40, 40:60] = 255  # one white mark
    quad = cv2.boxPoints(((200, 200), (200, 60), 20)).astype(np.float32)
    quad = quad[[1, 2, 3, 0]]  # OpenCV begins at the bottom left
    to_picture = cv2.getPerspectiveTransform(rectangle(0, 0, 200, 60), quad)
    picture = cv2.warpPerspective(flat, to_picture, (400, 400), flags=cv2.INTER_LINEAR)
    crop = cut_line(Picture(Image.fromarray(np.asarray(picture, np.uint8))), quad)
    assert abs(crop.shape[1] - 200) <= 1
    assert crop[22:38, 42:58].min() > 200
    assert crop[:16].max() < 60
    assert crop[:, 64:].max() < 60


corner = st.tuples(st.floats(0, 9), st.floats(0, 9))


@given(st.tuples(corner, corner, corner, corner), st.integers(4, 300), st.integers(4, 300))
def test_the_perspective_maps_corners_to_corners(
    shifts: tuple[tuple[float, float], ...], width: int, height: int
) -> None:
    quad = rectangle(10, 10, 60, 30) + np.array(shifts, np.float32)
    a, b, c, d, e, f, g, h = perspective_coefficients(quad, width, height)
    for (u, v), expected in zip(rectangle(0, 0, width, height).tolist(), quad, strict=True):
        scale = g * u + h * v + 1
        found = [(a * u + b * v + c) / scale, (d * u + e * v + f) / scale]
        np.testing.assert_allclose(found, expected, atol=0.02)  # float32, as the official service


def test_the_perspective_is_solved_in_float32_with_the_rows_of_x_and_y_by_turns() -> None:
    quad = np.array([[311, 127], [611, 139], [609, 181], [308, 168]], np.float32)
    rows, targets = [], []
    for (u, v), (x, y) in zip([(0, 0), (300, 0), (300, 41), (0, 41)], quad.tolist(), strict=True):
        rows += [[u, v, 1, 0, 0, 0, -u * x, -v * x], [0, 0, 0, u, v, 1, -u * y, -v * y]]
        targets += [x, y]
    found = perspective_coefficients(quad, 300, 41)
    solved = np.linalg.solve(np.array(rows, np.float32), np.array(targets, np.float32))
    assert found == solved.tolist()
    assert found != np.linalg.solve(np.array(rows, np.float64), np.array(targets)).tolist()


@pytest.mark.parametrize(
    ("size", "crop"), [((8000, 2000), (2000, 8000)), ((8001, 2000), (1999, 8000))]
)
def test_a_crop_of_more_pixels_than_a_line_has_is_reduced(
    size: tuple[int, int], crop: tuple[int, int]
) -> None:
    picture = Picture(Image.new("RGB", (9, 9)))
    assert cut_line(picture, rectangle(0, 0, *size)).shape[:2] == crop


def test_a_box_without_area_is_an_error() -> None:
    with pytest.raises(InferenceError, match="has no area"):
        perspective_coefficients(np.zeros((4, 2), np.float32), 10, 10)


# -- the tensor's width (contract §6.4) ------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "width"),
    [
        (1, 224),
        (3.7, 224),  # int(177.6) x 1.25 = 221.25
        (4, 240),
        (10.03, 602),  # int(481.44) x 1.25 = 601.25
        (34, 2040),
        (100, 2048),
    ],
)
def test_free_shapes_leave_a_quarter_of_space(ratio: float, width: int) -> None:
    assert tensor_width(ratio, fixed=False) == width


@pytest.mark.parametrize(
    ("ratio", "width"),
    [(1, 224), (224 / 48, 224), (225 / 48, 320), (10, 640), (13.4, 1280), (30, 2048), (99, 2048)],
)
def test_fixed_shapes_take_the_first_that_fits(ratio: float, width: int) -> None:
    assert tensor_width(ratio, fixed=True) == width


@given(st.floats(0.01, 500))
def test_a_width_is_listed_or_within_its_bounds(ratio: float) -> None:
    assert 224 <= tensor_width(ratio, fixed=False) <= 2048
    fixed = tensor_width(ratio, fixed=True)
    assert fixed in FIXED_WIDTHS_PX
    assert fixed >= min(math.ceil(48 * ratio), 2048)


# -- CTC -------------------------------------------------------------------------------------------


def naive_ctc(classes: list[int], confidences: list[float]) -> tuple[str, float]:
    text, kept, previous = "", [], None
    for index, confidence in zip(classes, confidences, strict=True):
        if index != 0 and index != previous:
            text += CLASSES[index]
            kept.append(confidence)
        previous = index
    return text, sum(kept) / len(kept) if kept else 0.0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 100)), max_size=40))
def test_decoding_is_that_of_the_naive_loop(steps: list[tuple[int, int]]) -> None:
    classes = [index for index, _ in steps]
    confidences = [share / 100 for _, share in steps]
    reading = decode_ctc(np.array(classes, np.intp), np.array(confidences, np.float32), CLASSES)
    text, score = naive_ctc(classes, confidences)
    assert reading.text == text
    assert reading.score == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ([], ""),
        ([0, 0], ""),
        ([1, 1, 1], "a"),
        ([1, 0, 1], "aa"),  # a blank between keeps a double letter
        ([1, 4, 4, 2], "a b"),
    ],
)
def test_repeats_collapse_and_blanks_drop(classes: list[int], text: str) -> None:
    confidences = np.full(len(classes), 0.5, np.float32)
    assert decode_ctc(np.array(classes, np.intp), confidences, CLASSES) == Reading(
        text, 0.5 if text else 0.0
    )


# -- the recogniser --------------------------------------------------------------------------------


def recogniser(graph: FakeGraph) -> TextRecogniser:
    return TextRecogniser(graph, CHARSET, name="m")


def line(width: int = 100, height: int = 24) -> LineCrop:
    return LineCrop(Picture(noise_picture(300, 100)), rectangle(10, 10, width, height))


def no_output(_: Any) -> list[Tensor]:
    return []


def test_a_float_graph_gets_bgr_with_zeros_behind_the_line() -> None:
    blob = recogniser(FakeGraph(no_output)).preprocess(line())
    crop = cut_line(line().picture, line().quad)
    resized = np.asarray(cv2.resize(crop, (200, 48), interpolation=cv2.INTER_LINEAR))
    expected = (resized[:, :, ::-1].astype(np.float64) / 127.5 - 1).transpose(2, 0, 1)
    assert blob.shape == (3, 48, 250)  # 200 x 1.25
    np.testing.assert_allclose(blob[:, :, :200], expected, atol=1e-6)
    assert not blob[:, :, 200:].any()


def test_a_fused_graph_gets_rgb_bytes_with_grey_behind_the_line() -> None:
    blob = recogniser(FakeGraph(no_output, inputs=[spec("x", np.uint8)])).preprocess(line())
    crop = cut_line(line().picture, line().quad)
    expected = cv2.resize(crop, (200, 48), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(blob[:, :200], expected)
    assert (blob[:, 200:] == 127).all()


@pytest.mark.parametrize(("fixed", "width"), [(False, 250), (True, 224)])
def test_fixed_shapes_choose_from_the_list(fixed: bool, width: int) -> None:
    blob = recogniser(FakeGraph(no_output, fixed_shapes=fixed)).preprocess(line())
    assert blob.shape == (3, 48, width)


def test_a_very_long_line_is_squeezed() -> None:
    picture = Picture(Image.new("RGB", (3000, 20), "white"))
    crop = LineCrop(picture, rectangle(0, 0, 3000, 20))
    blob = recogniser(FakeGraph(no_output)).preprocess(crop)
    assert blob.shape == (3, 48, 2048)
    assert (blob[:, 4:-4, :-4] == 1).all()  # no space behind it


def test_a_very_thin_line_keeps_a_pixel() -> None:
    quad = np.array([[5, 5], [6, 5], [6, 5.4], [5, 5.4]], np.float32)
    blob = recogniser(FakeGraph(no_output)).preprocess(
        LineCrop(Picture(noise_picture(20, 20)), quad)
    )
    assert blob.shape == (3, 48, 224)


def probabilities(feeds: dict[str, Tensor]) -> list[Tensor]:
    """One character per line, by its first pixel: step 0 blank, step 1 the character at 0.75."""
    (batch,) = feeds.values()
    found = np.full((len(batch), 2, 5), 0.0625, np.float32)
    found[:, 0, 0] = 0.75
    for row, blob in enumerate(batch):
        found[row, 1, int(blob.flat[0])] = 0.75
    return [found]


def blob(index: int, width: int) -> Tensor:
    return np.full((48, width, 3), index, np.uint8)


def test_lines_of_one_width_share_a_run_and_answers_keep_their_order() -> None:
    graph = FakeGraph(probabilities)
    model = recogniser(graph)
    raw = model.infer([blob(1, 224), blob(2, 320), blob(3, 224), blob(4, 320)])
    assert [model.postprocess(steps, line()).text for steps in raw] == ["a", "b", "c", " "]
    assert [fed["input"].shape[:3:2] for fed in graph.fed] == [(2, 224), (2, 320)]
    assert model.postprocess(raw[0], line()).score == 0.75


def test_a_lines_reading_does_not_depend_on_its_company() -> None:
    model = recogniser(FakeGraph(probabilities))
    alone = model.infer([blob(2, 320)])[0]
    together = model.infer([blob(1, 320), blob(2, 320), blob(3, 224)])[1]
    assert model.postprocess(alone, line()) == model.postprocess(together, line())


def test_logits_are_turned_into_a_probability() -> None:
    logits = np.array([[[0, 1, 3, -2, 0.5]]], np.float32)
    graph = FakeGraph(lambda _: [logits], outputs=[spec("ctc_logits")])
    model = recogniser(graph)
    reading = model.postprocess(model.infer([blob(0, 224)])[0], line())
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert reading.text == "b"
    assert reading.score == pytest.approx(float(softmax[0, 0, 2]), abs=1e-6)


def indices(
    classes: list[int],
    names: tuple[str, str] = ("ctc_indices", "ctc_confidences"),
    *,
    dtype: type = np.int32,
    is_turned: bool = False,
) -> FakeGraph:
    outputs: list[Tensor] = [
        np.array([classes], dtype),
        np.full((1, len(classes)), 0.5, np.float16),
    ]
    specs = [spec(name) for name in names]
    if is_turned:
        outputs, specs = outputs[::-1], specs[::-1]
    return FakeGraph(lambda _: outputs, outputs=specs)


@pytest.mark.parametrize("names", [("ctc_indices", "ctc_confidences"), ("indices", "probs")])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_graph_may_answer_with_indices_by_any_name_and_in_any_order(
    names: tuple[str, str], dtype: type, is_turned: bool
) -> None:
    model = recogniser(indices([1, 1, 0, 4, 3], names, dtype=dtype, is_turned=is_turned))
    reading = model.postprocess(model.infer([blob(0, 224)])[0], line())
    assert reading == Reading("a c", 0.5)


def test_indices_without_their_probabilities_are_an_error() -> None:
    graph = FakeGraph(lambda _: [np.array([[1, 2]], np.int32)], outputs=[spec("indices")])
    with pytest.raises(InferenceError, match="classes without their probabilities"):
        recogniser(graph).infer([blob(0, 224)])


@pytest.mark.parametrize("classes", [[1, 5], [-1, 1]])
def test_an_index_outside_the_character_list_is_an_error(classes: list[int]) -> None:
    with pytest.raises(InferenceError, match="its character list has 5"):
        recogniser(indices(classes)).infer([blob(0, 224)])


def test_a_list_of_another_length_than_the_classes_is_an_error() -> None:
    model = TextRecogniser(FakeGraph(probabilities), ["a"], name="m")
    with pytest.raises(InferenceError, match="m knows 5 classes, its character list has 3"):
        model.infer([blob(0, 224)])


@pytest.mark.parametrize("output", ["softmax", "ctc_logits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_an_error(output: str, value: float) -> None:
    scores = np.zeros((1, 3, 5), np.float32)
    scores[0, 1, 2] = value
    graph = FakeGraph(lambda _: [scores], outputs=[spec(output)])
    with np.errstate(invalid="ignore"), pytest.raises(InvalidOutput, match="not finite"):
        recogniser(graph).infer([blob(0, 224)])


def test_close_frees_the_graph() -> None:
    graph = FakeGraph(no_output)
    model = recogniser(graph)
    model.close()
    assert graph.is_closed
    assert (model.max_batch, model.size_bytes) == (4, 1234)
