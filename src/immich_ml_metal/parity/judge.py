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


class Level(IntEnum):
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
    level: Level
    reason: str
    faces_both: int = 0
    faces_only_ours: int = 0
    faces_only_theirs: int = 0
    iou_median: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement over all tasks, in words."""

    level: Level
    words: str
    reasons: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run found: the two addresses, each comparison, the figures, the judgement."""

    ours: str
    theirs: str
    comparisons: tuple[Comparison, ...]
    summaries: tuple[TaskSummary, ...]
    verdict: Verdict
    cause: str = ""


def summarise(task: str, comparisons: Sequence[Comparison]) -> TaskSummary:
    """The figures of one task and what they mean."""
    values = [c.value for c in comparisons if c.value is not None]
    matches = [c.faces for c in comparisons if c.faces is not None]
    if task == "faces":
        values = [value for match in matches for value in match.cosines]
    problems = tuple(f"{c.subject}: {c.problem}" for c in comparisons if c.problem)
    ious = [value for match in matches for value in match.ious]
    both = len(ious)
    only_ours = sum(match.only_ours for match in matches)
    only_theirs = sum(match.only_theirs for match in matches)
    answered = [c for c in comparisons if c.value is not None]
    minimum, p5, median = _spread(values)
    level, reason = _judge(
        task, (minimum, p5, median), len(problems), (both, only_ours, only_theirs), len(answered)
    )
    return TaskSummary(
        task=task,
        count=len(answered),
        problems=problems,
        minimum=minimum,
        p5=p5,
        median=median,
        speed=_speed(answered),
        level=level,
        reason=reason,
        faces_both=both,
        faces_only_ours=only_ours,
        faces_only_theirs=only_theirs,
        iou_median=float(np.median(ious)) if ious else None,
    )


def judge(summaries: Iterable[TaskSummary]) -> Verdict:
    """The verdict in words over every task that was compared."""
    summaries = list(summaries)
    reasons = tuple(f"{s.task}: {s.reason}" for s in summaries if s.reason)
    if not any(s.count for s in summaries):
        return Verdict(Level.UNKNOWN, "nothing could be compared", reasons)
    worst = max((s.level for s in summaries if s.level is not Level.UNKNOWN), default=Level.SAFE)
    if worst is Level.UNSAFE:
        return Verdict(Level.UNSAFE, "do not mix", reasons)
    if worst is Level.SAFE:
        return Verdict(Level.SAFE, "safe to switch", reasons)
    kinds = {"faces": "people", "text": "text"}
    differing = [kinds[s.task] for s in summaries if s.level is Level.DIFFERS and s.task in kinds]
    return Verdict(Level.DIFFERS, f"safe for search; {' and '.join(differing)} may differ", reasons)


def _judge(
    task: str,
    spread: tuple[float | None, float | None, float | None],
    problems: int,
    faces: tuple[int, int, int],
    answered: int,
) -> tuple[Level, str]:
    refused = f"{problems} answered by one side only" if problems else ""
    if not answered:
        return (Level.UNSAFE, refused) if problems else (Level.UNKNOWN, "not compared")
    minimum, p5, median = spread
    if task == "faces":
        level, reason = _judge_faces(median, *faces)
    elif task == "text":
        level, reason = _judge_text(median)
    else:
        level, reason = _judge_clip(minimum, p5)
    if problems:
        level = max(level, Level.UNSAFE if task.startswith("clip") else Level.DIFFERS)
    return level, "; ".join(filter(None, (reason, refused)))


def _judge_clip(minimum: float | None, p5: float | None) -> tuple[Level, str]:
    assert minimum is not None
    assert p5 is not None
    if minimum >= CLIP_SAFE_MIN and p5 >= CLIP_SAFE_P5:
        return Level.SAFE, ""
    return (
        Level.UNSAFE,
        f"vectors differ: lowest cosine {minimum:.4f} (needs {CLIP_SAFE_MIN}), "
        f"5th percentile {p5:.5f} (needs {CLIP_SAFE_P5})",
    )


def _judge_faces(
    median: float | None, both: int, only_ours: int, only_theirs: int
) -> tuple[Level, str]:
    total = both + only_ours + only_theirs
    if not total:
        return Level.UNKNOWN, "no face in any of these pictures"
    if median is not None and median < FACE_MIX_MEDIAN:
        return Level.UNSAFE, f"median face cosine {median:.3f} (needs {FACE_MIX_MEDIAN})"
    reasons = []
    if both / total < FACE_SAFE_MATCHED:
        reasons.append(f"{both} of {total} faces found by both (needs {FACE_SAFE_MATCHED:.0%})")
    if median is not None and median < FACE_SAFE_MEDIAN:
        reasons.append(f"median face cosine {median:.4f} (needs {FACE_SAFE_MEDIAN})")
    return (Level.DIFFERS if reasons else Level.SAFE), "; ".join(reasons)


def _judge_text(median: float | None) -> tuple[Level, str]:
    assert median is not None
    if median >= TEXT_SAFE:
        return Level.SAFE, ""
    return Level.DIFFERS, f"{median:.0%} of lines agree (needs {TEXT_SAFE:.0%})"


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
