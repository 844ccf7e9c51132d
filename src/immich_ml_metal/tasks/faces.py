"""Faces: SCRFD detection, five-point alignment, ArcFace vectors.

The rules are Immich's (contract §5): they must not drift by a pixel, because people are clustered
by vectors that were cut out with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from immich_ml_metal.errors import InferenceError, LoadFailed
from immich_ml_metal.tasks.images import Picture
from immich_ml_metal.tasks.vectors import check_finite, check_vector
from immich_ml_metal.types import Bytes, Faces, Floats, Graph, Tensor

CANVAS_PX = 640  # SCRFD's square input
STRIDES = (8, 16, 32)  # pixels of the canvas per cell, one head each
ANCHORS_PER_CELL = 2
HEAD_ROWS = [(CANVAS_PX // stride) ** 2 * ANCHORS_PER_CELL for stride in STRIDES]
NMS_IOU = 0.4
# Of one picture, the best: far more than a group portrait has at this input size. A `minScore` near
# 0 makes thousands of anchors faces, each with a vector to compute and 6 KB of answer.
MAX_FACES = 300
MAX_CANDIDATES = 5000  # anchors that overlaps are looked for among: a face has about ten

CROP_PX = 112  # ArcFace's square input
# Where ArcFace was trained to see the eyes, the nose and the mouth corners: xy, pixels of the crop.
ARCFACE_TEMPLATE: Floats = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ],
    dtype=np.float32,
)

# Below it, the landmarks lie on one point but for rounding; a face one pixel wide has about 100.
MIN_OVERLAP_PX2 = 1e-3


# -- detection -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FaceQuery:
    """Find the faces of a picture that score at least `min_score` (0..1)."""

    picture: Picture
    min_score: float


def fit_canvas(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture on the canvas: the longer side fills it, fractions cut off.

    A side never falls to zero: a picture more than 640 times as long as wide keeps one pixel.
    """
    width, height = size
    if height > width:
        return max(1, int(CANVAS_PX * width / height)), CANVAS_PX
    return CANVAS_PX, max(1, int(CANVAS_PX * height / width))


def letterbox(pixels: Bytes) -> Bytes:
    """(H, W, 3) RGB → (640, 640, 3) RGB, the picture in the top-left corner, zeros elsewhere."""
    new_width, new_height = fit_canvas((pixels.shape[1], pixels.shape[0]))
    canvas = np.zeros((CANVAS_PX, CANVAS_PX, 3), dtype=np.uint8)
    canvas[:new_height, :new_width] = cv2.resize(
        pixels, (new_width, new_height), interpolation=cv2.INTER_LINEAR
    )
    return canvas


def decode_heads(heads: Sequence[Tensor], *, min_score: float, scale: float) -> Faces:
    """SCRFD's nine outputs → faces, overlaps removed, best first.

    Args:
        heads: scores (N, 1), boxes (N, 4) and landmarks (N, 10) of each stride, in any order, with
            or without a batch axis; distances are in cells.
        min_score: 0..1, inclusive.
        scale: canvas pixels per picture pixel.
    """
    scores: list[Floats] = []
    boxes: list[Floats] = []
    landmarks: list[Floats] = []
    for stride, (score, distance, offset) in zip(STRIDES, _by_stride(heads), strict=True):
        (kept,) = np.nonzero(score[:, 0] >= min_score)
        centres = _anchor_centres(kept, stride)  # (n, 2)
        reach = distance[kept] * stride  # (n, 4) left, top, right, bottom
        scores.append(score[kept, 0])
        boxes.append(np.hstack([centres - reach[:, :2], centres + reach[:, 2:]]))
        landmarks.append(centres[:, None, :] + (offset[kept] * stride).reshape(-1, 5, 2))
    found = Faces(
        boxes=np.concatenate(boxes) / scale,
        scores=np.concatenate(scores),
        landmarks=np.concatenate(landmarks) / scale,
    )
    found = _best(found, MAX_CANDIDATES)
    best = _suppress(found)[:MAX_FACES]
    return Faces(np.round(found.boxes[best]), found.scores[best], found.landmarks[best])


def _by_stride(heads: Sequence[Tensor]) -> list[tuple[Floats, Floats, Floats]]:
    """The heads as (scores, boxes, landmarks) per stride, told apart by their shapes."""
    flat = [np.asarray(head, dtype=np.float32).reshape(-1, head.shape[-1]) for head in heads]
    kinds = [
        sorted((head for head in flat if head.shape[1] == width), key=len, reverse=True)
        for width in (1, 4, 10)
    ]
    if any([len(head) for head in kind] != HEAD_ROWS for kind in kinds):
        shapes = [head.shape for head in heads]
        raise InferenceError(f"the face detector's outputs are not SCRFD's: {shapes}")
    return list(zip(*kinds, strict=True))


