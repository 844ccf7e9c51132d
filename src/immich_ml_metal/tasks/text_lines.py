"""Text recognition: text box → line of text, through a PP-OCR recogniser (CTC).

The rules are those of Immich 3.3 (contract §6.4). What a line reads never depends on its company in
a batch: each line has its own tensor width, and only equal widths share a run.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from immich_ml_metal.errors import InferenceError
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.vectors import bgr_planes, check_finite
from immich_ml_metal.types import Bytes, Floats, Graph, Reading, Tensor

LINE_HEIGHT_PX = 48
MIN_WIDTH_PX, MAX_WIDTH_PX = 224, 2048
WIDTH_MARGIN = 1.25  # empty space behind the line, of its width
FIXED_WIDTHS_PX = (224, 320, 448, 640, 1280, 2048)  # of engines that compile a graph per shape
# The official service cuts any size out. A thousand boxes may each be as large as the picture; a
# line is brought to 48 pixels of height anyway.
MAX_CROP_PIXELS = 16_000_000
UPRIGHT_RATIO = 1.5  # lines this much taller than wide are vertical and are turned
PAD_BYTE = 127  # what fused graphs see behind the line; 0 after normalisation in float graphs
BLANK = 0  # CTC's blank class


@dataclass(frozen=True, slots=True)
class LineCrop:
    """One line to read: `quad` is (4, 2) xy in the picture's pixels, clockwise from top-left."""

    picture: Picture
    quad: Floats


def cut_line(picture: Picture, quad: Floats) -> Bytes:
    """Cut a quad out of a picture and straighten it: (height, width, 3) RGB, black outside."""
    top, right, bottom, left = (
        float(np.linalg.norm(quad[a] - quad[b])) for a, b in ((1, 0), (2, 1), (3, 2), (3, 0))
    )
    width, height = max(1, int(max(top, bottom))), max(1, int(max(left, right)))
    if width * height > MAX_CROP_PIXELS:
        shrink = math.sqrt(MAX_CROP_PIXELS / (width * height))
        width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    image = picture.image.transform(
        (width, height),
        Image.Transform.PERSPECTIVE,
        perspective_coefficients(quad, width, height),
        Image.Resampling.BICUBIC,
    )
    if height / width >= UPRIGHT_RATIO:
        image = image.transpose(Image.Transpose.ROTATE_90)  # counter-clockwise
    return np.asarray(image)


def perspective_coefficients(quad: Floats, width: int, height: int) -> list[float]:
    """Pillow's eight numbers that map a (width, height) rectangle onto `quad` (4, 2).

    Solved in float32, the rows of x and y by turns, as by the official service: in float64 most
    pixels of a tilted line come out one level away, and some scores move by 0.01.
    """
    u = np.array([0, width, width, 0], dtype=np.float32)
    v = np.array([0, 0, height, height], dtype=np.float32)
    corners = quad.astype(np.float32)
    x, y = corners.T
    one, zero = np.ones(4, dtype=np.float32), np.zeros(4, dtype=np.float32)
    rows = np.empty((8, 8), dtype=np.float32)
    rows[0::2] = np.stack([u, v, one, zero, zero, zero, -u * x, -v * x], axis=1)
    rows[1::2] = np.stack([zero, zero, zero, u, v, one, -u * y, -v * y], axis=1)
    try:
        solution = np.linalg.solve(rows, corners.reshape(8))
    except np.linalg.LinAlgError as exc:
        raise InferenceError(f"a text box has no area: {quad.tolist()}") from exc
    return [float(value) for value in solution]


def tensor_width(ratio: float, *, fixed: bool) -> int:
    """Width in pixels of the tensor for a line `ratio` times as wide as high."""
    if fixed:
        crop = math.ceil(LINE_HEIGHT_PX * ratio)
        return next((w for w in FIXED_WIDTHS_PX if w >= crop), FIXED_WIDTHS_PX[-1])
    wanted = math.ceil(WIDTH_MARGIN * int(LINE_HEIGHT_PX * ratio))
    return min(max(wanted, MIN_WIDTH_PX), MAX_WIDTH_PX)


