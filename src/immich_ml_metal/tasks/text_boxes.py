"""Text detection: picture → text boxes in reading order, through a PP-OCR detector (DB).

The rules are those of Immich 3.3 (contract §6.1 to §6.3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from immich_ml_metal.errors import InferenceError
from immich_ml_metal.tasks.images import Picture, resize
from immich_ml_metal.tasks.vectors import bgr_planes, check_finite
from immich_ml_metal.types import Floats, Graph, Tensor, TextRegions

# Half of what comes before the network is Lanczos, and Immich asks for one text at a time.
RESIZING_THREADS = 2
MIN_SIDE_PX = 32  # smaller pictures hold no text, and the network halves its input five times
MULTIPLE_PX = 32
# The official service bounds the short side only. This bounds the area, so that a panorama cannot
# take gigabytes: the largest of the official canvases (contract §6.1).
MAX_DETECTION_PIXELS = 2880 * 1440
# Canvases of engines that compile a graph per shape: long side by short side (contract §6.1).
CANVAS_RATIOS = (1, 4 / 3, 3 / 2, 16 / 9, 2)

BINARY_THRESHOLD = 0.3
MAX_CONTOURS = 1000
MIN_RECT_PX = 3  # short side of a candidate, pixels of the probability map
MIN_GROWN_PX = 5  # and of the box grown from it
UNCLIP_RATIO = 1.6
MIN_EDGE_PX = 3  # boxes whose top or left edge is not longer than this are dropped
LINE_GAP_PX = 10  # boxes whose tops lie closer are on one line


@dataclass(frozen=True, slots=True)
class TextRegionQuery:
    """Find text scoring at least `min_score`, the short side reduced to `max_resolution` px."""

    picture: Picture
    min_score: float
    max_resolution: int


def detection_size(size: tuple[int, int], max_resolution: int) -> tuple[int, int]:
    """(width, height) a picture is resized to: both sides the nearest multiples of 32.

    The short side is reduced to `max_resolution` px, never enlarged; the area is bounded.
    """
    width, height = size
    ratio = min(1.0, max_resolution / min(width, height))
    ratio = min(ratio, math.sqrt(MAX_DETECTION_PIXELS / (width * height)))

    def snap(side: int) -> int:
        return max(MULTIPLE_PX, round(side * ratio / MULTIPLE_PX) * MULTIPLE_PX)

    return snap(width), snap(height)


def canvas_size(size: tuple[int, int]) -> tuple[int, int]:
    """The smallest listed (width, height) that holds `size`, or `size` where none does."""
    short, long = sorted(size)
    for ratio in CANVAS_RATIOS:
        side = -(-round(short * ratio) // MULTIPLE_PX) * MULTIPLE_PX
        if side >= long:
            return (side, short) if size[0] >= size[1] else (short, side)
    return size


@dataclass(frozen=True, slots=True)
class _Blob:
    """What the graph takes, and how much of its map is picture: (width, height)."""

    tensor: Tensor
    content: tuple[int, int]


class TextDetector:
    """Picture → `TextRegions` without readings."""

    max_batch = 1  # pictures differ in shape

    def __init__(self, graph: Graph, *, name: str) -> None:
        self._graph = graph
        self._name = name
        self._input = graph.inputs[0]
        self.size_bytes = graph.size_bytes

    def preprocess(self, item: TextRegionQuery) -> _Blob | None:
        """Picture → (H, W, 3) uint8 RGB for a fused graph, else (3, H, W) float32 BGR in -1..1.

        None for a picture too small to hold text.
        """
        if min(item.picture.size) < MIN_SIDE_PX:
            return None
        size = detection_size(item.picture.size, item.max_resolution)
        resized = resize(
            item.picture.image, size, Image.Resampling.LANCZOS, threads=RESIZING_THREADS
        )
        pixels = np.asarray(resized)
        if self._graph.fixed_shapes:
            width, height = canvas_size(size)
            canvas = np.zeros((height, width, 3), dtype=np.uint8)
            canvas[: size[1], : size[0]] = pixels
            pixels = canvas
        if self._input.dtype == np.uint8:
            return _Blob(pixels, size)
        return _Blob(bgr_planes(pixels), size)

    def infer(self, batch: Sequence[_Blob | None]) -> Sequence[Floats]:
        """One picture → its (H, W) map of text probabilities, the content only."""
        return [self._infer_one(blob) for blob in batch]

    def _infer_one(self, blob: _Blob | None) -> Floats:
        if blob is None:
            return np.zeros((0, 0), dtype=np.float32)
        output = self._graph.run({self._input.name: blob.tensor[None]})[0]
        if output.size != blob.tensor.size // 3:
            raise InferenceError(f"{self._name} maps {blob.tensor.shape} to {output.shape}")
        width, height = blob.content
        probability = check_finite(output, name=self._name).reshape(output.shape[-2:])
        return probability[:height, :width]

    def postprocess(self, raw: Floats, item: TextRegionQuery) -> TextRegions:
        """Map → boxes in the picture's pixels, in reading order."""
        if raw.size == 0:
            return TextRegions(np.empty((0, 4, 2), np.float32), np.empty(0, np.float32))
        return find_regions(raw, size=item.picture.size, min_score=item.min_score)

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()


