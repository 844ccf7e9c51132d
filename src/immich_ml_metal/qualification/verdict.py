"""What was found about one engine with one model, and the limits within which it may answer."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from immich_ml_metal.backends.selection import Candidate
from immich_ml_metal.types import Part, Slot, Task


class Outcome(StrEnum):
    """How a probe ended. The first two may answer."""

    RIGHT = "right"  # within the limits
    WORKS = "works"  # it runs, and there is nothing to compare it with
    WRONG = "wrong"  # beyond a limit
    FAILED = "failed"  # it raised an error
    CRASHED = "crashed"  # its process ended by itself
    HUNG = "hung"  # no end within the time limit
    UNAVAILABLE = "unavailable"  # a library or a number format is not here


USABLE = frozenset({Outcome.RIGHT, Outcome.WORKS})


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured; None where it was not, or does not apply.

    Attributes:
        cosine: lowest cosine between an answer and the reference's, over all rows.
        relative_error: largest difference, divided by the largest magnitude of the reference.
        not_finite: values that are not finite.
        boxes_differ: boxes that only one of the two found.
        box_px: how far a box that both found moved at most, pixels of the picture.
        score_gap: largest difference of two scores.
        texts_differ: lines that read otherwise.
        first_s: from opening the model to its first answer.
        alone_ms, batch_ms: per item, one at a time and in a batch.
        batch: items in that batch.
        memory_bytes: what the process grew by.
        node_share: of the graph that the accelerator took, 0..1, where the engine tells.
    """

    cosine: float | None = None
    relative_error: float | None = None
    not_finite: int | None = None
    boxes_differ: int | None = None
    box_px: float | None = None
    score_gap: float | None = None
    texts_differ: int | None = None
    first_s: float | None = None
    alone_ms: float | None = None
    batch_ms: float | None = None
    batch: int | None = None
    memory_bytes: int | None = None
    node_share: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The known ones; JSON has no word for infinity."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value for name, value in known.items() if math.isfinite(value)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a candidate did, and why."""

    outcome: Outcome
    reason: str = ""
    figures: Figures = field(default_factory=Figures)

    @property
    def is_usable(self) -> bool:
        """Whether the candidate may answer."""
        return self.outcome in USABLE

    def as_dict(self) -> dict[str, Any]:
        """For a file or `/health`."""
        return {"outcome": self.outcome, "reason": self.reason, "figures": self.figures.as_dict()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Verdict":
        """Read what `as_dict` gives.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        known = {one.name for one in fields(Figures)}
        figures = {name: value for name, value in stored["figures"].items() if name in known}
        if not all(isinstance(value, int | float) for value in figures.values()):
            raise ValueError("a figure is no number")
        return cls(Outcome(stored["outcome"]), str(stored["reason"]), Figures(**figures))

    def __str__(self) -> str:
        return f"{self.outcome}: {self.reason}" if self.reason else str(self.outcome)


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound of one figure; `why` is for people."""

    figure: str
    bound: float
    why: str
    is_least: bool = False

    def breach(self, figures: Figures) -> str | None:
        """What is beyond it, in words; None when the figure is within, or was not measured."""
        value = getattr(figures, self.figure)
        if value is None:
            return None
        within = value >= self.bound if self.is_least else value <= self.bound  # NaN is beyond both
        if within:
            return None
        return f"{_WORDS[self.figure]} {value:.6g}, limit {self.bound:g}"


_WORDS = {
    "cosine": "cosine to float32 on the CPU",
    "not_finite": "values that are not finite:",
    "boxes_differ": "boxes found by only one of the two:",
    "box_px": "a box moved by pixels:",
    "score_gap": "a score differs by",
    "texts_differ": "lines that read otherwise:",
}
_FINITE = Limit("not_finite", 0, "a NaN looks like *nothing found*, and poisons a search index")
_VECTOR = Limit(
    "cosine",
    0.9998,
    "Immich calls pictures duplicates from a distance of 0.01 on: 0.0002 is a fiftieth of it, and "
    "what half precision costs a sound model is a tenth of that",
    is_least=True,
)
_BOX = Limit("box_px", 1.0, "faces and lines are cut out along these boxes, in whole pixels")
_BOXES = Limit("boxes_differ", 0, "a face or a line is found or it is not")
_SCORE = Limit("score_gap", 0.01, "Immich's thresholds are given in steps of 0.01")
_TEXT = Limit("texts_differ", 0, "a line is read the same or it is not")

LIMITS: Mapping[Slot, tuple[Limit, ...]] = {
    (Task.CLIP, Part.VISUAL): (_FINITE, _VECTOR),
    (Task.CLIP, Part.TEXTUAL): (_FINITE, _VECTOR),
    (Task.FACES, Part.DETECTION): (_FINITE, _BOXES, _BOX, _SCORE),
    (Task.FACES, Part.RECOGNITION): (_FINITE, _VECTOR),
    (Task.OCR, Part.DETECTION): (_FINITE, _BOXES, _BOX, _SCORE),
    (Task.OCR, Part.RECOGNITION): (_FINITE, _TEXT, _SCORE),
}


# Where a detector and the reference agree that nothing is there, boxes say nothing of either.
NOTHING_FOUND = (_FINITE, _VECTOR)


def judge(
    slot: Slot, figures: Figures, note: str = "", limits: tuple[Limit, ...] | None = None
) -> Verdict:
    """Hold figures against the limits of one part of a task, or others."""
    breaches = [limit.breach(figures) for limit in limits or LIMITS[slot]]
    found = [breach for breach in breaches if breach]
    if found:
        return Verdict(Outcome.WRONG, "; ".join(found), figures)
    return Verdict(Outcome.RIGHT, note, figures)


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict with what it depends on.

    Attributes:
        facts: of the engine's environment when it was made, and the model's digest.
        depth: `check` or `comparison`.
    """

    candidate: Candidate
    verdict: Verdict
    facts: Mapping[str, str]
    depth: str = "check"
