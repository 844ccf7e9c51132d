"""Compare two services' answers to the same question. Pure: knows nothing about HTTP or files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from immich_ml_metal.client.calls import FaceAnswer
from immich_ml_metal.types import Floats

MIN_IOU = 0.5  # Immich matches a face to a stored one above this


@dataclass(frozen=True, slots=True, eq=False)
class FaceMatch:
    """Faces of one picture side by side: `pairs` are (ours, theirs) indices by falling IoU."""

    ours: FaceAnswer
    theirs: FaceAnswer
    pairs: tuple[tuple[int, int], ...]
    ious: tuple[float, ...]
    cosines: tuple[float, ...]
    only_ours: int
    only_theirs: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question to both services.

    Attributes:
        task: `clip image`, `clip text`, `faces` or `text`.
        subject: the picture's path, or the text.
        value: 1.0 is identical: a cosine, or the share of agreeing faces or lines; None when there
            was no answer to compare.
        ours_s: seconds we took.
        theirs_s: seconds they took.
        faces: the matched faces.
        lines: the text lines, ours and theirs.
        problem: why there is no value; empty where both refused alike.
    """

    task: str
    subject: str
    value: float | None
    ours_s: float
    theirs_s: float
    faces: FaceMatch | None = None
    lines: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    problem: str = ""


def cosine(first: Floats, second: Floats) -> float:
    """Cosine of two vectors (D,); 0 when the lengths differ or one is all zeros."""
    if first.shape != second.shape:
        return 0.0
    a, b = first.astype(np.float64), second.astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


def iou(first: Floats, second: Floats) -> Floats:
    """Overlap of every box of (N, 4) with every box of (M, 4), xyxy → (N, M) in 0..1."""
    corner_min = np.maximum(first[:, None, :2], second[None, :, :2])  # (N, M, 2)
    corner_max = np.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = np.prod(np.clip(corner_max - corner_min, 0, None), axis=2)  # (N, M)
    area_first = np.prod(first[:, 2:] - first[:, :2], axis=1)
    area_second = np.prod(second[:, 2:] - second[:, :2], axis=1)
    union = area_first[:, None] + area_second[None, :] - overlap
    ratios: Floats = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    return ratios


def match_faces(ours: FaceAnswer, theirs: FaceAnswer) -> FaceMatch:
    """Pair faces greedily by overlap, each at most once, and compare the pairs' vectors."""
    overlaps = iou(ours.boxes.reshape(-1, 4), theirs.boxes.reshape(-1, 4))
    pairs: list[tuple[int, int]] = []
    for flat in np.argsort(-overlaps, axis=None, kind="stable"):
        i, j = divmod(int(flat), overlaps.shape[1])
        if overlaps[i, j] <= MIN_IOU:
            break
        if all(i != a and j != b for a, b in pairs):
            pairs.append((i, j))
    return FaceMatch(
        ours=ours,
        theirs=theirs,
        pairs=tuple(pairs),
        ious=tuple(float(overlaps[i, j]) for i, j in pairs),
        cosines=tuple(cosine(ours.embeddings[i], theirs.embeddings[j]) for i, j in pairs),
        only_ours=len(ours.boxes) - len(pairs),
        only_theirs=len(theirs.boxes) - len(pairs),
    )


def face_agreement(match: FaceMatch) -> float:
    """Share of faces that both found, weighted by how alike their vectors are; 1.0 for no faces."""
    total = len(match.pairs) + match.only_ours + match.only_theirs
    return sum(max(value, 0.0) for value in match.cosines) / total if total else 1.0


def line_agreement(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Share of equal lines, whatever their order: 2·common / all; 1.0 when neither has any."""
    total = len(ours) + len(theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / total if total else 1.0