# -- probability map → boxes -----------------------------------------------------------------------


def find_regions(probability: Floats, *, size: tuple[int, int], min_score: float) -> TextRegions:
    """Boxes of connected text in a (H, W) map, in reading order.

    Args:
        probability: of each cell to be text, 0..1.
        size: (width, height) of the picture in pixels, the frame of the result.
        min_score: lowest mean probability inside a box, inclusive.
    """
    to_picture = np.array(size, np.float32) / np.array(probability.shape[::-1], np.float32)
    quads, scores = [], []
    for contour in _contours(probability):
        rect = cv2.minAreaRect(contour)
        if min(rect[1]) < MIN_RECT_PX:
            continue
        score = _mean_inside(probability, _corners(rect))
        grown = grow(rect)
        if score < min_score or min(grown[1]) < MIN_GROWN_PX:
            continue
        quad = order_corners(np.round(_corners(grown) * to_picture).clip(0, size))
        quad = quad.clip(0, np.array(size, np.float32) - 1)
        if _is_large_enough(quad):
            quads.append(quad)
            scores.append(score)
    regions = TextRegions(
        np.array(quads, np.float32).reshape(-1, 4, 2), np.array(scores, dtype=np.float32)
    )
    order = reading_order(regions.quads)
    return TextRegions(regions.quads[order], regions.scores[order])


def _contours(probability: Floats) -> Sequence[Tensor]:
    """Outlines of what is likely text, (n, 1, 2) xy each, in the order OpenCV finds them."""
    binary = (probability > BINARY_THRESHOLD).astype(np.uint8)
    closed = cv2.dilate(binary, np.ones((2, 2), dtype=np.uint8))
    contours, _ = cv2.findContours(closed, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return contours[:MAX_CONTOURS]


Rect = tuple[Sequence[float], Sequence[float], float]  # OpenCV's: centre xy, size wh, angle in deg


def grow(rect: Rect) -> Rect:
    """Grow a rectangle by area · 1.6 / perimeter on every side: the network sees text shrunk."""
    centre, (width, height), angle = rect
    growth = width * height * UNCLIP_RATIO / (width + height)  # both sides of one axis together
    return centre, (width + growth, height + growth), angle


def _corners(rect: Rect) -> Floats:
    """(4, 2) corners, in OpenCV's order."""
    return np.asarray(cv2.boxPoints(rect), dtype=np.float32)


def order_corners(quad: Floats) -> Floats:
    """(4, 2) corners → clockwise from top-left: the two left-most by x, each pair by y."""
    by_x = quad[np.lexsort((quad[:, 1], quad[:, 0]))]  # ties by y: any order in, one order out
    left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
    right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
    return np.array([left[0], right[0], right[1], left[1]], dtype=np.float32)


def reading_order(quads: Floats) -> Tensor:
    """Indices that sort (N, 4, 2) quads into lines from the top, and each line from the left."""
    x, y = quads[:, 0, 0], quads[:, 0, 1]
    by_y = np.argsort(y, kind="stable")
    line = np.empty(len(quads), dtype=np.intp)
    line[by_y] = np.concatenate([[0], np.cumsum(np.diff(y[by_y]) >= LINE_GAP_PX)])[: len(quads)]
    # the last key is the first to sort by; ties keep the order from the top
    return by_y[np.lexsort((x[by_y], line[by_y]))]


def _mean_inside(probability: Floats, corners: Floats) -> float:
    """Mean of the map inside a rotated rectangle."""
    low = np.floor(corners.min(axis=0)).astype(int).clip(0)
    high = np.ceil(corners.max(axis=0)).astype(int)
    window = probability[low[1] : high[1] + 1, low[0] : high[0] + 1]  # ends where the map does
    mask = np.zeros(window.shape, dtype=np.uint8)
    cv2.fillPoly(mask, [(corners - low).astype(np.int32)], (1,))
    return float(cv2.mean(np.ascontiguousarray(window), mask)[0])


def _is_large_enough(quad: Floats) -> bool:
    top = int(np.linalg.norm(quad[1] - quad[0]))
    left = int(np.linalg.norm(quad[3] - quad[0]))
    return min(top, left) > MIN_EDGE_PX
