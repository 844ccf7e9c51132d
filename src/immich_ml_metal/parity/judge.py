"""What a difference between two services means for a user's index, in figures and in words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from immich_ml_metal.parity.compare import Comparison

# Duplicate detection cuts at a cosine distance of 0.01, so two services may share an index only if
# the same picture differs by far less than that between them.
CLIP_SAFE_P5 = 0.9995
CLIP_SAFE_MIN = 0.999
# People are clustered at a cosine distance of 0.5. Landmarks from another detector cost about 0.02
# (one published comparison: median 0.980), which can move a face at the edge; below 0.9 the vectors
# are no longer of the same kind.
FACE_SAFE_MEDIAN = 0.995
FACE_SAFE_MATCHED = 0.97
FACE_MIX_MEDIAN = 0.9
TEXT_SAFE = 0.9
LEAST_FACES = 3  # fewer say nothing of the next thousand


class Difference(IntEnum):
    """How bad a difference is."""

    SAFE = 0
    DIFFERS = 1
    UNSAFE = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """All comparisons of one task; `level` and `reason` say what they mean."""

    task: str
    count: int
    problems: tuple[str, ...]
    minimum: float | None
    p5: float | None
    median: float | None
    speed: float | None  # their median time over ours: above 1 we are faster
    level: Difference
    reason: str
    faces_both: int = 0
    faces_only_ours: int = 0
    faces_only_theirs: int = 0
    iou_median: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement over all tasks, in words."""

    level: Difference
    words: str
    reasons: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Everything one run found: the two addresses, each comparison, the figures, the judgement."""

    ours: str
    theirs: str
    comparisons: tuple[Comparison, ...]
    summaries: tuple[TaskSummary, ...]
    verdict: Verdict
    cause: str = ""


def summarise(task: str, comparisons: Sequence[Comparison]) -> TaskSummary:
    """The figures of one task and what they mean."""
    answered = [c for c in comparisons if c.value is not None]
    matches = [c.faces for c in comparisons if c.faces is not None]
    values = [c.value for c in comparisons if c.value is not None]
    if task == "faces":
        values = [value for match in matches for value in match.cosines]
    problems = tuple(f"{c.subject}: {c.problem}" for c in comparisons if c.problem)
    ious = [value for match in matches for value in match.ious]
    faces = (
        len(ious),
        sum(match.only_ours for match in matches),
        sum(match.only_theirs for match in matches),
    )
    spread = _spread(values)
    level, reason = _judge(task, spread, len(problems), faces, len(answered))
    speed, iou = _speed(answered), float(np.median(ious)) if ious else None
    return TaskSummary(
        task, len(answered), problems, *spread, speed, level, reason, *faces, iou_median=iou
    )


def judge(summaries: Iterable[TaskSummary]) -> Verdict:
    """The verdict in words over every task that was compared."""
    summaries = list(summaries)
    reasons = tuple(f"{s.task}: {s.reason}" for s in summaries if s.reason)
    if not any(s.count for s in summaries):
        return Verdict(Difference.UNKNOWN, "nothing could be compared", reasons)
    worst = max(
        (s.level for s in summaries if s.level is not Difference.UNKNOWN), default=Difference.SAFE
    )
    if worst is Difference.UNSAFE:
        return Verdict(Difference.UNSAFE, "do not mix", reasons)
    unknown = [s.task for s in summaries if s.level is Difference.UNKNOWN]
    if worst is Difference.SAFE and unknown:
        words = f"not known to be safe: {', '.join(unknown)} not compared"
        return Verdict(Difference.UNKNOWN, words, reasons)
    if worst is Difference.SAFE:
        return Verdict(Difference.SAFE, "safe to switch", reasons)
    kinds = {"faces": "people", "text": "text"}
    differing = [
        kinds[s.task] for s in summaries if s.level is Difference.DIFFERS and s.task in kinds
    ]
    return Verdict(
        Difference.DIFFERS, f"safe for search; {' and '.join(differing)} may differ", reasons
    )


def _judge(
    task: str,
    spread: tuple[float | None, float | None, float | None],
    problems: int,
    faces: tuple[int, int, int],
    answered: int,
) -> tuple[Difference, str]:
    refused = f"{problems} answered by one side only" if problems else ""
    if not answered:
        return (Difference.UNSAFE, refused) if problems else (Difference.UNKNOWN, "not compared")
    minimum, p5, median = spread
    if task == "faces":
        level, reason = _judge_faces(median, *faces)
    elif task == "text":
        level, reason = _judge_text(median)
    else:
        level, reason = _judge_clip(minimum, p5)
    if problems:
        level = max(level, Difference.UNSAFE if task.startswith("clip") else Difference.DIFFERS)
    return level, "; ".join(filter(None, (reason, refused)))


def _judge_clip(minimum: float | None, p5: float | None) -> tuple[Difference, str]:
    assert minimum is not None
    assert p5 is not None
    if minimum >= CLIP_SAFE_MIN and p5 >= CLIP_SAFE_P5:
        return Difference.SAFE, ""
    return (
        Difference.UNSAFE,
        f"vectors differ: lowest cosine {minimum:.4f} (needs {CLIP_SAFE_MIN}), "
        f"5th percentile {p5:.5f} (needs {CLIP_SAFE_P5})",
    )


def _judge_faces(
    median: float | None, both: int, only_ours: int, only_theirs: int
) -> tuple[Difference, str]:
    total = both + only_ours + only_theirs
    if not total:
        return Difference.UNKNOWN, "no face in any of these pictures"
    if median is not None and median < FACE_MIX_MEDIAN:
        return Difference.UNSAFE, f"median face cosine {median:.3f} (needs {FACE_MIX_MEDIAN})"
    reasons = []
    if both / total < FACE_SAFE_MATCHED:
        reasons.append(f"{both} of {total} faces found by both (needs {FACE_SAFE_MATCHED:.0%})")
    if median is not None and median < FACE_SAFE_MEDIAN:
        reasons.append(f"median face cosine {median:.4f} (needs {FACE_SAFE_MEDIAN})")
    if not reasons and total < LEAST_FACES:
        few = f"only {total} faces in these pictures (needs {LEAST_FACES})"
        return Difference.UNKNOWN, few
    return (Difference.DIFFERS if reasons else Difference.SAFE), "; ".join(reasons)


def _judge_text(median: float | None) -> tuple[Difference, str]:
    assert median is not None
    if median >= TEXT_SAFE:
        return Difference.SAFE, ""
    return Difference.DIFFERS, f"{median:.0%} of lines agree (needs {TEXT_SAFE:.0%})"


def _spread(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    if not values:
        return None, None, None
    array = np.asarray(values, np.float64)
    return float(array.min()), float(np.percentile(array, 5)), float(np.median(array))


def _speed(answered: Sequence[Comparison]) -> float | None:
    if not answered:
        return None
    ours = float(np.median([c.ours_s for c in answered]))
    theirs = float(np.median([c.theirs_s for c in answered]))
    return theirs / ours if ours > 0 else None