def _anchor_centres(rows: Tensor, stride: int) -> Floats:
    """(n, 2) xy of anchors on the canvas: row-major cells, both anchors of a cell side by side."""
    cell_y, cell_x = np.divmod(rows // ANCHORS_PER_CELL, CANVAS_PX // stride)
    return np.stack([cell_x, cell_y], axis=1).astype(np.float32) * stride


def _best(faces: Faces, count: int) -> Faces:
    """The `count` best, in the order they came."""
    if len(faces) <= count:
        return faces
    kept = np.sort(np.argsort(-faces.scores, kind="stable")[:count])
    return Faces(faces.boxes[kept], faces.scores[kept], faces.landmarks[kept])


def _suppress(faces: Faces) -> Tensor:
    """Rows to keep, best score first: greedy non-maximum suppression."""
    if len(faces) == 0:
        return np.empty(0, dtype=np.intp)
    corner, size = faces.boxes[:, :2], faces.boxes[:, 2:] - faces.boxes[:, :2]
    xywh = np.hstack([corner, size])
    kept = cv2.dnn.NMSBoxes(xywh.tolist(), faces.scores.tolist(), 0.0, NMS_IOU)
    return np.asarray(kept, dtype=np.intp).reshape(-1)


class FaceDetector:
    """Picture → `Faces`, through an SCRFD graph."""

    max_batch = 1  # the heads of the legacy exports have no batch axis

    def __init__(self, graph: Graph, *, name: str) -> None:
        """Raises LoadFailed when the graph has not SCRFD's nine outputs."""
        if len(graph.outputs) != 3 * len(STRIDES):
            raise LoadFailed(f"{name}: {len(graph.outputs)} outputs, an SCRFD detector has 9")
        self._graph = graph
        self._name = name
        self._input = graph.inputs[0]
        self.size_bytes = graph.size_bytes

    def preprocess(self, item: FaceQuery) -> Tensor:
        """Picture → (640, 640, 3) uint8 for a fused graph, else (3, 640, 640) float32."""
        canvas = letterbox(item.picture.pixels)
        if self._input.dtype == np.uint8:
            return canvas
        # (x - 127.5) / 128, in OpenCV's planes
        blob = cv2.dnn.blobFromImage(canvas, 1 / 128, mean=(127.5, 127.5, 127.5))
        return np.asarray(blob[0])

    def infer(self, batch: Sequence[Tensor]) -> Sequence[list[Tensor]]:
        """One canvas → its nine heads."""
        return [
            [
                check_finite(head, name=self._name)
                for head in self._graph.run({self._input.name: blob[None]})
            ]
            for blob in batch
        ]

    def postprocess(self, raw: list[Tensor], item: FaceQuery) -> Faces:
        """Heads → faces in the picture's pixels."""
        height = item.picture.size[1]
        scale = fit_canvas(item.picture.size)[1] / height  # of both axes, as the official service
        faces = decode_heads(raw, min_score=item.min_score, scale=scale)
        check_finite(faces.boxes, name=self._name)  # finite heads may overflow on the way here
        check_finite(faces.landmarks, name=self._name)
        return faces

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()


# -- recognition -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FaceCrop:
    """One face to embed: `landmarks` is (5, 2) xy in the picture's pixels."""

    picture: Picture
    landmarks: Floats


def similarity_transform(points: Floats, template: Floats = ARCFACE_TEMPLATE) -> Floats:
    """The rotation, uniform scale and shift that brings `points` nearest to `template`.

    Umeyama's least squares; in the plane, with points as complex numbers, it is one division.

    Args:
        points: (5, 2) xy.
        template: (5, 2) xy.

    Returns:
        (2, 3), to be applied to column vectors (x, y, 1).

    Raises:
        InferenceError: the points lie on one another, so that no scale fits them.
    """
    source = points.astype(np.float64) @ np.array([1, 1j])
    target = template.astype(np.float64) @ np.array([1, 1j])
    centred = source - source.mean()
    overlap = np.vdot(centred, target - target.mean())
    if abs(overlap) < MIN_OVERLAP_PX2:
        raise InferenceError(f"the landmarks of a face lie on one another: {points.tolist()}")
    turn = overlap / np.vdot(centred, centred).real
    shift = target.mean() - turn * source.mean()
    return np.array(
        [[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]], dtype=np.float32
    )


def align(pixels: Bytes, landmarks: Floats) -> Bytes:
    """Cut one face out of (H, W, 3) RGB, upright, as (112, 112, 3); black outside the picture."""
    return warp_affine(pixels, similarity_transform(landmarks), CROP_PX)


def warp_affine(pixels: Bytes, matrix: Floats, side_px: int) -> Bytes:
    """Bilinear warp in the fixed-point arithmetic of OpenCV 4's `warpAffine`, bit for bit.

    The official service runs OpenCV 4: positions in 1/32 pixel, rounded as it does. OpenCV 5
    interpolates otherwise in `warpAffine`, which moves face vectors by up to 0.0004 in cosine, but
    its `remap` still takes fixed-point positions. Goes when the official service runs OpenCV 5.

    Args:
        pixels: (H, W, 3) uint8.
        matrix: (2, 3), from the picture to the crop.
        side_px: side of the square crop.

    Returns:
        (side_px, side_px, 3) uint8, zero where the crop leaves the picture.
    """
    whole, fraction = np.divmod(_crop_positions(matrix, side_px), _SUBPIXELS)  # (2, S, S) px, 1/32
    part, near = _needed_part(pixels, whole)
    return np.asarray(
        cv2.remap(
            part,
            np.ascontiguousarray(near.transpose(1, 2, 0), dtype=np.int16),
            (fraction[1] * _SUBPIXELS + fraction[0]).astype(np.uint16),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
        ),
        dtype=np.uint8,
    )


def _needed_part(pixels: Bytes, whole: Tensor) -> tuple[Bytes, Tensor]:
    """The part of a picture a crop touches, and `whole` (2, S, S) counted from its corner.

    `remap` takes 16-bit positions, which do not reach across a large picture.
    """
    limit = np.array(pixels.shape[1::-1])
    corner = whole.min(axis=(1, 2)).clip(0, limit - 1)
    end = np.maximum(whole.max(axis=(1, 2)) + 2, corner + 1)  # one pixel at least
    part = pixels[corner[1] : end[1], corner[0] : end[0]]
    near = (whole - corner[:, None, None]).clip(-2, np.array(part.shape[1::-1])[:, None, None] + 1)
    return part, near


def _crop_positions(matrix: Floats, side_px: int) -> Tensor:
    """(2, S, S) xy of each pixel of the crop in the picture, in 1/32 pixel, rounded as OpenCV 4."""
    inverse = np.linalg.inv(np.vstack([matrix.astype(np.float64), [0, 0, 1]]))[:2]
    steps = np.arange(side_px)
    across = np.rint(inverse[:, :1] * steps * _COORDINATE_UNITS).astype(np.int64)  # (2, S)
    down = np.rint((inverse[:, 1:2] * steps + inverse[:, 2:]) * _COORDINATE_UNITS)
    down = down.astype(np.int64) + _UNITS_PER_STEP // 2
    return (down[:, :, None] + across[:, None, :]) // _UNITS_PER_STEP


_COORDINATE_UNITS = 1024  # OpenCV 4 computes positions in 1/1024 pixel
_SUBPIXELS = 32  # and interpolates in 1/32 pixel
_UNITS_PER_STEP = _COORDINATE_UNITS // _SUBPIXELS


class FaceRecogniser:
    """Face → vector (512,) float32, not normalised, through an ArcFace graph."""

    def __init__(self, graph: Graph, *, name: str, dim: int | None) -> None:
        self._graph = graph
        self._name = name
        self._dim = dim
        self._input = graph.inputs[0]
        self.max_batch = graph.max_batch
        self.size_bytes = graph.size_bytes

    def preprocess(self, item: FaceCrop) -> Tensor:
        """Face → (112, 112, 3) uint8 for a fused graph, else (3, 112, 112) float32."""
        crop = align(item.picture.pixels, item.landmarks)
        if self._input.dtype == np.uint8:
            return crop
        return (crop.transpose(2, 0, 1) - np.float32(127.5)) * np.float32(1 / 127.5)

    def infer(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """N crops → N vectors."""
        return list(self._graph.run({self._input.name: np.stack(batch)})[0])

    def postprocess(self, raw: Tensor, item: FaceCrop) -> Floats:
        """Check the vector."""
        return check_vector(raw, name=self._name, dim=self._dim)

    def close(self) -> None:
        """Free the graph."""
        self._graph.close()
