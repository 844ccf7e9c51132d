"""Two answers to the same question, as numbers: how far are they apart? Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from immich_ml_metal.onnx_graph.gap import Gap
from immich_ml_metal.types import Faces, Reading, Tensor, TextRegions

# Below it a line is a guess, which may go either way; Immich shows lines from 0.8 on.
READ_SCORE = 0.5
# Two boxes that overlap more than this are one and the same.
SAME_BOX_IOU = 0.5


def worst(gaps: Iterable[Gap]) -> Gap:
    """The worst of each figure."""
    found = list(gaps)
    return Gap(
        min(one.cosine for one in found),
        max(one.largest for one in found),
        max(one.relative for one in found),
        sum(one.not_finite for one in found),
    )


def flatten(raw: object) -> list[Tensor]:
    """The arrays of a model's raw answer, which may be one, or several in lists and tuples."""
    if isinstance(raw, (list, tuple)):
        return [array for part in raw for array in flatten(part)]
    return [np.asarray(raw)]


@dataclass(frozen=True, slots=True)
class BoxGap:
    """How found boxes differ: those that only one found, how far the others moved, their scores."""

    unmatched: int
    moved_px: float
    score_gap: float


def box_gap(ours: Faces | TextRegions, theirs: Faces | TextRegions) -> BoxGap:
    """Match boxes by overlap and measure. A box whose score is at the threshold may come or go."""
    a, b = _corners(ours), _corners(theirs)
    pairs = _matched(_bounds(a), _bounds(b))
    rows = [i for i, _ in pairs], [j for _, j in pairs]
    moved = np.abs(a[rows[0]] - b[rows[1]]).max(initial=0)
    scores = np.abs(ours.scores[rows[0]] - theirs.scores[rows[1]]).max(initial=0)
    return BoxGap(len(a) + len(b) - 2 * len(pairs), float(moved), float(scores))


def _corners(found: Faces | TextRegions) -> Tensor:
    """(N, 4, 2) xy, pixels."""
    if isinstance(found, TextRegions):
        return found.quads
    left, top, right, bottom = found.boxes.reshape(-1, 4).T
    return np.stack([left, top, right, top, right, bottom, left, bottom], axis=1).reshape(-1, 4, 2)


def _bounds(corners: Tensor) -> Tensor:
    """(N, 4) xyxy around (N, 4, 2) corners."""
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _matched(ours: Tensor, theirs: Tensor) -> list[tuple[int, int]]:
    pairs, free = [], set(range(len(theirs)))
    for i, box in enumerate(ours):
        best = max(free, key=lambda j: _overlap(box, theirs[j]), default=None)
        if best is not None and _overlap(box, theirs[best]) > SAME_BOX_IOU:
            free.discard(best)
            pairs.append((i, best))
    return pairs


def _overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of two xyxy boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod((high - low).clip(0)))
    areas = [float(np.prod((box[2:] - box[:2]).clip(0))) for box in (one, other)]
    return shared / (sum(areas) - shared) if shared else 0.0


def reading_gap(ours: Sequence[Reading], theirs: Sequence[Reading]) -> tuple[int, float]:
    """Lines that read otherwise, and the largest difference of their scores."""
    pairs = list(zip(ours, theirs, strict=True))
    differ = sum(a.text != b.text for a, b in pairs if b.score >= READ_SCORE)
    return differ, max((abs(a.score - b.score) for a, b in pairs), default=0.0)