def decode_ctc(classes: Tensor, confidences: Floats, charset: Sequence[str]) -> Reading:
    """Best class per step → text: repeats collapse, blanks drop.

    Args:
        classes: (T,) indices into `charset`.
        confidences: (T,) probability of each, 0..1.
        charset: the characters by class; class 0 is the blank.

    Returns:
        The text, and the mean confidence of the kept steps; 0 for an empty text.
    """
    is_kept = (classes != BLANK) & np.concatenate([[True], classes[1:] != classes[:-1]])
    if not is_kept.any():
        return Reading("", 0.0)
    kept: list[int] = classes[is_kept].tolist()
    text = "".join(charset[index] for index in kept)
    return Reading(text, float(confidences[is_kept].mean(dtype=np.float32)))


class TextRecogniser:
    """Line → `Reading`."""

    def __init__(self, graph: Graph, charset: Sequence[str], *, name: str) -> None:
        """`charset` is without the blank and the final space; both are added here."""
        self._graph = graph
        self._name = name
        self._charset = ("", *charset, " ")
        self._input = graph.inputs[0]
        self._gives_logits = graph.outputs[0].name == "ctc_logits"
        self.max_batch = graph.max_batch
        self.size_bytes = graph.size_bytes

    def preprocess(self, item: LineCrop) -> Tensor:
        """Line → (48, W, 3) uint8 RGB for a fused graph, else (3, 48, W) float32 BGR in -1..1."""
        crop = cut_line(item.picture, item.quad)
        ratio = crop.shape[1] / crop.shape[0]
        width = tensor_width(ratio, fixed=self._graph.fixed_shapes)
        line_width = max(1, min(math.ceil(LINE_HEIGHT_PX * ratio), width))
        size = (line_width, LINE_HEIGHT_PX)
        line = np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
        if self._input.dtype == np.uint8:
            canvas = np.full((LINE_HEIGHT_PX, width, 3), PAD_BYTE, dtype=np.uint8)
            canvas[:, :line_width] = line
            return canvas
        blob = np.zeros((3, LINE_HEIGHT_PX, width), dtype=np.float32)
        blob[:, :, :line_width] = bgr_planes(line)
        return blob

    def infer(self, batch: Sequence[Tensor]) -> Sequence[tuple[Tensor, Floats]]:
        """N lines → best class and its probability per step, (T,) each."""
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, blob in enumerate(batch):
            by_shape[blob.shape].append(row)
        results: dict[int, tuple[Tensor, Floats]] = {}
        for rows in by_shape.values():
            outputs = self._graph.run({self._input.name: np.stack([batch[row] for row in rows])})
            classes, confidences = self._best(outputs)
            results.update(zip(rows, zip(classes, confidences, strict=True), strict=True))
        return [results[row] for row in range(len(batch))]

    def _best(self, outputs: list[Tensor]) -> tuple[Tensor, Floats]:
        """The graph's outputs → best class and its probability, (N, T) each.

        Whole numbers are classes and what stands beside them their probabilities, whatever the two
        are called: exporters have changed the names.
        """
        chosen = [one for one in outputs if one.dtype.kind in "iu"]
        if chosen:
            classes = chosen[0].astype(np.intp)
            beside = [one for one in outputs if one.dtype.kind == "f" and one.ndim == classes.ndim]
            if not beside:
                raise InferenceError(f"{self._name} gives classes without their probabilities")
            confidences = beside[0].astype(np.float32)
            self._check_indices(classes)
        else:
            scores = outputs[0].astype(np.float32, copy=False)  # (N, T, C)
            self._check_class_count(scores.shape[-1])
            classes = scores.argmax(axis=-1)
            confidences = np.take_along_axis(scores, classes[..., None], axis=-1)[..., 0]
            if self._gives_logits:  # softmax of the best class
                confidences = 1 / np.exp(scores - confidences[..., None]).sum(axis=-1)
        return classes, check_finite(confidences, name=self._name)

    def _check_indices(self, classes: Tensor) -> None:
        if classes.min(initial=0) < 0 or classes.max(initial=0) >= len(self._charset):
            raise InferenceError(
                f"{self._name} gave the classes {classes.min()} to {classes.max()}, "
                f"its character list has {len(self._charset)}"
            )

    def _check_class_count(self, count: int) -> None:
        if count != len(self._charset):
            raise InferenceError(
                f"{self._name} knows {count} classes, its character list has {len(self._charset)}"
            )

    def postprocess(self, raw: tuple[Tensor, Floats], item: LineCrop) -> Reading:
        """Steps → text."""
        return decode_ctc(*raw, self._charset)

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()
